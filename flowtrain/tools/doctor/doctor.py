"""Diagnosis of a trained flow: are its layers invertible in floating point, and log-dets right?

`docs/doctor.md` says for each bound what crossing it would do to a pixel or to a bit.
"""

import copy
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from flowtrain.bijections import Bijection
from flowtrain.bijections.base import Direction, Executor
from flowtrain.bijections.context import Context, unguided
from flowtrain.bijections.execution import FUSED, call, opposite
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet
from flowtrain.errors import RunError, UserError
from flowtrain.evaluation.layers import (
    Watching,
    layers_of,
    log_scales,
    mixing_matrix,
    predicted_log_scales,
    short_name,
)
from flowtrain.flow.dequantize import EDGE, Dequantizer
from flowtrain.flow.flow import Flow
from flowtrain.system.console import silent
from flowtrain.system.random import Stream, generator, uniform

Verdict = Literal["ok", "watch", "bad"]
Map = Callable[[Tensor], tuple[Tensor, Tensor]]
Pass = Callable[[Executor], tuple[Tensor, Tensor]]

logger = logging.getLogger(__name__)

# The error that one layer may make, in the unit interval. An error of half a level loses a pixel of
# 8 bits. The rounding errors of 300 layers (no model here has more) add up to sqrt(300) times that
# of one layer.
SHARE = 0.5 / 256 / math.sqrt(300)
ROUNDING = 2.0**-24  # of float32, relative

# For uniform noise only a value that is not finite is bad. Any flow that fits images well stretches
# noise so far that it does not come back (Behrmann et al. 2021, "Understanding and Mitigating
# Exploding Inverses"). This harms neither images nor samples.
IMAGES, NOISE, SAMPLES = "test images", "uniform noise", "prior samples"

NOISE_MODEL = "dequantizer.noise_model"  # the name of the learned noise as one layer

# The bounds (watch, bad) of each check. A value beyond one gets that verdict. Where the second
# bound is the smaller one, smaller values are worse.
BOUNDS = {
    # How many entries of parameters and buffers, or how many images, are not finite.
    "parameters": (0, 0),
    "forward pass": (0, 0),
    "inverse pass": (0, 0),
    # How much a layer enlarges a rounding error, on the way to a pixel or to a likelihood.
    "lowest log-scale": (math.log(4 * ROUNDING / SHARE), math.log(ROUNDING / SHARE)),
    "highest log-scale": (
        math.log(1e-4 * math.log(2) / ROUNDING),
        math.log(1e-3 * math.log(2) / ROUNDING),
    ),
    "condition number": (SHARE / ROUNDING / 4, SHARE / ROUNDING),
    # Errors of one layer, relative to the entry or to the root mean square, whichever is larger.
    "inverse of forward": (SHARE / 4, SHARE),
    "forward of inverse": (SHARE / 4, SHARE),
    # Errors in bits per dimension of the whole image.
    "log-det": (1e-4, 1e-3),
    "float32 likelihood": (1e-4, 1e-3),
    # Errors of the whole model, in levels (data) and in bits per dimension (latents).
    "data round trip, float32": (0.05, 0.5),
    "data round trip, float64": (0.005, 0.05),
    "latent round trip, float32": (1e-4, 1e-3),
    "latent round trip, float64": (1e-5, 1e-4),
    # Bits of the test images, relative to those of a uniform coder, log2(Q) for each entry.
    "likelihood": (1, 1),
    # A fraction. If fewer than one image in 1,000 changes, a value lies at the edge of its bin, and
    # the inverse is not wrong.
    "images that come back exactly": (1, 0.999),
}

BATCH_SIZE = 64
PROBES = 4  # draws of signs that show whether a Jacobian is diagonal
JACOBIAN_ROWS = 32  # computed at once, as copies of the image with their activations in float64
LARGEST_JACOBIAN = 4096  # entries of an image, whose Jacobian takes 128 MiB in float64
SIDES = (4, 8, 16, 32, 64)  # of reduced images; below 4 a 3x3 convolution sees mostly padding


@dataclass(frozen=True)
class Finding:
    """One number with its bounds.

    check: what was measured, a key of `BOUNDS`.
    layer: its name, or "" for the whole model.
    inputs: "test images", "uniform noise", "prior samples", or "" where the number belongs to the
        weights.
    value: the worst over all inputs; None if it is not finite or could not be computed.
    watch, bad: the bounds. The verdict is ok up to `watch` (inclusive), and bad beyond `bad`. If
        `bad` is below `watch`, smaller values are worse. If `bad` is the largest float, or minus
        it, only a value that is not finite is bad.
    """

    check: str
    layer: str
    inputs: str
    value: float | None
    watch: float
    bad: float
    verdict: Verdict

    @property
    def severity(self) -> float:
        """Orders the findings of one check: larger is worse. It is inf if there is no value."""
        if self.value is None:
            return math.inf
        return -self.value if self.bad < self.watch else self.value


@dataclass
class _Notes:
    """The worst finding per check, layer and kind of input, in the order of their first values."""

    findings: dict[tuple[str, str, str], Finding] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)

    def add(
        self,
        check: str,
        value: float | Tensor,
        layer: str = "",
        inputs: str = "",
        harmless: bool = False,
    ) -> None:
        new = judge(check, float(value), layer, inputs, harmless)
        old = self.findings.setdefault((check, layer, inputs), new)
        if new.severity > old.severity:
            self.findings[check, layer, inputs] = new

    def failed(
        self, checks: tuple[str, ...], error: Exception, layer: str = "", inputs: str = ""
    ) -> None:
        """Notes checks that have no value because `error` was raised. Logs each reason once."""
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        reason = f"{type(error).__name__}: {error}"
        if reason not in self.reasons:
            self.reasons.add(reason)
            logger.warning(f"{layer or 'the model'}: {checks[0]}: {reason}")
        for check in checks:
            self.add(check, math.nan, layer, inputs)


def judge(
    check: str, value: float, layer: str = "", inputs: str = "", harmless: bool = False
) -> Finding:
    """The finding for a value: its bounds and its verdict.

    Of what is `harmless`, and for uniform noise, only a value that is not finite is bad.
    """
    watch, bad = BOUNDS[check]
    if (harmless or inputs == NOISE) and watch != bad:
        bad = math.copysign(sys.float_info.max, bad - watch)
    sign = -1 if bad < watch else 1
    verdict: Verdict = (
        "ok" if sign * value <= sign * watch else "watch" if sign * value <= sign * bad else "bad"
    )
    return Finding(
        check, layer, inputs, value if math.isfinite(value) else None, watch, bad, verdict
    )


def overall(findings: list[Finding]) -> Verdict:
    """The worst verdict of all."""
    found = {finding.verdict for finding in findings}
    return "bad" if "bad" in found else "watch" if "watch" in found else "ok"


def worst(findings: list[Finding]) -> list[Finding]:
    """The bad findings, causes before effects: in the order of `BOUNDS`, then by severity."""
    checks = list(BOUNDS)
    bad = [finding for finding in findings if finding.verdict == "bad"]
    return sorted(bad, key=lambda finding: (checks.index(finding.check), -finding.severity))


def count(findings: list[Finding]) -> dict[Verdict, int]:
    """How many findings have each verdict."""
    verdicts: tuple[Verdict, ...] = ("ok", "watch", "bad")
    return {kind: sum(finding.verdict == kind for finding in findings) for kind in verdicts}


def require_none_bad(findings: list[Finding]) -> None:
    """Raises `RunError` naming the layers of the bad findings, the worst first."""
    bad = worst(findings)
    if not bad:
        return
    names = list(dict.fromkeys(finding.layer or "the whole model" for finding in bad))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    raise RunError(
        f"{len(bad)} of {len(findings)} findings are bad, the worst first: "
        f"{', '.join(names[:5])}{more}"
    )


def as_json(
    findings: list[Finding], model: LoadedModel, data: DataSet, num_images: int, seed: int
) -> dict[str, Any]:
    """The content of `doctor.json`: the findings, and what `examine` was called with."""
    return {
        "verdict": overall(findings),
        "counts": count(findings),
        "checkpoint": str(model.checkpoint.path),
        "weights": model.weights,
        "step": model.checkpoint.meta["step"],
        "dataset": data.config.name,
        "num_images": min(num_images, len(data.split("test"))),
        "seed": seed,
        "findings": [asdict(finding) for finding in findings],
    }


@torch.no_grad()
def examine(
    model: LoadedModel,
    data: DataSet,
    *,
    num_images: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] = silent,
) -> list[Finding]:
    """All findings about a model, on test images, uniform noise and samples.

    It takes a sample of `num_images` test images, and as many of the other two. A model that
    raises, or whose values are not finite, has findings like any other.

    Raises:
        UserError: if the data do not have the model's shape and levels, or have no test image. Also
            for points of a surface: noise is off it, and Jacobians are not square.
    """
    flow = model.flow
    if flow.kind.on_surface:
        raise UserError(
            f"{model.checkpoint.path}: the data are points of a surface, for which there are no "
            f"checks"
        )
    data.require(flow.shape, flow.levels, model.checkpoint.path)
    split = data.split("test")
    if len(split) == 0:
        raise UserError("data: the test split is empty")
    x = split.sample(num_images, seed).take(slice(None))
    randomness = generator(seed, Stream.EVALUATION)
    noise = uniform(x.shape, seed, Stream.EVALUATION, device=x.device)
    random_images = flow.kind.uniform_like(x, randomness)
    levels = flow.kind.levels_per_unit(x)
    z = flow.latents_of_classes(flow.draw_latents(len(x), generator(seed, Stream.LATENTS))).cpu()

    precise = copy.deepcopy(flow).cpu().double()  # on the CPU: some accelerators have no float64
    notes = _Notes()
    batches = -(-len(x) // BATCH_SIZE)
    done, total = 0, (10 if learns_noise(flow) else 7) * batches + 1

    def counted(parts: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        nonlocal done
        for part in parts:
            yield part
            done += 1
            progress(done, total)

    def in_batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return counted(zip(*(tensor.split(BATCH_SIZE) for tensor in tensors), strict=True))

    _weights(flow, notes)
    for kind, images in ((IMAGES, x), (NOISE, random_images)):
        for part, u in in_batches(images, noise):
            data_and_noise = part.to(flow.device), u.to(flow.device)
            _layers(flow, partial(flow.to_latents, *data_and_noise), "forward pass", kind, notes)
    for part, images in in_batches(z, x):
        latents = part.to(flow.device)
        seen = flow.conditioning(len(latents), context=flow.context_of(images))

        def decode(
            executor: Executor, latents: Tensor = latents, seen: Context | None = seen
        ) -> tuple[Tensor, Tensor]:
            return flow.bijection.run(executor, "inverse", latents, seen)

        _layers(flow, decode, "inverse pass", SAMPLES, notes)
    if learns_noise(flow):
        for kind, images in ((IMAGES, x), (NOISE, random_images), (SAMPLES, x)):
            for part, u in in_batches(images, noise):
                _noise(flow, part.to(flow.device), u.to(flow.device), kind, notes)
    for kind, images in ((IMAGES, x), (NOISE, random_images)):
        exact = sum(
            _data_round_trip(flow, precise, part, levels, kind, notes)
            for (part,) in in_batches(images)
        )
        if not flow.kind.exact:
            notes.add("images that come back exactly", exact / len(x), inputs=kind)
    for part, images in in_batches(z, x):
        _latent_round_trip(flow, precise, part, images, levels, notes)
    reported = [_likelihood(flow, precise, part, u, notes) for part, u in in_batches(x, noise)]
    if flow.levels is not None and not flow.kind.no_bits:
        bits = flow.loss(torch.cat(reported)).mean()
        notes.add("likelihood", bits / math.log2(flow.levels), inputs=IMAGES)
    _jacobians(model, x[:1], noise[:1], notes)
    progress(total, total)
    return list(notes.findings.values())


# --- weights --------------------------------------------------------------------------------------


def _weights(flow: Flow, notes: _Notes) -> None:
    if flow.class_prior is not None:
        _log_scale(log_scales(flow.class_prior), "class_prior", "", notes)
    layers = layers_of(flow)
    owners = {module: name for name, layer in layers.items() for module in layer.modules()}
    for name, module in flow.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if tensors:
            wrong = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)
            notes.add("parameters", wrong, owners.get(module, short_name(name)))
    for name, layer in layers.items():
        _log_scale(log_scales(layer), name, "", notes)
        if (matrix := mixing_matrix(layer)) is not None:
            matrix = matrix.double().cpu()
            finite = bool(torch.isfinite(matrix).all())
            notes.add("condition number", torch.linalg.cond(matrix) if finite else math.nan, name)


def _log_scale(log_scale: Tensor | None, layer: str, inputs: str, notes: _Notes) -> None:
    # A checkerboard may keep all of an image of one pixel.
    if log_scale is not None and log_scale.numel():
        notes.add("lowest log-scale", log_scale.min(), layer, inputs)
        notes.add("highest log-scale", log_scale.max(), layer, inputs)


# --- layers ---------------------------------------------------------------------------------------


def _finite(*tensors: Tensor) -> Tensor:
    """Which examples are finite in all of the tensors, `(B,)`."""
    return torch.stack(
        [torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1) for tensor in tensors]
    ).all(dim=0)


def _layers(flow: Flow, run: Pass, check: str, inputs: str, notes: _Notes) -> None:
    """Checks each layer on the inputs that it gets in a pass through the flow, or through its
    learned noise.

    `run` is this pass, and `check` names the finding about its result. A layer is judged on the
    examples that reach it finite. So only the first damaged layer is named, not all those after it.
    """
    where = first = ""

    def around(
        name: str, layer: Bijection, direction: Direction, given: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        nonlocal where, first
        where = name
        result, log_det = call(layer, direction, given, context)
        arrived = _finite(given)
        if not first and not _finite(result, log_det)[arrived].all():
            first = name
        if arrived.any():
            seen = unguided(context)
            part = None if seen is None else seen[arrived]
            _layer(name, layer, direction, given[arrived], result[arrived], part, inputs, notes)
        return result, log_det

    try:
        ends = run(Watching(flow, around))
    except Exception as error:  # a model of the user's own may raise anything
        notes.failed((check,), error, where, inputs)
    else:
        notes.add(check, (~_finite(*ends)).sum(), first, inputs)


def _layer(
    name: str,
    layer: Bijection,
    direction: Direction,
    given: Tensor,
    result: Tensor,
    context: Context | None,
    inputs: str,
    notes: _Notes,
) -> None:
    other = opposite(direction)
    checks = (f"{other} of {direction}", f"{direction} of {other}")
    try:
        back = call(layer, other, result, context)[0]
        again = call(layer, direction, back, context)[0]
        x = back if direction == "forward" else result
        predicted = predicted_log_scales(layer, x, context)
    except Exception as error:
        notes.failed(checks, error, name, inputs)
        return
    # At the edge of a bin, rounding moves a level of a sequential inverse, and all that follow.
    # Whether images come back is measured at the middle of the bins.
    harmless = layer.is_discrete
    notes.add(checks[0], _relative_error(back, given), name, inputs, harmless)
    notes.add(checks[1], _relative_error(again, result), name, inputs, harmless)
    _log_scale(predicted, name, inputs, notes)


class LearnedNoise(Bijection):
    """The learned noise of a model as one layer, from uniform noise to u. The context is the image.

    Most of it are layers of its own. But the normal distribution function at its end can saturate,
    which no layer before it shows.
    """

    def __init__(self, flow: Flow):
        super().__init__()
        assert isinstance(flow.dequantizer, Dequantizer)
        self.dequantizer = flow.dequantizer

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        image = unguided(context)
        assert image is not None
        u, log_q = self.dequantizer.draw(image, x)
        return u, -log_q

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        image = unguided(context)
        assert image is not None
        return self.dequantizer.noise_of(image, z)


def learns_noise(flow: Flow) -> bool:
    """Whether the noise of a model is learned."""
    return isinstance(flow.dequantizer, Dequantizer) and flow.dequantizer.learns_noise


def _noise(flow: Flow, images: Tensor, noise: Tensor, inputs: str, notes: _Notes) -> None:
    """Checks the learned noise as one layer.

    For samples, it also checks each of its layers on the way from a uniform u back to the noise.
    The passes through the flow have no such direction.
    """
    layer = LearnedNoise(flow)
    direction: Direction = "forward"
    if inputs == SAMPLES:
        direction = "inverse"
        noise = EDGE + (1 - 2 * EDGE) * noise  # as u, which `draw` keeps off the edges of a bin
        invert = partial(layer.dequantizer.noise_of, images, noise)
        _layers(flow, invert, "inverse pass", inputs, notes)
    try:
        result, log_det = call(layer, direction, noise, images)
    except Exception:  # the passes have noted it
        return
    arrived = _finite(result, log_det)
    if arrived.any():
        _layer(
            NOISE_MODEL,
            layer,
            direction,
            noise[arrived],
            result[arrived],
            images[arrived],
            inputs,
            notes,
        )


def _relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """The largest error, relative to its entry or to the root mean square, whichever is larger."""
    found, expected = found.double().cpu(), expected.double().cpu()
    size = expected.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return ((found - expected).abs() / torch.maximum(expected.abs(), size)).max()


# --- the whole model ------------------------------------------------------------------------------


def _distance(flow: Flow, found: Tensor, expected: Tensor) -> Tensor:
    """The largest distance between two inputs of the flow, in the unit of its data."""
    return (flow.dequantizer.to_unit(found) - flow.dequantizer.to_unit(expected)).abs().max()


def _bits(found: Tensor, expected: Tensor) -> Tensor:
    """How much latents `(B, D)` differ in log N(z; 0, I), in bits/dim, for the worst example.

    Differences of entries do not cancel. For latents so far out that their squares are worth more
    than one bit/dim, the difference is relative to those.
    """
    found, expected = found.double().cpu(), expected.double().cpu()
    difference = (found.square() - expected.square()).abs().mean(dim=1) / (2 * math.log(2))
    return (difference / (expected.square().mean(dim=1) / (2 * math.log(2))).clamp_min(1)).max()


def _data_round_trip(
    flow: Flow, precise: Flow, x: Tensor, levels: float, inputs: str, notes: _Notes
) -> int:
    """Checks images to latents, back, and to latents again.

    Returns the number of images that come back exactly in float32.
    """
    restored = 0
    for one, name in ((flow, "float32"), (precise, "float64")):
        checks = (f"data round trip, {name}", f"latent round trip, {name}")
        try:
            images = x.to(one.device)
            v = one.dequantizer.middle(images, one.dtype)
            seen = one.conditioning(len(v), context=one.context_of(images))
            z = one.bijection(v, seen)[0]
            back = one.bijection.inverse(z, seen)[0]
            again = one.bijection(back, seen)[0]
        except Exception as error:
            notes.failed(checks, error, inputs=inputs)
            continue
        notes.add(checks[0], _distance(one, back, v) * levels, inputs=inputs)
        notes.add(checks[1], _bits(again, z), inputs=inputs)
        if one is flow:
            finite = _finite(back)
            same = flow.dequantizer.to_data(back[finite]) == images[finite]
            restored = int(same.flatten(1).all(dim=1).sum())
    return restored


def _latent_round_trip(
    flow: Flow, precise: Flow, z: Tensor, images: Tensor, levels: float, notes: _Notes
) -> None:
    """Checks latents to data, back, and to data again, given the contexts of images if need be."""
    for one, name in ((flow, "float32"), (precise, "float64")):
        checks = (f"data round trip, {name}", f"latent round trip, {name}")
        try:
            start = z.to(one.device, one.dtype)
            seen = one.conditioning(len(z), context=one.context_of(images))
            v = one.bijection.inverse(start, seen)[0]
            back = one.bijection(v, seen)[0]
            again = one.bijection.inverse(back, seen)[0]
        except Exception as error:
            notes.failed(checks, error, inputs=SAMPLES)
            continue
        harmless = one is flow and flow.bijection.is_discrete  # as for a layer
        notes.add(checks[0], _distance(one, again, v) * levels, inputs=SAMPLES, harmless=harmless)
        notes.add(checks[1], _bits(back, start), inputs=SAMPLES, harmless=harmless)


def _likelihood(flow: Flow, precise: Flow, x: Tensor, noise: Tensor, notes: _Notes) -> Tensor:
    """Checks how far float32 moves a reported likelihood.

    Returns the likelihoods in nats, float64 `(B,)` on the CPU; NaN where there are none.
    """
    reported = torch.full((len(x),), math.nan, dtype=torch.float64)
    try:
        reported = flow(x.to(flow.device), noise.to(flow.device)).total.cpu().double()
        error = (reported - precise(x, noise).total).abs().max() / (flow.dims * math.log(2))
    except Exception as failure:
        notes.failed(("float32 likelihood",), failure, inputs=IMAGES)
    else:
        notes.add("float32 likelihood", error, inputs=IMAGES)
    return reported


# --- log-determinants -----------------------------------------------------------------------------


def _jacobians(model: LoadedModel, x: Tensor, noise: Tensor, notes: _Notes) -> None:
    """Checks the log-dets in float32 against the Jacobian in float64, per layer and for all layers.

    The Jacobian of the whole flow is with respect to the uniform noise. So it includes that of the
    dequantizer: q(u|x) is the density of u for uniform noise. A density of real values, or of
    noisy images, has the Jacobian with respect to these.
    """
    flow = reduced(model)
    if flow is None:
        return
    _, height, width = flow.shape
    # The middle of the image, because edges often have one colour.
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    x = x[:, :, top : top + height, left : left + width]
    # Noise stays off the edges of a bin, where it is clipped and has no derivative.
    noise = 0.01 + 0.98 * noise[:, :, top : top + height, left : left + width]
    precise = copy.deepcopy(flow).double()
    bits = 1 / (flow.dims * math.log(2))
    reporting = layers_of(flow)

    where = ""

    def around(
        name: str, layer: Bijection, direction: Direction, given: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        nonlocal where
        where, seen = name, unguided(context)
        result = call(layer, direction, given, context)
        if _finite(given.float()).all():  # otherwise a layer before it is at fault

            def with_copies(copies: Tensor) -> tuple[Tensor, Tensor]:
                same = None if seen is None else seen.expand(len(copies), *seen.shape[1:])
                return call(layer, direction, copies, same)

            low = None if seen is None else seen.float()
            reported = call(reporting[name], direction, given.float(), low)[1]
            exact = diagonal_log_det if layer.is_discrete else jacobian_log_det
            error = abs(reported.double() - exact(with_copies, given)).max() * bits
            notes.add("log-det", error, name, IMAGES)
        return result

    def whole(one: Flow, copies: Tensor, executor: Executor = FUSED) -> tuple[Tensor, Tensor]:
        images = x.expand(len(copies), -1, -1, -1)
        if one.kind.no_bits:
            seen = one.conditioning(len(copies), context=one.context_of(images))
            return one.bijection.run(executor, "forward", copies, seen)
        return one.to_latents(images, copies, executor)

    start = flow.dequantizer(x, noise)[0] if flow.kind.no_bits else noise
    try:
        whole(precise, start.double(), Watching(precise, around))
        if learns_noise(flow):
            where = NOISE_MODEL
            learned = LearnedNoise(precise)
            exact = jacobian_log_det(
                lambda copies: learned(copies, x.expand(len(copies), -1, -1, -1)), start.double()
            )
            reported = LearnedNoise(flow)(start, x)[1].double()
            notes.add("log-det", abs(reported - exact).max() * bits, NOISE_MODEL, IMAGES)
        where = ""
        log_det = diagonal_log_det if flow.bijection.is_discrete else jacobian_log_det
        exact = log_det(lambda copies: whole(precise, copies), start.double())
        notes.add(
            "log-det", abs(whole(flow, start)[1].double() - exact).max() * bits, inputs=IMAGES
        )
    except Exception as error:
        notes.failed(("log-det",), error, where, IMAGES)


def jacobian_log_det(function: Map, x: Tensor) -> Tensor:
    """log|det J| of a map at one example `x` `(1, ...)`, by autograd, in nats, shape `()`.

    Examples of a batch do not affect each other. So with copies of `x` as a batch, row i of the
    Jacobian is the gradient of entry i of the i-th copy. (torch's `jacobian` needs one backward
    pass per row, or vmap, which our autograd functions do not support.)
    """
    rows = []
    for part in torch.eye(x.numel(), dtype=x.dtype, device=x.device).split(JACOBIAN_ROWS):
        copies = x.detach().expand(len(part), *x.shape[1:]).clone().requires_grad_()
        with torch.enable_grad():
            z = function(copies)[0]
        rows.append(torch.autograd.grad(z, copies, part.view_as(z))[0].flatten(1))
    log_det: Tensor = torch.linalg.slogdet(torch.cat(rows)).logabsdet
    return log_det


def diagonal_log_det(function: Map, x: Tensor) -> Tensor:
    """`jacobian_log_det` of a map that keeps the order of entries, if its Jacobian is diagonal.

    The gradient of a sum of the results with random signs is then the diagonal with these signs.
    The result is NaN where a few draws of the signs disagree, so that the Jacobian is not diagonal.
    """
    signs = torch.randint(2, (PROBES, x.numel()), generator=torch.Generator().manual_seed(0))
    signs = 2 * signs.to(x) - 1
    copies = x.detach().expand(PROBES, *x.shape[1:]).clone().requires_grad_()
    with torch.enable_grad():
        z = function(copies)[0]
    diagonal = torch.autograd.grad(z, copies, signs.view_as(z))[0].flatten(1) * signs
    if not torch.allclose(diagonal, diagonal[:1], rtol=1e-9, atol=1e-12):
        return x.new_full((), math.nan)
    log_det: Tensor = diagonal[0].abs().log().sum()
    return log_det


def reduced(model: LoadedModel) -> Flow | None:
    """The model for the smallest images for which all its weights fit and it runs, on the CPU.

    A model that is not convolutional fits only its own size. The result is None if that has more
    than `LARGEST_JACOBIAN` entries. A diagonal Jacobian may have any size.
    """
    if model.flow.bijection.is_discrete:
        return copy.deepcopy(model.flow).cpu()
    channels, height, width = model.flow.shape
    for side in SIDES:
        if side < min(height, width):
            try:
                flow = build_flow(model.config, (channels, side, side), model.flow.levels)
                flow = flow.eval().requires_grad_(False)
                if _transplant(model.flow, flow):
                    black = torch.zeros(1, *flow.shape)
                    flow(black, black)
                    return flow
            except Exception:  # not a size of this model
                continue
    return copy.deepcopy(model.flow).cpu() if model.flow.dims <= LARGEST_JACOBIAN else None


def _transplant(trained: Flow, flow: Flow) -> bool:
    """Copies the weights if parameters have the same shapes, and all tensors the same names.

    Buffers of another shape belong to the image size, and are not copied.
    """
    weights, own = trained.state_dict(), flow.state_dict()
    shapes = [{name: p.shape for name, p in one.named_parameters()} for one in (trained, flow)]
    if shapes[0] != shapes[1] or weights.keys() != own.keys():
        return False
    flow.load_state_dict(
        {n: weights[n] if weights[n].shape == own[n].shape else own[n] for n in own}
    )
    return True

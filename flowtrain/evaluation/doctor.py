"""Diagnosis of a trained flow: is each layer invertible in floating point, and is the reported
log-det the Jacobian's?

`docs/doctor.md` says of every bound what crossing it would do to a pixel or to a bit.
"""

import copy
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flowtrain.bijections import Bijection
from flowtrain.bijections.base import Direction
from flowtrain.bijections.execution import FUSED, Executor, call, opposite
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.evaluation.layers import Watching, layers_of, short_name
from flowtrain.flow.dequantize import draw_noise
from flowtrain.flow.flow import Flow
from flowtrain.system.random import Stream, generator

Verdict = Literal["ok", "watch", "bad"]
Map = Callable[[Tensor], tuple[Tensor, Tensor]]

logger = logging.getLogger(__name__)

# A layer's share of the half level that loses a pixel of 8 bits, as part of the unit interval: the
# rounding errors of 300 layers (more than any model here has) add up to the root of 300 times that
# of one.
SHARE = 0.5 / 256 / math.sqrt(300)
ROUNDING = 2.0**-24  # of float32, relative

# Of noise the bound of what is bad is the largest number: any flow that fits images well stretches
# it beyond return (Behrmann et al. 2021, "Understanding and Mitigating Exploding Inverses"), which
# costs neither an image nor a sample.
IMAGES, NOISE, SAMPLES = "test images", "uniform noise", "prior samples"

# Each check with the values from which on, exclusively, it is to be watched and bad. Smaller values
# are the worse ones where the second bound is the smaller.
BOUNDS = {
    # Parameters and buffers, and images of a batch, that are not finite.
    "parameters": (0, 0),
    "forward pass": (0, 0),
    "inverse pass": (0, 0),
    # What a scale makes of a rounding error, on the way back to a pixel or on the way to a
    # likelihood.
    "lowest log-scale": (math.log(4 * ROUNDING / SHARE), math.log(ROUNDING / SHARE)),
    "highest log-scale": (
        math.log(1e-4 * math.log(2) / ROUNDING),
        math.log(1e-3 * math.log(2) / ROUNDING),
    ),
    "condition number": (SHARE / ROUNDING / 4, SHARE / ROUNDING),
    # Of a layer; relative to the larger of the entry and the root mean square of all.
    "inverse of forward": (SHARE / 4, SHARE),
    "forward of inverse": (SHARE / 4, SHARE),
    # Bits per dimension of the whole image.
    "log-det": (1e-4, 1e-3),
    "float32 likelihood": (1e-4, 1e-3),
    # Of the whole model: levels, and bits per dimension.
    "data round trip, float32": (0.05, 0.5),
    "data round trip, float64": (0.005, 0.05),
    "latent round trip, float32": (1e-4, 1e-3),
    "latent round trip, float64": (1e-5, 1e-4),
    # A fraction. Fewer than one in 1,000 is a value at the edge of its bin, and not an inverse that
    # is wrong.
    "images that come back exactly": (1, 0.999),
}

BATCH_SIZE = 64
JACOBIAN_ROWS = 32  # computed at once: copies of the image with their activations, in float64
LARGEST_JACOBIAN = 4096  # entries of an image: 128 MiB in float64
# of reduced images; below 4 a 3x3 convolution sees little but its padding
SIDES = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Finding:
    """One number with its bounds.

    check: what was measured, a key of `BOUNDS`.
    layer: its name, or "" for the whole model.
    inputs: "test images", "uniform noise", "prior samples", or "" where the number belongs to the
        weights.
    value: the worst over all inputs; None where it is not finite, or could not be had.
    watch, bad: the bounds; up to and with `watch` the verdict is ok, beyond `bad` it is bad. Where
        `bad` is below `watch`, smaller values are the worse ones. The largest float stands for
        none: bad is only what is not finite.
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
        """Sorts findings of one check: larger is worse, and infinite is a value that is not
        finite.
        """
        if self.value is None:
            return math.inf
        return -self.value if self.bad < self.watch else self.value


@dataclass
class _Notes:
    """The worst finding of each check, layer and kind of input, in the order in which they came
    up.
    """

    findings: dict[tuple[str, str, str], Finding] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)

    def add(self, check: str, value: float | Tensor, layer: str = "", inputs: str = "") -> None:
        new = judge(check, float(value), layer, inputs)
        old = self.findings.setdefault((check, layer, inputs), new)
        if new.severity > old.severity:
            self.findings[check, layer, inputs] = new

    def failed(
        self, checks: tuple[str, ...], error: Exception, layer: str = "", inputs: str = ""
    ) -> None:
        """It raised: each of the checks has no number, and the reason is logged once."""
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        reason = f"{type(error).__name__}: {error}"
        if reason not in self.reasons:
            self.reasons.add(reason)
            logger.warning(f"{layer or 'the model'}: {checks[0]}: {reason}")
        for check in checks:
            self.add(check, math.nan, layer, inputs)


def judge(check: str, value: float, layer: str = "", inputs: str = "") -> Finding:
    """A value with its bounds and verdict."""
    watch, bad = BOUNDS[check]
    if inputs == NOISE and watch != bad:
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
    """The bad ones, causes before effects: weights, layers, the whole model; of a check the worst
    first.
    """
    checks = list(BOUNDS)
    bad = [finding for finding in findings if finding.verdict == "bad"]
    return sorted(bad, key=lambda finding: (checks.index(finding.check), -finding.severity))


@torch.no_grad()
def examine(
    model: LoadedModel,
    data: DataSet,
    *,
    num_images: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """All findings about a model, on the first `num_images` test images and as many of uniform
    noise and of samples.

    A model that raises or gives values that are not finite has findings like any other.

    Raises:
        UserError: where the data do not have the model's shape and levels, there is no test image,
            or the data are points of a surface: noise is not on it, and a Jacobian is not square.
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
    x = split.take(slice(0, num_images))
    randomness = generator(seed, Stream.EVALUATION)
    noise = draw_noise(x.shape, randomness, x.device)
    random_images = flow.kind.uniform_like(x, randomness)
    levels = flow.kind.levels_per_unit(x)
    z = flow.place(flow.draw_latents(len(x), generator(seed, Stream.LATENTS))).cpu()

    precise = copy.deepcopy(flow).cpu().double()  # there: some accelerators have no float64
    notes = _Notes()
    batches = -(-len(x) // BATCH_SIZE)
    done, total = 0, 7 * batches + 1

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
            _layers(flow, part.to(flow.device), u.to(flow.device), kind, notes)
    for (part,) in in_batches(z):
        _layers(flow, part.to(flow.device), None, SAMPLES, notes)

    for kind, images in ((IMAGES, x), (NOISE, random_images)):
        exact = sum(
            _data_round_trip(flow, precise, part, levels, kind, notes)
            for (part,) in in_batches(images)
        )
        if not flow.kind.exact:
            notes.add("images that come back exactly", exact / len(x), inputs=kind)
    for (part,) in in_batches(z):
        _latent_round_trip(flow, precise, part, levels, notes)
    for part, u in in_batches(x, noise):
        _likelihood(flow, precise, part, u, notes)
    _jacobians(model, x[:1], noise[:1], notes)
    progress(total, total)
    return list(notes.findings.values())


# --- weights --------------------------------------------------------------------------------------


def _weights(flow: Flow, notes: _Notes) -> None:
    if flow.class_prior is not None:
        _log_scale(flow.class_prior.bounded_log_scale(), "class_prior", "", notes)
    layers = layers_of(flow)
    owners = {module: name for name, layer in layers.items() for module in layer.modules()}
    for name, module in flow.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if tensors:
            wrong = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)
            notes.add("parameters", wrong, owners.get(module, short_name(name)))
    for name, layer in layers.items():
        _log_scale(layer.log_scales(), name, "", notes)
        if (matrix := layer.mixing_matrix()) is not None:
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


def _layers(flow: Flow, start: Tensor, noise: Tensor | None, inputs: str, notes: _Notes) -> None:
    """Each layer on its own inputs: images from the data to the latents, or latents (without noise)
    to the data.

    A layer is judged on the examples that reach it finite: so the first damaged one is named, and
    not all after it.
    """
    where = first = ""

    def around(
        name: str, layer: Bijection, direction: Direction, given: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        nonlocal where, first
        where = name
        result, log_det = call(layer, direction, given, context)
        arrived = _finite(given)
        if not first and not _finite(result, log_det)[arrived].all():
            first = name
        if arrived.any():
            part = None if context is None else context[arrived]
            _layer(name, layer, direction, given[arrived], result[arrived], part, inputs, notes)
        return result, log_det

    check = "inverse pass" if noise is None else "forward pass"
    try:
        watching = Watching(flow, around)
        if noise is None:
            ends = flow.bijection.through(watching, "inverse", start)
        else:
            ends = flow.to_latents(start, noise, watching)
    except Exception as error:  # whatever a model of the user's own may raise
        notes.failed((check,), error, where, inputs)
    else:
        notes.add(check, (~_finite(*ends)).sum(), first, inputs)


def _layer(
    name: str,
    layer: Bijection,
    direction: Direction,
    given: Tensor,
    result: Tensor,
    context: Tensor | None,
    inputs: str,
    notes: _Notes,
) -> None:
    other = opposite(direction)
    checks = (f"{other} of {direction}", f"{direction} of {other}")
    try:
        back = call(layer, other, result, context)[0]
        again = call(layer, direction, back, context)[0]
        log_scales = layer.predicted_log_scales(back if direction == "forward" else result, context)
    except Exception as error:
        notes.failed(checks, error, name, inputs)
        return
    notes.add(checks[0], _relative_error(back, given), name, inputs)
    notes.add(checks[1], _relative_error(again, result), name, inputs)
    _log_scale(log_scales, name, inputs, notes)


def _relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """The largest error of an entry, as a part of it or of the root mean square of all, whichever
    is larger.
    """
    found, expected = found.double().cpu(), expected.double().cpu()
    size = expected.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return ((found - expected).abs() / torch.maximum(expected.abs(), size)).max()


# --- the whole model ------------------------------------------------------------------------------


def _distance(flow: Flow, found: Tensor, expected: Tensor) -> Tensor:
    """The largest distance of two inputs of the flow, in the unit of its data."""
    return (flow.dequantizer.to_unit(found) - flow.dequantizer.to_unit(expected)).abs().max()


def _bits(found: Tensor, expected: Tensor) -> Tensor:
    """How much two latents `(B, D)` differ in log N(z; 0, I), every entry for itself: bits/dim, the
    worst example.

    Of latents so far out that they have more than one bit/dim there, as a part of it.
    """
    found, expected = found.double().cpu(), expected.double().cpu()
    difference = (found.square() - expected.square()).abs().mean(dim=1) / (2 * math.log(2))
    return (difference / (expected.square().mean(dim=1) / (2 * math.log(2))).clamp_min(1)).max()


def _data_round_trip(
    flow: Flow, precise: Flow, x: Tensor, levels: float, inputs: str, notes: _Notes
) -> int:
    """Images to latents, back, and to latents again. Gives the number of images that come back
    exactly in float32.
    """
    restored = 0
    for one, name in ((flow, "float32"), (precise, "float64")):
        checks = (f"data round trip, {name}", f"latent round trip, {name}")
        try:
            images = x.to(one.device)
            v = one.dequantizer.middle(images, one.dtype)
            z = one.bijection(v)[0]
            back = one.bijection.inverse(z)[0]
            again = one.bijection(back)[0]
        except Exception as error:
            notes.failed(checks, error, inputs=inputs)
            continue
        notes.add(checks[0], _distance(one, back, v) * levels, inputs=inputs)
        notes.add(checks[1], _bits(again, z), inputs=inputs)
        if one is flow:
            finite = _finite(back)
            restored = int(
                (flow.dequantizer.to_data(back[finite]) == images[finite])
                .flatten(1)
                .all(dim=1)
                .sum()
            )
    return restored


def _latent_round_trip(flow: Flow, precise: Flow, z: Tensor, levels: float, notes: _Notes) -> None:
    """Latents to data, back, and to data again."""
    for one, name in ((flow, "float32"), (precise, "float64")):
        checks = (f"data round trip, {name}", f"latent round trip, {name}")
        try:
            start = z.to(one.device, one.dtype)
            v = one.bijection.inverse(start)[0]
            back = one.bijection(v)[0]
            again = one.bijection.inverse(back)[0]
        except Exception as error:
            notes.failed(checks, error, inputs=SAMPLES)
            continue
        notes.add(checks[0], _distance(one, again, v) * levels, inputs=SAMPLES)
        notes.add(checks[1], _bits(back, start), inputs=SAMPLES)


def _likelihood(flow: Flow, precise: Flow, x: Tensor, noise: Tensor, notes: _Notes) -> None:
    """What float32 costs of a reported figure."""
    try:
        reported = flow(x.to(flow.device), noise.to(flow.device)).total.cpu().double()
        error = (reported - precise(x, noise).total).abs().max() / (flow.dims * math.log(2))
    except Exception as failure:
        notes.failed(("float32 likelihood",), failure, inputs=IMAGES)
    else:
        notes.add("float32 likelihood", error, inputs=IMAGES)


# --- log-determinants -----------------------------------------------------------------------------


def _jacobians(model: LoadedModel, x: Tensor, noise: Tensor, notes: _Notes) -> None:
    """The log-dets that float32 reports, against the Jacobian in float64: of each layer, and of
    all.

    That of all is the Jacobian with respect to the uniform noise, which has that of the dequantizer
    in it: q(u|x) is the density of u where the noise is uniform. Of real values, which have no
    noise, it is with respect to them.
    """
    flow = reduced(model)
    if flow is None:
        return
    _, height, width = flow.shape
    # the middle: edges are often of one colour
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    x = x[:, :, top : top + height, left : left + width]
    # Kept off the edges of a bin, where noise is clipped, and has no derivative.
    noise = 0.01 + 0.98 * noise[:, :, top : top + height, left : left + width]
    precise = copy.deepcopy(flow).double()
    bits = 1 / (flow.dims * math.log(2))
    reporting = layers_of(flow)

    where = ""

    def around(
        name: str, layer: Bijection, direction: Direction, given: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        nonlocal where
        where = name
        result = call(layer, direction, given, context)
        if _finite(given.float()).all():  # otherwise a layer before it is at fault

            def with_copies(copies: Tensor) -> tuple[Tensor, Tensor]:
                same = None if context is None else context.expand(len(copies), *context.shape[1:])
                return call(layer, direction, copies, same)

            reported = call(
                reporting[name],
                direction,
                given.float(),
                None if context is None else context.float(),
            )[1]
            error = abs(reported.double() - jacobian_log_det(with_copies, given)).max() * bits
            notes.add("log-det", error, name, IMAGES)
        return result

    def whole(one: Flow, copies: Tensor, executor: Executor = FUSED) -> tuple[Tensor, Tensor]:
        images = copies if one.kind.exact else x.expand(len(copies), -1, -1, -1)
        return one.to_latents(images, copies, executor)

    start = x if flow.kind.exact else noise
    try:
        whole(precise, start.double(), Watching(precise, around))
        where = ""
        exact = jacobian_log_det(lambda copies: whole(precise, copies), start.double())
        notes.add(
            "log-det", abs(whole(flow, start)[1].double() - exact).max() * bits, inputs=IMAGES
        )
    except Exception as error:
        notes.failed(("log-det",), error, where, IMAGES)


def jacobian_log_det(function: Map, x: Tensor) -> Tensor:
    """log|det J| of a map at one example `(1, ...)`, by autograd: nats, a number.

    No example of a batch sees another, so that row i of the Jacobian is the gradient of entry i for
    the i-th of many copies of `x`. (torch's `jacobian` takes a backward pass a row, or vmap, which
    autograd functions do not have.)
    """
    rows = []
    for part in torch.eye(x.numel(), dtype=x.dtype, device=x.device).split(JACOBIAN_ROWS):
        copies = x.detach().expand(len(part), *x.shape[1:]).clone().requires_grad_()
        with torch.enable_grad():
            z = function(copies)[0]
        rows.append(torch.autograd.grad(z, copies, part.view_as(z))[0].flatten(1))
    return torch.linalg.slogdet(torch.cat(rows)).logabsdet


def reduced(model: LoadedModel) -> Flow | None:
    """The model for smaller images, on the CPU: the smallest size at which all of its weights fit,
    and it runs.

    A model that is not convolutional fits its own size alone; None if that has more than
    `LARGEST_JACOBIAN` entries.
    """
    channels, height, width = model.flow.shape
    for side in SIDES:
        if side < min(height, width):
            try:
                flow = (
                    build_flow(model.config, (channels, side, side), model.flow.levels)
                    .eval()
                    .requires_grad_(False)
                )
                if _transplant(model.flow, flow):
                    black = torch.zeros(1, *flow.shape)
                    flow(black, black)
                    return flow
            except Exception:  # not a size of this model
                continue
    return copy.deepcopy(model.flow).cpu() if model.flow.dims <= LARGEST_JACOBIAN else None


def _transplant(trained: Flow, flow: Flow) -> bool:
    """Copies the weights, if they have the same names and shapes. Buffers of another shape belong
    to the size.
    """
    weights, own = trained.state_dict(), flow.state_dict()
    shapes = [{name: p.shape for name, p in one.named_parameters()} for one in (trained, flow)]
    if shapes[0] != shapes[1] or weights.keys() != own.keys():
        return False
    flow.load_state_dict(
        {n: weights[n] if weights[n].shape == own[n].shape else own[n] for n in own}
    )
    return True

"""Checks of log-determinants against Jacobians, of each layer and of the whole flow."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtrain.bijections import Bijection
from flowtrain.bijections.base import Direction, Executor
from flowtrain.bijections.context import Context, unguided
from flowtrain.bijections.execution import FUSED, call
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.evaluation.layers import Watching, layers_of
from flowtrain.flow.flow import Flow
from flowtrain.foreign.file import is_foreign
from flowtrain.foreign.model import ForeignLayer, ForeignModel
from flowtrain.tools.doctor.draws import adds_noise, averaged, beyond
from flowtrain.tools.doctor.findings import IMAGES, Notes, Verdict, judge
from flowtrain.tools.doctor.layers import NOISE_MODEL, LearnedNoise, are_finite

Map = Callable[[Tensor], tuple[Tensor, Tensor]]

PROBES = 4  # draws of signs that show whether a Jacobian is diagonal
JACOBIAN_ROWS = 32  # computed at once, as copies of the image with their activations in float64
LARGEST_JACOBIAN = 4096  # entries of an image, whose Jacobian takes 128 MiB in float64
LARGEST_PART = 256  # entries of an image with whose middle a layer of other code is checked
SIDES = (4, 8, 16, 32, 64)  # of reduced images; below 4 a 3x3 convolution sees mostly padding


def check_log_dets(model: LoadedModel, x: Tensor, noise: Tensor, notes: Notes) -> None:
    """Checks the log-dets in float32 against the Jacobian in float64, per layer and for all layers.

    The Jacobian of the whole flow is with respect to the uniform noise, so it includes the
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
    start = flow.dequantizer(x, noise)[0] if flow.kind.no_bits else noise
    layers = _Layers(flow, notes)
    try:
        _latents(precise, x, start.double(), Watching(precise, layers))
        if flow.dequantizer.learns_noise:
            layers.where = NOISE_MODEL
            learned = LearnedNoise(precise)
            exact = jacobian_log_det(
                lambda copies: learned(copies, x.expand(len(copies), -1, -1, -1)), start.double()
            )
            reported = LearnedNoise(flow)(start, x)[1].double()
            error = abs(reported - exact).max() * layers.bits
            notes.add("log-det", error, NOISE_MODEL, IMAGES)
        layers.where = ""
        _check_whole(flow, precise, x, start, layers)
    except Exception as error:
        notes.failed(("log-det",), error, layers.where, IMAGES)


def _latents(
    flow: Flow, x: Tensor, start: Tensor, executor: Executor = FUSED
) -> tuple[Tensor, Tensor]:
    """Latents and log-dets of copies of an image `x`, from noise, or from noisy or real values."""
    images = x.expand(len(start), -1, -1, -1)
    if flow.kind.no_bits:
        context = flow.conditioning(len(start), context=flow.context_of(images))
        return flow.bijection.run(executor, "forward", start, context)
    return flow.to_latents(images, start, executor)


@dataclass(frozen=True)
class _Call:
    """A call of a layer in float64 at one example, and the same layer in float32, `reporting`."""

    name: str
    layer: Bijection
    reporting: Bijection
    direction: Direction
    own: Tensor | None  # its context, without guidance
    result: tuple[Tensor, Tensor]

    def exact(self, x: Tensor) -> Tensor:
        """The log-det at an input by the Jacobian, in nats."""
        if self.layer.latent_dims(x.numel()) < x.numel():
            return surface_log_det(lambda z: call(self.layer, "inverse", z), self.result[0])

        def with_copies(copies: Tensor) -> tuple[Tensor, Tensor]:
            own = self.own
            same = None if own is None else own.expand(len(copies), *own.shape[1:])
            return call(self.layer, self.direction, copies, same)

        of = diagonal_log_det if self.layer.is_discrete else jacobian_log_det
        return of(with_copies, x)

    def reported(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and log-det at an input in float32."""
        own = None if self.own is None else self.own.float()
        return call(self.reporting, self.direction, x.float(), own)


class _Layers:
    """Checks each layer of a pass (`Watching`) in float64, and keeps its log-det in nats.

    log_dets, errors: by the name of a layer, of all its calls; an error is six standard errors of
        an estimate.
    where: the last layer of the pass so far.
    """

    def __init__(self, flow: Flow, notes: Notes):
        self.reporting, self.notes = layers_of(flow), notes
        self.bits = 1 / (flow.dims * math.log(2))
        self.log_dets: dict[str, float] = {}
        self.errors: dict[str, float] = {}
        self.where = ""

    def __call__(
        self, name: str, layer: Bijection, direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        self.where = name
        result = call(layer, direction, x, context)
        if are_finite(x.float()).all():  # otherwise a layer before it is at fault
            log_det, sure = averaged(layer, lambda: call(layer, direction, x, context)[1])
            self.log_dets[name] = self.log_dets.get(name, 0.0) + float(log_det)
            self.errors[name] = math.hypot(self.errors.get(name, 0.0), float(sure))
            own = unguided(context)
            one = _Call(name, layer, self.reporting[name], direction, own, result)
            if not isinstance(layer, ForeignLayer):
                self._compare(one, x)
            elif not layer.random_latents:  # else no map from its input has this log-det
                self._check_inverse(one, log_det, sure)
                self._compare_part(one, x)
        return result

    def _check_inverse(self, one: _Call, log_det: Tensor, sure: Tensor) -> None:
        """Checks that the log-det of the inverse is the negative of `log_det`."""
        back, own = averaged(one.layer, lambda: call(one.layer, "inverse", one.result[0])[1])
        error = beyond(back + log_det, sure + own).max() * self.bits
        same = abs(back - log_det).max() * self.bits < error
        reason = "it has the sign of the forward direction" if same else ""
        self.notes.add("log-det of the inverse", error, one.name, IMAGES, reason=reason)

    def _compare_part(self, one: _Call, x: Tensor) -> None:
        """Compares the log-det on the middle of a large input. A layer may hold its size in its
        log-det. Then only its own size shows the error.
        """
        part = _middle(one.layer, x)
        if part.numel() > LARGEST_JACOBIAN:
            return
        factor = x.numel() / part.numel()
        if self._compare(one, part, factor) == "bad" and factor > 1:
            small = x.numel() <= LARGEST_JACOBIAN
            self._compare(one, x if small else part, 1 if small else factor, harmless=not small)

    def _compare(self, one: _Call, x: Tensor, factor: float = 1, harmless: bool = False) -> Verdict:
        """Adds the error of the log-det at an input, and returns its verdict. A bad one of a part
        of the input, which is `factor` times as large, is only added if it is `harmless`.
        """
        z, log_det = one.reported(x)
        lost, words = _lost_digits((z, log_det), one.result)
        log_det, sure = averaged(one.reporting, lambda: one.reported(x)[1])
        exact = one.exact(x)
        error = beyond(log_det - exact, sure).max() * self.bits * factor
        verdict = judge("log-det", float(error)).verdict
        if factor == 1 or harmless or verdict != "bad":
            reason = _reason(float(log_det), float(exact), z[0, 0].numel())
            self.notes.add("log-det", error, one.name, IMAGES, harmless, reason)
            self.notes.add("digits of the result", lost, one.name, IMAGES, reason=words)
        return verdict


def _check_whole(flow: Flow, precise: Flow, x: Tensor, start: Tensor, layers: _Layers) -> None:
    """Checks the log-det of the whole flow, whose layers were checked before."""
    if adds_noise(flow) and not layers.reporting:
        return  # its log-density has all terms
    # In float32, random numbers would differ from the Jacobian's.
    one = precise if isinstance(flow, ForeignModel) and flow.is_random else flow
    given = start.to(one.dtype)
    if adds_noise(flow):
        reported, sure = _latents(one, x, given)[1], torch.zeros(1)
    else:
        reported, sure = averaged(one, lambda: _latents(one, x, given)[1])
    if _is_large(flow):
        exact = precise.dequantizer(x, start.double())[1] + sum(layers.log_dets.values())
        sure = sure + math.hypot(*layers.errors.values())
    elif flow.kind.on_surface:
        z = _latents(precise, x, start.double())[0]
        exact = surface_log_det(precise.bijection.inverse, z)
    else:
        log_det = diagonal_log_det if flow.bijection.is_discrete else jacobian_log_det
        exact = log_det(lambda copies: _latents(precise, x, copies), start.double())
    of_bins = flow.dims * math.log(flow.num_bins or 1)
    reason = _reason_of_whole(float(reported - exact), layers.log_dets, of_bins)
    error = beyond(reported - exact, sure).max() * layers.bits
    layers.notes.add("log-det", error, inputs=IMAGES, reason=reason)


def _is_large(flow: Flow) -> bool:
    """Whether the Jacobian of the whole flow takes too long: of a foreign one for large images,
    whose layers are checked on the middle of their inputs.
    """
    return isinstance(flow, ForeignModel) and flow.shape[1] > 1 and flow.dims > LARGEST_PART


def _middle(layer: Bijection, x: Tensor) -> Tensor:
    """The middle of images `(1, C, H, W)`, if they have more than `LARGEST_PART` entries and the
    layer takes a part of them: of `LARGEST_PART` entries, or else the smallest that it takes.
    """
    if x.ndim != 4 or x.numel() <= LARGEST_PART:
        return x
    side = 2
    while x.shape[1] * (2 * side) ** 2 <= LARGEST_PART:
        side *= 2
    while side < max(x.shape[2:]):
        top, left = ((size - min(side, size)) // 2 for size in x.shape[2:])
        middle = x[:, :, top : top + side, left : left + side].contiguous()
        try:
            layer(middle)
        except Exception:  # not a size of this layer
            side *= 2
        else:
            return middle
    return x


def _lost_digits(single: tuple[Tensor, ...], double: tuple[Tensor, ...]) -> tuple[int, str]:
    """The binary digits that results lack in float32, or in float64, and the reason."""
    for results, words in ((single, "they are"), (double, "in float64, they are")):
        expected = torch.float32 if results is single else torch.float64
        dtype = min((result.dtype for result in results), key=significant_digits)
        if (lost := significant_digits(expected) - significant_digits(dtype)) > 0:
            return lost, f"{words} {dtype}"
    return 0, ""


def significant_digits(dtype: torch.dtype) -> int:
    """Binary digits of a number: 24 of float32."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def _reason(reported: float, exact: float, places: int) -> str:
    """The mistake by which `exact` becomes `reported`, or an empty string. `places` is the number
    of entries of a channel.
    """
    mistakes = {
        "it is missing": 0.0,
        "it has the wrong sign": -exact,
        "it counts twice": 2 * exact,
        "it counts half": exact / 2,
        "it is in bits, not in nats": exact / math.log(2),
    }
    if places > 1:
        mistakes[f"it is of one pixel, not of {places}"] = exact / places
    return nearest(reported, mistakes, abs(exact) / 100)


def _reason_of_whole(error: float, of_layers: dict[str, float], of_bins: float) -> str:
    """The layer whose log-det explains the error of the sum, or the missing D log Q `of_bins`, or
    an empty string.
    """
    mistakes = {"D log Q is missing": of_bins}
    for name, log_det in of_layers.items():
        mistakes[f"the log-det of {name} counts twice"] = log_det
        mistakes[f"the log-det of {name} is missing"] = -log_det
        mistakes[f"the log-det of {name} has the wrong sign"] = -2 * log_det
    return nearest(error, mistakes, abs(error) / 1000)


def nearest(value: float, mistakes: dict[str, float], within: float) -> str:
    """The mistake nearest to a value, or an empty string if none is `within` this distance."""
    words = min(mistakes, key=lambda each: abs(mistakes[each] - value), default="")
    return words if words and abs(mistakes[words] - value) < within else ""


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


def surface_log_det(inverse: Map, z: Tensor) -> Tensor:
    """The log-det of a map from a surface in D dimensions to latents, at one latent `(1, d)`.

    It is `-1/2 log det(J^T J)`, with J the D by d Jacobian of the inverse.
    """
    entries = inverse(z)[0].numel()
    copies = z.detach().expand(entries, *z.shape[1:]).clone().requires_grad_()
    with torch.enable_grad():
        x = inverse(copies)[0]
    rows = torch.eye(entries, dtype=z.dtype, device=z.device).view_as(x)
    jacobian = torch.autograd.grad(x, copies, rows)[0].flatten(1)
    log_det: Tensor = torch.linalg.slogdet(jacobian.mT @ jacobian).logabsdet / -2
    return log_det


def diagonal_log_det(function: Map, x: Tensor) -> Tensor:
    """`jacobian_log_det` of a map whose Jacobian is diagonal.

    The gradient of a sum of the results with random signs is then the diagonal with these signs.
    If a few draws of the signs disagree, the Jacobian is not diagonal, and the result is NaN.
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
    """The model on the CPU, for the smallest images with which it runs with all its weights.

    A model that is not convolutional fits only its own size, and so does a flow from Python code,
    whose configuration is unknown. The result is None if that has more than `LARGEST_JACOBIAN`
    entries. A diagonal Jacobian may have any size.
    """
    if model.flow.bijection.is_discrete or _is_large(model.flow):
        return copy.deepcopy(model.flow).cpu()
    channels, height, width = model.flow.shape
    known = model.checkpoint.meta and not is_foreign(str(model.checkpoint.path))
    for side in SIDES if known else ():
        if side < min(height, width):
            try:
                flow = build_flow(model.config, (channels, side, side), model.flow.num_bins)
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

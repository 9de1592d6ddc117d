"""Checks of each layer: its weights, both round trips, and the learned noise as one more layer."""

import contextlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flowtrain.bijections import Bijection
from flowtrain.bijections.base import Direction, Executor
from flowtrain.bijections.context import Context, unguided
from flowtrain.bijections.execution import call, opposite
from flowtrain.bijections.spline import whole_turns
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
from flowtrain.foreign.model import ForeignLayer
from flowtrain.tools.doctor.findings import SAMPLES, TOLERANCE, Notes

Pass = Callable[[Executor], tuple[Tensor, Tensor]]

KEPT = 0.999  # of the entries of learned noise
NOISE_MODEL = "dequantizer.noise_model"  # the name of the learned noise as one layer


def check_weights(flow: Flow, notes: Notes) -> None:
    if flow.class_prior is not None:
        _log_scale(log_scales(flow.class_prior), "class_prior", "", notes)
    layers = layers_of(flow)
    owners = {module: name for name, layer in layers.items() for module in layer.modules()}
    for name, module in flow.named_modules():
        parameters, buffers = (
            [each for each in of(recurse=False) if each.layout == torch.strided]  # not sparse
            for of in (module.parameters, module.buffers)
        )
        if tensors := [*parameters, *buffers]:
            wrong = sum(int((~torch.isfinite(each)).sum()) for each in tensors)
            # In the mask of attention, a buffer, -inf leaves an entry out.
            wrong -= sum(int((each == -math.inf).sum()) for each in buffers)
            notes.add("parameters", wrong, owners.get(module, short_name(name)))
    for name, layer in layers.items():
        _log_scale(log_scales(layer), name, "", notes)
        if (matrix := mixing_matrix(layer)) is not None:
            matrix = matrix.double().cpu()
            finite = bool(torch.isfinite(matrix).all())
            notes.add("condition number", torch.linalg.cond(matrix) if finite else math.nan, name)


def _log_scale(log_scale: Tensor | None, layer: str, inputs: str, notes: Notes) -> None:
    # A checkerboard may keep all of an image of one pixel.
    if log_scale is not None and log_scale.numel():
        notes.add("lowest log-scale", log_scale.min(), layer, inputs)
        notes.add("highest log-scale", log_scale.max(), layer, inputs)


def are_finite(*tensors: Tensor) -> Tensor:
    """Whether an example is finite in all of the tensors, `(B,)`."""
    each = [torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1) for tensor in tensors]
    return torch.stack(each).all(dim=0)


def check_layers(flow: Flow, run: Pass, check: str, inputs: str, notes: Notes) -> None:
    """Checks each layer on its inputs in a pass through the flow, or through its learned noise.

    `run` is this pass, and `check` names the finding about its result. A layer is judged on the
    finite ones of its inputs. So only the first damaged layer is named, not all layers after it.
    """
    where = first = ""

    def around(
        name: str, layer: Bijection, direction: Direction, given: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        nonlocal where, first
        where = name
        result, log_det = call(layer, direction, given, context)
        arrived = are_finite(given)
        if not first and not are_finite(result, log_det)[arrived].all():
            first = name
        if arrived.any():
            kept = unguided(context)
            kept = None if kept is None else kept[arrived]
            _layer(name, layer, direction, given[arrived], result[arrived], kept, inputs, notes)
        return result, log_det

    try:
        ends = run(Watching(flow, around))
    except Exception as error:  # a model of the user's own may raise anything
        notes.failed((check,), error, where, inputs)
    else:
        notes.add(check, (~are_finite(*ends)).sum(), first, inputs)


def _layer(
    name: str,
    layer: Bijection,
    direction: Direction,
    given: Tensor,
    result: Tensor,
    context: Context | None,
    inputs: str,
    notes: Notes,
    share: float = 1.0,
) -> None:
    """Checks a layer in both directions. The errors are the largest of this share of entries."""
    if isinstance(layer, ForeignLayer) and layer.random_latents:
        return  # noise cannot be taken away again
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
    for check, found, expected in zip(checks, (back, again), (given, result), strict=True):
        distance = _relative_error(found, expected, layer.of_angles, share)
        near = isinstance(layer, ForeignLayer | LearnedNoise) and bool(distance < TOLERANCE)
        notes.add(check, distance, name, inputs, harmless or near)
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
        assert isinstance(context, Tensor)
        u, log_q = self.dequantizer.draw(context, x)
        return u, -log_q

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        assert isinstance(context, Tensor)
        return self.dequantizer.noise_of(context, z)


def check_noise(flow: Flow, images: Tensor, noise: Tensor, inputs: str, notes: Notes) -> None:
    """Checks the learned noise as one layer.

    For samples, it also checks each of its layers on the way from a u that it draws back to the
    noise. The passes through the flow have no such direction. Of all u, only those near the edges
    of a bin may be lost, one in a thousand.
    """
    layer = LearnedNoise(flow)
    direction: Direction = "forward"
    if inputs == SAMPLES:
        direction = "inverse"
        with contextlib.suppress(Exception):  # the passes have noted it
            drawn = layer.dequantizer.draw(images, noise)[0]
            noise = torch.where(drawn.isfinite(), drawn, EDGE + (1 - 2 * EDGE) * noise)
        invert = partial(layer.dequantizer.noise_of, images, noise)
        check_layers(flow, invert, "inverse pass", inputs, notes)
    try:
        result, log_det = call(layer, direction, noise, images)
    except Exception:  # the passes have noted it
        return
    arrived = are_finite(result, log_det)
    if arrived.any():
        given, result, images = noise[arrived], result[arrived], images[arrived]
        _layer(NOISE_MODEL, layer, direction, given, result, images, inputs, notes, KEPT)


def _relative_error(found: Tensor, expected: Tensor, of_angles: bool, share: float = 1.0) -> Tensor:
    """The largest error of this share of entries, relative to the entry or to the root mean square,
    whichever is larger.
    """
    found, expected = found.double().cpu(), expected.double().cpu()
    size = expected.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    error = found - expected
    error = error - whole_turns(error) if of_angles else error
    errors = (error.abs() / torch.maximum(expected.abs(), size)).flatten()
    if share == 1 or errors.isnan().any():
        return errors.max()
    return errors.kthvalue(math.ceil(share * len(errors))).values

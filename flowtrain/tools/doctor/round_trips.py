"""Checks of the whole flow: round trips of data and latents, and likelihoods in float32."""

import math

import torch
from torch import Tensor

from flowtrain.bijections.base import Direction
from flowtrain.bijections.execution import call, opposite
from flowtrain.flow.flow import Flow
from flowtrain.foreign.model import ForeignModel
from flowtrain.tools.doctor.draws import adds_noise, averaged, beyond
from flowtrain.tools.doctor.findings import BOUNDS, TOLERANCE, Notes
from flowtrain.tools.doctor.layers import are_finite


def _distance(flow: Flow, found: Tensor, expected: Tensor, levels: float) -> Tensor:
    """The largest distance between two inputs of the flow, in levels. A flow that adds noise may
    give any value in the bin that begins at the expected one.
    """
    error = (flow.dequantizer.to_unit(found) - flow.dequantizer.to_unit(expected)) * levels
    if adds_noise(flow):
        error = torch.where(error > 0, (error - 1).clamp_min(0), error)
    return error.abs().max()


def _bits(found: Tensor, expected: Tensor) -> Tensor:
    """The difference of latents `(B, D)` in log N(z; 0, I), in bits/dim, for the worst example.

    Differences of entries do not cancel. If the squares of the latents are worth more than one
    bit/dim, the difference is relative to those.
    """
    found, expected = found.double().cpu(), expected.double().cpu()
    difference = (found.square() - expected.square()).abs().mean(dim=1) / (2 * math.log(2))
    return (difference / (expected.square().mean(dim=1) / (2 * math.log(2))).clamp_min(1)).max()


def round_trip(
    flow: Flow, precise: Flow, x: Tensor, z: Tensor | None, levels: float, inputs: str, notes: Notes
) -> int:
    """Checks images `x` to latents, back, and to latents again, in float32 and in float64.

    With latents `z` `(B, D)`, it starts at these, and `x` has the images for their contexts.
    If the flow adds noise, only data that come from data are compared. Returns the number of images
    that come back exactly in float32.
    """
    restored = 0
    if z is not None and adds_noise(flow):
        return restored
    direction: Direction = "forward" if z is None else "inverse"
    for one, name in ((flow, "float32"), (precise, "float64")):
        checks = (f"data round trip, {name}", f"latent round trip, {name}")
        try:
            images = x.to(one.device)
            context = one.conditioning(len(images), context=one.context_of(images))
            start = (
                one.dequantizer.middle(images, one.dtype)
                if z is None
                else z.to(one.device, one.dtype)
            )
            there = call(one.bijection, direction, start, context)[0]
            back = call(one.bijection, opposite(direction), there, context)[0]
            again = call(one.bijection, direction, back, context)[0]
        except Exception as error:
            notes.failed(checks, error, inputs=inputs)
            continue
        pairs = ((back, start), (again, there))
        data, latents = pairs if z is None else reversed(pairs)
        # As for a layer: at the edge of a bin, rounding moves a level.
        harmless = z is not None and one is flow and flow.bijection.is_discrete
        distance = _distance(one, *data, levels)
        wrong = one is precise and distance > BOUNDS[checks[0]][1]
        reason = "more than rounding: a wrong inverse, or one that stops too early" if wrong else ""
        notes.add(checks[0], distance, inputs=inputs, harmless=harmless, reason=reason)
        if not adds_noise(flow):
            apart = _bits(*latents)
            solved = isinstance(one, ForeignModel) and one is precise and bool(apart < TOLERANCE)
            notes.add(checks[1], apart, inputs=inputs, harmless=harmless or solved)
        if z is None and one is flow:
            finite = are_finite(back)
            same = flow.dequantizer.to_data(back[finite]) == images[finite]
            restored = int(same.flatten(1).all(dim=1).sum())
    return restored


def check_likelihood(
    flow: Flow, precise: Flow, x: Tensor, noise: Tensor, inputs: str, notes: Notes
) -> tuple[Tensor, Tensor]:
    """Checks the error of a reported likelihood in float32.

    Returns the likelihoods in nats and six standard errors of them, float64 `(B,)` on the CPU; NaN
    if the flow raises.
    """
    lost = torch.full((len(x),), math.nan, dtype=torch.float64)
    try:
        on_device = x.to(flow.device), noise.to(flow.device)
        found = averaged(flow, lambda: flow(*on_device).total)
        exact = averaged(precise, lambda: precise(x, noise).total)
        error = beyond(found[0] - exact[0], found[1] + exact[1]) / (flow.dims * math.log(2))
    except Exception as failure:
        notes.failed(("float32 likelihood",), failure, inputs=inputs)
        return lost, lost
    notes.add("float32 likelihood", error.max(), inputs=inputs)
    return found

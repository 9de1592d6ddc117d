"""Checks of the whole flow: round trips of data and latents, and likelihoods in float32."""

import math

import torch
from torch import Tensor

from flowtrain.bijections.base import Direction
from flowtrain.bijections.execution import call, opposite
from flowtrain.flow.flow import Flow
from flowtrain.tools.doctor.findings import BOUNDS, IMAGES, Notes
from flowtrain.tools.doctor.layers import are_finite


def _distance(flow: Flow, found: Tensor, expected: Tensor) -> Tensor:
    """The largest distance between two inputs of the flow, in the unit of its data."""
    return (flow.dequantizer.to_unit(found) - flow.dequantizer.to_unit(expected)).abs().max()


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
    Returns the number of images that come back exactly in float32.
    """
    restored = 0
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
        distance = _distance(one, *data) * levels
        wrong = one is precise and distance > BOUNDS[checks[0]][1]
        reason = "more than rounding: a wrong inverse, or one that stops too early" if wrong else ""
        notes.add(checks[0], distance, inputs=inputs, harmless=harmless, reason=reason)
        notes.add(checks[1], _bits(*latents), inputs=inputs, harmless=harmless)
        if z is None and one is flow:
            finite = are_finite(back)
            same = flow.dequantizer.to_data(back[finite]) == images[finite]
            restored = int(same.flatten(1).all(dim=1).sum())
    return restored


def check_likelihood(flow: Flow, precise: Flow, x: Tensor, noise: Tensor, notes: Notes) -> Tensor:
    """Checks the error of a reported likelihood in float32.

    Returns the likelihoods in nats, float64 `(B,)` on the CPU; NaN if the flow raises.
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

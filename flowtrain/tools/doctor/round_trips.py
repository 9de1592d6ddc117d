"""Checks of the whole flow: round trips of data and latents, and likelihoods in float32."""

import math

import torch
from torch import Tensor

from flowtrain.flow.flow import Flow
from flowtrain.tools.doctor.findings import IMAGES, SAMPLES, Notes
from flowtrain.tools.doctor.layers import are_finite


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


def data_round_trip(
    flow: Flow, precise: Flow, x: Tensor, levels: float, inputs: str, notes: Notes
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
            finite = are_finite(back)
            same = flow.dequantizer.to_data(back[finite]) == images[finite]
            restored = int(same.flatten(1).all(dim=1).sum())
    return restored


def latent_round_trip(
    flow: Flow, precise: Flow, z: Tensor, images: Tensor, levels: float, notes: Notes
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


def check_likelihood(flow: Flow, precise: Flow, x: Tensor, noise: Tensor, notes: Notes) -> Tensor:
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

"""The integral of a density in the plane, on a torus or on the sphere, by quadrature."""

import math

import torch
from torch import Tensor

from flowtrain.evaluation.layers import layers_of
from flowtrain.flow.flow import Flow
from flowtrain.pictures.draw import mesh
from flowtrain.tools.doctor.findings import Notes

SIDE = 128  # cells of the mesh in each direction
BATCH = 4096


def check_integral(flow: Flow, x: Tensor, z: Tensor, notes: Notes) -> None:
    """Checks that the density integrates to 1, for two dimensions or the sphere.

    The midpoint rule on a mesh covers the sphere, a torus, or the part of the plane with data `x`
    and the samples of latents `z`. There the integral is at most 1. A mesh of half the side shows
    the error of the rule: if it is as large as the excess, the excess is harmless.
    """
    surface = flow.kind.on_surface
    if flow.num_bins is not None or not (surface or flow.shape == (2, 1, 1)):
        return
    torus = any(layer.of_angles for layer in layers_of(flow).values()) and not surface
    try:
        if torus or surface:
            bounds = (-math.pi, math.pi, *((-1.0, 1.0) if surface else (-math.pi, math.pi)))
        else:
            points = torch.cat([x.cpu(), flow.decode(z).cpu()]).flatten(1)
            (left, bottom), (right, top) = points.amin(dim=0).tolist(), points.amax(dim=0).tolist()
            bounds = left, right, bottom, top
        coarse, fine = (_integral(flow, bounds, side) for side in (SIDE // 2, SIDE))
    except Exception as error:
        notes.failed(("integral",), error)
        return
    excess = abs(fine - 1) if torus or surface else max(0.0, fine - 1)
    notes.add("integral", excess, harmless=abs(fine - coarse) > excess / 2)


def _integral(flow: Flow, bounds: tuple[float, float, float, float], side: int) -> float:
    cells, area = mesh(flow, bounds, side)
    parts = [
        flow.log_prob(part.to(flow.device)).double().exp().sum() for part in cells.split(BATCH)
    ]
    return float(sum(parts)) * area

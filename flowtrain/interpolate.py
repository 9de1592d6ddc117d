"""Paths between images through the latent space."""

from pathlib import Path

import torch
from torch import Tensor

from flowtrain.checkpoint import LoadedModel
from flowtrain.data import DataSet
from flowtrain.datasets.base import open_image
from flowtrain.device import Stream, generator
from flowtrain.errors import UserError
from flowtrain.flow import Flow


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985) between latents `(D,)`, for each of `t` `(S,)`: `(S, D)`.

    The ends are `a` and `b` exactly. In between the norm stays typical of a standard normal, where a straight line
    would pass through the improbable middle. (Anti)parallel latents are joined by a straight line.
    """
    cosine = torch.dot(a, b) / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    t = t[:, None]
    if torch.sin(angle) < 1e-4:
        path = a + t * (b - a)
    else:
        path = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(t == 0, a, torch.where(t == 1, b, path))


def interpolate(flow: Flow, first: Tensor, second: Tensor, steps: int) -> Tensor:
    """Between pairs of images, both uint8 `(P, C, H, W)`: uint8 `(P, steps, C, H, W)`, the ends included."""
    t = torch.linspace(0, 1, steps, device=flow.device)
    paths = [slerp(a, b, t) for a, b in zip(flow.encode(first), flow.encode(second), strict=True)]
    return torch.stack([flow.decode(path) for path in paths])


def from_test_images(model: LoadedModel, data: DataSet, pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random pairs of different test images: two tensors `(P, C, H, W)`. Raises `UserError` if there are too few."""
    data.require(model.flow.shape, model.flow.levels, model.checkpoint.path)
    split = data.split("test")
    if len(split) < 2 * pairs:
        raise UserError(f"--pairs {pairs}: the test split has only {len(split)} images")
    order = torch.randperm(len(split), generator=generator(seed, Stream.PAIRS))[: 2 * pairs].numpy()
    return split.take(order[:pairs]), split.take(order[pairs:])


def from_files(files: tuple[Path, Path], model: LoadedModel) -> tuple[Tensor, Tensor]:
    """Two image files, brought to the model's shape by its data set's resize policy (`crop` where it has none)."""
    flow, policy = model.flow, model.config.data.options().get("resize", "crop")
    first, second = (torch.from_numpy(open_image(path, flow.shape, flow.levels, policy)) for path in files)
    return first[None], second[None]

"""Paths between images through the latent space."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet, Split
from flowtrain.datasets.base import open_image
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow
from flowtrain.pictures.sample import decode
from flowtrain.system import capacity
from flowtrain.system.random import Stream, generator

ATTRIBUTE_IMAGES = 500  # images of a class over which the mean latent is taken, at most
BATCH_SIZE = 100


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985) between latents `(D,)` at each `t` `(S,)`: `(S, D)`.

    The ends are exactly `a` and `b`. In between, the norm stays typical of a standard normal. A
    straight line would pass through the improbable middle, and only joins latents that are parallel
    or antiparallel.
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
    """Paths between pairs of images, `(P, C, H, W)` each: `(P, steps, C, H, W)` with both ends."""
    _require_room(flow, len(first), steps)
    t = torch.linspace(0, 1, steps, device=flow.device)
    paths = [slerp(a, b, t) for a, b in zip(flow.encode(first), flow.encode(second), strict=True)]
    return _decoded(flow, torch.stack(paths))


def _decoded(flow: Flow, paths: Tensor) -> Tensor:
    """Latents `(P, S, D)` as images `(P, S, C, H, W)`.

    All paths are decoded together, because a sequential inverse takes as long for a few as for one.
    """
    images: Tensor = decode(flow, paths.flatten(0, 1)).unflatten(0, paths.shape[:2])
    return images


def _require_room(flow: Flow, pairs: int, steps: int) -> None:
    """Raises `UserError` where the paths and all pictures do not fit into memory."""
    pixels = flow.dims * (4 if flow.levels is None else 1)
    capacity.require(
        2 * 4 * pairs * steps * flow.latent_dims + 2 * pairs * steps * pixels,
        f"--steps {steps}: {pairs} paths of {steps:,} images need",
    )


def between_classes(
    flow: Flow, split: Split, first: int, second: int, pairs: int, steps: int
) -> Tensor:
    """Images of one class, moved along the difference of the mean latents of two classes.

    This is the attribute manipulation of Glow, section 6.2. The result, uint8
    `(P, steps, C, H, W)`, starts from the first `P = pairs` images of class `first`. Each row
    begins with the unchanged image. The means are over up to `ATTRIBUTE_IMAGES` images of a class.

    Raises `UserError` if there are no labels, or too few images of a class.
    """
    _require_room(flow, pairs, steps)
    if split.labels is None:
        raise UserError(f"--from-class {first}: the data set has no labels")
    of_class = {}
    for option, label, needed in (("--from-class", first, pairs), ("--to-class", second, 1)):
        # numpy compares with numbers of any size
        where = (split.labels.numpy() == label).nonzero()[0]
        if len(where) < needed:
            raise UserError(
                f"{option} {label}: the split has {len(where)} images of it, {needed} are needed"
            )
        where = where[: max(ATTRIBUTE_IMAGES, needed)]
        latents = [
            flow.encode(split.take(part))
            for part in np.array_split(where, max(1, len(where) // BATCH_SIZE))
        ]
        of_class[label] = torch.cat(latents)
    direction = of_class[second].mean(dim=0) - of_class[first].mean(dim=0)
    t = torch.linspace(0, 1, steps, device=flow.device)[:, None]
    return _decoded(flow, of_class[first][:pairs, None] + t * direction)


def from_test_images(
    model: LoadedModel, data: DataSet, pairs: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Random pairs of different test images, as two tensors `(P, C, H, W)`.

    Raises `UserError` if there are too few images.
    """
    data.require(model.flow.shape, model.flow.levels, model.checkpoint.path)
    split = data.split("test")
    if len(split) < 2 * pairs:
        raise UserError(f"--pairs {pairs}: the test split has only {len(split)} images")
    order = torch.randperm(len(split), generator=generator(seed, Stream.PAIRS))[: 2 * pairs].numpy()
    return split.take(order[:pairs]), split.take(order[pairs:])


def from_files(files: tuple[Path, Path], model: LoadedModel) -> tuple[Tensor, Tensor]:
    """Two image files as images of the model's shape, `(1, C, H, W)` each.

    They are resized by the policy of its data set, or `crop` if it has none.
    """
    flow, policy = model.flow, model.config.data.options().get("resize", "crop")
    levels = flow.kind.require_levels("--images: the model is of real-valued data, not of images")
    first, second = (
        torch.from_numpy(open_image(path, flow.shape, levels, policy)) for path in files
    )
    return first[None], second[None]

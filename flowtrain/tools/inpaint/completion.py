"""Files with a part of an image, and files with the images that complete it."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.bijections.ordinal import discrete_model
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.datasets.base import open_image
from flowtrain.errors import UserError
from flowtrain.flow.image_context import ImageContext
from flowtrain.pictures import grid
from flowtrain.pictures.lossless import png_files
from flowtrain.system import files
from flowtrain.tools.inpaint.constraints import Averages, Constraint, Pixels
from flowtrain.tools.inpaint.posterior import Posterior

COLUMNS = 10  # of the grid: eight samples by default, the given part, and the mean


@dataclass(frozen=True)
class Given:
    """The known part of an image, and a picture of it: integers `(C, H, W)`."""

    constraint: Constraint
    shown: Tensor
    words: str


def of_mask(image: Path, mask: Path, model: LoadedModel) -> Given:
    """An image file whose pixels are known where a mask file is black.

    Both have the size of the model's images. Raises `UserError` that names the file if one cannot
    be read or has another size, or if the mask is not black and white, or hides nothing or
    everything.
    """
    flow = model.flow
    assert flow.num_bins is not None
    x = _exactly(image, flow.shape, flow.num_bins, "--image")
    white = _exactly(mask, (1, *flow.shape[1:]), 256, "--mask")
    other = (white != 0) & (white != 255)
    if other.any():
        raise UserError(
            f"--mask {mask}: {int(other.sum())} pixels are neither black (known) nor white "
            f"(missing): save it without smoothing, as PNG"
        )
    known = (white == 0).expand(flow.shape)
    if known.all():
        raise UserError(f"--mask {mask}: it is all black, so no pixel is missing: paint some white")
    if not known.any():
        raise UserError(
            f"--mask {mask}: it is all white, so no pixel is known: `flowtrain sample` draws such "
            f"images"
        )
    constraint = Pixels(x, known, flow.num_bins, within=discrete_model(flow.bijection) is None)
    missing = int((white == 255).sum())
    shown = torch.where(known, x, flow.num_bins // 2)
    return Given(constraint, shown, f"{missing} of {white.numel()} pixels are missing")


def of_averages(image: Path, factor: int, model: LoadedModel) -> Given:
    """An image file that is `factor` times smaller than the model's images, and whose pixels are
    means of patches. Raises `UserError` as `of_mask` does, and if the factor does not divide both
    sides.
    """
    flow = model.flow
    assert flow.num_bins is not None
    _, height, width = flow.shape
    if factor < 2 or height % factor or width % factor:
        raise UserError(
            f"--factor {factor}: expected a number from 2 that divides both sides of images of "
            f"{height}x{width} pixels"
        )
    context = ImageContext("downsample", factor, flow.shape, flow.num_bins)
    small = _exactly(image, context.shape, flow.num_bins, "--image")
    words = f"the means of patches of {factor}x{factor} pixels are known"
    return Given(Averages(small, context), context.shown(small[None])[0], words)


def _exactly(path: Path, shape: tuple[int, int, int], num_bins: int, option: str) -> Tensor:
    try:
        return torch.from_numpy(open_image(path, shape, num_bins, "exact"))
    except UserError as error:
        raise UserError(f"{option} {error}") from None


def names(count: int) -> list[str]:
    """The files of `count` samples in a folder."""
    samples = [f"sample-{number:02}.png" for number in range(count)]
    return [*samples, "mean.png", "grid.png", "inpaint.json"]


def write_folder(
    out: Path, model: LoadedModel, given: Given, found: Posterior, about: Mapping[str, object]
) -> None:
    """Writes a PNG file for each sample, their mean, a grid of the given part, the samples and the
    mean, and `about` as a JSON file. See `files.write_folder`.
    """
    num_bins = model.flow.num_bins
    assert num_bins is not None
    mean = found.x.float().mean(dim=0).round().to(torch.uint8)
    shown = torch.cat([given.shown[None].to(torch.uint8), found.x, mean[None]])
    *single, of_all, result = names(len(found.x))
    picture = grid.png(grid.grid(shown, num_bins, COLUMNS))
    text = json.dumps(about, indent=2, allow_nan=False).encode() + b"\n"
    pictures = png_files(single, shown[1:], num_bins)
    files.write_folder(out, [*pictures, (of_all, picture), (result, text)])


def npz(
    model: LoadedModel, given: Given, found: Posterior, losses: Sequence[float], seed: int
) -> bytes:
    """The images as an .npz file, channels last, with their mean and the given part."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        "images": found.x.movedim(1, -1).numpy(),
        "mean": found.x.float().mean(dim=0).movedim(0, -1).numpy(),
        "given": given.shown.to(torch.uint8).movedim(0, -1).numpy(),
        "bits_per_dim": np.array(losses),
    }
    if isinstance(given.constraint, Pixels):
        arrays["known"] = given.constraint.known[0].numpy()
    np.savez_compressed(buffer, **arrays, seed=seed, **model.flow.kind.npz())
    return buffer.getvalue()

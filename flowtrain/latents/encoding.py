"""Images to latents and back, for any number of images, and images that a command line names."""

import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet, SplitName
from flowtrain.datasets.folder import files_of, read_files
from flowtrain.errors import RunError, UserError, cut
from flowtrain.flow.flow import Flow
from flowtrain.flow.passes import sampling_batch_size
from flowtrain.system import capacity
from flowtrain.system.arrays import ONLY, ArrayFile
from flowtrain.system.console import silent
from flowtrain.system.files import check_names

log = logging.getLogger("flowtrain")


def encode(flow: Flow, x: Tensor, progress: Callable[[float, float], None] = silent) -> Tensor:
    """The latents of images `(N, C, H, W)`, float32 `(N, D)` on the CPU. See `Flow.encode`. Raises
    `UserError` if there is no room for them.
    """
    capacity.require(2 * 4 * len(x) * flow.latent_dims, f"encoding: {len(x):,} latents need")
    z = torch.empty(len(x), flow.latent_dims)
    at_a_time = sampling_batch_size(flow)
    for start in range(0, len(x), at_a_time):
        part = x[start : start + at_a_time]
        z[start : start + len(part)] = flow.encode(part)
        progress(start + len(part), len(x))
    return z


def difference(flow: Flow, x: Tensor, back: Tensor, names: Sequence[str]) -> float:
    """The largest difference of points from decoded ones, or 0.0 for images.

    Raises `RunError` that names the first image that is not the same in every pixel.
    """
    if flow.num_bins is None:
        return float(flow.distance(back, x.to(back.dtype)).max())
    different = (back != x).flatten(1).sum(dim=1)
    if different.any():
        first = int(different.gt(0).long().argmax())
        raise RunError(
            f"{cut(names[first])}: {int(different[first])} of {flow.dims} values are not restored, "
            f"nor are {int(different.gt(0).sum())} of {len(x)} images: nothing is written"
        )
    return 0.0


def of_split(
    model: LoadedModel, data: DataSet, split_name: SplitName, count: int | None
) -> tuple[list[str], Tensor, Tensor | None]:
    """Names, images and classes, if they are known, of the first `count` images of a split.

    Raises `UserError` if the data are not the model's, or the split is empty.
    """
    data.require(model.flow.shape, model.flow.num_bins, model.checkpoint.path)
    split = data.split(split_name)
    if len(split) == 0:
        raise UserError(f"--split {split_name}: it is empty")
    x = split.take(slice(0, count))
    classes = None if split.labels is None else split.labels[: len(x)]
    return [f"{split_name}-{i:05}.png" for i in range(len(x))], x, classes


def named_images(
    paths: Sequence[Path], model: LoadedModel, count: int | None
) -> tuple[list[str], Tensor]:
    """Names and pixels of the first `count` images at these paths: image files and folders, or one
    .npy or .npz file for a model of points.
    """
    if model.flow.num_bins is None:
        x = read_points(paths, model)[:count]
        return [f"{i:05}" for i in range(len(x))], x
    found = files_at(paths, "--images")
    names = list(found)[:count]
    kept, x = readable_images([found[name] for name in names], paths, model, "--images")
    return [names[i] for i in kept], x


def read_points(paths: Sequence[Path], model: LoadedModel) -> Tensor:
    """Points from one .npy file, or from `images` of an .npz file of `sample` or `decode`: float32
    `(N, C, 1, 1)`. Raises `UserError` that names the file if these are no finite points.
    """
    if len(paths) != 1 or paths[0].suffix.lower() not in (".npy", ".npz"):
        raise UserError(f"--images {paths[0]}: the model is of points: give one .npy or .npz file")
    file = ArrayFile(paths[0])
    name = ONLY if ONLY in file.names else "images"
    channels = model.flow.shape[0]
    flat = len(file.header(name).shape) == 2
    shape = (None, channels) if flat else (None, 1, 1, channels)
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite
        values = file.read(name, "f", shape).astype(np.float32)
    if not len(values) or not np.isfinite(values).all():
        raise UserError(f"{paths[0]}: it has no points, or one that is not finite")
    return torch.from_numpy(values).reshape(-1, *model.flow.shape)


def picture_names(names: Sequence[str]) -> list[str]:
    """Names of PNG files in one folder. Raises `UserError` if they are impossible or the same."""
    found = [name if name.lower().endswith(".png") else f"{name}.png" for name in names]
    try:
        check_names(found)
    except ValueError as error:
        raise UserError(f"names: {error}") from None
    return found


def files_at(paths: Sequence[Path], option: str) -> dict[str, Path]:
    """Image files, and those in folders at any depth, by name: the path below the folder.

    Files in a folder that have the name of an earlier one are left out, with a warning. Raises
    `UserError` that begins with `option` if a folder has no image, or if one of `paths` itself has
    the name of an earlier file.
    """
    found: dict[str, Path] = {}
    for path in paths:
        named = {path.name: path}
        if path.is_dir():
            try:
                names = [file.name for file in files_of(path, "")]
            except UserError as error:
                why = str(error).removeprefix("data.path: ")
                raise UserError(f"{option} {path}: {why}") from None
            named = {name: path / name for name in names}
        if same := [name for name in named if name in found]:
            problem = f"{option} {named[same[0]]}: it has the same name as {found[same[0]]}"
            if not path.is_dir():
                raise UserError(problem)
            also = f", like {len(same) - 1} more files in {path}" if len(same) > 1 else ""
            log.warning("%s, and is left out%s", problem, also)
        found |= {name: file for name, file in named.items() if name not in found}
    return found


def read_images(files: Sequence[Path], model: LoadedModel, option: str) -> Tensor:
    """Image files as images of the model's shape, `(N, C, H, W)`, resized as its data are. Raises
    `UserError` that names a file that cannot be read, or `option` for a model of points.
    """
    return readable_images(files, files, model, option)[1]


def readable_images(
    files: Sequence[Path], named: Collection[Path], model: LoadedModel, option: str
) -> tuple[list[int], Tensor]:
    """Places in `files`, and images as from `read_images`, of those that can be read. A file that
    the user has `named` must be readable (`read_files`).
    """
    flow, policy = model.flow, model.config.data.resize_policy
    num_bins = flow.kind.require_bins(f"{option}: the model is of real-valued data, not of images")
    capacity.require(len(files) * flow.dims, f"{option}: {len(files):,} images need")
    kept, x = read_files(files, named, option, flow.shape, num_bins, policy)
    return kept, torch.from_numpy(x)

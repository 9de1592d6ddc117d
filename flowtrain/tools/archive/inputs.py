"""The images that go into an archive, and what they take in ordinary formats."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet, SplitName
from flowtrain.datasets.base import picture
from flowtrain.datasets.folder import files_of
from flowtrain.errors import UserError, short
from flowtrain.pictures.grid import to_8bit
from flowtrain.pictures.lossless import FORMATS, affordable, file_sizes, formats
from flowtrain.system.console import silent
from flowtrain.system.files import check_names
from flowtrain.tools.archive.strips import STRIP, tall_length
from flowtrain.tools.archive.threads import Progress, Tick, in_threads


@dataclass
class Selection:
    """Images of a model."""

    names: list[str] | str  # one per image, or one word, of which names are made
    images: Tensor  # uint8 (N, C, H, W), values 0..Q-1
    levels: int  # Q


def from_split(data: DataSet, name: SplitName, model: LoadedModel, count: int | None) -> Selection:
    """The first `count` images of a split of the model's data; None stands for all of them.

    Raises `UserError` where the data are not the model's, or the split is empty.
    """
    data.require(model.flow.shape, model.flow.levels, model.checkpoint.path)
    split = data.split(name)
    if len(split) == 0:
        raise UserError(
            f"--split {name}: it is empty (data.validation is {data.config.validation:g})"
        )
    return Selection(name, split.take(slice(0, count)), _levels(model))


def from_files(paths: list[Path], model: LoadedModel, out: Path, count: int | None) -> Selection:
    """The first `count` of the image files at these paths; None stands for all of them.

    Raises `UserError` as `find_files` and `read_files` do, and where one of them, or the model, is
    the file `out` that is to be written.
    """
    found = find_files(paths)
    for file in (*found.values(), model.checkpoint.path):
        if out.exists() and file.exists() and out.samefile(file):
            raise UserError(f"--out {out}: is one of the files that are read; give another name")
    names, levels = list(found)[:count], _levels(model)
    images = read_files([found[name] for name in names], model.flow.shape, levels)
    return Selection(names, images, levels)


def _levels(model: LoadedModel) -> int:
    return model.flow.kind.require_levels("compress: a model of real values, not of images")


def find_files(paths: list[Path]) -> dict[str, Path]:
    """Image files, and those in folders, by the names that `decompress` will write.

    Folders are read as the data set `folder` reads them: at any depth, links are followed, and what
    begins with a dot is ignored. Raises `UserError` where a folder has no image, or where a file
    cannot be unpacked beside the others.
    """
    files: dict[str, Path] = {}
    for path in paths:
        named = [(path.name, path)]
        if path.is_dir():
            try:
                found = [file.name for file in files_of(path, "")]
            except UserError as error:
                raise UserError(str(error).removeprefix("data.path: ")) from None
            named = [(Path(path.resolve().name, name).as_posix(), path / name) for name in found]
        for name, file in named:
            name = name if name.lower().endswith(".png") else f"{name}.png"
            if name in files:
                raise UserError(
                    f"{file}: it would be unpacked as {name!r}, and so would {files[name]}"
                )
            _check_names([name], str(file))
            files[name] = file
    _check_names(list(files), "INPUT")
    return files


def _check_names(names: list[str], what: str) -> None:
    try:
        check_names(names)
    except ValueError as error:
        raise UserError(f"{what}: it cannot be unpacked: {error}") from None


def read_files(files: list[Path], shape: tuple[int, int, int], levels: int) -> Tensor:
    """Image files as they are: uint8 `(N, C, H, W)`, values 0..Q-1.

    Raises `UserError` naming the file where it is missing, or has other pixels than images of
    `shape` with `levels`.
    """
    return torch.stack([_pixels(file, shape, levels) for file in files])


def _pixels(path: Path, shape: tuple[int, int, int], levels: int) -> Tensor:
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    try:
        with picture(path) as image:
            found = f"{image.width}x{image.height} {image.mode}"
            frames = getattr(image, "n_frames", 1)
            # Nothing is decoded that is not wanted.
            fits = found == f"{width}x{height} {mode}" and frames == 1
            pixels = np.array(image) if fits else np.empty(0)
            # PNG's tRNS: one colour or level is transparent.
            transparent = "transparency" in image.info
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such image file") from None
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise UserError(f"{path}: cannot be read as an image ({short(error)})") from None
    if not fits:
        raise UserError(
            f"{path}: it has {frames} picture(s) of {found}, and the model is for "
            f"{width}x{height} {mode}; nothing is converted, as that would not be lossless"
        )
    if transparent:
        raise UserError(f"{path}: a part of it is transparent, which would be lost")
    # What `to_8bit` makes of each level: the values that `decompress` writes.
    values = to_8bit(torch.arange(levels), levels)
    level_of = torch.full((256,), -1)
    level_of[values.long()] = torch.arange(levels)
    image_levels = level_of[torch.from_numpy(pixels.reshape(height, width, channels)).long()]
    if (image_levels < 0).any():
        raise UserError(
            f"{path}: its values are not the {levels} that images of this model have "
            f"({', '.join(map(str, values[:4].tolist()))}, ..., 255): to keep fewer bits of it "
            f"would not be lossless"
        )
    return image_levels.to(torch.uint8).movedim(-1, 0)


def ordinary_sizes(images: Tensor, levels: int, progress: Progress = silent) -> dict[str, int]:
    """The bytes of all images together, per lossless format that Pillow has: as one file each, and
    in tall pictures (`tall NAME`) of as many images as a WebP can have.

    The slow options of `FORMATS` are tried too where there are few images (`affordable`).
    """
    names = {name: (name, False) for name in formats()}
    names |= {
        f"{name} {FORMATS[name].slow}": (name, True)
        for name in formats()
        if affordable(images, name)
    }
    parts = torch.split(images, STRIP)
    tall = [
        part.movedim(1, 0).flatten(1, 2)[None]
        for part in torch.split(images, tall_length(images.shape[2]))
    ]
    tasks = [
        functools.partial(_sizes, prefix + name, *names[name], part, levels, count)
        for name in names
        for prefix, pictures in (("", parts), ("tall ", tall))
        for part, count in zip(pictures, _shares(len(images), len(pictures)), strict=True)
    ]
    totals = {prefix + name: 0 for prefix in ("", "tall ") for name in names}
    lossy = set()
    for name, sizes in in_threads(tasks, 2 * len(names) * len(images), progress):
        if sizes is None:
            lossy.add(name)
        else:
            totals[name] += int(sizes.sum())
    return {name: total for name, total in totals.items() if name not in lossy}


def _shares(count: int, parts: int) -> list[int]:
    """`count` in about equal parts."""
    return [count * (i + 1) // parts - count * i // parts for i in range(parts)]


def _sizes(
    title: str, name: str, slow: bool, images: Tensor, levels: int, count: int, tick: Tick
) -> tuple[str, Tensor | None]:
    try:
        sizes = file_sizes(images, levels, name, slow)
    except (OSError, ValueError):  # too tall for the format
        sizes = None
    tick(count)
    return title, sizes

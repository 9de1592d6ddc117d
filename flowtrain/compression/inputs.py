"""Image files that go into an archive, and what they take in ordinary formats."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowtrain.compression import format as archive
from flowtrain.compression.streams import Progress, in_threads
from flowtrain.datasets.base import READABLE
from flowtrain.datasets.folder import files_of
from flowtrain.errors import UserError, short
from flowtrain.pictures.grid import to_8bit
from flowtrain.pictures.lossless import file_sizes, formats


def find_files(paths: list[Path]) -> dict[str, Path]:
    """Image files, and those in folders, by the names that `decompress` will write.

    In folders, as the data set `folder` does: at any depth, links are followed, and what begins
    with a dot is ignored. Raises `UserError` where a folder has none, or where a file cannot be
    unpacked beside the others.
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
            try:
                archive.check_names([name])
            except ValueError as error:
                raise UserError(f"{file}: it cannot be unpacked: {error}") from None
            files[name] = file
    try:
        archive.check_names(files)
    except ValueError as error:
        raise UserError(f"INPUT: it cannot be unpacked: {error}") from None
    return files


def read_files(files: list[Path], shape: tuple[int, int, int], levels: int) -> Tensor:
    """Image files as they are: uint8 `(N, C, H, W)`.

    Raises `UserError` naming the file where it is missing, or has other pixels than images of
    `shape` with `levels`.
    """
    return torch.stack([_pixels(file, shape, levels) for file in files])


def _pixels(path: Path, shape: tuple[int, int, int], levels: int) -> Tensor:
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(path, formats=READABLE) as image:
            found = f"{image.width}x{image.height} {image.mode}"
            frames = getattr(image, "n_frames", 1)
            # a colour or level that is to be seen through: PNG's tRNS
            transparent = "transparency" in image.info
            pixels = np.array(image)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such image file") from None
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise UserError(f"{path}: cannot be read as an image ({short(error)})") from None
    if found != f"{width}x{height} {mode}" or frames > 1:
        raise UserError(
            f"{path}: it has {frames} picture(s) of {found}, and the model is for "
            f"{width}x{height} {mode}; "
            "nothing is converted, as that would not be lossless"
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


def ordinary_sizes(images: Tensor, levels: int, progress: Progress) -> dict[str, int]:
    """Bytes of all images, each as a file, in the lossless formats that Pillow has."""
    names = formats()
    parts = images.split(archive.STRIP)
    tasks = [functools.partial(_sizes, name, part, levels) for name in names for part in parts]
    totals = dict.fromkeys(names, 0)
    lossy = set()
    for name, sizes in in_threads(tasks, len(names) * len(images), progress):
        if sizes is None:
            lossy.add(name)
        else:
            totals[name] += int(sizes.sum())
    return {name: total for name, total in totals.items() if name not in lossy}


def _sizes(
    name: str, images: Tensor, levels: int, tick: Callable[[int], None]
) -> tuple[str, Tensor | None]:
    sizes = file_sizes(images, levels, name)
    tick(len(images))
    return name, sizes


def require_writable(out: Path, folder: Path) -> None:
    """Raises `UserError`, naming --out, where no file can be made in `folder`: said before any work
    is done.
    """
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: there is no permission to write into {existing}")

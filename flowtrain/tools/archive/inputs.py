"""The images that go into an archive, and their sizes in ordinary formats."""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.datasets.base import picture
from flowtrain.errors import UserError, short
from flowtrain.latents.encoding import files_at
from flowtrain.pictures.grid import to_8bit
from flowtrain.pictures.lossless import FORMATS, affordable, file_sizes, formats
from flowtrain.system.console import silent
from flowtrain.system.files import check_names
from flowtrain.tools.archive.strips import STRIP, tall_length
from flowtrain.tools.archive.threads import Progress, Tick, in_threads


def from_files(
    paths: list[Path], model: LoadedModel, num_bins: int, out: Path, count: int | None
) -> tuple[list[str], Tensor]:
    """Names and pixels of the first `count` image files at these paths; None stands for all.

    Raises `UserError`, also if one of them, or the model, is the output file `out`.
    """
    found = find_files(paths)
    for file in (*found.values(), model.checkpoint.path):
        if out.exists() and file.exists() and out.samefile(file):
            raise UserError(f"--out {out}: is one of the files that are read; give another name")
    names = list(found)[:count]
    return names, read_files([found[name] for name in names], model.flow.shape, num_bins)


def find_files(paths: list[Path]) -> dict[str, Path]:
    """Image files, and those in folders, by the names that `decompress` will write.

    Folders are read as by the data set `folder`. Raises `UserError` if a folder has no image, or if
    a file cannot be unpacked beside the others.
    """
    files: dict[str, Path] = {}
    for path in paths:
        folder = path.resolve().name if path.is_dir() else ""
        for below, file in files_at([path], "INPUT").items():
            name = Path(folder, below).as_posix()
            name = name if name.lower().endswith(".png") else f"{name}.png"
            if name in files:
                raise UserError(
                    f"{file}: it would be unpacked as {name!r}, and so would {files[name]}"
                )
            _check_names([name], str(file))
            files[name] = file
    _check_names(list(files), "INPUT")
    return files


def _check_names(names: list[str], where: str) -> None:
    try:
        check_names(names)
    except ValueError as error:
        raise UserError(f"{where}: it cannot be unpacked: {error}") from None


def read_files(files: list[Path], shape: tuple[int, int, int], num_bins: int) -> Tensor:
    """Image files as they are: uint8 `(N, C, H, W)`, values 0..Q-1.

    Raises `UserError` naming a file that is missing, or has another shape or other values.
    """
    return torch.stack([_pixels(file, shape, num_bins) for file in files])


def _pixels(path: Path, shape: tuple[int, int, int], num_bins: int) -> Tensor:
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    try:
        with picture(path) as image:
            found = f"{image.width}x{image.height} {image.mode}"
            frames = getattr(image, "n_frames", 1)
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
    values = to_8bit(torch.arange(num_bins), num_bins).long()  # as `decompress` writes them
    image_values = torch.from_numpy(pixels.reshape(height, width, channels)).long()
    image_levels = torch.searchsorted(values, image_values)
    if (values[image_levels] != image_values).any():
        raise UserError(
            f"{path}: its values are not the {num_bins} that images of this model have "
            f"({', '.join(map(str, values[:4].tolist()))}, ..., 255): to keep fewer bits of it "
            f"would not be lossless"
        )
    return image_levels.to(torch.uint8).movedim(-1, 0)


def ordinary_sizes(images: Tensor, num_bins: int, progress: Progress = silent) -> dict[str, int]:
    """The bytes of all images in each lossless format of Pillow: as one file each, and in tall
    pictures (`tall NAME`). The slow options of `FORMATS` are tried too for few images.
    """
    names = {name: (name, False) for name in formats()}
    slow = [name for name in formats() if affordable(images, name)]
    names |= {f"{name} {FORMATS[name].slow}": (name, True) for name in slow}
    tall = [
        part.movedim(1, 0).flatten(1, 2)[None]
        for part in torch.split(images, tall_length(images.shape[2]))
    ]
    tasks = [
        functools.partial(_sizes, prefix + name, *names[name], part, num_bins)
        for name in names
        for prefix, pictures in (("", torch.split(images, STRIP)), ("tall ", tall))
        for part in pictures
    ]
    totals = {prefix + name: 0 for prefix in ("", "tall ") for name in names}
    lossy = set()
    for name, size in in_threads(tasks, len(tasks), progress):
        if size is None:
            lossy.add(name)
        else:
            totals[name] += size
    return {name: total for name, total in totals.items() if name not in lossy}


def _sizes(
    title: str, name: str, slow: bool, images: Tensor, num_bins: int, tick: Tick
) -> tuple[str, int | None]:
    try:
        sizes = file_sizes(images, num_bins, name, slow)
    except (OSError, ValueError):  # too tall for the format
        sizes = None
    tick(1)
    return title, None if sizes is None else int(sizes.sum())

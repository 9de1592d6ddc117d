"""The images that go into an archive, and their sizes in ordinary formats."""

import functools
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.datasets.base import picture
from flowtrain.errors import UserError, short
from flowtrain.latents.encoding import files_at, read_images
from flowtrain.pictures.grid import to_8bit
from flowtrain.pictures.lossless import FORMATS, affordable, file_sizes, formats
from flowtrain.system.console import console, silent
from flowtrain.system.files import check_names
from flowtrain.tools.archive.strips import STRIP, tall_length
from flowtrain.tools.archive.threads import Progress, Tick, in_threads


class Unfit(UserError):
    """An image file that would have to be converted."""


def from_files(
    paths: list[Path],
    model: LoadedModel,
    num_bins: int,
    out: Path,
    count: int | None,
    fit: bool = False,
) -> tuple[list[str], Tensor]:
    """Names and pixels of the first `count` image files at these paths; None stands for all. With
    `fit` the pixels are as by `latents.encoding.read_images`, and otherwise as by `read_files`.

    Raises `UserError`, also if one of them, or the model, is the output file `out`.
    """
    found = find_files(paths)
    for file in (*found.values(), model.checkpoint.path):
        if out.exists() and file.exists() and out.samefile(file):
            raise UserError(f"--out {out}: is one of the files that are read; give another name")
    names = list(found)[:count]
    files = [found[name] for name in names]
    if fit:
        return names, read_images(files, model, "INPUT")
    return names, read_files(files, model.flow.shape, num_bins)


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

    Raises `UserError` naming a file that is missing or damaged. Files of another shape or with
    other values are all printed first.
    """
    images, unfit = [], []
    for file in files:
        try:
            images.append(_pixels(file, shape, num_bins))
        except Unfit as error:
            unfit.append(str(error))
    if not unfit:
        return torch.stack(images)
    others = ""
    if len(unfit) > 1:
        for line in unfit:
            console.print(line)
        others = f", nor do {len(unfit) - 1} more of {len(files)} images, listed above"
    raise UserError(
        f"{unfit[0]}: does not fit the model{others}\n"
        f"the model is for {form_of(shape)} with {num_bins} levels, and nothing is converted, "
        f"because that would not be lossless\n"
        f"--fit packs copies of that size with these levels, not the originals"
    )


def form_of(shape: tuple[int, int, int]) -> str:
    """Width, height and mode of images, in Pillow's words."""
    channels, height, width = shape
    return f"{width}x{height} {'L' if channels == 1 else 'RGB'}"


def _pixels(path: Path, shape: tuple[int, int, int], num_bins: int) -> Tensor:
    channels, height, width = shape
    try:
        with picture(path) as image:
            found = f"{image.width}x{image.height} {image.mode}"
            frames = getattr(image, "n_frames", 1)
            fits = found == form_of(shape) and frames == 1
            # Of 16 bits of a colour, Pillow keeps 8. The decoders of PPM get the largest value.
            if fits and any(
                re.search(";16[BLN]", str(args)) or (codec[:3] == "ppm" and args[1] > 255)
                for codec, _, _, args in getattr(image, "tile", ())
            ):
                found, fits = f"{found} of 16 bits", False
            pixels = np.array(image) if fits else np.empty(0)
            # PNG's tRNS: one colour or level is transparent.
            transparent = "transparency" in image.info
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such image file") from None
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise UserError(f"{path}: cannot be read as an image ({short(error)})") from None
    if not fits:
        raise Unfit(f"{path}: {found}" if frames == 1 else f"{path}: {frames} pictures of {found}")
    if transparent:
        raise Unfit(f"{path}: a part of it is transparent")
    values = to_8bit(torch.arange(num_bins), num_bins).long()  # as `decompress` writes them
    image_values = torch.from_numpy(pixels.reshape(height, width, channels)).long()
    image_levels = torch.searchsorted(values, image_values)
    if (values[image_levels] != image_values).any():
        few = ", ".join(map(str, values[:4].tolist()))
        raise Unfit(f"{path}: its values are not the {num_bins} levels {few}, ..., 255")
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

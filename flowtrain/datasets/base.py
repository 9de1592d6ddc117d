"""What every data set gives (`Images`), held-out splits, and image files brought to a shape."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from flowtrain.errors import UserError, short
from flowtrain.types import Shape

Part = Literal["train", "test"]  # what a data set itself is divided into
Policy = Literal["crop", "stretch", "exact"]

# Without EPS, for which Pillow starts Ghostscript, whatever the file's suffix says.
READABLE = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


@dataclass(frozen=True)
class Images:
    """One split of a data set, described before any pixel is read or downloaded.

    shape: (C, H, W) of one image as stored.
    levels: Q; the values are 0..Q-1. None for real-valued data.
    read: gives the pixels, uint8 (N, C, H, W), float32 if real-valued: a C-contiguous array, or a
        read-only `np.memmap` where they may not fit in memory. Downloads on first use. Raises
        UserError or RunError.
    flip: whether a mirrored image belongs to the same distribution (the default of `data.flip`).
    labels: gives the classes of the same images, int64 (N,), from 0. None where there are none.
    key: identifies the content where hashing the pixels would be slow (None: hash the pixels).
    """

    shape: Shape
    levels: int | None
    read: Callable[[], np.ndarray]
    flip: bool = False
    key: str | None = None
    labels: Callable[[], np.ndarray] | None = None


def frozen_random(*key: int) -> np.random.RandomState:
    """A generator that depends on the key alone.

    numpy never changes the numbers of a RandomState. So a newer numpy neither moves images between
    splits nor makes other points.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def hold_out(n: int, held: int | float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split range(n) into (kept, held) sorted index arrays, the same for one seed everywhere.

    `held` is a count, or a fraction below 1 (rounded, at least one image); 0 holds out nothing.
    Raises UserError if `held` is neither, or if nothing would be kept.
    """
    if seed < 0:
        raise UserError(f"seed is {seed}: give a whole number that is not negative")
    if not held >= 0 or (held >= 1 and held != int(held)):
        raise UserError(f"cannot hold out {held} images: give a count, or a fraction below 1")
    count = int(held) if held >= 1 or held == 0 else max(1, round(n * held))
    if count >= n:
        raise UserError(f"cannot hold {count} of {n} images out: none is left to train on")
    order = frozen_random(seed).permutation(n)
    return np.sort(order[count:]), np.sort(order[:count])


def part_of(examples: np.ndarray, part: Part, seed: int) -> np.ndarray:
    """The part of examples that have no division of their own: a seeded tenth is the test split."""
    kept, held = hold_out(len(examples), 0.1, seed)
    chosen: np.ndarray = examples[kept if part == "train" else held]
    return chosen


def resize(image: Image.Image, shape: Shape, policy: Policy) -> np.ndarray:
    """Bring an image to `shape` (C, H, W), C being 1 (luma) or 3 (RGB): uint8, 0..255.

    Upright by its EXIF orientation; transparency is composited on white, as image viewers show it;
    16-bit grey keeps its upper 8 bits; a palette or CMYK becomes RGB. Then, by policy:
    `crop`: the largest centred part of the right aspect ratio, resampled (Lanczos, antialiased);
    `stretch`: the whole image, resampled; `exact`: the pixels as they are.
    Raises UserError if the policy is `exact` and the size differs.
    """
    channels, height, width = shape
    image = _convert(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
    if policy == "exact" and image.size != (width, height):
        raise UserError(
            f"the image is {image.width}x{image.height} (width x height), not {width}x{height}: "
            "resize it, or choose the resize policy crop or stretch"
        )
    box = (0.0, 0.0, float(image.width), float(image.height))
    if policy == "crop":
        box = _centre(image.size, (width, height))
    # Same-sized images come through Pillow's resize unchanged, bit for bit.
    image = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    pixels = np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (C, H, W)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow clips at 255 here, which turns 16-bit images white
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert(mode)
    if image.mode == "F":
        raise UserError("the image has floating-point pixels, of unknown range: save it as 8-bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _centre(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    scale = min(size[0] / target[0], size[1] / target[1])
    w, h = min(target[0] * scale, size[0]), min(target[1] * scale, size[1])
    left, top = (size[0] - w) / 2, (size[1] - h) / 2
    if scale == 1:  # nothing to resample: half a pixel off centre is better than a blur
        left, top = int(left), int(top)
    return left, top, left + w, top + h


def decode(path: Path, shape: Shape, policy: Policy) -> np.ndarray:
    """Read one image file as uint8 (C, H, W), 0..255; raises whatever Pillow or `resize` raises."""
    with Image.open(path, formats=READABLE) as image:
        if policy != "exact":  # lets a JPEG decode at a half, quarter or eighth: much faster
            image.draft(None, (2 * max(shape[1:]),) * 2)
        return resize(image, shape, policy)


def open_image(path: Path, shape: Shape, levels: int, policy: Policy = "crop") -> np.ndarray:
    """Read a user's image file as uint8 (C, H, W), with values 0..levels-1 from `quantize`.

    Raises UserError that names the path.
    """
    try:
        pixels = decode(path, shape, policy)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such image file") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise UserError(f"{path} cannot be read as an image ({short(error)})") from None
    return quantize(pixels, levels)


def quantize(pixels: np.ndarray, levels: int) -> np.ndarray:
    """Values 0..255 to 0..Q-1, uint8.

    256 levels keep the values, and 2**n levels their upper n bits, as `data.n_bits` does. Any other
    number Q takes round(v / 255 * (Q - 1)).
    """
    if levels & (levels - 1) == 0:
        reduced: np.ndarray = pixels >> (8 - (levels.bit_length() - 1))
        return reduced
    return np.round(pixels / 255 * (levels - 1)).astype(np.uint8)


def contiguous(pixels: Any) -> np.ndarray:
    """uint8 (N, C, H, W) in C order, copied only if it is not."""
    return np.ascontiguousarray(pixels, dtype=np.uint8)

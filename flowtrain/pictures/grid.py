"""Pictures: grids, PNG and GIF files."""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowtrain.system import capacity
from flowtrain.types import Shape

# Smaller images are enlarged in pictures, to whole multiples of their size.
SMALLEST_SIDE = 32
SMALLEST_GRID = 800  # width in pixels
SMALLEST_GIF = 256  # longer side in pixels
FRAME, GREY = 2, 64  # width and value of the pixels between and around the images of a grid
BESIDE = 4  # blocks in a row
LINE, FONT_SIZE = 24, 15  # height of a title, and of its letters, in pixels


def to_8bit(images: Tensor, num_bins: int) -> Tensor:
    """Values 0..Q-1 to 0..255."""
    return (images.to(torch.int32) * 255 // max(num_bins - 1, 1)).to(torch.uint8)


def grid(images: Tensor, num_bins: int, columns: int, beside: int = 1) -> Tensor:
    """Images `(N, C, H, W)` with values 0..Q-1 as one picture, uint8 `(3, H', W')`.

    Small images are enlarged, until the grid, with those `beside` it, is `SMALLEST_GRID` pixels
    wide. Each image has a grey frame, unless it is the only one, as in torchvision's `make_grid`,
    whose import takes a second.
    """
    count = len(images)
    factor = _enlargement(images.shape, columns, beside)
    pixels = to_8bit(images.cpu(), num_bins)
    enlarged = pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    height, width = enlarged.shape[-2:]
    if count == 1:
        return enlarged[0].expand(3, -1, -1)
    columns = min(columns, count)
    rows = -(-count // columns)
    picture = enlarged.new_full(
        (3, rows * (height + FRAME) + FRAME, columns * (width + FRAME) + FRAME), GREY
    )
    for index, image in enumerate(enlarged):
        row, column = divmod(index, columns)
        top, left = FRAME + row * (height + FRAME), FRAME + column * (width + FRAME)
        picture[:, top : top + height, left : left + width] = image  # one channel becomes three
    return picture


def blocks(images: Tensor, num_bins: int, columns: int, titles: Sequence[str]) -> Tensor:
    """An equal part of the images `(N, C, H, W)` below each title, as a grid: uint8 `(3, H', W')`.
    Up to `BESIDE` grids are side by side, unless each is a single row.
    """
    parts = images.chunk(len(titles))
    beside = 1 if len(parts[0]) <= columns else min(BESIDE, len(titles))
    grids = [grid(part, num_bins, columns, beside) for part in parts]
    font = ImageFont.load_default(FONT_SIZE)
    width = max(grids[0].shape[2], *(math.ceil(font.getlength(title)) for title in titles)) + LINE
    height = grids[0].shape[1] + LINE
    size = (beside * width - LINE, -(-len(titles) // beside) * height)
    picture = Image.new("RGB", size, "white")
    for index, (title, pixels) in enumerate(zip(titles, grids, strict=True)):
        left, top = index % beside * width, index // beside * height
        ImageDraw.Draw(picture).text((left, top + LINE // 2), title, "black", font, anchor="lm")
        picture.paste(picture_of(pixels.numpy()), (left, top + LINE))
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)


def _enlargement(shape: Sequence[int], columns: int, beside: int = 1) -> int:
    """The factor by which a grid enlarges images `(N, C, H, W)`."""
    count, _, height, width = shape
    factor = max(1, -(-SMALLEST_SIDE // min(height, width)))
    columns = beside * min(columns, count)
    return factor if count == beside == 1 else max(factor, -(-SMALLEST_GRID // (columns * width)))


def require_room(images: int, shape: Shape, columns: int, what: str) -> None:
    """Raises `UserError` that begins with `what` if images and their grid do not fit in memory."""
    channels, height, width = shape
    factor = _enlargement((images, *shape), columns)
    capacity.require(images * factor**2 * height * width * (channels + 3), what)


def picture_of(image: np.ndarray) -> Image.Image:
    """An image `(1, H, W)` in grey or `(3, H, W)` in colour, uint8."""
    return Image.fromarray(
        image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    )


def png(pixels: Tensor) -> bytes:
    """A `(3, H, W)` uint8 picture as a PNG file."""
    buffer = io.BytesIO()
    picture_of(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def gif(frames: Sequence[Image.Image], milliseconds: int = 120) -> bytes:
    """Pictures of one size as an endless animation, in which small ones are enlarged."""
    buffer = io.BytesIO()
    factor = max(1, -(-SMALLEST_GIF // max(frames[0].size)))
    size = (factor * frames[0].width, factor * frames[0].height)
    first, *rest = (
        frame.convert("RGB").quantize(256).resize(size, Image.Resampling.NEAREST)
        for frame in frames
    )
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return buffer.getvalue()


def animation(frames: Sequence[Tensor]) -> bytes:
    """`(3, H, W)` uint8 pictures as a GIF file."""
    return gif([picture_of(frame.numpy()) for frame in frames])

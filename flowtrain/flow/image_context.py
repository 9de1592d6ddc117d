"""A context of an image that follows from the image itself: a smaller or a grey version of it.

With c(x) as the context of the networks, a flow models log P(x | c(x)): super-resolution (SRFlow,
Lugmayr et al. 2020, arXiv:2006.14200) and colorization (Ardizzone et al. 2019, arXiv:1907.02392).
Here alone it is computed, so it is the same in training and everywhere else. Since c is a function
of x, `log P(x) = log P(c(x)) + log P(x | c(x))`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowtrain.errors import UserError
from flowtrain.types import Shape

GREY = (19595, 38470, 7471)  # red, green and blue of ITU-R 601-2 in 2**-16, as in Pillow's mode L


@dataclass(frozen=True)
class ImageContext:
    """The context of images of shape `image` with the values 0..num_bins-1.

    `downsample` is the mean of each patch of `factor` x `factor` pixels, `grey` the luminance of
    each pixel. Both are rounded to levels.

    Raises:
        UserError: if such images have no such context.
    """

    kind: Literal["downsample", "grey"]
    factor: int
    image: Shape
    num_bins: int

    def __post_init__(self) -> None:
        channels, height, width = self.image
        if self.kind == "grey" and channels != 3:
            raise UserError(
                f"model.context: grey needs images with 3 channels, and these have {channels}"
            )
        if self.kind == "downsample" and (height % self.factor or width % self.factor):
            raise UserError(
                f"model.context_factor: {self.factor} does not divide both sides of images of "
                f"{height}x{width} pixels"
            )

    @property
    def words(self) -> str:
        """What is given, for messages."""
        _, height, width = self.shape
        return "the grey image" if self.kind == "grey" else f"the image at {height}x{width} pixels"

    @property
    def shape(self) -> Shape:
        """Shape of a context, `(C', H', W')`."""
        channels, height, width = self.image
        if self.kind == "grey":
            return 1, height, width
        return channels, height // self.factor, width // self.factor

    def of(self, x: Tensor) -> Tensor:
        """The context of integers `x` `(B, C, H, W)`: uint8 `(B, C', H', W')`."""
        x = x.to(torch.int32)
        if self.kind == "grey":
            red, green, blue = (part * each for part, each in zip(x.unbind(1), GREY, strict=True))
            return ((red + green + blue + 2**15) >> 16)[:, None].to(torch.uint8)
        f = self.factor
        sums = x.unflatten(3, (-1, f)).unflatten(2, (-1, f)).sum((3, 5), dtype=torch.int32)
        return torch.div(sums + f * f // 2, f * f, rounding_mode="floor").to(torch.uint8)

    def checked(self, context: Tensor | None, count: int) -> Tensor:
        """The context of `count` images, if it is one, also as an array of NumPy. Raises
        `ValueError` if it is not.
        """
        context = None if context is None else torch.as_tensor(context)
        if context is None or tuple(context.shape) != (count, *self.shape):
            raise ValueError(
                f"the model is given {self.words}: expected a context of shape "
                f"({count}, {', '.join(map(str, self.shape))}), got "
                f"{'none' if context is None else tuple(context.shape)}; context_of(x) is that of "
                f"images"
            )
        low, high = map(int, context.long().aminmax())  # torch has no extremes of uint16
        no_integers = context.is_floating_point() or context.dtype == torch.bool
        if no_integers or low < 0 or high >= self.num_bins:
            raise ValueError(f"expected a context of integers in 0..{self.num_bins - 1}")
        return context

    def scaled(self, context: Tensor, dtype: torch.dtype) -> Tensor:
        """What the networks see of a context: its values as reals in [-1/2, 1/2]."""
        return (context.to(dtype) + 0.5) / self.num_bins - 0.5

    def shown(self, context: Tensor) -> Tensor:
        """A context in the shape of images, for pictures: uint8 `(B, C, H, W)`."""
        if self.kind == "grey":
            return context.expand(-1, 3, -1, -1)
        return context.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)

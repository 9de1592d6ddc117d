"""What turns images into bits on a stack and back, of whatever kind of flow."""

from typing import Protocol

import torch
from torch import Tensor

from flowtrain.bijections.ordinal import discrete_model
from flowtrain.flow.flow import Flow
from flowtrain.tools.archive.codec import Codec
from flowtrain.tools.archive.direct import DirectCodec
from flowtrain.tools.archive.stack import Stack

PROBE = 2  # images


class Coder(Protocol):
    """A flow as an exact map between images and bits on a stack. It computes on the CPU.

    The same images, coded together in the same order by one thread of torch, give the same bits.
    """

    levels: int
    shape: tuple[int, int, int]
    dims: int
    borrows: bool  # whether coding takes bits off the stack, which the first images must give
    chunk: int  # images coded together, at most
    stream: int  # images on one stack, at most
    checked: int  # images with one checksum in the archive

    def encode(self, x: Tensor, stack: Stack) -> None:
        """Puts images, uint8 `(B, C, H, W)`, onto the stack.

        Raises `Uncodable` and `Exhausted`, after which the stack is useless.
        """

    def decode(self, count: int, stack: Stack) -> Tensor:
        """The inverse of `encode`: takes images off the stack, uint8 `(count, C, H, W)`.

        The stack then holds what `encode` began with, but only if both computed exactly the same
        numbers. Raises almost anything where they plainly did not.
        """

    def fingerprint(self, x: Tensor) -> int:
        """A checksum of the numbers that the model computes for images."""


def coder_of(flow: Flow) -> Coder:
    """The coder of a flow.

    Raises `UserError` where there is none: for a layer without a rule, for a model of real-valued
    data, and for one with classes.
    """
    return Codec(flow) if discrete_model(flow.bijection) is None else DirectCodec(flow)


def probe(coder: Coder) -> int:
    """A checksum of what the model computes for fixed images: a different one means that this
    machine computes other numbers.
    """
    channels, height, width = coder.shape
    ramp = torch.arange(height)[:, None] + torch.arange(width) * 2
    level = torch.arange(PROBE * channels).view(PROBE, channels, 1, 1) * 3
    images = ((ramp + level) * coder.levels // (4 * (height + width))) % coder.levels
    return coder.fingerprint(images.to(torch.uint8))

"""Streams: some images on one stack of bits, and the bits that they borrow first.

Bits-back coding begins by taking bits off the stack. So a stream begins with its first images (its
carriers), compressed in the ordinary way. Every image after them costs the flow's bound. More and
more images are coded together (a chunk) as the stack grows.
"""

import math
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowtrain.errors import UserError
from flowtrain.tools.archive.codec import Coder
from flowtrain.tools.archive.format import StreamDescription
from flowtrain.tools.archive.stack import (
    RESERVE,
    Exhausted,
    Stack,
    Uncodable,
    random_words,
    words_of,
)
from flowtrain.tools.archive.strips import strip, unstrip
from flowtrain.tools.archive.threads import Tick

MOST_CARRIERS = 32  # images; if they are too small, random bits fill up the rest


class EncodedStream(NamedTuple):
    """Some images on one stack. `images` are their indices, the carriers first."""

    images: list[int]
    described: StreamDescription
    initial_bits: int
    words: np.ndarray

    @property
    def net_bits(self) -> int:
        """The bits of all images but the carriers."""
        return 32 * len(self.words) - self.initial_bits


class Estimate(NamedTuple):
    """From a few images: the bits that the first image borrows, and seconds per image."""

    borrowed: int
    encode_seconds: float
    decode_seconds: float


def estimate(coder: Coder, images: Tensor) -> Estimate | None:
    """Codes and decodes images `(N, C, H, W)`, without uncodable ones, on a stack of random bits.

    None if none can be coded. Raises `UserError` if they do not come back.
    """
    while len(images):
        stack = Stack(random_words(4 * images.numel()))
        before, started = stack.bits, time.perf_counter()
        try:
            coder.encode(images, stack)
        except Uncodable as error:
            images = images[~error.images]
            continue
        encoded = time.perf_counter()
        back = coder.decode(len(images), stack)
        seconds = time.perf_counter() - encoded
        if not torch.equal(back, images):
            raise UserError(
                "the model's numerics do not reproduce on this machine: it cannot be used to "
                "compress"
            )
        borrowed = 0
        if coder.borrows:
            borrowed = math.ceil(1.1 * (before - stack.lowest) / len(images)) + 2 * RESERVE
        return Estimate(borrowed, (encoded - started) / len(images), seconds / len(images))
    return None


def encode_stream(
    coder: Coder, images: Tensor, indices: list[int], borrowed: int, tick: Tick, sides: Tensor
) -> EncodedStream:
    """Codes the images at these indices, without uncodable ones. `borrowed` is an estimate. All
    `images` `(N, C, H, W)` are turned to their `sides` `(N,)`.
    """
    while True:
        try:
            return _encode_stream(coder, images, indices, borrowed, tick, sides)
        except Exhausted:  # one image borrowed more than the carriers have
            borrowed = borrowed * 5 // 4


def _encode_stream(
    coder: Coder, images: Tensor, indices: list[int], borrowed: int, tick: Tick, sides: Tensor
) -> EncodedStream:
    carriers, blob = 0, b""
    while 8 * len(blob) < borrowed and carriers < min(len(indices), MOST_CARRIERS):
        carriers += 1
        blob = strip(images[indices[:carriers]])
    initial = blob + random_words(borrowed).tobytes()[: max(borrowed // 8 + 1 - len(blob), 0)]
    stack = Stack(words_of(initial + bytes(-len(initial) % 4)))
    initial_bits, done, rest = stack.bits, indices[:carriers], indices[carriers:]
    chunks: list[int] = []
    tick(carriers)
    while rest:
        chunk = rest[: coder.chunk]
        if coder.borrows:
            chunk = chunk[: max((stack.bits - RESERVE) // borrowed, 1)]
        while chunk:
            attempt = stack.copy()
            try:
                coder.encode(images[chunk], attempt, sides[chunk])
            except Uncodable as error:
                bad = {index for index, flag in zip(chunk, error.images, strict=True) if flag}
                chunk = [index for index in chunk if index not in bad]
                rest = [index for index in rest if index not in bad]
                tick(len(bad))
            except Exhausted:
                if len(chunk) == 1:
                    raise
                chunk = chunk[: len(chunk) // 2]
            else:
                stack = attempt
                chunks.append(len(chunk))
                done, rest = done + chunk, rest[len(chunk) :]
                tick(len(chunk))
                break
    described = StreamDescription(
        images=len(done), carriers=carriers, carrier_bytes=len(blob), chunks=chunks
    )
    return EncodedStream(done, described, initial_bits, stack.words())


def decode_stream(
    coder: Coder, words: np.ndarray, described: StreamDescription, tick: Tick, sides: Tensor
) -> Tensor:
    """The images of a stream, uint8 `(N, C, H, W)`, turned to their `sides` `(N,)`.

    If the model computes other numbers than before, this raises, or the images are wrong.
    """
    stack = Stack(words, again=True)
    parts = []
    of_chunks = sides[described.carriers :].split(described.chunks)
    for count, of_chunk in reversed(list(zip(described.chunks, of_chunks, strict=True))):
        parts.append(coder.decode(count, stack, of_chunk))
        tick(count)
    blob = stack.first_words().astype("<u4").tobytes()[: described.carrier_bytes]
    if described.carriers:
        parts.append(torch.empty(described.carriers, *coder.shape, dtype=torch.uint8))
        unstrip(blob, parts[-1])
        tick(described.carriers)
    return torch.cat(parts[::-1])

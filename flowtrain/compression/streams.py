"""Streams of images on one stack each, and what they borrow at their start."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.compression import format as archive
from flowtrain.compression.codec import Codec
from flowtrain.compression.format import StreamDescription
from flowtrain.compression.stack import ENOUGH, Exhausted, Stack, Uncodable
from flowtrain.errors import UserError

CHUNK = 16  # images coded together, at most


MOST_CARRIERS = 32  # images; where they are too small, random bits fill up what is missing


Progress = Callable[[int, int], None]


@dataclass
class Stream:
    """Some images on one stack. `images` are their indices, the carriers first."""

    images: list[int]
    carriers: int = 0
    carrier_bytes: int = 0
    initial_bits: int = 0
    chunks: list[int] = field(default_factory=list)
    words: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))

    @property
    def net_bits(self) -> int:
        """Of all images but the carriers."""
        return 32 * len(self.words) - self.initial_bits

    def description(self) -> StreamDescription:
        return StreamDescription(
            images=len(self.images),
            carriers=self.carriers,
            carrier_bytes=self.carrier_bytes,
            chunks=self.chunks,
        )


@dataclass
class Estimate:
    """What a few of the images say about all: bits that the first image borrows, seconds of an
    image each way.
    """

    borrowed: int
    encode_seconds: float
    decode_seconds: float


def random_words(count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(0)).integers(0, 2**32, count, dtype=np.uint32)


@contextlib.contextmanager
def one_thread() -> Iterator[int]:
    """Within it torch uses one thread; gives the number that it had: of streams at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def estimate(codec: Codec, images: Tensor) -> Estimate:
    """Codes and decodes the first images `(N, C, H, W)` that can be coded, on a stack of random
    bits.

    Raises `UserError` if they do not come back.
    """
    while len(images):
        stack = Stack(random_words(4 * images.numel()))
        before, started = stack.bits, time.perf_counter()
        try:
            codec.encode(images, stack)
        except Uncodable as error:
            images = images[~error.images]
            continue
        encoded = time.perf_counter()
        back = codec.decode(len(images), stack)
        seconds = time.perf_counter() - encoded
        if not torch.equal(back, images):
            raise UserError(
                "the model's numerics do not reproduce on this machine: it cannot be used to "
                "compress"
            )
        borrowed = math.ceil(1.1 * (before - stack.lowest) / len(images)) + 2 * ENOUGH
        return Estimate(borrowed, (encoded - started) / len(images), seconds / len(images))
    return Estimate(0, 0.0, 0.0)


def encode_stream(
    codec: Codec, images: Tensor, indices: list[int], borrowed: int, tick: Callable[[int], None]
) -> tuple[Stream, list[int]]:
    """Codes the images with these indices; also gives the indices of those that could not be."""
    while True:
        try:
            return _encode_stream(codec, images, indices, borrowed, tick)
        except Exhausted:  # one image borrowed more than the carriers have
            borrowed = borrowed * 5 // 4


def _encode_stream(
    codec: Codec, images: Tensor, indices: list[int], borrowed: int, tick: Callable[[int], None]
) -> tuple[Stream, list[int]]:
    carriers, blob = 0, b""
    while 8 * len(blob) < borrowed and carriers < min(len(indices), MOST_CARRIERS):
        carriers += 1
        blob = archive.strip(images[indices[:carriers]])
    initial = blob + random_words(borrowed).tobytes()[: max(borrowed // 8 + 1 - len(blob), 0)]
    stack = Stack(words_of(initial + bytes(-len(initial) % 4)))
    stream = Stream(list(indices[:carriers]), carriers, len(blob), stack.bits)
    rest, dropped = list(indices[carriers:]), []
    tick(carriers)
    while rest:
        chunk = rest[: min(max((stack.bits - ENOUGH) // borrowed, 1), CHUNK)]
        while chunk:
            attempt = stack.copy()
            try:
                codec.encode(images[chunk], attempt)
            except Uncodable as error:
                bad = [
                    index for index, flag in zip(chunk, error.images.tolist(), strict=True) if flag
                ]
                dropped += bad
                chunk = [index for index in chunk if index not in bad]
                rest = [index for index in rest if index not in bad]
                tick(len(bad))
            except Exhausted:
                if len(chunk) == 1:
                    raise
                chunk = chunk[: len(chunk) // 2]
            else:
                stack = attempt
                stream.chunks.append(len(chunk))
                stream.images += chunk
                rest = rest[len(chunk) :]
                tick(len(chunk))
                break
    stream.words = stack.words()
    return stream, dropped


def decode_stream(
    codec: Codec, words: np.ndarray, described: StreamDescription, tick: Callable[[int], None]
) -> Tensor:
    """The images of a stream, uint8 `(N, C, H, W)`. Where the model's numerics differ it raises, or
    they are wrong.
    """
    stack = Stack(words, again=True)
    parts = []
    for count in reversed(described.chunks):
        parts.append(codec.decode(count, stack))
        tick(count)
    blob = stack.first_words().astype("<u4").tobytes()[: described.carrier_bytes]
    if described.carriers:
        parts.append(archive.unstrip(blob, codec.shape, described.carriers))
        tick(described.carriers)
    return torch.cat(parts[::-1])


def words_of(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<u4").astype(np.uint32)


def in_threads(
    tasks: Sequence[Callable[[Callable[[int], None]], Any]], total: int, progress: Progress
) -> list[Any]:
    """Runs the tasks, as many at a time as torch has threads. Each calls what it is given with what
    it has done.
    """
    lock, stopped, done = threading.Lock(), threading.Event(), 0

    def tick(count: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise InterruptedError
        with lock:
            done += count
            progress(min(done, total), total)

    with one_thread() as threads, ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(task, tick) for task in tasks]
        try:
            for future in as_completed(futures):  # the first that fails ends all
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]

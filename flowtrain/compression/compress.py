"""A lossless archive of images, coded with a flow: streams, what they borrow at their start, what
is stored plainly.

Bits-back coding begins by taking bits off the stack. A stream begins with its first images,
compressed in the ordinary way (its carriers), so that what it borrows is of use; every image after
them costs what the flow's bound says. More and more images are coded together (a chunk), as the
stack grows. Streams are independent, one thread each.
"""

import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.compression import format as archive
from flowtrain.compression.codec import Codec, model_bytes, model_hash, probe, versions
from flowtrain.compression.streams import (
    CHUNK,
    Estimate,
    Progress,
    Stream,
    encode_stream,
    estimate,
    in_threads,
    one_thread,
)
from flowtrain.data.splits import Split
from flowtrain.evaluation.score import score

STREAM = 1000  # images of a stream, at most


@dataclass
class Prepared:
    """Images, uint8 `(N, C, H, W)`, and what the model says about them before any is coded."""

    model: LoadedModel
    codec: Codec
    probe: int
    images: Tensor
    bound: Tensor  # bits of each image, `(N,)`: the single-draw bound that `evaluate` computes
    promising: list[
        int
        # the images worth coding: one that the model knows nothing about is not worth more than
        # stored
    ]
    expected: Estimate


def prepare(
    model: LoadedModel, images: Tensor, progress: Progress = lambda done, total: None
) -> Prepared:
    """What comes before coding. `progress` is called with images scored and all.

    Raises `UserError` for a model that has no rules or does not invert, `FloatingPointError` for
    weights that are not finite.
    """
    with one_thread():
        codec = Codec(model.flow)
        probed = probe(codec)
    split = Split(images.numpy(), np.arange(len(images)), 0)
    bound = score(model.flow, split, progress=progress).log_prob / -math.log(2)
    promising = (bound < codec.dims * math.log2(codec.levels)).nonzero()[:, 0].tolist()
    with one_thread():
        expected = estimate(codec, images[promising[:CHUNK]])
    return Prepared(model, codec, probed, images, bound, promising, expected)


def strips(images: Tensor, progress: Progress = lambda done, total: None) -> list[bytes]:
    """Images `(N, C, H, W)`, stored without a flow: `archive.strip` of every few."""
    tasks = [
        functools.partial(_strip, part)
        for part in images.split(archive.strip_length(images.shape[2]))
    ]
    return in_threads(tasks, len(images), progress) if len(images) else []


def _strip(images: Tensor, tick: Callable[[int], None]) -> bytes:
    data = archive.strip(images)
    tick(len(images))
    return data


@dataclass
class Compressed:
    """An archive's bytes, and what was measured on the way. Bits are those of all images
    together.
    """

    data: bytes
    stored: int  # images that are stored without the flow, apart from the carriers
    carriers: int
    coded: int  # images
    net_bits: int  # of the coded images
    bound_bits: float  # of the coded images: the single-draw bound that `evaluate` computes
    initial_bits: int
    seconds: float  # of coding


def compress(
    prepared: Prepared,
    names: list[str] | str,
    *,
    plain: list[bytes] | None = None,
    embed: bool = False,
    stream_size: int = STREAM,
    progress: Progress = lambda done, total: None,
    announce: Callable[[Estimate, int], None] = lambda estimate, images: None,
) -> Compressed:
    """An archive of images with values 0..Q-1.

    Args:
        names: a file name for each, or one word, of which the names are made.
        plain: the images' `strips`: where the flow takes more than they do, they are the archive.
            Without them it is made with the flow in any case.
        embed: puts the model into the archive, if it is made with the flow.
        stream_size: images of a stream, at most.
        progress: called with images done and all.
        announce: called once before the coding, with what it will take, and the number of images.
    """
    images, bound, promising = prepared.images, prepared.bound, prepared.promising
    without = math.inf if plain is None else len(_packed(prepared, names, [], plain, b""))
    embedded = model_bytes(prepared.model) if embed else b""
    number = -(-len(promising) // stream_size)  # of streams
    streams: list[Stream] = []
    data = b""
    started = time.perf_counter()
    if prepared.expected.borrowed and (
        plain is None or _promises(prepared, number, plain, len(embedded))
    ):
        announce(prepared.expected, len(promising))
        tasks = [
            functools.partial(
                encode_stream, prepared.codec, images, part.tolist(), prepared.expected.borrowed
            )
            for part in np.array_split(np.array(promising), number)
        ]
        streams = [stream for stream, _ in in_threads(tasks, len(promising), progress)]
    seconds = time.perf_counter() - started
    if any(stream.chunks for stream in streams):  # there may be no more than carriers
        data = _packed(
            prepared, names, streams, strips(images[_others(streams, len(images))]), embedded
        )
    if not data or len(data) >= without:
        streams = []
        data = _packed(prepared, names, [], strips(images) if plain is None else plain, b"")
    coded = [index for stream in streams for index in stream.images[stream.carriers :]]
    return Compressed(
        data=data,
        stored=len(_others(streams, len(images))),
        carriers=sum(stream.carriers for stream in streams),
        coded=len(coded),
        net_bits=sum(stream.net_bits for stream in streams),
        bound_bits=bound[coded].sum().item(),
        initial_bits=sum(stream.initial_bits for stream in streams),
        seconds=seconds,
    )


def _promises(prepared: Prepared, streams: int, plain: list[bytes], model_bytes: int) -> bool:
    """Whether the flow might take less than the strips `plain`, give or take a twentieth: coding
    will tell.
    """
    plain_bits = 8 * sum(len(part) for part in plain) / len(prepared.images)  # of an image
    bound = prepared.bound[prepared.promising]
    carriers = prepared.expected.borrowed / plain_bits  # of a stream
    bits = bound.sum().item() + streams * (
        prepared.expected.borrowed - carriers * bound.mean().item()
    )
    return streams * carriers < len(bound) and bits + 8 * model_bytes < 1.05 * plain_bits * len(
        bound
    )


def _others(streams: list[Stream], count: int) -> list[int]:
    """The images that are in no stream."""
    used = {index for stream in streams for index in stream.images}
    return [index for index in range(count) if index not in used]


def _packed(
    prepared: Prepared,
    names: list[str] | str,
    streams: list[Stream],
    stored: list[bytes],
    embedded: bytes,
) -> bytes:
    codec, model = prepared.codec, prepared.model
    description: dict[str, Any] = {
        "shape": list(codec.shape),
        "levels": codec.levels,
        "names": names,
    }
    if isinstance(names, str):
        description["count"] = len(prepared.images)
    parts = [
        np.array([archive.checksum(image) for image in prepared.images], "<u4").tobytes(),
        *stored,
    ]
    if streams:
        description["stored"] = _others(streams, len(prepared.images))
        description["streams"] = [stream.description().model_dump() for stream in streams]
        parts += [stream.words.astype("<u4").tobytes() for stream in streams]
        path = os.fsencode(model.checkpoint.path).decode(errors="replace")
        described = {
            "hash": model_hash(model),
            "path": path,
            "weights": model.weights,
            "embedded": bool(embedded),
        }
        description |= {"model": described, "probe": prepared.probe, "versions": versions()}
        if embedded:
            parts.append(embedded)
    return archive.pack(description, parts)

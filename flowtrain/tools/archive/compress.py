"""A lossless archive of images, coded with a flow or stored in strips, whichever is smaller."""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints import zoo
from flowtrain.checkpoints.load import LoadedModel, model_hash
from flowtrain.data.splits import Split
from flowtrain.evaluation.score import score
from flowtrain.system.console import silent
from flowtrain.system.threads import one_thread
from flowtrain.tools.archive import format as archive
from flowtrain.tools.archive.coder import Coder, coder_of, probe
from flowtrain.tools.archive.inputs import Selection
from flowtrain.tools.archive.model import model_bytes, versions
from flowtrain.tools.archive.streams import EncodedStream, Estimate, encode_stream, estimate
from flowtrain.tools.archive.strips import strip_length, strips
from flowtrain.tools.archive.threads import Progress, in_threads

Stage = Callable[[str], AbstractContextManager[Progress]]  # such as `ProgressBar`


@contextlib.contextmanager
def silent_stage(title: str) -> Iterator[Progress]:
    """A stage whose progress nobody sees."""
    yield silent


@dataclass
class Forecast:
    """What coding will take: threads, and seconds to encode and to decode."""

    threads: int
    encode_seconds: float
    decode_seconds: float


@dataclass
class Compressed:
    """An archive's bytes, and what was measured on the way.

    The bits are those of all images together.
    """

    data: bytes
    stored: int  # images that are stored without the flow, apart from the carriers
    carriers: int
    coded: int  # images
    net_bits: int  # of the coded images
    bound_bits: float  # of the coded images, or of all where there are none: see `Prepared.bound`
    initial_bits: int
    seconds: float  # of coding
    codable: bool  # whether there was an image worth coding


def compress(
    model: LoadedModel,
    selection: Selection,
    *,
    embed: bool = False,
    stage: Stage = silent_stage,
    announce: Callable[[Forecast], None] = lambda forecast: None,
) -> Compressed:
    """The smaller of two archives of the selected images: one coded with the flow, and one in
    strips.

    Args:
        embed: puts the model into the archive, if it is made with the flow.
        stage: opens the progress of a named part of the work.
        announce: called once before the coding, if it is tried.

    Raises `UserError` for a model that has no rules or does not invert, and `FloatingPointError`
    for weights that are not finite.
    """
    with stage("scoring") as progress:
        prepared = prepare(model, selection.images, progress)
    with stage("packing without the flow") as progress:
        plain = strips(selection.images, progress)
    return choose(
        prepared, selection.names, plain=plain, embed=embed, stage=stage, announce=announce
    )


@dataclass
class Prepared:
    """Images, uint8 `(N, C, H, W)`, and what the model says about them before any is coded."""

    model: LoadedModel
    coder: Coder
    probe: int
    images: Tensor
    bound: Tensor  # bits of each image, `(N,)`: the single-draw bound that `evaluate` computes
    # The images worth coding: one about which the model knows nothing is better stored.
    promising: list[int]
    expected: Estimate | None  # None where none can be coded


def prepare(model: LoadedModel, images: Tensor, progress: Progress = silent) -> Prepared:
    """What comes before coding. `progress` is called with the images scored and all of them.

    Raises as `compress` does.
    """
    with one_thread():
        coder = coder_of(model.flow)
        probed = probe(coder)
    split = Split(images.numpy(), np.arange(len(images)), 0)
    bound = score(model.flow, split, progress=progress).log_prob / -math.log(2)
    promising = (bound < coder.dims * math.log2(coder.levels)).nonzero()[:, 0].tolist()
    with one_thread():
        expected = estimate(coder, images[promising[: coder.chunk]])
    return Prepared(model, coder, probed, images, bound, promising, expected)


def choose(
    prepared: Prepared,
    names: list[str] | str,
    *,
    plain: list[bytes] | None = None,
    embed: bool = False,
    stream_size: int | None = None,
    stage: Stage = silent_stage,
    announce: Callable[[Forecast], None] = lambda forecast: None,
) -> Compressed:
    """The smaller archive. `plain` are the images' strips; without them, the flow is always tried.

    `names` are a file name per image, or one word, of which the names are made. `stream_size` is
    the largest number of images on a stack, by default the coder's.
    """
    stream_size = stream_size or prepared.coder.stream
    images, bound, promising = prepared.images, prepared.bound, prepared.promising
    without = math.inf if plain is None else len(_pack(prepared, names, [], plain, b""))
    embedded = model_bytes(prepared.model) if embed else b""
    number = -(-len(promising) // stream_size)  # of streams
    streams: list[EncodedStream] = []
    data = b""
    seconds = 0.0
    expected = prepared.expected
    if expected and (plain is None or _promises(prepared, expected, number, plain, len(embedded))):
        announce(_forecast(expected, len(promising), number))
        started = time.perf_counter()
        tasks = [
            functools.partial(
                encode_stream, prepared.coder, images, part.tolist(), expected.borrowed
            )
            for part in np.array_split(np.array(promising), number)
        ]
        with stage("compressing") as progress:
            streams = in_threads(tasks, len(promising), progress)
        seconds = time.perf_counter() - started
    if any(stream.chunks for stream in streams):  # there may be no more than carriers
        stored = strips(images[_not_in(streams, len(images))])
        data = _pack(prepared, names, streams, stored, embedded)
    if not data or len(data) >= without:
        streams = []
        data = _pack(prepared, names, [], strips(images) if plain is None else plain, b"")
    coded = [index for stream in streams for index in stream.images[stream.carriers :]]
    return Compressed(
        data=data,
        stored=len(_not_in(streams, len(images))),
        carriers=sum(stream.carriers for stream in streams),
        coded=len(coded),
        net_bits=sum(stream.net_bits for stream in streams),
        bound_bits=(bound[coded] if coded else bound).sum().item(),
        initial_bits=sum(stream.initial_bits for stream in streams),
        seconds=seconds,
        codable=bool(promising),
    )


def _promises(
    prepared: Prepared, expected: Estimate, streams: int, plain: list[bytes], model_bytes: int
) -> bool:
    """Whether the flow might take less than the strips `plain`, give or take a twentieth.

    Only coding tells for certain.
    """
    plain_bits = 8 * sum(len(part) for part in plain) / len(prepared.images)  # per image
    bound = prepared.bound[prepared.promising]
    borrowed = expected.borrowed
    carriers = borrowed / plain_bits  # per stream
    if streams * carriers >= len(bound):
        return False
    bits = bound.sum().item() + streams * (borrowed - carriers * bound.mean().item())
    return bits + 8 * model_bytes < 1.05 * plain_bits * len(bound)


def _forecast(expected: Estimate, images: int, streams: int) -> Forecast:
    threads = min(torch.get_num_threads(), streams)
    each = images / threads
    return Forecast(threads, expected.encode_seconds * each, expected.decode_seconds * each)


def _not_in(streams: list[EncodedStream], count: int) -> list[int]:
    """The images that are in no stream."""
    used = {index for stream in streams for index in stream.images}
    return [index for index in range(count) if index not in used]


def _pack(
    prepared: Prepared,
    names: list[str] | str,
    streams: list[EncodedStream],
    stored: list[bytes],
    embedded: bytes,
) -> bytes:
    coder, model = prepared.coder, prepared.model
    description: dict[str, Any] = {
        "shape": list(coder.shape),
        "levels": coder.levels,
        "names": names,
    }
    if isinstance(names, str):
        description["count"] = len(prepared.images)
    count = len(_not_in(streams, len(prepared.images)))
    if len(stored) != -(-count // strip_length(coder.shape[1])):
        description["tall"] = True
    checked = coder.checked if streams else 1
    if checked > 1:
        description["checked"] = checked
    checksums = np.array([archive.checksum(part) for part in prepared.images.split(checked)], "<u4")
    parts = [checksums.tobytes(), *stored]
    if streams:
        hashed = model_hash(model)[: archive.HASH_DIGITS]
        parts[0] += archive.Identity(hashed, prepared.probe).written()
        description["stored"] = _not_in(streams, len(prepared.images))
        description["streams"] = [
            stream.description().model_dump(exclude_defaults=True) for stream in streams
        ]
        parts += [stream.words.astype("<u4").tobytes() for stream in streams]
        described = {
            "path": os.fsencode(zoo.argument(model.checkpoint.path)).decode(errors="replace"),
            "weights": model.weights,
            "embedded": bool(embedded),
        }
        description |= {"model": described, "versions": versions()}
        if embedded:
            parts.append(embedded)
    return archive.pack(description, parts)

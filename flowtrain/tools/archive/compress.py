"""A lossless archive of images, coded with a flow or stored in strips, whichever is smaller."""

import functools
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.bijections.orders import turn_each
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints import zoo
from flowtrain.checkpoints.load import LoadedModel, model_hash
from flowtrain.data.splits import Split
from flowtrain.evaluation.score import score
from flowtrain.system.console import duration, silent
from flowtrain.system.threads import one_thread
from flowtrain.tools.archive import format as archive
from flowtrain.tools.archive.codec import Coder, coder_of
from flowtrain.tools.archive.streams import EncodedStream, Estimate, encode_stream, estimate
from flowtrain.tools.archive.strips import strip_length, strips
from flowtrain.tools.archive.threads import Progress, in_threads


@dataclass
class Compressed:
    """An archive's bytes, and figures of its coding. Bits are sums over images."""

    data: bytes
    stored: int  # images that are stored without the flow, apart from the carriers
    carriers: int
    coded: int  # images
    net_bits: int  # of the coded images
    bound_bits: float  # of the coded images, or of all if there are none: see `Prepared.bound`
    initial_bits: int
    seconds: float  # of coding
    codable: bool  # whether there was an image worth coding


@dataclass
class Prepared:
    """Images, uint8 `(N, C, H, W)`, ready to be coded."""

    model: LoadedModel
    coder: Coder
    probe: int
    images: Tensor
    # Bits of each image, `(N,)`: the single-draw bound that `evaluate` computes. With several sides
    # it is the bound of the likeliest one, and the bits for the choice.
    bound: Tensor
    sides: Tensor  # from which each image is coded, int64 `(N,)`
    # The images worth coding: one whose bound exceeds its raw size is better stored.
    promising: list[int]
    expected: Estimate | None  # None if none can be coded


def prepare(model: LoadedModel, images: Tensor, progress: Progress = silent) -> Prepared:
    """All that comes before coding.

    Raises `UserError` for a model that has no rules or does not invert, and `FloatingPointError`
    for weights that are not finite.
    """
    with one_thread():
        coder = coder_of(model.flow)
        probe = coder.probe()
    split = Split(images.numpy(), np.arange(len(images)))
    scores = [
        score(model.flow, split, side=side, progress=progress) for side in range(model.flow.sides)
    ]
    bound, sides = torch.stack([each.log_prob / -math.log(2) for each in scores]).min(dim=0)
    bound += math.log2(model.flow.sides)
    promising = (bound < coder.dims * math.log2(coder.num_bins)).nonzero()[:, 0].tolist()
    with one_thread():
        expected = estimate(coder, images[promising[: coder.chunk]])
    return Prepared(model, coder, probe, images, bound, sides, promising, expected)


def choose(
    prepared: Prepared,
    names: list[str] | str,
    *,
    plain: list[bytes] | None = None,
    embed: bool = False,
    progress: Callable[[], AbstractContextManager[Progress]] = lambda: nullcontext(silent),
    announce: Callable[[str], None] = lambda forecast: None,
) -> Compressed:
    """The smaller of two archives: with the flow, or in the strips `plain`.

    `names` are a file name per image, or one word, of which they are made. Without `plain`, the
    flow is always tried. `embed` adds the model to an archive with the flow. `announce` gets a
    forecast of the time before the coding.
    """
    images, bound, promising = prepared.images, prepared.bound, prepared.promising
    sides = prepared.model.flow.sides
    if sides > 1:
        images = turn_each(images.clone(), prepared.sides)
    without = math.inf if plain is None else len(_pack(prepared, names, [], plain, b""))
    embedded = checkpoint_format.encoded(*prepared.model.alone()) if embed else b""
    number = -(-len(promising) // prepared.coder.stream)  # of streams
    streams: list[EncodedStream] = []
    data = b""
    seconds = 0.0
    expected = prepared.expected
    if expected and (plain is None or _promises(prepared, expected, number, plain, len(embedded))):
        threads = min(torch.get_num_threads(), number)
        each = len(promising) / threads
        announce(
            f"about {duration(expected.encode_seconds * each)} (threads: {threads}), and "
            f"{duration(expected.decode_seconds * each)} to decompress"
        )
        started = time.perf_counter()
        tasks = [
            functools.partial(
                encode_stream,
                *(prepared.coder, images, part.tolist(), expected.borrowed),
                sides=prepared.sides,
            )
            for part in np.array_split(np.array(promising), number)
        ]
        with progress() as report:
            streams = in_threads(tasks, len(promising), report)
        seconds = time.perf_counter() - started
    if any(stream.described.chunks for stream in streams):  # there may be no more than carriers
        stored = strips(images[_not_in(streams, len(images))])
        data = _pack(prepared, names, streams, stored, embedded)
    if not data or len(data) >= without:
        streams = []
        plain = strips(prepared.images) if plain is None else plain
        data = _pack(prepared, names, [], plain, b"")
    coded = [index for stream in streams for index in stream.images[stream.described.carriers :]]
    return Compressed(
        data=data,
        stored=len(_not_in(streams, len(images))),
        carriers=sum(stream.described.carriers for stream in streams),
        coded=len(coded),
        net_bits=sum(stream.net_bits for stream in streams) + archive.side_bits(sides, len(coded)),
        bound_bits=(bound[coded] if coded else bound).sum().item(),
        initial_bits=sum(stream.initial_bits for stream in streams),
        seconds=seconds,
        codable=bool(promising),
    )


def _promises(
    prepared: Prepared, expected: Estimate, streams: int, plain: list[bytes], model_bytes: int
) -> bool:
    """Whether the flow might take less than the strips `plain`, within a twentieth."""
    plain_bits = 8 * sum(len(part) for part in plain) / len(prepared.images)  # per image
    bound = prepared.bound[prepared.promising]
    borrowed = expected.borrowed
    carriers = borrowed / plain_bits  # per stream
    if streams * carriers >= len(bound):
        return False
    bits = bound.sum().item() + streams * (borrowed - carriers * bound.mean().item())
    return bits + 8 * model_bytes < 1.05 * plain_bits * len(bound)


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
    coder, model, images = prepared.coder, prepared.model, prepared.images
    description: dict[str, Any] = {
        "shape": list(coder.shape),
        "levels": coder.num_bins,
        "names": names,
    }
    if isinstance(names, str):
        description["count"] = len(images)
    others = _not_in(streams, len(images))
    if len(stored) != -(-len(others) // strip_length(coder.shape[1])):
        description["tall"] = True
    checked = coder.checked if streams else 1
    if checked > 1:
        description["checked"] = checked
    checksums = np.array([archive.checksum(part) for part in images.split(checked)], "<u4")
    parts = [checksums.tobytes(), *stored]
    if streams and model.flow.sides > 1:
        description["sides"] = model.flow.sides
        parts[0] += archive.packed_sides(prepared.sides, model.flow.sides)
    if streams:
        hashed = bytes.fromhex(model_hash(model)[: archive.HASH_DIGITS])
        parts[0] += archive.IDENTITY.pack(hashed, prepared.probe)
        description["stored"] = others
        description["streams"] = [
            stream.described.model_dump(exclude_defaults=True) for stream in streams
        ]
        parts += [stream.words.astype("<u4").tobytes() for stream in streams]
        described = {
            "path": os.fsencode(zoo.argument(model.checkpoint.path)).decode(errors="replace"),
            "weights": model.weights,
            "embedded": bool(embedded),
        }
        description |= {"model": described, "versions": archive.versions()}
        if embedded:
            parts.append(embedded)
    return archive.pack(description, parts)

"""A lossless archive of images, coded with a flow: streams, what they borrow at their start, what is stored plainly.

Bits-back coding begins by taking bits off the stack. A stream begins with its first images, compressed in the ordinary
way (its carriers), so that what it borrows is of use; every image after them costs what the flow's bound says. More and
more images are coded together (a chunk), as the stack grows. Streams are independent, one thread each.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowtrain import archive
from flowtrain.archive import StreamDescription
from flowtrain.bitsback import ENOUGH, Codec, Exhausted, Stack, Uncodable
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.load import LoadedModel, load_model
from flowtrain.data.splits import Split
from flowtrain.datasets.base import FORMATS, short
from flowtrain.datasets.folder import files_of
from flowtrain.errors import UserError
from flowtrain.evaluation.score import score
from flowtrain.pictures.grid import to_8bit
from flowtrain.pictures.lossless import file_sizes, formats

STREAM = 1000  # images of a stream, at most
CHUNK = 16  # images coded together, at most
MOST_CARRIERS = 32  # images; where they are too small, random bits fill up what is missing
PROBE = 2  # images

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
            images=len(self.images), carriers=self.carriers, carrier_bytes=self.carrier_bytes, chunks=self.chunks
        )


@dataclass
class Estimate:
    """What a few of the images say about all: bits that the first image borrows, seconds of an image each way."""

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
    """Codes and decodes the first images `(N, C, H, W)` that can be coded, on a stack of random bits.

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
            raise UserError("the model's numerics do not reproduce on this machine: it cannot be used to compress")
        borrowed = math.ceil(1.1 * (before - stack.lowest) / len(images)) + 2 * ENOUGH
        return Estimate(borrowed, (encoded - started) / len(images), seconds / len(images))
    return Estimate(0, 0.0, 0.0)


# --- streams ----------------------------------------------------------------------------------------------------------


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
    stack = Stack(_words(initial + bytes(-len(initial) % 4)))
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
                bad = [index for index, flag in zip(chunk, error.images.tolist(), strict=True) if flag]
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


def decode_stream(codec: Codec, words: np.ndarray, described: StreamDescription, tick: Callable[[int], None]) -> Tensor:
    """The images of a stream, uint8 `(N, C, H, W)`. Where the model's numerics differ it raises, or they are wrong."""
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


def _words(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<u4").astype(np.uint32)


def in_threads(tasks: Sequence[Callable[[Callable[[int], None]], Any]], total: int, progress: Progress) -> list[Any]:
    """Runs the tasks, as many at a time as torch has threads. Each calls what it is given with what it has done."""
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


# --- the model --------------------------------------------------------------------------------------------------------


def model_hash(model: LoadedModel) -> str:
    """SHA-256 of what the model computes with: its options, shape, levels and the weights that are used."""
    described = {key: model.checkpoint.meta["config"][key] for key in ("model", "dequantization")}
    described |= {"shape": list(model.flow.shape), "levels": model.flow.levels}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(model.flow.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_bytes(model: LoadedModel) -> bytes:
    """A checkpoint of the weights that are used, and of nothing else."""
    tensors = {f"model.{name}": tensor for name, tensor in model.flow.state_dict().items()}
    keys = ("config", "shape", "levels", "step")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        checkpoint_format.write(path, {key: model.checkpoint.meta[key] for key in keys}, tensors)
        return path.read_bytes()


def versions() -> dict[str, str]:
    return {**checkpoint_format.versions(), "constriction": metadata.version("constriction")}


def probe(codec: Codec) -> int:
    """A checksum of what the model computes for fixed images: another one means other numerics."""
    channels, height, width = codec.shape
    ramp = torch.arange(height)[:, None] + torch.arange(width) * 2
    level = torch.arange(PROBE * channels).view(PROBE, channels, 1, 1) * 3
    images = ((ramp + level) * codec.levels // (4 * (height + width))) % codec.levels
    stack = Stack(random_words(4 * images.numel()))
    z = codec.forward(images.to(torch.uint8), stack)
    return archive.checksum(z) ^ archive.checksum(torch.from_numpy(stack.words().astype(np.int64)))


# --- the archive ------------------------------------------------------------------------------------------------------


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
    ]  # the images worth coding: one that the model knows nothing about is not worth more than stored
    expected: Estimate


def prepare(model: LoadedModel, images: Tensor, progress: Progress = lambda done, total: None) -> Prepared:
    """What comes before coding. `progress` is called with images scored and all.

    Raises `UserError` for a model that has no rules or does not invert, `FloatingPointError` for weights that are not
    finite.
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
    tasks = [functools.partial(_strip, part) for part in images.split(archive.strip_length(images.shape[2]))]
    return in_threads(tasks, len(images), progress) if len(images) else []


def _strip(images: Tensor, tick: Callable[[int], None]) -> bytes:
    data = archive.strip(images)
    tick(len(images))
    return data


@dataclass
class Compressed:
    """An archive's bytes, and what was measured on the way. Bits are those of all images together."""

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
        plain: the images' `strips`: where the flow takes more than they do, they are the archive. Without them it is
            made with the flow in any case.
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
    if prepared.expected.borrowed and (plain is None or _promises(prepared, number, plain, len(embedded))):
        announce(prepared.expected, len(promising))
        tasks = [
            functools.partial(encode_stream, prepared.codec, images, part.tolist(), prepared.expected.borrowed)
            for part in np.array_split(np.array(promising), number)
        ]
        streams = [stream for stream, _ in in_threads(tasks, len(promising), progress)]
    seconds = time.perf_counter() - started
    if any(stream.chunks for stream in streams):  # there may be no more than carriers
        data = _packed(prepared, names, streams, strips(images[_others(streams, len(images))]), embedded)
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
    """Whether the flow might take less than the strips `plain`, give or take a twentieth: coding will tell."""
    plain_bits = 8 * sum(len(part) for part in plain) / len(prepared.images)  # of an image
    bound = prepared.bound[prepared.promising]
    carriers = prepared.expected.borrowed / plain_bits  # of a stream
    bits = bound.sum().item() + streams * (prepared.expected.borrowed - carriers * bound.mean().item())
    return streams * carriers < len(bound) and bits + 8 * model_bytes < 1.05 * plain_bits * len(bound)


def _others(streams: list[Stream], count: int) -> list[int]:
    """The images that are in no stream."""
    used = {index for stream in streams for index in stream.images}
    return [index for index in range(count) if index not in used]


def _packed(
    prepared: Prepared, names: list[str] | str, streams: list[Stream], stored: list[bytes], embedded: bytes
) -> bytes:
    codec, model = prepared.codec, prepared.model
    description: dict[str, Any] = {"shape": list(codec.shape), "levels": codec.levels, "names": names}
    if isinstance(names, str):
        description["count"] = len(prepared.images)
    parts = [np.array([archive.checksum(image) for image in prepared.images], "<u4").tobytes(), *stored]
    if streams:
        description["stored"] = _others(streams, len(prepared.images))
        description["streams"] = [stream.description().model_dump() for stream in streams]
        parts += [stream.words.astype("<u4").tobytes() for stream in streams]
        path = os.fsencode(model.checkpoint.path).decode(errors="replace")
        described = {"hash": model_hash(model), "path": path, "weights": model.weights, "embedded": bool(embedded)}
        description |= {"model": described, "probe": prepared.probe, "versions": versions()}
        if embedded:
            parts.append(embedded)
    return archive.pack(description, parts)


class Opened:
    """An archive that has been read and verified. Raises `UserError` where it is damaged or none."""

    def __init__(self, path: Path):
        self.path = path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        self.description, self.parts = archive.unpack(path, data)
        self.names = self.description.files
        self.levels = self.description.levels
        self.streams = self.description.streams

    def load(self, given: str | None, trust_code: bool) -> LoadedModel:
        """The model: the one given, else the embedded one, else the one at the path where it was.

        Raises `UserError` where it is not there, or is not the one that the images were coded with.
        """
        wanted = self.description.model
        assert wanted is not None  # there are streams
        if given is None and wanted.embedded:
            model = self._embedded_model(trust_code)
        else:
            if given is None and not Path(wanted.path).is_file():
                raise UserError(
                    f"{self.path}: it needs the model {wanted.hash[:16]}, which was {wanted.path}: "
                    "say where it is with --model"
                )
            model = load_model(given or wanted.path, torch.device("cpu"), wanted.weights, trust_code)
        found = model_hash(model)
        if found != wanted.hash:
            raise UserError(
                f"{self.path}: it was coded with the model {wanted.hash[:16]}, {wanted.weights} weights; "
                f"{model.checkpoint.path} is another one, {found[:16]}: say where it is with --model"
            )
        if (tuple(model.flow.shape), model.flow.levels) != (self.description.shape, self.levels):
            raise UserError(f"{self.path}: not a valid archive: its images are not of its model's shape and levels")
        return model

    def _embedded_model(self, trust_code: bool) -> LoadedModel:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "embedded.safetensors"
            path.write_bytes(self.parts[-1])
            try:
                return load_model(str(path), torch.device("cpu"), "raw", trust_code)
            except (MemoryError, OSError):
                raise
            except Exception as error:  # its checksum may be right, and its content anything
                raise UserError(f"{self.path}: the model in it cannot be loaded ({short(error)})") from None

    def images(self, model: LoadedModel | None, progress: Progress = lambda done, total: None) -> Tensor:
        """All images, uint8 `(N, C, H, W)`, checked one by one. `model` is needed if there are streams.

        Raises `UserError` where this machine computes other numbers than the one that wrote the archive.
        """
        described = self.description
        checksums = np.frombuffer(self.parts[0], "<u4").tolist()
        stored = self._stored()
        found = torch.empty(described.images, *described.shape, dtype=torch.uint8)
        if described.stored:
            found[described.stored] = stored
        if self.streams:
            assert model is not None
            others = sorted(set(range(described.images)) - set(described.stored))
            found[others] = self._decoded(model, progress)
        wrong = [
            i for i, (image, known) in enumerate(zip(found, checksums, strict=True)) if archive.checksum(image) != known
        ]
        if wrong:
            raise self._irreproducible(f"{len(wrong)} of {len(found)} images do not match their checksums")
        if self.levels < 256 and (found >= self.levels).any():
            raise UserError(f"{self.path}: not a valid archive: it has values that are not in 0..{self.levels - 1}")
        return found

    def _stored(self) -> Tensor:
        described = self.description
        try:
            return torch.cat(
                [
                    torch.empty(0, *described.shape, dtype=torch.uint8),
                    *(
                        archive.unstrip(data, described.shape, count)
                        for data, count in zip(self.parts[1:], described.strips, strict=False)
                    ),
                ]
            )
        except MemoryError:
            raise
        except Exception as error:  # bytes that are no picture make Pillow raise almost anything
            raise UserError(f"{self.path}: an image that is stored in it cannot be read ({short(error)})") from None

    def _decoded(self, model: LoadedModel, progress: Progress) -> Tensor:
        first = 1 + len(self.description.strips)
        try:
            with one_thread():
                codec = Codec(model.flow)
                if probe(codec) != self.description.probe:
                    raise self._irreproducible("the model computes other numbers here")
            tasks = [
                functools.partial(decode_stream, codec, _words(data), described)
                for data, described in zip(self.parts[first:], self.streams, strict=False)
            ]
            return torch.cat(in_threads(tasks, sum(stream.images for stream in self.streams), progress))
        except (MemoryError, UserError):
            raise
        except Exception as error:  # the coder and Pillow raise almost anything for bits that mean nothing
            raise self._irreproducible(short(error)) from error

    def _irreproducible(self, why: str) -> UserError:
        wrote = self.description.versions
        here = versions()
        differing = [f"{name} {wrote[name]}, here {here.get(name)}" for name in wrote if wrote[name] != here.get(name)]
        return UserError(
            f"{self.path}: this machine does not reproduce the numbers of the one that wrote it ({why}"
            + "".join(f"; written with {text}" for text in differing)
            + "): nothing is written; use the versions and the kind of machine that wrote it"
        )


# --- what goes in -----------------------------------------------------------------------------------------------------


def find_files(paths: list[Path]) -> dict[str, Path]:
    """Image files, and those in folders, by the names that `decompress` will write.

    In folders, as the data set `folder` does: at any depth, links are followed, and what begins with a dot is ignored.
    Raises `UserError` where a folder has none, or where a file cannot be unpacked beside the others.
    """
    files: dict[str, Path] = {}
    for path in paths:
        named = [(path.name, path)]
        if path.is_dir():
            try:
                found = [file.name for file in files_of(path, "")]
            except UserError as error:
                raise UserError(str(error).removeprefix("data.path: ")) from None
            named = [(Path(path.resolve().name, name).as_posix(), path / name) for name in found]
        for name, file in named:
            name = name if name.lower().endswith(".png") else f"{name}.png"
            if name in files:
                raise UserError(f"{file}: it would be unpacked as {name!r}, and so would {files[name]}")
            try:
                archive.check_names([name])
            except ValueError as error:
                raise UserError(f"{file}: it cannot be unpacked: {error}") from None
            files[name] = file
    try:
        archive.check_names(files)
    except ValueError as error:
        raise UserError(f"INPUT: it cannot be unpacked: {error}") from None
    return files


def read_files(files: list[Path], shape: tuple[int, int, int], levels: int) -> Tensor:
    """Image files as they are: uint8 `(N, C, H, W)`.

    Raises `UserError` naming the file where it is missing, or has other pixels than images of `shape` with `levels`.
    """
    return torch.stack([_pixels(file, shape, levels) for file in files])


def _pixels(path: Path, shape: tuple[int, int, int], levels: int) -> Tensor:
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(path, formats=FORMATS) as image:
            found = f"{image.width}x{image.height} {image.mode}"
            frames = getattr(image, "n_frames", 1)
            transparent = "transparency" in image.info  # a colour or level that is to be seen through: PNG's tRNS
            pixels = np.array(image)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such image file") from None
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise UserError(f"{path}: cannot be read as an image ({short(error)})") from None
    if found != f"{width}x{height} {mode}" or frames > 1:
        raise UserError(
            f"{path}: it has {frames} picture(s) of {found}, and the model is for {width}x{height} {mode}; "
            "nothing is converted, as that would not be lossless"
        )
    if transparent:
        raise UserError(f"{path}: a part of it is transparent, which would be lost")
    # What `to_8bit` makes of each level: the values that `decompress` writes.
    values = to_8bit(torch.arange(levels), levels)
    level_of = torch.full((256,), -1)
    level_of[values.long()] = torch.arange(levels)
    image_levels = level_of[torch.from_numpy(pixels.reshape(height, width, channels)).long()]
    if (image_levels < 0).any():
        raise UserError(
            f"{path}: its values are not the {levels} that images of this model have "
            f"({', '.join(map(str, values[:4].tolist()))}, ..., 255): to keep fewer bits of it would not be lossless"
        )
    return image_levels.to(torch.uint8).movedim(-1, 0)


def ordinary_sizes(images: Tensor, levels: int, progress: Progress) -> dict[str, int]:
    """Bytes of all images, each as a file, in the lossless formats that Pillow has."""
    names = formats()
    parts = images.split(archive.STRIP)
    tasks = [functools.partial(_sizes, name, part, levels) for name in names for part in parts]
    totals = dict.fromkeys(names, 0)
    lossy = set()
    for name, sizes in in_threads(tasks, len(names) * len(images), progress):
        if sizes is None:
            lossy.add(name)
        else:
            totals[name] += int(sizes.sum())
    return {name: total for name, total in totals.items() if name not in lossy}


def _sizes(name: str, images: Tensor, levels: int, tick: Callable[[int], None]) -> tuple[str, Tensor | None]:
    sizes = file_sizes(images, levels, name)
    tick(len(images))
    return name, sizes


def require_writable(out: Path, folder: Path) -> None:
    """Raises `UserError`, naming --out, where no file can be made in `folder`: said before any work is done."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: there is no permission to write into {existing}")

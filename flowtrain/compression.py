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
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowtrain import archive, checkpoint
from flowtrain import evaluate as evaluation
from flowtrain.bitsback import ENOUGH, Codec, Exhausted, Stack, Uncodable
from flowtrain.checkpoint import LoadedModel
from flowtrain.data import Split
from flowtrain.datasets.base import FORMATS, short
from flowtrain.datasets.folder import SUFFIXES
from flowtrain.errors import UserError
from flowtrain.images import to_8bit

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

    def description(self) -> dict[str, Any]:
        keys = ("carriers", "carrier_bytes", "chunks")
        return {"images": len(self.images), **{key: getattr(self, key) for key in keys}}


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


def decode_stream(codec: Codec, words: np.ndarray, described: dict[str, Any], tick: Callable[[int], None]) -> Tensor:
    """The images of a stream, uint8 `(N, C, H, W)`. Where the model's numerics differ it raises, or they are wrong."""
    stack = Stack(words, again=True)
    parts = []
    for count in reversed(described["chunks"]):
        parts.append(codec.decode(count, stack))
        tick(count)
    blob = stack.first_words().astype("<u4").tobytes()[: described["carrier_bytes"]]
    if described["carriers"]:
        parts.append(archive.unstrip(blob, codec.shape))
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
            return [future.result() for future in futures]
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
        checkpoint.write(path, {key: model.checkpoint.meta[key] for key in keys}, tensors)
        return path.read_bytes()


def versions() -> dict[str, str]:
    return {**checkpoint.versions(), "constriction": metadata.version("constriction")}


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
    model: LoadedModel,
    images: Tensor,
    names: list[str] | str,
    *,
    embed: bool = False,
    ordinary_bytes: float = math.inf,
    progress: Progress = lambda done, total: None,
    announce: Callable[[Estimate, int], None] = lambda estimate, images: None,
) -> Compressed:
    """An archive of images, uint8 `(N, C, H, W)`, with values 0..Q-1.

    Args:
        names: a file name for each, or one word, of which the names are made.
        embed: puts the model into the archive.
        ordinary_bytes: about what the images take in an ordinary format: where the flow would take more, they are
            stored like that.
        progress: called with images done and all.
        announce: called once before the coding, with what it will take, and the number of images.
    """
    codec = Codec(model.flow)
    count = len(images)
    split = Split(images.numpy(), np.arange(count), 0)
    bound = evaluation.score(model.flow, split).log_prob / -math.log(2)  # bits
    # An image that the model knows nothing about is not worth more than its bytes.
    promising = (bound < codec.dims * math.log2(codec.levels)).nonzero()[:, 0].tolist()
    with one_thread():
        expected = estimate(codec, images[promising[:CHUNK]])
    ordinary_bits = 8 * ordinary_bytes / count
    carriers = expected.borrowed / ordinary_bits
    bits = bound[promising].sum().item() + (expected.borrowed - carriers * bound[promising].mean().item())
    worth = expected.borrowed > 0 and len(promising) > carriers and bits < 1.15 * ordinary_bits * len(promising)
    streams: list[Stream] = []
    started = time.perf_counter()
    if worth:
        announce(expected, len(promising))
        number = -(-len(promising) // STREAM)
        tasks = [
            functools.partial(encode_stream, codec, images, part.tolist(), expected.borrowed)
            for part in np.array_split(np.array(promising), number)
        ]
        streams = [stream for stream, _ in in_threads(tasks, len(promising), progress)]
    seconds = time.perf_counter() - started
    data = _packed(model, codec, images, names, streams, embed)
    # Ordinary formats gain from being packed, but never a seventh (and packing takes a while where there are many).
    if streams and (count <= archive.STRIP or len(data) > 0.85 * ordinary_bytes):
        plain = _packed(model, codec, images, names, [], embed)
        if len(plain) <= len(data):
            data, streams = plain, []
    coded = [index for stream in streams for index in stream.images[stream.carriers :]]
    return Compressed(
        data=data,
        stored=count - sum(len(stream.images) for stream in streams),
        carriers=sum(stream.carriers for stream in streams),
        coded=len(coded),
        net_bits=sum(stream.net_bits for stream in streams),
        bound_bits=bound[coded].sum().item(),
        initial_bits=sum(stream.initial_bits for stream in streams),
        seconds=seconds,
    )


def _packed(
    model: LoadedModel, codec: Codec, images: Tensor, names: list[str] | str, streams: list[Stream], embed: bool
) -> bytes:
    used = {index for stream in streams for index in stream.images}
    stored = [index for index in range(len(images)) if index not in used]
    description: dict[str, Any] = {"shape": list(codec.shape), "levels": codec.levels, "names": names}
    if isinstance(names, str):
        description["count"] = len(images)
    parts = [np.array([archive.checksum(image) for image in images], "<u4").tobytes()]
    parts += archive.strips(images[stored])
    if streams:
        description["stored"] = stored
        description["streams"] = [stream.description() for stream in streams]
        parts += [stream.words.astype("<u4").tobytes() for stream in streams]
        path = str(model.checkpoint.path)
        described = {"hash": model_hash(model), "path": path, "weights": model.weights, "embedded": embed}
        with one_thread():
            description |= {"model": described, "probe": probe(codec), "versions": versions()}
        if embed:
            parts.append(model_bytes(model))
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
        self.names = archive.names(self.description)
        self.levels: int = self.description["levels"]
        self.streams: list[dict[str, Any]] = self.description.get("streams", [])

    def load(self, given: str | None, trust_code: bool) -> LoadedModel:
        """The model: the one given, else the embedded one, else the one at the path where it was.

        Raises `UserError` where it is not there, or is not the one that the images were coded with.
        """
        wanted = self.description["model"]
        if given is None and wanted["embedded"]:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "embedded.safetensors"
                path.write_bytes(self.parts[-1])
                model = checkpoint.load_model(str(path), torch.device("cpu"), "raw", trust_code)
        else:
            if given is None and not Path(wanted["path"]).exists():
                raise UserError(
                    f"{self.path}: it needs the model {wanted['hash'][:16]}, which was {wanted['path']}: "
                    "say where it is with --model"
                )
            model = checkpoint.load_model(given or wanted["path"], torch.device("cpu"), wanted["weights"], trust_code)
        found = model_hash(model)
        if found != wanted["hash"]:
            raise UserError(
                f"{self.path}: it was coded with the model {wanted['hash'][:16]}, {wanted['weights']} weights; "
                f"{model.checkpoint.path} is another one, {found[:16]}: say where it is with --model"
            )
        return model

    def images(self, model: LoadedModel | None, progress: Progress = lambda done, total: None) -> Tensor:
        """All images, uint8 `(N, C, H, W)`, checked one by one. `model` is needed if there are streams.

        Raises `UserError` where this machine computes other numbers than the one that wrote the archive.
        """
        channels, height, width = self.description["shape"]
        shape = channels, height, width
        checksums = np.frombuffer(self.parts[0], "<u4").tolist()
        count = len(checksums)
        stored = self.description.get("stored", range(count))
        strips = self.parts[1 : len(self.parts) - len(self.streams) - self._embedded]
        found = torch.empty(count, *shape, dtype=torch.uint8)
        if strips:
            found[list(stored)] = torch.cat([archive.unstrip(data, shape) for data in strips])
        if self.streams:
            assert model is not None
            others = sorted(set(range(count)) - set(stored))
            found[others] = self._decoded(Codec(model.flow), progress)
        wrong = [
            i for i, (image, known) in enumerate(zip(found, checksums, strict=True)) if archive.checksum(image) != known
        ]
        if wrong:
            raise self._irreproducible(f"{len(wrong)} of {count} images do not match their checksums")
        return found

    @property
    def _embedded(self) -> int:
        return int(bool(self.streams) and self.description["model"]["embedded"])

    def _decoded(self, codec: Codec, progress: Progress) -> Tensor:
        with one_thread():
            if probe(codec) != self.description["probe"]:
                raise self._irreproducible("the model computes other numbers here")
        end = len(self.parts) - self._embedded
        tasks = [
            functools.partial(decode_stream, codec, _words(data), described)
            for data, described in zip(self.parts[end - len(self.streams) : end], self.streams, strict=True)
        ]
        total = sum(sum(described["chunks"]) for described in self.streams)
        try:
            return torch.cat(in_threads(tasks, total, progress))
        except (Uncodable, Exhausted, ValueError, OSError) as error:
            raise self._irreproducible(str(error)) from error

    def _irreproducible(self, why: str) -> UserError:
        wrote = self.description["versions"]
        here = versions()
        differing = [f"{name} {wrote[name]}, here {here[name]}" for name in wrote if wrote[name] != here[name]]
        return UserError(
            f"{self.path}: this machine does not reproduce the numbers of the one that wrote it ({why}"
            + "".join(f"; written with {text}" for text in differing)
            + "): nothing is written; use the versions and the kind of machine that wrote it"
        )


# --- what goes in -----------------------------------------------------------------------------------------------------


def from_files(paths: list[Path], shape: tuple[int, int, int], levels: int) -> tuple[list[str], Tensor]:
    """Image files, and those in folders, as they are: names for `decompress` to write, and uint8 `(N, C, H, W)`.

    Raises `UserError` that names the file where it is missing, has other pixels than images of `shape` with `levels`,
    or would be written to the place of another one.
    """
    files: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise UserError(f"{path}: there is no image in this folder (looked for {', '.join(SUFFIXES)})")
            named = [(Path(path.resolve().name, file.relative_to(path)).as_posix(), file) for file in found]
        else:
            named = [(path.name, path)]
        for name, file in named:
            name = name if name.lower().endswith(".png") else f"{name}.png"
            if name in files:
                raise UserError(f"{file}: it would be unpacked as {name}, and so would {files[name]}")
            files[name] = file
    return list(files), torch.stack([_pixels(file, shape, levels) for file in files.values()])


def _pixels(path: Path, shape: tuple[int, int, int], levels: int) -> Tensor:
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(path, formats=FORMATS) as image:
            found = f"{image.width}x{image.height} {image.mode}"
            frames = getattr(image, "n_frames", 1)
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
    names = archive.formats()
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
    sizes = archive.sizes(images, levels, name)
    tick(len(images))
    return name, sizes

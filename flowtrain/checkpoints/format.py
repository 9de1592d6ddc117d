"""Checkpoints: one safetensors file with a JSON description and a checksum over every byte.

The file is an ordinary safetensors file. Its metadata has two strings: `flowtrain`, the description
as JSON (format, versions, configuration, image shape, levels, step, the data's fingerprint, the
trainer's counters), and `checksum`, the SHA-256 of the whole file with these 64 digits at zero.
Nothing in it can run code.

safetensors reads the file but does not write it: its `save` holds the interpreter while it copies
all tensors, and needs three times the memory.
"""

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import flowtrain
from flowtrain.checkpoints.description import Description, Origin
from flowtrain.checkpoints.record import checked
from flowtrain.errors import UserError, cut, short, shown
from flowtrain.system import capacity, distributed
from flowtrain.system.files import Piece, content_of, make_folder_of, write_atomically

FORMAT = 1
SUFFIX = ".safetensors"
PARTS = ("model", "ema", "optimizer")

SMALL = 2**20  # bytes; tensors with fewer are put together

# The names of https://github.com/huggingface/safetensors#format
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bool: "BOOL"}
DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}
DTYPES |= {torch.bfloat16: "BF16", torch.uint8: "U8", torch.complex64: "C64"}

_ZEROS = b"0" * 64  # in place of the checksum
_CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')


@dataclass
class Checkpoint:
    """A checkpoint's file, its description, and its tensors: `model.*`, `ema.*`, `optimizer.*`.

    `meta` has the keys of `Description`, with their defaults for those that the file lacks.
    """

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, without its prefix."""
        parts = [(key.partition("."), value) for key, value in self.tensors.items()]
        return {rest: value for (part, _, rest), value in parts if part == name and rest}


def versions() -> dict[str, str]:
    return {
        "flowtrain": flowtrain.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def encoded(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    return b"".join(pieces(meta, tensors))


def pieces(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The bytes of a checkpoint, part by part. The host's large tensors are not copied."""
    # Aligned like safetensors' own files: a tensor of larger numbers comes first.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    header = _header(meta, ordered)
    match = _CHECKSUM.search(header)
    assert match is not None
    digest = hashlib.sha256(header)
    for piece in _contents(ordered):
        digest.update(piece)
    header[match.start(1) : match.end(1)] = digest.hexdigest().encode()
    yield header
    yield from _contents(ordered)


def _header(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytearray:
    """The bytes before the tensors, with zeros in place of the checksum."""
    described = json.dumps({"format": FORMAT, "versions": versions(), **meta}, allow_nan=False)
    metadata = {"checksum": _ZEROS.decode(), "flowtrain": described}
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, tensor in tensors.items():
        offsets = [start, start + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        start += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text)


def _contents(tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The bytes of the tensors. Small ones are joined, so that there are few pieces."""
    together = bytearray()
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy().data
        if len(content) < SMALL:
            together += content
        if len(together) >= SMALL or len(content) >= SMALL:
            yield together
            together = bytearray()
        if len(content) >= SMALL:
            yield content
    yield together


def write(path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint, and makes its folder if it is missing. A kill at any moment leaves the
    old file or the new one. Raises `RunError` and keeps the old one if writing fails.
    """
    make_folder_of(path)
    write_atomically(path, pieces(meta, tensors))


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint. Raises `UserError` if it is missing, damaged, or not a checkpoint."""
    return _parse(path, content_of(path, largest()))


def read_by_main(find: Callable[[], Path | None]) -> Checkpoint | None:
    """As `read`, but one process reads for all. The others need not have the file."""
    path = distributed.from_main(lambda: None if (found := find()) is None else str(found))
    if path is None:
        return None
    file = Path(path)
    return _parse(file, distributed.bytes_from_main(lambda: content_of(file, largest())))


def largest() -> int:
    """The size in bytes of the largest file that is read. The tensors take as much again."""
    return capacity.total() // 2


def _parse(path: Path, data: bytes) -> Checkpoint:
    foreign = UserError(
        f"{path}: not a flowtrain checkpoint (a safetensors file with its description; pickles "
        f"are never loaded)"
    )
    try:
        header = json.loads(data[8 : _header_end(data)])
        metadata = header["__metadata__"]
        described, checksum = metadata["flowtrain"], metadata["checksum"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        # Its name or a word in it distinguishes a damaged checkpoint from a file of another kind.
        if b'"flowtrain"' in data[:1_000_000] or (path.suffix == SUFFIX and not _of_others(data)):
            raise UserError(
                f"{path}: damaged: its header cannot be read (truncated, or bytes changed)"
            ) from error
        raise foreign from error
    match = _CHECKSUM.search(data, 0, _header_end(data))
    if match is None:
        raise UserError(f"{path}: damaged: it has no checksum")
    digest = hashlib.sha256()
    for part in (data[: match.start(1)], _ZEROS, data[match.end(1) :]):
        digest.update(part)
    if digest.hexdigest() != checksum:
        raise UserError(
            f"{path}: damaged: its bytes do not match its checksum (truncated or changed)"
        )
    # The file is as somebody wrote it, but perhaps not with `write`.
    invalid = f"{path}: not a valid checkpoint"
    if not isinstance(described, str):
        raise UserError(f"{invalid}: its description is not text")
    origin = checked(Origin, described, invalid)
    if origin.format != FORMAT:
        version = cut(origin.versions.get("flowtrain", "?"))
        raise UserError(
            f"{path}: written in checkpoint format {origin.format} by flowtrain {version}; this is "
            f"flowtrain {flowtrain.__version__}, which reads format {FORMAT}: use that version, or "
            f"train again"
        )
    meta = checked(Description, described, invalid).model_dump()
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:  # KeyError: of a dtype
        raise UserError(f"{invalid}: its tensors cannot be read: {short(error)}") from error
    foreign_names = sorted(name for name in tensors if name.partition(".")[0] not in PARTS)
    if foreign_names:
        raise UserError(
            f"{invalid}: a tensor {shown(foreign_names[0])} belongs to none of {', '.join(PARTS)}"
        )
    return Checkpoint(path, meta, tensors)


def _of_others(data: bytes) -> bool:
    """Whether it is a sound safetensors file of another program, without our words."""
    try:
        header = data[8 : _header_end(data)]
        return isinstance(json.loads(header), dict) and b'"checksum"' not in header
    except (ValueError, RecursionError):
        return False


def _header_end(data: bytes | bytearray) -> int:
    """The end of the header. Raises `ValueError` if its length cannot be right."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, 100_000_000):
        raise ValueError("header length")
    return 8 + length

"""The file of a compressed set of images: its bytes and its checks.

    "FTa1"  length of the description  description  parts, one after the other  checksum of all that

The description is JSON, deflated with a dictionary of the words that it always has, so that an
archive of one image is no larger than a PNG of it. It gives the shape, the levels, the names, the
chunks of the streams, and the lengths of all parts but the last.

The first part holds the images' checksums and, if there are streams, the identity of the model.
With several `sides`, the bits of each image's side are between them (see `packed_sides`). The
strips follow (see `strips.py`), then the streams, and then the embedded model, if there is one.
"""

import hashlib
import json
import math
import struct
import zlib
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from torch import Tensor

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.errors import UserError, cut
from flowtrain.system.files import check_names
from flowtrain.tools.archive.strips import strip_length, tall_length
from flowtrain.types import Side

LARGEST_CHUNK = 128  # images coded together
BYTES_PER_IMAGE = 1000  # of its name, its checksum, and their processing
HASH_DIGITS = 16  # of `checkpoints.load.model_hash`
# The model of the streams: its hash, and what it computes (`Coder.probe`). These bytes do not
# shrink if they are deflated.
IDENTITY = struct.Struct(f"<{HASH_DIGITS // 2}sI")


def side_bits(sides: int, images: int) -> int:
    """The bits that choose one of the `sides` of each image."""
    return (sides - 1).bit_length() * images


def packed_sides(chosen: Tensor, sides: int) -> bytes:
    """The bits of the sides `(N,)` of images, the lowest of each side first."""
    bits = chosen[:, None] >> torch.arange(side_bits(sides, 1)) & 1
    return np.packbits(bits.numpy().astype(np.uint8)).tobytes()


def unpacked_sides(data: bytes, sides: int, images: int) -> Tensor:
    """The inverse of `packed_sides`, int64 `(N,)`."""
    count = side_bits(sides, images)
    bits = torch.from_numpy(np.unpackbits(np.frombuffer(data, "u1"), count=count)).long()
    return (bits.view(images, -1) << torch.arange(side_bits(sides, 1))).sum(dim=1)


class StreamDescription(BaseModel):
    """The numbers of images in a stream, of its carriers, and of the others coded together."""

    images: PositiveInt
    carriers: NonNegativeInt = 0
    carrier_bytes: NonNegativeInt = 0
    chunks: list[Annotated[int, Field(ge=1, le=LARGEST_CHUNK)]]

    @model_validator(mode="after")
    def _consistent(self) -> "StreamDescription":
        if self.carriers + sum(self.chunks) != self.images:
            raise ValueError("a stream's chunks do not add up to its images")
        return self


class ModelDescription(BaseModel):
    """The model that the streams were coded with."""

    path: str  # as a command takes it: the path of a checkpoint, or the name of a trained model
    weights: Literal["ema", "raw"]
    embedded: bool


class Description(BaseModel):
    """Without streams, all images are stored in strips; with them, only the `stored` ones are."""

    shape: tuple[Literal[1, 3], Side, Side]
    levels: Annotated[int, Field(ge=2, le=256)]
    # A list of names, or the name of a split, of which they are made. Text in JSON may be no UTF-8.
    names: Any
    count: int | None = None
    lengths: list[NonNegativeInt]  # in an archive of all parts but the last; here of all
    streams: list[StreamDescription] = []
    stored: list[int] = []
    # images with one checksum; the last one may have fewer
    checked: Annotated[int, Field(ge=1, le=LARGEST_CHUNK)] = 1
    sides: Literal[1, 2, 4, 8] = 1  # of which bits for each image choose the one that is here
    tall: bool = False  # whether the strips are as tall as a picture can be
    model: ModelDescription | None = None
    versions: dict[str, str] = {}

    @property
    def images(self) -> int:
        if isinstance(self.names, str):
            return self.count or 0
        return len(self.names) if isinstance(self.names, list) else 0

    @property
    def side_bytes(self) -> int:
        """The bytes of the bits for the images' sides."""
        return -(-side_bits(self.sides, self.images) // 8)

    @property
    def memory(self) -> int:
        """Approximate bytes of memory for unpacking: all images, and the copies of the largest
        strip while it is read, or of an image while it is written.
        """
        pixels = math.prod(self.shape)
        strip = min(self.images, self.longest_strip) * pixels
        return self.images * (pixels + BYTES_PER_IMAGE) + max(4 * strip, 12 * pixels)

    @property
    def files(self) -> list[str]:
        """The images' names: relative paths with "/"."""
        if isinstance(self.names, str):
            return [f"{self.names}-{i:05}.png" for i in range(self.images)]
        return list(self.names)

    @property
    def longest_strip(self) -> int:
        """The most images in a strip."""
        return (tall_length if self.tall else strip_length)(self.shape[1])

    @property
    def strips(self) -> list[int]:
        """The number of images in each strip."""
        each = self.longest_strip
        return [min(each, len(self.stored) - i) for i in range(0, len(self.stored), each)]

    def check_counts(self, following: int) -> None:
        """Adds the length of the last part, if all have so many bytes.

        Raises `ValueError` unless there are as many checksums as the images need.
        """
        last = following - sum(self.lengths)
        if last < 0:
            raise ValueError("its parts are longer than it is")
        self.lengths.append(last)
        checksums = self.lengths[0] - self.side_bytes - (IDENTITY.size if self.streams else 0)
        if self.images < 1 or checksums != 4 * -(-self.images // self.checked):
            raise ValueError("there is not one name for each image that has a checksum")

    def check_images(self) -> None:
        """Raises `ValueError` unless each image has a valid name and one place among the parts."""
        check_names(self.files)
        if self.sides > 4 and self.shape[1] != self.shape[2]:
            raise ValueError("there are transposed images, and these are not square")
        if not self.streams:
            self.stored, self.model = list(range(self.images)), None
        elif self.model is None or not self.versions:
            raise ValueError("there are streams, and no model")
        if sum(stream.images for stream in self.streams) + len(self.stored) != self.images:
            raise ValueError("the streams and the stored images do not add up")
        stored = set(self.stored)
        if len(stored) != len(self.stored) or not stored <= set(range(self.images)):
            raise ValueError("the stored images are not some of the images")
        embedded = self.model is not None and self.model.embedded
        if len(self.lengths) != 1 + len(self.strips) + len(self.streams) + embedded:
            raise ValueError("there are more or fewer parts than it needs")


def versions() -> dict[str, str]:
    """The versions that the numerics may depend on."""
    return {**checkpoint_format.versions(), "constriction": metadata.version("constriction")}


def checksum(image: Tensor) -> int:
    """CRC-32 of an image's pixels."""
    return zlib.crc32(image.contiguous().numpy().data)


MAGIC = b"FTa1"  # the digit is the version of the format and of the arithmetic
DIGEST = 8  # bytes
# The most bytes of JSON that are inflated, for some 500,000 names.
LONGEST_DESCRIPTION = 2**26
BYTES_PER_CHARACTER = 32  # of that JSON, in memory: the shortest names and numbers take most
# Never to be changed within a version. Small archives need the last words most: a causal flow's, in
# the order of the description.
DICTIONARY = (
    b'"streams":[{"images":1000,"carriers":4,"carrier_bytes":7,"chunks":[1,1,16,16]}],"stored":[],'
    b'"model":{"path":"runs//checkpoints/best.safetensors","weights":"ema",'
    b'"embedded":false},"versions":{"flowtrain":"1.0.0","torch":"2.","python":"3."},'
    b'{"shape":[1,28,28],"shape":[3,32,32],"levels":256,"names":"test","names":["0.png"],'
    b'"lengths":[4,'
    b'{"shape":[1,28,28],"levels":256,"names":"test","count":10000,"checked":128,"stored":[],'
    b'"streams":[{"images":128,"chunks":[128]},{"images":127,"chunks":[127]}],"model":{"path":"'
    b'causal_cifar_smallruns/causal/checkpoints/best.safetensors","weights":"ema","embedded":false}'
    b',"versions":{"flowtrain":"1.0.0","torch":"2.13.0+cpu","python":"3.11.7",'
    b'"constriction":"0.5.0"},"lengths":[16]}'
    b'{"shape":[3,32,32],"levels":256,"names":["0.png"],"checked":128,"stored":[],'
    b'"streams":[{"images":1,"chunks":[1]}],"model":{"path":"'
)


def pack(description: dict[str, Any], parts: list[bytes]) -> bytes:
    """The bytes of an archive. Raises `UserError` if there are too many names."""
    text = json.dumps(
        {**description, "lengths": [len(part) for part in parts[:-1]]}, separators=(",", ":")
    ).encode()
    if len(text) > LONGEST_DESCRIPTION:
        raise UserError(
            f"the names take {len(text)} bytes, more than the {LONGEST_DESCRIPTION} of one archive"
        )
    deflate = zlib.compressobj(9, wbits=-15, zdict=DICTIONARY)
    described = deflate.compress(text) + deflate.flush()
    data = b"".join([MAGIC, len(described).to_bytes(4, "little"), described, *parts])
    return data + digest(data)


def unpack(path: Path, data: bytes, memory: int) -> tuple[Description, list[bytes]]:
    """The description and the parts. Raises `UserError` naming the file if it is damaged or not an
    archive, or if unpacking takes more than `memory` bytes.
    """
    if data[: len(MAGIC)] != MAGIC:
        if data[: len(MAGIC) - 1] == MAGIC[:-1]:
            raise UserError(f"{path}: damaged, or an archive of another version of flowtrain")
        raise UserError(f"{path}: not an archive of flowtrain compress")
    if len(data) < len(MAGIC) + 4 + DIGEST or digest(data[:-DIGEST]) != data[-DIGEST:]:
        raise UserError(
            f"{path}: damaged: its bytes do not match its checksum (truncated or changed)"
        )
    start = len(MAGIC) + 4
    end = start + int.from_bytes(data[len(MAGIC) : start], "little")
    # The file is now as somebody wrote it, but perhaps not with `pack`.
    try:
        inflate = zlib.decompressobj(wbits=-15, zdict=DICTIONARY)
        longest = min(LONGEST_DESCRIPTION, memory // BYTES_PER_CHARACTER)
        text = inflate.decompress(data[start:end], longest)
        if not inflate.eof:
            raise ValueError(f"its description does not end within {longest} bytes")
        description = Description.model_validate(json.loads(text))
        description.check_counts(len(data) - DIGEST - end)
        needed = 2 * len(data) + description.memory  # the parts are copies
        if needed > memory:
            raise UserError(
                f"{path}: unpacking takes {needed / 2**20:,.0f} MiB of memory, but --max-memory "
                f"is {memory / 2**20:,.0f} MiB"
            )
        description.check_images()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        why = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: not a valid archive: {cut(why, 300)}") from None
    except (ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{path}: not a valid archive: {cut(str(error), 300)}") from None
    parts = []
    for length in description.lengths:
        parts.append(data[end : end + length])
        end += length
    return description, parts


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()

"""The file of a compressed set of images: its bytes, its checks, and the images that are stored without a flow.

    "FTa1"  length of the description  description  parts, one after the other  checksum of all that

The description is JSON, deflated with a dictionary of the words that it always has, so that an archive of one image is
no larger than a PNG of it. It says shape, levels, names, the lengths of the parts, and how the streams were coded (see
`flowtrain.compression`). The first part is the images' checksums.
"""

import hashlib
import io
import json
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowtrain.errors import UserError
from flowtrain.images import to_8bit

MAGIC = b"FTa1"  # the digit is the version of the format and of the arithmetic
DIGEST = 8  # bytes
# Never to be changed within a version.
DICTIONARY = (
    b'"streams":[{"images":1000,"carriers":4,"carrier_bytes":7,"chunks":[1,1,16,16]}],"stored":[],"model":{"hash":"'
    b'","path":"runs//checkpoints/best.safetensors","weights":"ema","embedded":false},"probe":,"versions":{"flowtrain":'
    b'"0.1.0","torch":"2.","python":"3."},{"shape":[1,28,28],"shape":[3,32,32],"levels":256,"names":"test",'
    b'"names":["0.png"],"lengths":[4,'
)
# Lossless formats, with what makes each smallest. (JPEG XL: where a plugin has told Pillow about it.)
FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "WEBP": {"lossless": True, "quality": 100, "method": 6},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "JXL": {"lossless": True},
}
STRIP = 64  # images stored as one picture
LONGEST = 16383  # pixels, of a WebP's side


# --- the file ---------------------------------------------------------------------------------------------------------


def pack(description: dict[str, Any], parts: list[bytes]) -> bytes:
    """The bytes of an archive."""
    text = json.dumps({**description, "lengths": [len(part) for part in parts]}, separators=(",", ":"))
    deflate = zlib.compressobj(9, wbits=-15, zdict=DICTIONARY)
    described = deflate.compress(text.encode()) + deflate.flush()
    data = b"".join([MAGIC, len(described).to_bytes(4, "little"), described, *parts])
    return data + _digest(data)


def unpack(path: Path, data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The description and the parts. Raises `UserError` naming the file, where it is damaged or none of ours."""
    if data[: len(MAGIC)] != MAGIC:
        if data[: len(MAGIC) - 1] == MAGIC[:-1]:
            raise UserError(f"{path}: damaged, or an archive of another version of flowtrain")
        raise UserError(f"{path}: not an archive of flowtrain compress")
    if len(data) < len(MAGIC) + 4 + DIGEST or _digest(data[:-DIGEST]) != data[-DIGEST:]:
        raise UserError(f"{path}: damaged: its bytes do not match its checksum (truncated or changed)")
    start = len(MAGIC) + 4
    end = start + int.from_bytes(data[len(MAGIC) : start], "little")
    description = json.loads(zlib.decompressobj(wbits=-15, zdict=DICTIONARY).decompress(data[start:end]))
    parts = []
    for length in description["lengths"]:
        parts.append(data[end : end + length])
        end += length
    return description, parts


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def names(description: dict[str, Any]) -> list[str]:
    """Of the images' files, relative. Raises `UserError` for one that would leave the folder it is written to."""
    given = description["names"]
    if isinstance(given, str):  # of a split
        return [f"{given}-{i:05}.png" for i in range(description["count"])]
    for name in given:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/" or any(c in name for c in "\\:\0"):
            raise UserError(f"the archive has a file named {name!r}, which is not a plain relative path")
    return given


def checksum(image: Tensor) -> int:
    """CRC-32 of an image's pixels."""
    return zlib.crc32(image.contiguous().numpy().data)


# --- images without a flow --------------------------------------------------------------------------------------------


def formats() -> list[str]:
    """Those of `FORMATS` that this Pillow writes."""
    Image.init()
    return [name for name in FORMATS if name in Image.SAVE]


def encoded(image: Tensor, name: str) -> bytes:
    """An image `(C, H, W)`, uint8, C 1 or 3, as a file of a lossless format."""
    buffer = io.BytesIO()
    pixels = image.movedim(0, -1).contiguous().numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, name, **FORMATS[name])
    return buffer.getvalue()


def decoded(data: bytes, channels: int) -> Tensor:
    """The inverse of `encoded`."""
    pixels = np.asarray(Image.open(io.BytesIO(data), formats=list(FORMATS)))
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return torch.from_numpy(pixels[..., :channels].copy()).movedim(-1, 0)  # WebP has no grey: three equal channels


def sizes(images: Tensor, levels: int, name: str) -> Tensor | None:
    """Bytes of each of the images `(N, C, H, W)` as a file of a format; None if the format does not give them back."""
    pixels = to_8bit(images, levels)
    files = [encoded(image, name) for image in pixels[:1]]
    if not torch.equal(decoded(files[0], images.shape[1]), pixels[0]):
        return None
    files += [encoded(image, name) for image in pixels[1:]]
    return torch.tensor([len(file) for file in files])


def strip(images: Tensor) -> bytes:
    """Some images `(N, C, H, W)`, one above the other, in the fewest bytes: WebP, PNG, or deflated."""
    tall = images.movedim(1, 0).flatten(1, 2)
    candidates = [zlib.compress(images.contiguous().numpy().tobytes(), 9)]
    candidates += [encoded(tall, name) for name in formats() if name in ("PNG", "WEBP")]
    return min(candidates, key=len)


def unstrip(data: bytes, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `strip`: `(N, C, H, W)`."""
    channels, height, width = shape
    if data[:1] == b"\x78":  # neither PNG nor WebP begins so
        return torch.frombuffer(bytearray(zlib.decompress(data)), dtype=torch.uint8).view(-1, *shape)
    return decoded(data, channels).unflatten(1, (-1, height)).movedim(1, 0)


def strips(images: Tensor) -> list[bytes]:
    """Any number of images, a strip for every few."""
    if len(images) == 0:
        return []
    return [strip(part) for part in images.split(min(STRIP, max(1, LONGEST // images.shape[2])))]

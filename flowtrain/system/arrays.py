"""Arrays in .npz and .npy files that may come from a stranger.

Nothing is unpickled, and no array is read before its shape and type were compared with what the
caller expects, and its size with the memory.
"""

import contextlib
import math
import os
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from flowtrain.errors import RunError, UserError, cut, short
from flowtrain.system.files import open_regular

ONLY = "the array"  # the name of the array of an .npy file
# Kinds of numpy's types
KINDS = {"f": "real numbers", "iu": "whole numbers", "U": "texts", "b": "yes or no"}
TEXT_BYTES = 100  # that a text takes in a list of Python, beside its characters
LOCAL_HEADER = struct.Struct("<4s22x2H")  # of a zip: its signature, lengths of name and of extras


@dataclass(frozen=True)
class Stored:
    """An array in a file, described by its header.

    where: File and name, for messages.
    fortran: Whether the first axis varies fastest.
    bytes: Size of the values.
    header: Size of the header before the values.
    offset: Start of the values in the file. None if they are compressed.
    crc: The checksum of the header and the values, in a zip.
    """

    file: "ArrayFile"
    name: str
    where: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[np.generic]
    bytes: int
    header: int
    offset: int | None
    crc: int | None


class ArrayFile:
    """The arrays of an .npz file by name, or the one of an .npy file, named `ONLY`.

    Raises `UserError` that names the file, after `key`, where it cannot be read as one of the two.
    """

    def __init__(self, path: Path, key: str = ""):
        self.path, self.key = path, key
        self.names = [ONLY]
        magic = np.lib.format.MAGIC_PREFIX
        with self._opened() as file:
            if file.read(len(magic)) != magic:
                with self._zip(file) as archive:
                    self.names = [name.removesuffix(".npy") for name in archive.namelist()]
        if len(set(self.names)) < len(self.names):
            raise UserError(f"{key}{path}: two of its arrays have one name")

    def header(self, name: str) -> Stored:
        """The header of an array. Raises `UserError` if it is missing or damaged."""
        with self._member(name) as (file, member, info):
            shape, fortran, dtype = header_of(member)
            header, offset, crc = member.tell(), None, None
            if info is None:
                size, offset = os.fstat(file.fileno()).st_size, header
            else:
                size, crc = info.file_size, info.CRC
                if info.compress_type == zipfile.ZIP_STORED and info.compress_size == size:
                    file.seek(info.header_offset)
                    _, *lengths = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
                    offset = info.header_offset + LOCAL_HEADER.size + sum(lengths) + header
        where, values = self._where(name), size - header
        return Stored(self, name, where, shape, fortran, dtype, values, header, offset, crc)

    def values(self, name: str) -> np.ndarray:
        """An array of any shape and type. Raises `UserError` if it is missing or damaged."""
        with self._member(name) as (_, member, _info):
            values = array_of(member)
            member.read(1)  # at the end of a member, zipfile compares its checksum
            return values

    def read(self, name: str, kinds: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """An array whose type is one of `KINDS`. `None` in `shape` stands for any length. Raises
        `UserError` that names the file and the array if it is missing or damaged, has another type
        or shape, or does not fit into memory.
        """
        from flowtrain.system import capacity  # imports torch

        header = self.header(name)
        where = header.where
        # Texts without room for a character take no bytes, however many there are.
        if header.dtype.kind not in kinds or not header.dtype.itemsize:
            raise UserError(
                f"{where} has the type {cut(str(header.dtype))}, expected {KINDS[kinds]}"
            )
        fits = len(header.shape) == len(shape) and all(
            wanted in (None, length) for wanted, length in zip(shape, header.shape, strict=True)
        )
        if not fits:
            by = " x ".join("N" if length is None else str(length) for length in shape)
            raise UserError(
                f"{where} has the shape {cut(str(header.shape))}, expected {by or 'one value'}"
            )
        size = math.prod(header.shape) * header.dtype.itemsize
        if size != header.bytes:
            raise UserError(f"{where} is damaged: it has {header.bytes} bytes, not {size}")
        texts = TEXT_BYTES * math.prod(header.shape) if header.dtype.kind == "U" else 0
        capacity.require(2 * size + texts, f"{where} needs")
        values = self.values(name)
        if header.dtype.kind == "U":
            characters = np.frombuffer(values.tobytes(), f"{values.dtype.str[0]}u4")
            if characters.max(initial=0) > sys.maxunicode:  # Python would raise a SystemError
                raise UserError(f"{where} is damaged: it has a character that does not exist")
        return values

    def _where(self, name: str) -> str:
        return f"{self.key}{self.path}" + ("" if name == ONLY else f": {cut(name)}")

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """The file. Any error from its content becomes a message on this array."""
        with self._opened() as file:
            try:
                yield file
            except (UserError, RunError):
                raise
            except MemoryError:
                raise UserError(f"{self._where(name)} does not fit into memory") from None
            except Exception as error:  # damaged bytes make zipfile and numpy raise anything
                raise UserError(
                    f"{self._where(name)} is damaged or not a plain array ({short(error)})"
                ) from None

    @contextlib.contextmanager
    def _member(self, name: str) -> Iterator[tuple[BinaryIO, IO[bytes], zipfile.ZipInfo | None]]:
        """The file, an array in it as an .npy file, and its description in a zip."""
        if name not in self.names:
            there = ", ".join(sorted(self.names)) or "nothing"
            raise UserError(f"{self.key}{self.path}: it has no array {name} (it has {cut(there)})")
        with self.opened(name) as file:
            if name == ONLY:
                yield file, file, None
                return
            with self._zip(file) as archive:
                info = archive.getinfo(f"{name}.npy")
                with archive.open(info) as member:
                    yield file, member, info

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            raise UserError(f"{self.key}{self.path}: there is no such file") from None
        except OSError as error:
            raise UserError(
                f"{self.key}{self.path}: cannot be opened ({error.strerror or short(error)})"
            ) from None
        with file:
            yield file

    @contextlib.contextmanager
    def _zip(self, file: BinaryIO) -> Iterator[zipfile.ZipFile]:
        try:
            archive = zipfile.ZipFile(file)
        except MemoryError:
            raise
        except Exception:  # a damaged directory of the archive makes zipfile raise almost anything
            raise UserError(
                f"{self.key}{self.path}: is not an .npz or .npy file, or is cut short"
            ) from None
        with archive:
            yield archive


def header_of(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether the first axis varies fastest, and type of the array of a .npy file. The
    values follow in the file. Raises anything for a file that is none.
    """
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(file)]
    with _from_any_python():
        shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def array_of(file: IO[bytes]) -> np.ndarray:
    """The array of a .npy file, without unpickling. Raises anything for a file that is none."""
    with _from_any_python():
        values: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return values


@contextlib.contextmanager
def _from_any_python() -> Iterator[None]:
    """Hides a warning of numpy: that a header is not of Python 3, or damaged, takes longer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Reading `.npy` or `.npz` file required", UserWarning)
        yield

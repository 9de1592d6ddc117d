"""Arrays in .npz and .npy files that may come from a stranger.

Nothing is unpickled, and no array is read before its shape and type were compared with what the
caller expects, and its size with the memory.
"""

import contextlib
import math
import os
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

ONLY = "the array"  # the name of that of an .npy file
KINDS = {
    "f": "real numbers",
    "iu": "whole numbers",
    "U": "texts",
    "b": "yes or no",
}  # of numpy's types
TEXT_BYTES = 100  # that a text takes in a list of Python, beside its characters


@dataclass(frozen=True)
class Header:
    """What a file says of an array: its shape, its type, and how many bytes are there for it."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    bytes: int


class ArrayFile:
    """The arrays of an .npz file by name, or the one of an .npy file, named `ONLY`.

    Raises `UserError` that names the file where it cannot be read as one of the two.
    """

    def __init__(self, path: Path):
        self.path = path
        self.names = [ONLY]
        with self._opened() as file:
            if not _is_npy(file):
                with self._zip(file) as archive:
                    self.names = [name.removesuffix(".npy") for name in archive.namelist()]
        if len(set(self.names)) < len(self.names):
            raise UserError(f"{path}: two of its arrays have one name")

    def header(self, name: str) -> Header:
        """What the file says of an array. Raises `UserError` where there is none, or is damaged."""
        with self._member(name) as (member, size):
            shape, _, dtype = header_of(member)
            return Header(shape, dtype, size - member.tell())

    def read(self, name: str, kinds: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """An array whose type is of one of the `kinds` of numpy: "f", "iu" or "U".

        `None` in `shape` stands for any length. Raises `UserError` that names the file and the
        array where it is missing, is another one, is damaged, or does not fit into memory.
        """
        from flowtrain.system import capacity  # imports torch

        header = self.header(name)
        where = self._where(name)
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
        with self._member(name) as (member, _):
            # With the last byte of a member, zipfile compares its checksum.
            values = array_of(member)
        if header.dtype.kind == "U" and _codes(values).max(initial=0) > sys.maxunicode:
            # Python makes no text of such a number, and fails without saying why.
            raise UserError(f"{where} is damaged: it has a character that does not exist")
        return values

    def _where(self, name: str) -> str:
        return f"{self.path}: {cut(name)}"

    @contextlib.contextmanager
    def _member(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        """An array as an .npy file, and the bytes of that file."""
        if name not in self.names:
            there = ", ".join(sorted(self.names)) or "nothing"
            raise UserError(f"{self.path}: it has no array {name} (it has {cut(there)})")
        with self._opened() as file:
            try:
                if name == ONLY:
                    yield file, os.fstat(file.fileno()).st_size
                    return
                with self._zip(file) as archive:
                    info = archive.getinfo(f"{name}.npy")
                    with archive.open(info) as member:
                        yield member, info.file_size
            except (UserError, RunError, MemoryError):
                raise
            except Exception as error:  # damaged bytes make zipfile and numpy raise anything
                raise UserError(
                    f"{self._where(name)} is damaged or not a plain array ({short(error)})"
                ) from None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            raise UserError(f"{self.path}: there is no such file") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be opened ({short(error)})") from None
        with file:
            yield file

    @contextlib.contextmanager
    def _zip(self, file: BinaryIO) -> Iterator[zipfile.ZipFile]:
        try:
            archive = zipfile.ZipFile(file)
        except MemoryError:
            raise
        except Exception:  # a damaged directory of the archive makes zipfile raise almost anything
            raise UserError(f"{self.path}: is not an .npz or .npy file, or is cut short") from None
        with archive:
            yield archive


def _codes(texts: np.ndarray) -> np.ndarray:
    """The numbers of all characters of an array of texts."""
    return np.frombuffer(texts.tobytes(), f"{texts.dtype.str[0]}u4")


def _is_npy(file: BinaryIO) -> bool:
    return file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX


def header_of(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether the first axis varies fastest, and type of the array of a .npy file.

    The values follow in the file. Raises anything for a file that is none.
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

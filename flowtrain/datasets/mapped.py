"""Images in files that are mapped into memory instead of read.

All processes of a machine share the pages, and the system drops them when memory is needed. So the
array may be larger than the memory, and a start reads nothing but headers.
"""

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from flowtrain.errors import RunError

Layout = Literal["nhwc", "nchw"]
COPIED = 2**24  # bytes of images that are copied at a time


@dataclass(frozen=True)
class Piece:
    """The images of one file.

    images: A view of the file in any order of memory, uint8 (N, C, H, W).
    end: Bytes that the file must have.
    """

    path: Path
    pages: mmap.mmap
    images: np.ndarray
    end: int

    def require_whole(self) -> None:
        """Raises `RunError` if the file has become shorter, as a page beyond its end would end the
        process by a signal (SIGBUS).
        """
        if self.pages.size() < self.end:
            raise RunError(
                f"{self.path} became shorter while it was in use: do not change data during a run"
            )


def piece(
    path: Path, file: BinaryIO, offset: int, shape: tuple[int, ...], fortran: bool, layout: Layout
) -> Piece:
    """Maps the uint8 array of `shape` that begins `offset` bytes into an open file. Its
    `shape` is (N, H, W), or four axes in the order of `layout`. With `fortran`, the first axis
    varies fastest. Raises `ValueError` if the file is too short.
    """
    end = offset + math.prod(shape)
    if os.fstat(file.fileno()).st_size < end:
        raise ValueError("it is cut short")
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    values = np.frombuffer(pages, np.uint8, math.prod(shape), offset)
    values = values.reshape(shape, order="F" if fortran else "C")
    return Piece(path, pages, channels_first(values, layout), end)


def channels_first(values: np.ndarray, layout: Layout) -> np.ndarray:
    """A view as (N, C, H, W) of (N, H, W), or of four axes in the order of `layout`."""
    if values.ndim == 3:
        return values[:, None]
    return values.transpose(0, 3, 1, 2) if layout == "nhwc" else values


class Mapped:
    """The images of several pieces, one after the other: uint8 (N, C, H, W).

    It is indexed like an array, by a slice or by numbers of images. The result is a copy.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces = pieces
        self._ends = np.cumsum([len(each.images) for each in pieces])
        self.shape: tuple[int, ...] = (int(self._ends[-1]), *pieces[0].images.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """uint8 (B, C, H, W), C-contiguous. Raises `RunError` as `Piece.require_whole` does."""
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        found = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        which = np.searchsorted(self._ends, wanted, side="right")
        each = max(1, COPIED // max(1, math.prod(self.shape[1:])))  # images at a time
        for number in np.unique(which):
            source = self.pieces[number]
            source.require_whole()
            first = self._ends[number] - len(source.images)
            places = np.flatnonzero(which == number)
            for start in range(0, len(places), each):
                part = places[start : start + each]
                found[part] = source.images[wanted[part] - first]
        return found

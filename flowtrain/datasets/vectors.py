"""A user's own vectors of real values, in one .npz, .npy or CSV file.

Likelihoods are densities in nats, in the units of the file: the flow standardizes each column, and
counts the Jacobian (`Standardize` in `bijections/actnorm.py`).
"""

import contextlib
import csv
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from flowtrain.datasets.base import Images, Part, digests, first_equal, part_of, reading
from flowtrain.errors import UserError, cut
from flowtrain.system.arrays import ONLY, ArrayFile
from flowtrain.system.files import open_regular

KEY = "data.path: "  # before messages
SUFFIXES = (".npz", ".npy", ".csv")
STEPS = 1000
NAMED = 5  # columns in a message


def build(root: Path, split: Part, *, seed: int = 0, path: Path) -> Images:
    """Vectors `(D, 1, 1)` of float32, from arrays of real numbers `(N, D)`.

    Missing values and constant columns are refused by name.

    Args:
        path: The file. An .npz file has x_train, and x_test for the test split. An .npy file has
            one array. A CSV file may begin with a line of names. Without x_test, a seeded
            tenth of the rows is the test split.
    """
    own_test = False
    part: Part = "train"
    read_values: Callable[[], np.ndarray]
    if path.suffix.lower() == ".csv":
        names, named = _columns(path)
        read_values = functools.partial(_values, path, len(names), named)
    else:
        file = ArrayFile(path, KEY)
        own_test = "x_test" in file.names
        part = split if own_test else "train"
        key = ONLY if file.names == [ONLY] else f"x_{part}"
        header = file.header(key)
        if len(header.shape) != 2 or not math.prod(header.shape):
            raise UserError(
                f"{header.where} has the shape {cut(str(header.shape))}: expected (N, D), a row "
                f"for each vector"
            )
        names = [f"column {i}" for i in range(header.shape[1])]
        read_values = functools.partial(file.read, key, "f", (None, None))

    @functools.cache
    def read() -> np.ndarray:
        with np.errstate(over="ignore"):  # infinite in float32
            x = np.ascontiguousarray(read_values(), np.float32)
        _require_values(x, names, path, split)
        return x.reshape(*x.shape, 1, 1)

    def rows() -> np.ndarray:
        return part_of(first_equal(digests(read())), split, seed)

    return Images((len(names), 1, 1), None, read, rows=None if own_test else rows)


def _require_values(x: np.ndarray, names: list[str], path: Path, split: Part) -> None:
    """Raises `UserError` naming the columns of `(N, D)` with missing values, or with a range of
    fewer than `STEPS` float32 numbers, which vectors to be scored may have.
    """
    bad = ~np.isfinite(x)
    found = [f"{names[i]} ({bad[:, i].sum():,})" for i in np.flatnonzero(bad.any(axis=0))]
    if found:
        raise UserError(
            f"{KEY}{path}: missing values, texts or infinite values in {_listed(found)}, the first "
            f"in row {bad.any(axis=1).argmax() + 1:,}: leave out these rows, or fill the values in"
        )
    low, high = x.min(axis=0), x.max(axis=0)
    constant = high - low < STEPS * np.spacing(np.maximum(abs(low), abs(high)))
    if constant.any() and split == "train":
        raise UserError(
            f"{KEY}{path}: a constant has no density, and float32 does not resolve how these "
            f"columns vary: {_listed([names[i] for i in np.flatnonzero(constant)])}: leave them "
            f"out, or subtract their means"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(cut, names[:NAMED])) + more


def _columns(path: Path) -> tuple[list[str], bool]:
    """The columns of a CSV file, and whether its first line has their names: it has no number."""
    with _reading(path) as lines:
        first = next(lines, "")
        texts = next(csv.reader([first]), [])
        if not texts:
            raise UserError(f"{KEY}{path}: it has no rows")
        if len(texts) == 1 and any(other in first for other in ";\t"):
            raise UserError(f"{KEY}{path}: expected commas between the values")
        named = not any(map(_is_number, texts))
    return texts if named else [f"column {i}" for i in range(len(texts))], named


def _is_number(text: str) -> bool:
    """Whether a value is a number, or a word for a missing or infinite one."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _values(path: Path, columns: int, named: bool) -> np.ndarray:
    """The numbers of a CSV file, float64 `(N, D)`. What is no number is NaN."""
    with _reading(path) as lines, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for a file without rows
        x: np.ndarray = np.genfromtxt(
            lines, delimiter=",", skip_header=named, comments="\0", ndmin=2
        )
    if not x.size:
        raise UserError(f"{KEY}{path}: it has no rows")
    if x.shape[1] != columns:
        raise UserError(
            f"{KEY}{path}: its first line has {columns} columns, and its rows have {x.shape[1]}"
        )
    return x


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a CSV file that are not empty. Any error from its content becomes a message."""
    advice = "expected a CSV file with as many values in each line"
    with reading(f"{KEY}{path} cannot be read", advice), open_regular(path) as file:
        texts = (line.decode("utf-8-sig") for line in file)
        yield (text for text in texts if text.strip())

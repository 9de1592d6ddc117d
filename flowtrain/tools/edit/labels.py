"""Images with and without attributes: of folders, of a table, or of the classes of a data set."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet, SplitName, sampled
from flowtrain.errors import UserError, cut, short, shown
from flowtrain.latents.directions import check_name
from flowtrain.latents.encoding import files_at, read_images, readable_images
from flowtrain.system.files import read_regular

LARGEST_TABLE = 2**25  # bytes; 200,000 lines of 40 attributes have 18 million
MOST_ATTRIBUTES = 1000


@dataclass(frozen=True)
class Labelled:
    """Images `(N, C, H, W)`, and for each attribute which of them have it, bool `(N,)`."""

    x: Tensor
    attributes: dict[str, Tensor]


def from_folders(
    positive: Sequence[Path],
    negative: Sequence[Path],
    name: str,
    model: LoadedModel,
    most: int,
    seed: int = 0,
) -> Labelled:
    """A sample of at most `most` images of each kind. Raises `UserError` as `files_at` and
    `readable_images` do.
    """
    check_name(name)
    groups = []
    for option, paths in (("--positive", positive), ("--negative", negative)):
        # Each path by itself: files of two folders may have the same names.
        found = [file for path in paths for file in files_at([path], option).values()]
        files = list(dict.fromkeys(found))
        chosen = [files[i] for i in sampled(len(files), most, seed)]
        groups.append(readable_images(chosen, paths, model, option)[1])
    return _labelled(name, *groups)


def _labelled(name: str, positive: Tensor, negative: Tensor) -> Labelled:
    x = torch.cat([positive, negative])
    return Labelled(x, {name: torch.arange(len(x)) < len(positive)})


def from_classes(
    model: LoadedModel,
    data: DataSet,
    split_name: SplitName,
    first: int | None,
    second: int,
    name: str,
    most: int,
    seed: int = 0,
) -> Labelled:
    """A sample of at most `most` images of class `second`, and as many of class `first`, or of all
    others.

    Raises `UserError` if there are no labels, or no such images.
    """
    check_name(name)
    data.require(model.flow.shape, model.flow.num_bins, model.checkpoint.path)
    split = data.split(split_name)
    if split.labels is None:
        raise UserError(f"--to-class {second}: {data.config.name} has no labels")
    labels = split.labels.numpy()
    of_first = labels != second if first is None else labels == first
    groups = []
    for what, where in (
        (f"--to-class {second}", labels == second),
        ("other classes" if first is None else f"--from-class {first}", of_first),
    ):
        of_kind = split.at(where.nonzero()[0])
        if not len(of_kind):
            raise UserError(f"{what}: the {split_name} split has no images of it")
        groups.append(of_kind.sample(most, seed).take(slice(None)))
    return _labelled(name, *groups)


def from_table(path: Path, folder: Path, model: LoadedModel, most: int, seed: int = 0) -> Labelled:
    """A sample of at most `most` images of a CSV table: a column of file names below `folder`, and
    a column of 0 and 1 for each attribute. The first line has the names of the columns.

    Raises `UserError` that names the table, and the line, if it is not such a table.
    """
    try:
        data = read_regular(path, LARGEST_TABLE)
        _, header = next(_lines(data), (1, []))
        if len(header) > 1 + MOST_ATTRIBUTES:  # before the other lines are parsed beside it
            raise UserError(
                f"--csv {path}: it has {len(header) - 1:,} attributes, and at most "
                f"{MOST_ATTRIBUTES:,} can be taken"
            )
        count = sum(1 for _ in _lines(data)) - 1
        chosen = {1 + i for i in sampled(max(0, count), most, seed).tolist()}
        # Only these are kept: as lists, short lines take a hundred times their bytes.
        lines = [line for i, line in enumerate(_lines(data)) if i in chosen]
    except OSError as error:
        raise UserError(f"--csv {path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"--csv {path}: is not a CSV table in UTF-8 ({short(error)})") from None
    if len(header) < 2:
        raise UserError(
            f"--csv {path}: its first line has to name the columns: file, and one for each "
            f"attribute"
        )
    names = [name.strip() for name in header[1:]]
    for name, times in Counter(names).items():
        check_name(name)
        if times > 1:
            raise UserError(f"--csv {path}: two columns are named {cut(name)}")
    files, rows = [], []
    for number, line in lines:
        where = f"--csv {path}, line {number}"
        if len(line) != len(header) or not line[0]:
            raise UserError(
                f"{where}: expected {len(header)} values, a file and a 0 or 1 for each attribute, "
                f"got {len(line)}"
            )
        values = [value.strip() for value in line[1:]]
        for name, value in zip(names, values, strict=True):
            if value not in ("0", "1"):
                raise UserError(f"{where}: {cut(name)} is {shown(value)}, expected 0 or 1")
        files.append(folder / line[0])
        if not files[-1].is_file():
            raise UserError(f"{where}: there is no image file {cut(str(files[-1]))}")
        rows.append([value == "1" for value in values])
    if not rows:
        raise UserError(f"--csv {path}: it has no images")
    attributes = dict(zip(names, torch.tensor(rows).unbind(dim=1), strict=True))
    return Labelled(read_images(files, model, "--csv"), attributes)


def _lines(data: bytes) -> Iterator[tuple[int, list[str]]]:
    """The lines of a table that are not empty, with their numbers."""
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")
    return (each for each in enumerate(csv.reader(text, strict=True), start=1) if each[1])

"""Reads and checks the files that `train` and `evaluate` write to a run directory.

It needs no torch, and runs no code that a configuration names.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from flowtrain import config as configuration
from flowtrain.errors import UserError, cut, shown
from flowtrain.results import Evaluation, Row, Summary
from flowtrain.system.files import content_of

# In bytes. A row of metrics takes some twenty times as much memory as its line.
LONGEST_METRICS = 2**27
LONGEST_JSON = 2**24  # of a summary or an evaluation


class Named(BaseModel):
    """A section of `config.yaml` that names a model or a data set."""

    name: str


class RunConfig(BaseModel):
    """The part of `config.yaml` that every run has."""

    data: Named
    model: Named


@dataclass(frozen=True)
class Record:
    """The contents of a run directory. The metrics are in their order."""

    path: Path
    config: dict[str, Any]
    summary: Summary
    rows: list[Row]
    # Of the test split, by `Evaluation.way`: the plain one, with --mirror, with --draws.
    tests: dict[str, Evaluation]


def read(path: Path) -> Record:
    """Reads a run directory, also while it is written.

    A run that has logged nothing yet has no metrics. Raises `UserError`, naming the file, if a file
    is missing or damaged.
    """
    if not path.is_dir():
        raise UserError(
            f"{path}: {'is not a run directory' if path.exists() else 'no such run directory'}"
        )
    config = configuration.load_yaml(path / "config.yaml")
    checked(RunConfig, config, str(path / "config.yaml"))
    metrics = path / "metrics.jsonl"
    evaluations = [
        read_evaluation(file)
        for file in path.glob("evaluate-*test.json")
        if re.fullmatch(r"evaluate-(mirror-)?(\d+-draws-)?test\.json", file.name)
    ]
    return Record(
        path,
        config,
        read_summary(path / "summary.json"),
        read_rows(metrics) if metrics.exists() else [],
        {test.way: test for test in sorted(evaluations, key=lambda test: (test.sides, test.draws))},
    )


def read_rows(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`, without an unfinished last line."""
    *lines, _unfinished = _text(path, LONGEST_METRICS).split("\n")
    return [checked(Row, line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_summary(path: Path) -> Summary:
    return checked(Summary, _text(path), str(path))


def read_evaluation(path: Path) -> Evaluation:
    return checked(Evaluation, _text(path), str(path))


def _text(path: Path, limit: int = LONGEST_JSON) -> str:
    try:
        return content_of(path, limit).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


Kind = TypeVar("Kind", bound=BaseModel)


def checked(kind: type[Kind], content: str | dict[str, Any], where: str) -> Kind:
    """JSON text, or values already parsed, as the type of a file.

    Raises `UserError` with `where` and the first wrong key.
    """
    try:
        if isinstance(content, str):
            return kind.model_validate_json(content)
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = cut(".".join(map(str, first["loc"])))
        why = cut(first["msg"].removeprefix("Value error, "), 300)
        if not key:  # it is not JSON, or not an object; the value is the whole file
            raise UserError(f"{where}: broken: {why}") from error
        got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
        raise UserError(f"{where}: {key}: {why}{got}") from error

"""Reads and checks the files in a run directory, which `train` and `evaluate` write.

It needs no torch, and runs no code that a configuration names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from flowtrain import config as configuration
from flowtrain.errors import UserError, shown
from flowtrain.results import Evaluation, Row, Summary
from flowtrain.system.files import read_regular

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
    test: Evaluation | None  # of the test split


def read(path: Path) -> Record:
    """Reads a run directory. It may still be being written.

    A run that has logged nothing yet has no metrics. Raises `UserError`, naming the file, if a file
    is missing or is not what `train` or `evaluate` write.
    """
    if not path.is_dir():
        raise UserError(
            f"{path}: {'is not a run directory' if path.exists() else 'no such run directory'}"
        )
    config = configuration.load_yaml(path / "config.yaml")
    _checked(RunConfig, config, str(path / "config.yaml"))
    metrics, test = path / "metrics.jsonl", path / "evaluate-test.json"
    return Record(
        path,
        config,
        _checked(Summary, _text(path / "summary.json"), str(path / "summary.json")),
        read_rows(metrics) if metrics.exists() else [],
        read_evaluation(test) if test.exists() else None,
    )


def read_rows(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`, without a last line that is still being written."""
    *lines, _unfinished = _text(path, LONGEST_METRICS).split("\n")
    return [_checked(Row, line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_evaluation(path: Path) -> Evaluation:
    """The result of `flowtrain evaluate`."""
    return _checked(Evaluation, _text(path), str(path))


def _text(path: Path, limit: int = LONGEST_JSON) -> str:
    try:
        return read_regular(path, limit).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read: {reason}") from error


Kind = TypeVar("Kind", bound=BaseModel)


def _checked(kind: type[Kind], content: str | dict[str, Any], where: str) -> Kind:
    """JSON text, or values already parsed, as the type of a file."""
    try:
        return (
            kind.model_validate_json(content)
            if isinstance(content, str)
            else kind.model_validate(content)
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if not key:  # it is not JSON, or not an object; the value is the whole file
            raise UserError(f"{where}: broken: {first['msg']}") from error
        got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
        raise UserError(f"{where}: {key}: {first['msg']}{got}") from error

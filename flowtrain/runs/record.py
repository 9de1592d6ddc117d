"""What a run directory says about its run: the files of `train` and `evaluate`, checked as they are
read.

Needs no torch, and runs no code that a configuration names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from flowtrain import config as configuration
from flowtrain.errors import UserError


class File(BaseModel):
    """Of a file's keys those that are used; it may have more."""

    model_config = ConfigDict(allow_inf_nan=False, frozen=True)


class Summary(File):
    """`summary.json`: the run at its last checkpoint."""

    step: int
    images: int
    seconds: float
    finished: bool
    best_validation_bits_per_dim: float | None
    # there for real-valued data only, in the place of bits
    best_validation_nats: float | None = None
    best_step: int | None
    parameters: int

    @property
    def unit(self) -> str:
        """What the run's losses are measured in."""
        return "nats" if "best_validation_nats" in self.model_fields_set else "bits/dim"

    @property
    def best(self) -> float | None:
        """Of the validations."""
        return (
            self.best_validation_nats if self.unit == "nats" else self.best_validation_bits_per_dim
        )


class Row(File):
    """A line of `metrics.jsonl`."""

    step: int
    images: int
    seconds: float
    split: Literal["train", "validation"]
    bits_per_dim: float | None
    nats: float | None = None  # of real-valued data, in the place of bits
    grad_norm: float | None = None
    lr: float | None = None
    images_per_second: float | None = None

    @property
    def loss(self) -> float | None:
        """In bits/dim or nats; None where it was not finite."""
        return self.nats if self.bits_per_dim is None else self.bits_per_dim


class Evaluation(File):
    """`evaluate-<split>.json`; figures that are not finite are None."""

    bits_per_dim: float | None
    bits_per_dim_stderr: float | None
    nats_per_image: float | None
    nats_per_image_stderr: float | None = None
    bound: str
    samples: int
    num_images: int
    split: str
    dataset: str
    weights: str
    step: int

    @property
    def loss(self) -> tuple[float | None, float | None]:
        """Bits/dim with its standard error; of real-valued data, whose likelihood is exact,
        nats.
        """
        if self.bound == "exact":
            return self.nats_per_image, self.nats_per_image_stderr
        return self.bits_per_dim, self.bits_per_dim_stderr


class Named(BaseModel):
    name: str


class RunConfig(BaseModel):
    """Of `config.yaml` what every run has."""

    data: Named
    model: Named


@dataclass(frozen=True)
class Record:
    """A run directory: its configuration, summary, metrics in order, and evaluation of the test
    split, if any.
    """

    path: Path
    config: dict[str, Any]
    summary: Summary
    rows: list[Row]
    test: Evaluation | None


def read(path: Path) -> Record:
    """Reads a run directory, also one that is being written.

    Raises `UserError`, naming the file, where it is missing or is not what `train` or `evaluate`
    write. A run that has logged nothing yet has no metrics.
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
    """The lines of a `metrics.jsonl`. A last line that is still being written is left out."""
    *lines, _unfinished = _text(path).split("\n")
    return [_checked(Row, line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_evaluation(path: Path) -> Evaluation:
    """The result of `flowtrain evaluate`."""
    return _checked(Evaluation, _text(path), str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read: {reason}") from error


Kind = TypeVar("Kind", bound=BaseModel)


def _checked(kind: type[Kind], content: str | dict[str, Any], where: str) -> Kind:
    """JSON text, or values already parsed, as one of the kinds above."""
    try:
        return (
            kind.model_validate_json(content)
            if isinstance(content, str)
            else kind.model_validate(content)
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if not key:  # not JSON, or no object: the value is the whole file
            raise UserError(f"{where}: broken: {first['msg']}") from error
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise UserError(f"{where}: {key}: {first['msg']}{got}") from error

"""Trained models that come with flowtrain: a checkpoint and a card each, in `flowtrain/zoo`.

`make models` trains them again (`benchmarks/zoo.py`).
"""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from flowtrain.checkpoints.record import checked
from flowtrain.config import load_yaml
from flowtrain.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "zoo"


class Card(BaseModel):
    """A trained model's origin, and figures of the file itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    command: str  # that trains it
    machine: str
    time: str  # of training
    data: str  # and where they come from
    licence: str  # of the data
    parameters: int
    unit: str
    loss: float  # of the test split, in `unit`
    error: float  # its standard error over images
    likelihood: str  # exact, or a bound from one draw of noise
    images: int  # in the test split
    loss_of_first: float  # of the first images of the test split, as a check
    first: int  # how many these are
    sha256: str  # of the checkpoint


def names() -> list[str]:
    """The names of the trained models, for `MODEL` of a command line."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def checkpoint_of(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def argument(checkpoint: Path) -> str:
    """The `MODEL` of a command for a checkpoint: a trained model's name, or the path itself."""
    return checkpoint.stem if checkpoint.parent == FOLDER else str(checkpoint)


def card_of(name: str) -> Card:
    """The card of a trained model. Raises `UserError` if it is damaged."""
    path = FOLDER / f"{name}.yaml"
    return checked(Card, load_yaml(path), str(path))


def verified(name: str) -> Path:
    """The file of a trained model. Raises `UserError` if it is not the one of its card."""
    path = checkpoint_of(name)
    if hashlib.sha256(path.read_bytes()).hexdigest() != card_of(name).sha256:
        raise UserError(
            f"{path}: its SHA-256 differs from its card, {name}.yaml; install flowtrain again"
        )
    return path

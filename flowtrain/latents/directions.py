"""Directions of attributes in latent space, which separate images with an attribute from others."""

import io
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel, model_hash, run_of
from flowtrain.errors import UserError, cut, did_you_mean
from flowtrain.latents.files import OtherModel, require_format
from flowtrain.system.arrays import ArrayFile
from flowtrain.system.files import one_at_a_time
from flowtrain.system.files import save as save_file
from flowtrain.system.random import Stream, generator

log = logging.getLogger("flowtrain")

Method = Literal["difference", "logistic"]
METHODS: tuple[Method, ...] = ("difference", "logistic")
FORMAT = 1
HELD_OUT = 0.25  # of the images with the attribute, and of those without
FEWEST = 4  # images of each kind, so that one can be held out and a mean taken of the others
# Inverse of scikit-learn's penalty: strong, because latents often have more entries than there are
# images.
STRENGTH = 0.1
LONGEST_NAME = 60  # characters
NUMBERS = ("low", "high", "accuracy", "error")
# The arrays of a file beside `vector`, with their kinds of numpy's types.
FIELDS = {"name": "U", "method": "U", "held_out": "iu", "orthogonal": "b"}
FIELDS |= dict.fromkeys(NUMBERS, "f")


@dataclass(frozen=True)
class Direction:
    """An attribute of images as a direction in latent space.

    vector: float32 `(D,)` of length 1 on the CPU. It points to images that have the attribute.
    low, high: mean of `z @ vector` over training images without and with the attribute.
    accuracy: balanced accuracy on held-out images, by the middle of the two. A guess has 1/2.
    error: its standard error.
    held_out: number of held-out images.
    orthogonal: whether it was made orthogonal to other directions.
    others: if so, the vectors of all others in its file. Together with `vector` they span the
        others as they were found, whose projections a move along it keeps.
    """

    name: str
    vector: Tensor
    low: float
    high: float
    method: Method
    accuracy: float
    error: float
    held_out: int
    orthogonal: bool = False
    others: Sequence[Tensor] = ()

    def target(self, strength: float) -> float:
        """The projection `z @ vector` at a strength: `low` at -1, and `high` at 1."""
        return (self.low + self.high) / 2 + strength * (self.high - self.low) / 2


def divided(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of training images and of held-out ones, for `count` images of a kind."""
    order = torch.randperm(count, generator=generator(seed, Stream.PAIRS))
    held = max(1, round(HELD_OUT * count))
    return order[held:], order[:held]


def fitted(positive: Tensor, negative: Tensor, method: Method) -> Tensor:
    """The direction from latents `negative` `(M, D)` to latents `positive` `(N, D)`, `(D,)`: the
    difference of their means (Kingma & Dhariwal 2018, section 6.2), or the weights of a logistic
    regression.
    """
    if method == "difference":
        return positive.mean(dim=0) - negative.mean(dim=0)
    from sklearn.linear_model import LogisticRegression

    z = torch.cat([positive, negative]).numpy()
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    model = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=1000)
    return torch.from_numpy(model.fit(z, labels).coef_[0].astype(np.float32))


def orthogonal_to(vector: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The part of `vector` `(D,)` orthogonal to all others (Shen et al. 2020, section 3.3)."""
    basis = torch.linalg.qr(torch.stack(list(others), dim=1).double())[0]
    rest = vector.double()
    for _ in range(2):  # once more for what rounding has left
        rest = rest - basis @ (basis.T @ rest)
    return rest.to(vector.dtype)


def measured(
    name: str,
    positive: Tensor,
    negative: Tensor,
    method: Method,
    others: Sequence[Tensor] = (),
    seed: int = 0,
) -> Direction:
    """The direction of an attribute from latents with it, `(N, D)`, and without it, `(M, D)`, made
    orthogonal to `others`.

    A seeded quarter of both is held out for the accuracy. Raises `UserError` if there are too few
    images, or nothing is left of the direction.
    """
    for latents, kind in ((positive, "with"), (negative, "without")):
        if len(latents) < FEWEST:
            raise UserError(
                f"{name}: there are {len(latents)} images {kind} it, and at least {FEWEST} are "
                f"needed"
            )
    (own, own_held), (other, other_held) = (divided(len(z), seed) for z in (positive, negative))
    vector = fitted(positive[own], negative[other], method)
    length = vector.norm()
    if others:
        vector = orthogonal_to(vector, others)
    if not vector.norm() > 1e-4 * length:
        raise UserError(
            f"{name}: nothing is left of its direction"
            + (": it is a mixture of the others" if others else ", as the images are the same")
        )
    vector = vector / vector.norm()
    low, high = (float((z @ vector).mean()) for z in (negative[other], positive[own]))
    if not high > low:
        raise UserError(f"{name}: its direction does not separate the images")
    middle = (low + high) / 2
    right = positive[own_held] @ vector > middle, negative[other_held] @ vector <= middle
    shares = [float(each.double().mean()) for each in right]
    error = sum(p * (1 - p) / len(each) for p, each in zip(shares, right, strict=True)) ** 0.5 / 2
    accuracy, held_out = sum(shares) / 2, sum(map(len, right))
    return Direction(
        name, vector, low, high, method, accuracy, error, held_out, orthogonal=bool(others)
    )


def of_attributes(
    z: Tensor,
    attributes: Mapping[str, Tensor],
    method: Method,
    known: Sequence[Direction] = (),
    orthogonal: bool = False,
    seed: int = 0,
) -> list[Direction]:
    """The directions of attributes, each a bool `(N,)`, true for the latents `(N, D)` that have it.

    With `orthogonal`, each is made orthogonal to all others as they were found, and to those
    `known` under other names. Raises `UserError` as `measured` does.
    """

    def found(name: str, others: Sequence[Tensor] = ()) -> Direction:
        has = attributes[name]
        return measured(name, z[has], z[~has], method, others, seed)

    plain = {name: found(name) for name in attributes}
    if not orthogonal:
        return list(plain.values())
    outside = [each.vector for each in known if each.name not in attributes]
    return [
        found(name, [*outside, *(plain[other].vector for other in plain if other != name)])
        for name in attributes
    ]


def check_name(name: str, where: str = "") -> None:
    """Raises `UserError`, whose message begins with `where`, for an impossible name."""
    if not name or name != cut(name, LONGEST_NAME) or name[0] == "-":
        raise UserError(
            f"{where}{cut(name)!r} cannot be the name of an attribute: give at most {LONGEST_NAME} "
            f"printable characters, not beginning with '-'"
        )


def file_of(model: LoadedModel) -> Path:
    return run_of(model.checkpoint.path) / "attributes.npz"


def save(path: Path, directions: Sequence[Direction], hash_of_model: str) -> None:
    """Writes directions into one file, with the model's `model_hash`."""
    arrays: dict[str, Any] = {
        key: np.array([getattr(each, key) for each in directions]) for key in FIELDS
    }
    arrays |= {"format": np.array(FORMAT), "model": np.array(hash_of_model)}
    arrays["vector"] = torch.stack([each.vector for each in directions]).numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    save_file(path, buffer.getvalue(), named=False)


def load(path: Path, model: LoadedModel) -> dict[str, Direction]:
    """The directions in a file, by name. The file may come from a stranger. Raises `UserError` that
    names the file if it has another format, or is of another model.
    """
    file = ArrayFile(path)
    require_format(file, FORMAT, "attributes", model)
    count = len(file.read("name", "U", (None,)))
    vectors = torch.from_numpy(
        file.read("vector", "f", (count, model.flow.latent_dims)).astype(np.float32)
    )
    columns = {key: file.read(key, kind, (count,)) for key, kind in FIELDS.items()}
    columns |= {key: columns[key].astype(np.float64) for key in NUMBERS}
    found: dict[str, Direction] = {}
    for i, vector in enumerate(vectors):
        values = {key: column[i].item() for key, column in columns.items()}
        check_name(name := values["name"], f"{path}: ")
        unit = abs(float(vector.norm()) - 1) < 1e-3
        if not unit or not np.isfinite([values[key] for key in NUMBERS]).all():
            raise UserError(f"{path}: {cut(name)}: its numbers are not a direction")
        if values["method"] not in METHODS or name in found or values["low"] >= values["high"]:
            raise UserError(f"{path}: {cut(name)}: it is not the description of a direction")
        found[name] = Direction(vector=vector, **values)
    for name, each in found.items():
        if each.orthogonal:
            others = [found[other].vector for other in found if other != name]
            found[name] = replace(each, others=others)
    return found


def existing(model: LoadedModel) -> dict[str, Direction]:
    """The attributes that are kept for a model, by name; none if there is no file."""
    path = file_of(model)
    return load(path, model) if path.exists() else {}


def of_these_weights(model: LoadedModel) -> dict[str, Direction]:
    """The same, but none if the file is of other weights, or from before more training."""
    try:
        return existing(model)
    except OtherModel:
        return {}


def add(model: LoadedModel, found: Sequence[Direction]) -> dict[str, Direction]:
    """Adds directions to those that are kept for a model, and returns all by name. A file of other
    weights gets another name. Commands that do so at the same time wait for each other.
    """
    path, own = file_of(model), model.checkpoint.path
    if not own.exists():  # FILE.py:NAME, a flow of other code
        own = own.with_name(own.name.rpartition(":")[0])
    with one_at_a_time(own):
        before = of_these_weights(model)
        if path.exists() and not before:
            its = "".join(filter(str.isalnum, str(ArrayFile(path).read("model", "U", ()))))
            aside, number = path.with_stem(f"{path.stem}-{its[:8]}"), itertools.count(2)
            while aside.exists():
                aside = path.with_stem(f"{path.stem}-{its[:8]}-{next(number)}")
            path.rename(aside)
            log.warning("%s was of other weights: renamed to %s", path, aside)
        after = before | {each.name: each for each in found}
        save(path, list(after.values()), model_hash(model))
    return after


def named(model: LoadedModel, name: str) -> Direction:
    """The attribute of this name. Raises `UserError` if the model has none."""
    known = existing(model)
    if name not in known:
        there = ", ".join(sorted(known)) or "none; `flowtrain attributes` makes some"
        raise UserError(
            f"{cut(name)}: no such attribute of {model.checkpoint.path} (there are: {cut(there)})"
            f"{did_you_mean(name, known)}"
        )
    return known[name]

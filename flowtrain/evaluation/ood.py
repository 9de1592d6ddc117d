"""Telling images of other data from those that a model was trained on: three scores of an image,
side by side.

The first, the likelihood, is known to fail: flows trained on CIFAR-10 find house numbers likelier
than CIFAR-10 (Nalisnick et al. 2019a, "Do Deep Generative Models Know What They Don't Know?"). The
other two are the usual repairs. Of each, a larger value means further out. All are in bits per
dimension.
"""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from flowtrain import config as configuration
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.config import Data as DataConfig
from flowtrain.data.named import section_named, undivided
from flowtrain.data.splits import DataSet, Split
from flowtrain.datasets.base import Policy, quantize, resize
from flowtrain.errors import RunError, UserError
from flowtrain.evaluation.score import score
from flowtrain.flow.kinds import bits_per_dim
from flowtrain.pictures.grid import to_8bit
from flowtrain.pictures.lossless import coders, complexity, picture_of
from flowtrain.system.random import Stream, generator
from flowtrain.types import Shape

SCORES = ("likelihood", "typicality", "complexity_corrected")


COLUMNS = (
    *("dataset", "index", "bits_per_dim", "log_prob"),
    *("typicality", "complexity_bits_per_dim", "complexity_corrected"),
)


def typicality(bits: np.ndarray, entropy: float) -> np.ndarray:
    """`|-log p(x) - H|`, `(N,)`, bits/dim: how far an image is from as probable as the model's
    images usually are.

    Nalisnick et al. 2019b ("Detecting Out-of-Distribution Inputs to Deep Generative Models Using
    Typicality"), the test with a batch of one image. `bits` is `-log p(x)`, and `entropy`, H, its
    mean over images like those trained on.
    """
    return np.abs(bits - entropy)


def complexity_corrected(bits: np.ndarray, complexity: np.ndarray) -> np.ndarray:
    """`-log2 p(x) - L(x)`, `(N,)`, bits/dim: how many more bits the model needs for an image than a
    general coder.

    Serra et al. 2020 ("Input Complexity and Out-of-Distribution Detection with Likelihood-Based
    Generative Models", section 3), a likelihood ratio whose other model is the coder; L(x) is the
    length that `complexity` gives.
    """
    return bits - complexity


def auroc(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float | None]:
    """The chance that an image from outside has the larger score, ties counting half; and its
    standard error.

    The error is that of DeLong et al. 1988, for two independent samples, `(N,)` and `(M,)`; None
    where one is a single image. It is 0 where the scores do not overlap, which says no more than
    that there were too few to see them do so.
    """
    from sklearn.metrics import roc_auc_score

    n, m = len(inside), len(outside)
    area = float(roc_auc_score(np.repeat([0, 1], [n, m]), np.concatenate([inside, outside])))
    if min(n, m) < 2:
        return area, None
    variances = (
        _share_below(outside, inside).var(ddof=1) / n,
        _share_below(inside, outside).var(ddof=1) / m,
    )
    return area, math.sqrt(sum(variances))


def _share_below(sample: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each value, the share of the sample that is smaller; what is equal counts half."""
    ordered = np.sort(sample)
    return (
        np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    ) / (2 * len(sample))


@dataclass(frozen=True)
class Collection:
    """Images of one kind, brought to the model's shape and levels."""

    name: str
    images: np.ndarray  # uint8 (N, C, H, W), values 0..Q-1
    split: str | None = None  # None for images that are made
    # shape and levels as stored, where those are not the model's
    stored: tuple[Shape, int] | None = None


def noise(count: int, shape: Shape, levels: int, seed: int) -> np.ndarray:
    """Images whose values are independent and uniform over all levels, uint8 `(count, C, H, W)`."""
    randomness = _randomness(seed, 1)
    return np.stack([_levels(shape, levels, randomness(index)) for index in range(count)])


def constant(count: int, shape: Shape, levels: int, seed: int) -> np.ndarray:
    """Images of one colour each, uniform over all colours, uint8 `(count, C, H, W)`."""
    randomness = _randomness(seed, 2)
    colours = np.stack(
        [_levels((shape[0], 1, 1), levels, randomness(index)) for index in range(count)]
    )
    return np.broadcast_to(colours, (count, *shape)).copy()


def shuffled(images: np.ndarray, seed: int) -> np.ndarray:
    """The images with their pixels in another order, each in its own; the channels of a pixel stay
    together.
    """
    randomness = _randomness(seed, 3)
    count, channels, height, width = images.shape
    pixels = images.reshape(count, channels, height * width)
    orders = (
        torch.randperm(height * width, generator=randomness(index)).numpy()
        for index in range(count)
    )
    return np.stack([image[:, order] for image, order in zip(pixels, orders, strict=True)]).reshape(
        images.shape
    )


MADE = ("noise", "constant", "shuffled")


def _randomness(seed: int, kind: int) -> Callable[[int], torch.Generator]:
    """A generator for each image's index, so that the first images do not depend on how many there
    are.
    """
    return lambda index: generator(seed, Stream.EVALUATION, index, kind)


def _levels(shape: Shape, levels: int, randomness: torch.Generator) -> np.ndarray:
    return torch.randint(levels, shape, generator=randomness, dtype=torch.uint8).numpy()


def convert(
    images: np.ndarray, levels: int, to_shape: Shape, to_levels: int, policy: Policy = "crop"
) -> np.ndarray:
    """Images uint8 `(N, C, H, W)` with values 0..levels-1, as a model's: uint8 `(N, *to_shape)`,
    0..to_levels-1.

    Values are stretched to 0..255; size and channels changed by `flowtrain.datasets.base.resize`
    (grey is repeated in each channel, colours become luma); then 2**n levels keep the upper n bits,
    as `data.n_bits` does, and any other number Q takes the nearest of 0..Q-1. What is the model's
    already stays as it is.
    """
    if images.shape[1:] == to_shape and levels == to_levels:
        return images
    pixels = to_8bit(torch.from_numpy(np.ascontiguousarray(images)), levels).numpy()
    if pixels.shape[1:] != to_shape:
        pixels = np.stack([resize(picture_of(image), to_shape, policy) for image in pixels])
    return quantize(pixels, to_levels)


def named(name: str, option: str, model: LoadedModel, own: DataConfig, count: int) -> Collection:
    """The first `count` images of a data set, folder or file that a command line names, as the
    model's.

    They are those of its test split; of a folder or file that has none, of all. `own` is the `data`
    section of the model's own data. Raises `UserError` naming `option`.
    """
    flow = model.flow
    section = section_named(name, own, flow.shape, option, also=MADE if option == "--out" else ())
    if name != own.name:  # what follows brings any number of levels to the model's
        section |= {"n_bits": 8, "flip": None, "shift": 0}
    config = configuration.parse(
        {**model.config.resolved(), "data": section}, f"{option} {name}"
    ).data
    data = DataSet(config, undivided(config, own))
    levels = data.kind.require_levels(f"{option} {name}: real values, not images")
    return _first(name, "all" if data.undivided else "test", data, levels, model, count)


def own_split(split: Any, model: LoadedModel, data: DataSet, count: int) -> Collection:
    """The first `count` images of a split of the model's own data."""
    levels = levels_of(model)
    data.require(model.flow.shape, levels, model.checkpoint.path)
    return _first(data.config.name, split, data, levels, model, count)


def _first(
    name: str, split: Any, data: DataSet, data_levels: int, model: LoadedModel, count: int
) -> Collection:
    images = data.split(split).take(slice(0, count)).numpy()
    shape, levels = model.flow.shape, levels_of(model)
    policy = data.config.options().get("resize", "crop")
    stored = None if (data.shape, data_levels) == (shape, levels) else (data.shape, data_levels)
    return Collection(name, convert(images, data_levels, shape, levels, policy), split, stored)


def levels_of(model: LoadedModel) -> int:
    """Q of a model of images. Raises `UserError` for one of real values."""
    return model.flow.kind.require_levels(
        f"{model.checkpoint.path}: a model of real values; the scores are of images"
    )


def made(name: str, like: Collection, levels: int, seed: int) -> Collection:
    """The images that a name of `MADE` stands for: as many as those of `like`, and of their
    shape.
    """
    if name == "shuffled":
        return Collection(name, shuffled(like.images, seed))
    make = {"noise": noise, "constant": constant}[name]
    return Collection(name, make(len(like.images), like.images.shape[1:], levels, seed))


@dataclass(frozen=True)
class Scored:
    """A collection's figures, each `(N,)` float64; all but `log_prob` (nats) in bits/dim."""

    collection: Collection
    log_prob: np.ndarray
    entropy: float  # H, for `typicality`

    @property
    def likelihood(self) -> np.ndarray:
        """`-log2 p(x) / D`, the bits per dimension."""
        return bits_per_dim(
            torch.from_numpy(self.log_prob), math.prod(self.collection.images.shape[1:])
        ).numpy()

    @property
    def typicality(self) -> np.ndarray:
        return typicality(self.likelihood, self.entropy)

    @cached_property
    def complexity(self) -> np.ndarray:
        return complexity(self.collection.images)

    @property
    def complexity_corrected(self) -> np.ndarray:
        return complexity_corrected(self.likelihood, self.complexity)

    @property
    def non_finite(self) -> list[int]:
        """The images whose likelihood is not finite."""
        return np.flatnonzero(~np.isfinite(self.log_prob)).tolist()


@dataclass(frozen=True)
class Comparison:
    """Images of the model's kind, and others, scored."""

    reference: Scored  # the images whose mean bits/dim is H
    inside: Scored
    outside: list[Scored]

    @property
    def compared(self) -> list[Scored]:
        return [self.inside, *self.outside]


def score_all(
    model: LoadedModel,
    reference: Collection,
    inside: Collection,
    outside: list[Collection],
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """The likelihood of every image; `reference` are images of the model's data which are not among
    those of `inside`.

    The bound is the single-draw one, of the averaged or raw weights that were loaded, as `flowtrain
    evaluate` has it.
    """
    collections = [reference, inside, *outside]
    total = sum(len(collection.images) for collection in collections)
    log_probs: list[np.ndarray] = []
    for collection in collections:
        split = Split(collection.images, np.arange(len(collection.images)), drop_bits=0)
        before = sum(map(len, log_probs))
        ahead = partial(_ahead, progress, before, total)
        log_probs.append(
            score(
                model.flow, split, seed=seed, batch_size=batch_size, progress=ahead
            ).log_prob.numpy()
        )
    entropy = float(bits_per_dim(torch.from_numpy(log_probs[0]), model.flow.dims).mean())
    first, second, *rest = (
        Scored(collection, log_prob, entropy)
        for collection, log_prob in zip(collections, log_probs, strict=True)
    )
    return Comparison(first, second, rest)


def _ahead(
    progress: Callable[[int, int], None], before: int, total: int, done: int, of: int
) -> None:
    progress(before + done, total)


def check_finite(comparison: Comparison) -> None:
    """Raises `RunError` naming the images whose likelihood is not finite."""
    said = []
    for scored in (comparison.reference, *comparison.compared):
        bad, collection = scored.non_finite, scored.collection
        if bad:
            which = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
            said.append(
                f"{len(bad)} of {len(collection.images)} images of {collection.name} "
                f"({collection.split or 'made'}) "
                f"have a likelihood that is not finite: those at {which}"
            )
    if said:
        raise RunError("; ".join(said))


def result(comparison: Comparison, model: LoadedModel, seed: int) -> dict[str, Any]:
    """The result of `flowtrain ood` as plain data; what cannot be computed is None."""
    return {
        "in": _described(comparison.inside),
        "out": [
            _described(scored) | _areas(comparison.inside, scored) for scored in comparison.outside
        ],
        "entropy_bits_per_dim": _finite(comparison.reference.entropy),
        "entropy_split": comparison.reference.collection.split,
        "entropy_images": len(comparison.reference.log_prob),
        "coders": coders(),
        "dims": model.flow.dims,
        "levels": model.flow.levels,
        "weights": model.weights,
        "step": model.checkpoint.meta["step"],
        "seed": seed,
        "checkpoint": str(model.checkpoint.path),
    }


def _described(scored: Scored) -> dict[str, Any]:
    collection = scored.collection
    shape, levels = collection.stored or (None, None)
    return {
        "dataset": collection.name,
        "split": collection.split,
        "num_images": len(collection.images),
        "non_finite_images": len(scored.non_finite),
        "stored_shape": shape and list(shape),
        "stored_levels": levels,
        **_mean("bits_per_dim", scored.likelihood),
        **_mean("complexity_bits_per_dim", scored.complexity),
    }


def _mean(name: str, values: np.ndarray) -> dict[str, float | None]:
    """Mean with its standard error, and median: of noise, a mean is that of a few images."""
    with np.errstate(invalid="ignore"):  # of infinite values
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return {
            name: _finite(values.mean()),
            f"{name}_stderr": _finite(error),
            f"{name}_median": _finite(np.median(values)),
        }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _areas(inside: Scored, outside: Scored) -> dict[str, dict[str, float | None]]:
    """AUROC and its error for each score; None for a score that is not finite for some image."""
    areas: dict[str, tuple[float | None, float | None]] = dict.fromkeys(SCORES, (None, None))
    for name in SCORES:
        a, b = getattr(inside, name), getattr(outside, name)
        if np.isfinite(a).all() and np.isfinite(b).all():
            areas[name] = auroc(a, b)
    return {
        "auroc": {name: area for name, (area, _) in areas.items()},
        "auroc_stderr": {name: error for name, (_, error) in areas.items()},
    }


def scores_csv(comparison: Comparison) -> bytes:
    """One row an image, those of the `in` data first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for scored in comparison.compared:
        columns = (scored.likelihood, scored.log_prob, scored.typicality, scored.complexity)
        rows = zip(
            *(column.tolist() for column in (*columns, scored.complexity_corrected)), strict=True
        )
        for index, row in enumerate(rows):
            writer.writerow([scored.collection.name, index, *map(repr, row)])
    return text.getvalue().encode()


def draw(comparison: Comparison, outcome: dict[str, Any]) -> bytes:
    """Histograms as a PNG file: a panel for each score, with all data sets, and the areas of
    `outcome`, its result.
    """
    from matplotlib.figure import Figure

    titles = {
        "likelihood": "likelihood: -log2 p(x)",
        "typicality": f"typicality: |-log2 p(x) - {comparison.reference.entropy:.2f}|",
        "complexity_corrected": f"complexity-corrected: -log2 p(x) - L(x) "
        f"({', '.join(outcome['coders'])})",
    }
    # Noise and shuffled pixels may cost millions of bits: what is further out than twice a uniform
    # coder's log2 Q is drawn there, in the last bar.
    furthest = 2 * math.log2(outcome["levels"])
    figure = Figure(figsize=(16, 5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(SCORES)), SCORES, strict=True):
        values = [getattr(scored, name) for scored in comparison.compared]
        values = [of_set[np.isfinite(of_set)].clip(max=furthest) for of_set in values]
        edges = np.histogram_bin_edges(np.concatenate(values), bins=100)
        labels = [f"{comparison.inside.collection.name} (in)"]
        for described in outcome["out"]:
            area = described["auroc"][name]
            labels.append(described["dataset"] + ("" if area is None else f": AUROC {area:.3f}"))
        for order, (of_set, label) in enumerate(zip(values, labels, strict=True)):
            share = np.full(len(of_set), 1 / max(len(of_set), 1))
            style: dict[str, Any] = (
                {"color": "black", "histtype": "step"} if order == 0 else {"alpha": 0.5}
            )
            label = label.replace("$", r"\$")  # in a path, no formula
            axes.hist(
                of_set, edges, weights=share, label=label, **{"histtype": "stepfilled", **style}
            )
        axes.set_title(titles[name])
        axes.set(
            xlabel=f"bits/dim (what is over {furthest:.3g} is in the last bar)",
            ylabel="share of the images",
        )
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def check_names(inside: str, outside: list[str]) -> None:
    """Raises `UserError` where two data sets have the same name: rows and figures could not be told
    apart.
    """
    for index, name in enumerate(outside):
        if name in (inside, *outside[:index]):
            raise UserError(f"--out {name}: it is named twice")

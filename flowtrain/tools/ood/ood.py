"""Out-of-distribution detection: can a model tell other images from those that it was trained on?

Three scores of an image are computed side by side. The first, the likelihood, is known to fail:
flows trained on CIFAR-10 find house numbers likelier than CIFAR-10 (Nalisnick et al. 2019a, "Do
Deep Generative Models Know What They Don't Know?"). The other two are the usual repairs. For each
score, a larger value means further out. All are in bits per dimension, or for a density of noisy
images in nats per dimension, where the complexity is in nats too.
"""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from flowtrain import config as configuration
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.named import section_named, undivided
from flowtrain.data.splits import DataSet, Split, SplitName, sampled
from flowtrain.datasets.base import resize
from flowtrain.errors import RunError, UserError
from flowtrain.evaluation.score import require_memory, score
from flowtrain.flow.inputs import quantize
from flowtrain.flow.kinds import QuantizedImages
from flowtrain.pictures.grid import to_8bit
from flowtrain.pictures.lossless import coders, complexity, picture_of
from flowtrain.system.console import silent
from flowtrain.system.random import Stream, generator
from flowtrain.types import Policy, Shape


@dataclass(frozen=True)
class Collection:
    """Images of one kind, brought to the model's shape and levels."""

    name: str
    images: np.ndarray  # uint8 (N, C, H, W), values 0..Q-1
    positions: np.ndarray  # of the images in the split, or 0..N-1
    split: str | None = None  # None for made images
    # Shape and levels as stored, where those are not the model's.
    stored: tuple[Shape, int] | None = None


@dataclass(frozen=True)
class Collections:
    """The images of a comparison. `reference` are images of the model's data that are not among
    those of `inside`.
    """

    reference: Collection
    inside: Collection
    outside: list[Collection]

    @property
    def all(self) -> list[Collection]:
        return [self.reference, self.inside, *self.outside]


def collect(
    model: LoadedModel,
    data: DataSet,
    inside: str | None,
    outside: list[str],
    *,
    num_images: int,
    seed: int = 0,
) -> Collections:
    """A sample of `num_images` images of each data set that a command line names.

    Args:
        data: the model's own data. The reference is its validation split, or its training split
            where that is empty.
        inside: `--in`: images of the kind that the model was trained on. By default, the test split
            of its own data.
        outside: `--data`: other images, or names in `MADE`.
        seed: of the samples, and of images that are made.

    Raises `UserError` naming the option, for a model of real values, and where a name is given
    twice.
    """
    own = data.config.name
    _check_names(inside or own, outside)
    within = (
        named(inside, "--in", model, data, num_images, seed)
        if inside
        else own_split("test", model, data, num_images, seed)
    )
    others = [
        made(name, within, levels_of(model), seed)
        if name in MADE
        else named(name, "--data", model, data, num_images, seed)
        for name in outside
    ]
    reference: SplitName = "validation" if len(data.split("validation")) else "train"
    return Collections(own_split(reference, model, data, num_images, seed), within, others)


def _check_names(inside: str, outside: list[str]) -> None:
    """Raises `UserError` where two data sets have one name: rows and figures would look alike."""
    for index, name in enumerate(outside):
        if name in (inside, *outside[:index]):
            raise UserError(f"--data {name}: it is named twice")


def named(
    name: str, option: str, model: LoadedModel, own: DataSet, count: int, seed: int = 0
) -> Collection:
    """A sample of `count` images of a data set, folder or file that a command line names, as the
    model's.

    They are those of its test split, or all, for a folder or file that has no test split. `own` are
    the model's own data. Raises `UserError` naming `option`.
    """
    flow = model.flow
    also = MADE if option == "--data" else ()
    section = section_named(name, own.config, flow.shape, option, also=also)
    if name != own.config.name:  # `convert` brings any number of levels to the model's
        section |= {"n_bits": 8, "flip": None, "shift": 0}
    # What the model's configuration names was trusted when it was loaded.
    config = configuration.parse(
        {**model.config.resolved(), "data": section}, f"{option} {name}", trust_code=True
    ).data
    data = DataSet(config, undivided(config, own.config))
    levels = data.kind.require_levels(f"{option} {name}: real values, not images")
    return _sample(name, "all" if data.undivided else "test", data, levels, model, count, seed)


def own_split(
    split: SplitName, model: LoadedModel, data: DataSet, count: int, seed: int = 0
) -> Collection:
    """A sample of `count` images of a split of the model's own data."""
    levels = levels_of(model)
    data.require(model.flow.shape, levels, model.checkpoint.path)
    return _sample(data.config.name, split, data, levels, model, count, seed)


def _sample(
    name: str,
    split: SplitName,
    data: DataSet,
    data_levels: int,
    model: LoadedModel,
    count: int,
    seed: int,
) -> Collection:
    every = data.split(split)
    positions = sampled(len(every), count, seed)
    images = every.take(positions).numpy()
    shape, levels = model.flow.shape, levels_of(model)
    policy = data.config.resize_policy
    stored = None if (data.shape, data_levels) == (shape, levels) else (data.shape, data_levels)
    converted = convert(images, data_levels, shape, levels, policy)
    return Collection(name, converted, positions, split, stored)


def levels_of(model: LoadedModel) -> int:
    """Q of a model of images. Raises `UserError` for a model of real values."""
    return model.flow.kind.require_levels(
        f"{model.checkpoint.path}: a model of real values; the scores are of images"
    )


def convert(
    images: np.ndarray, levels: int, to_shape: Shape, to_levels: int, policy: Policy = "crop"
) -> np.ndarray:
    """Brings images, uint8 `(N, C, H, W)` with values 0..levels-1, to a model's shape and levels:
    uint8 `(N, *to_shape)` with values 0..to_levels-1.

    Values are stretched to 0..255, and size and channels changed by
    `flowtrain.datasets.base.resize` (grey is repeated in each channel, colours become luma). Then
    2**n levels keep the upper n bits, as `data.n_bits` does, and any other number Q takes the
    nearest of 0..Q-1. Images that have the model's shape and levels stay as they are.
    """
    if images.shape[1:] == to_shape and levels == to_levels:
        return images
    pixels = to_8bit(torch.from_numpy(np.ascontiguousarray(images)), levels).numpy()
    if pixels.shape[1:] != to_shape:
        pixels = np.stack([resize(picture_of(image), to_shape, policy) for image in pixels])
    return quantize(pixels, to_levels)


MADE = ("noise", "constant", "shuffled")


def made(name: str, like: Collection, levels: int, seed: int) -> Collection:
    """The images that a name in `MADE` stands for: as many as those of `like`, and of their
    shape.
    """
    count, channels, height, width = like.images.shape
    if name == "shuffled":
        images = shuffled(like.images, seed)
    else:
        make = {"noise": noise, "constant": constant}[name]
        images = make(count, (channels, height, width), levels, seed)
    return Collection(name, images, np.arange(count))


def noise(count: int, shape: Shape, levels: int, seed: int) -> np.ndarray:
    """Images whose values are independent and uniform over all levels, uint8 `(count, C, H, W)`."""
    randomness = _randomness(seed, 1)
    return np.stack([_draw(shape, levels, randomness(index)) for index in range(count)])


def constant(count: int, shape: Shape, levels: int, seed: int) -> np.ndarray:
    """Images of one colour each, uniform over all colours, uint8 `(count, C, H, W)`."""
    randomness = _randomness(seed, 2)
    colours = [_draw((shape[0], 1, 1), levels, randomness(index)) for index in range(count)]
    return np.broadcast_to(np.stack(colours), (count, *shape)).copy()


def shuffled(images: np.ndarray, seed: int) -> np.ndarray:
    """The images with their pixels in another order, each in its own; the channels of a pixel stay
    together.
    """
    randomness = _randomness(seed, 3)
    pixels = images.reshape(*images.shape[:2], -1)
    mixed = [
        image[:, torch.randperm(image.shape[1], generator=randomness(index)).numpy()]
        for index, image in enumerate(pixels)
    ]
    return np.stack(mixed).reshape(images.shape)


def _randomness(seed: int, kind: int) -> Callable[[int], torch.Generator]:
    """A generator per image index, so that the first images do not depend on how many there are."""
    return lambda index: generator(seed, Stream.EVALUATION, index, kind)


def _draw(shape: Shape, levels: int, randomness: torch.Generator) -> np.ndarray:
    return torch.randint(levels, shape, generator=randomness, dtype=torch.uint8).numpy()


SCORES = ("likelihood", "typicality", "complexity_corrected")


def typicality(loss: np.ndarray, entropy: float) -> np.ndarray:
    """`|-log p(x) - H|`, `(N,)`: how far an image's likelihood is from the usual one.

    This is the test of Nalisnick et al. 2019b ("Detecting Out-of-Distribution Inputs to Deep
    Generative Models Using Typicality") with a batch of one image. `loss` is `-log p(x)`, and
    `entropy`, H, its mean over images like those trained on.
    """
    return np.asarray(np.abs(loss - entropy))


def complexity_corrected(loss: np.ndarray, complexity: np.ndarray) -> np.ndarray:
    """`-log p(x) - L(x)`, `(N,)`, in bits/dim: how many more bits the model needs than a general
    coder.

    This is the likelihood ratio of Serra et al. 2020 ("Input Complexity and Out-of-Distribution
    Detection with Likelihood-Based Generative Models", section 3), whose other model is the coder.
    L(x) is the length that `complexity` gives. A density is no length: its score is known up to a
    constant, on which no AUROC depends.
    """
    return np.asarray(loss - complexity)


class Mean(NamedTuple):
    """A mean with its standard error, and the median. None stands for what is not finite."""

    mean: float | None
    stderr: float | None
    median: float | None


@dataclass(frozen=True)
class Scored:
    """A collection's figures, each `(N,)` float64; all but `log_prob` (nats) in the unit of the
    kind.
    """

    collection: Collection
    log_prob: np.ndarray
    entropy: float  # H, for `typicality`
    kind: QuantizedImages

    @property
    def likelihood(self) -> np.ndarray:
        """`-log p(x) / D`, for example the bits per dimension."""
        dims = math.prod(self.collection.images.shape[1:])
        return self.kind.loss(torch.from_numpy(self.log_prob), dims).numpy()

    @property
    def typicality(self) -> np.ndarray:
        return typicality(self.likelihood, self.entropy)

    @cached_property
    def complexity(self) -> np.ndarray:
        return self.kind.in_unit(complexity(self.collection.images))

    @property
    def complexity_corrected(self) -> np.ndarray:
        return complexity_corrected(self.likelihood, self.complexity)

    def score(self, name: str) -> np.ndarray:
        """A score by its name in `SCORES`."""
        return np.asarray(getattr(self, name))

    @property
    def mean_loss(self) -> Mean:
        return _mean(self.likelihood)

    @property
    def non_finite(self) -> list[int]:
        """The images whose likelihood is not finite."""
        return [int(index) for index in self.collection.positions[~np.isfinite(self.log_prob)]]


def _mean(values: np.ndarray) -> Mean:
    """The median beside the mean: for noise, a few images determine the mean."""
    with np.errstate(invalid="ignore"):  # for infinite values
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Mean(_finite(values.mean()), _finite(error), _finite(np.median(values)))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class Area(NamedTuple):
    """An AUROC with its standard error. None stands for what cannot be computed."""

    auroc: float | None
    stderr: float | None


def auroc(inside: np.ndarray, outside: np.ndarray) -> Area:
    """The chance that an image from outside has the larger score, where ties count half.

    The standard error is that of DeLong et al. 1988 for two independent samples, `(N,)` and `(M,)`.
    It is None where one sample is a single image, and 0 where the scores do not overlap, which only
    says that there were too few images to see them overlap.
    """
    from sklearn.metrics import roc_auc_score

    n, m = len(inside), len(outside)
    area = float(roc_auc_score(np.repeat([0, 1], [n, m]), np.concatenate([inside, outside])))
    if min(n, m) < 2:
        return Area(area, None)
    variances = (
        _share_below(outside, inside).var(ddof=1) / n,
        _share_below(inside, outside).var(ddof=1) / m,
    )
    return Area(area, math.sqrt(sum(variances)))


def _share_below(sample: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each value, the share of the sample that is smaller, where ties count half."""
    ordered = np.sort(sample)
    below = np.searchsorted(ordered, values, "left")
    not_above = np.searchsorted(ordered, values, "right")
    return (below + not_above) / (2 * len(sample))


@dataclass(frozen=True)
class Comparison:
    """The scores of a model's images and of others."""

    model: LoadedModel
    seed: int
    reference: Scored  # the images whose mean loss is H
    inside: Scored
    outside: list[Scored]

    @property
    def entropy(self) -> float:
        """H, in the unit of the kind."""
        return self.reference.entropy

    @property
    def kind(self) -> QuantizedImages:
        return self.reference.kind

    @property
    def compared(self) -> list[Scored]:
        return [self.inside, *self.outside]

    @cached_property
    def areas(self) -> list[dict[str, Area]]:
        """The AUROC of each score, for each of `outside`."""
        return [{name: self._area(scored, name) for name in SCORES} for scored in self.outside]

    def _area(self, outside: Scored, name: str) -> Area:
        a, b = self.inside.score(name), outside.score(name)
        return auroc(a, b) if np.isfinite([*a, *b]).all() else Area(None, None)

    def check_finite(self) -> None:
        """Raises `RunError` naming the images whose likelihood is not finite."""
        said = []
        for scored in (self.reference, *self.compared):
            bad, collection = scored.non_finite, scored.collection
            if bad:
                which = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
                said.append(
                    f"{len(bad)} of {len(collection.images)} images of {collection.name} "
                    f"({collection.split or 'made'}) have a likelihood that is not finite: those "
                    f"at {which}"
                )
        if said:
            raise RunError("; ".join(said))


def score_all(
    model: LoadedModel,
    collections: Collections,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = silent,
) -> Comparison:
    """Scores every image.

    The likelihood is the single-draw bound of `flowtrain evaluate`, with the weights that were
    loaded. Raises `UserError` for a `batch_size` that cannot fit into memory.
    """
    sizes = [len(collection.images) for collection in collections.all]
    require_memory(model.flow, max(sizes), batch_size)
    total = sum(sizes)
    log_probs: list[np.ndarray] = []
    for collection in collections.all:
        split = Split(collection.images, np.arange(len(collection.images)), drop_bits=0)
        ahead = partial(_ahead, progress, sum(map(len, log_probs)), total)
        scores = score(model.flow, split, seed=seed, batch_size=batch_size, progress=ahead)
        log_probs.append(scores.log_prob.numpy())
    entropy = float(model.flow.loss(torch.from_numpy(log_probs[0])).mean())
    kind = model.flow.kind
    assert isinstance(kind, QuantizedImages)  # `collect` refuses others
    first, second, *rest = (
        Scored(collection, log_prob, entropy, kind)
        for collection, log_prob in zip(collections.all, log_probs, strict=True)
    )
    return Comparison(model, seed, first, second, rest)


def _ahead(
    progress: Callable[[int, int], None], before: int, total: int, done: int, of: int
) -> None:
    progress(before + done, total)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The content of `ood.json`. None stands for what cannot be computed."""
    model = comparison.model
    return {
        "in": _described(comparison.inside),
        "out": [
            {
                **_described(scored),
                "auroc": {name: area.auroc for name, area in areas.items()},
                "auroc_stderr": {name: area.stderr for name, area in areas.items()},
            }
            for scored, areas in zip(comparison.outside, comparison.areas, strict=True)
        ],
        f"entropy_{comparison.kind.metric}": _finite(comparison.entropy),
        "entropy_split": comparison.reference.collection.split,
        "entropy_images": len(comparison.reference.log_prob),
        "coders": coders(),
        "dims": model.flow.dims,
        "levels": model.flow.levels,
        "weights": model.weights,
        "step": model.checkpoint.meta["step"],
        "seed": comparison.seed,
        "checkpoint": str(model.checkpoint.path),
    }


def _described(scored: Scored) -> dict[str, Any]:
    collection = scored.collection
    shape, levels = collection.stored or (None, None)
    described: dict[str, Any] = {
        "dataset": collection.name,
        "split": collection.split,
        "num_images": len(collection.images),
        "non_finite_images": len(scored.non_finite),
        "stored_shape": shape and list(shape),
        "stored_levels": levels,
    }
    metric = scored.kind.metric
    means = {metric: scored.mean_loss, f"complexity_{metric}": _mean(scored.complexity)}
    for name, (mean, stderr, median) in means.items():
        described |= {name: mean, f"{name}_stderr": stderr, f"{name}_median": median}
    return described


def scores_csv(comparison: Comparison) -> bytes:
    """One row per image, those of the `in` data first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metric = comparison.kind.metric
    writer.writerow(
        [
            *("dataset", "index", metric, "log_prob"),
            *("typicality", f"complexity_{metric}", "complexity_corrected"),
        ]
    )
    for scored in comparison.compared:
        columns = (scored.likelihood, scored.log_prob, scored.typicality, scored.complexity)
        values = (column.tolist() for column in (*columns, scored.complexity_corrected))
        for row in zip(scored.collection.positions.tolist(), *values, strict=True):
            writer.writerow([scored.collection.name, *map(repr, row)])
    return text.getvalue().encode()


def draw(comparison: Comparison) -> bytes:
    """Histograms as a PNG file: one panel per score, with all data sets and their AUROC."""
    from matplotlib.figure import Figure

    kind = comparison.kind
    log = "log" if kind.no_bits else "log2"
    titles = {
        "likelihood": f"likelihood: -{log} p(x)",
        "typicality": f"typicality: |-{log} p(x) - {comparison.entropy:.2f}|",
        "complexity_corrected": f"complexity-corrected: -{log} p(x) - L(x) ({', '.join(coders())})",
    }
    # Noise and shuffled pixels may cost millions of bits. What is further out than a uniform
    # coder's log2 Q, and as many bits again, is drawn there, in the last bar.
    furthest = kind.uniform_loss + float(kind.in_unit(np.log2(kind.levels)))
    figure = Figure(figsize=(16, 5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(SCORES)), SCORES, strict=True):
        values = [scored.score(name) for scored in comparison.compared]
        values = [of_set[np.isfinite(of_set)].clip(max=furthest) for of_set in values]
        edges = np.histogram_bin_edges(np.concatenate(values), bins=100)
        labels = [f"{comparison.inside.collection.name} (in)"]
        for scored, areas in zip(comparison.outside, comparison.areas, strict=True):
            area = areas[name].auroc
            labels.append(scored.collection.name + ("" if area is None else f": AUROC {area:.3f}"))
        for order, (of_set, label) in enumerate(zip(values, labels, strict=True)):
            share = np.full(len(of_set), 1 / max(len(of_set), 1))
            style: dict[str, Any] = (
                {"color": "black", "histtype": "step"} if order == 0 else {"alpha": 0.5}
            )
            label = label.replace("$", r"\$")  # a path is no formula
            axes.hist(
                of_set, edges, weights=share, label=label, **{"histtype": "stepfilled", **style}
            )
        axes.set_title(titles[name])
        axes.set(
            xlabel=f"{kind.unit} (what is over {furthest:.3g} is in the last bar)",
            ylabel="share of the images",
        )
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()

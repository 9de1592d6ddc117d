"""Out-of-distribution detection: can a model tell other images from its training images?

Scores of an image are computed side by side. The first, the likelihood, is known to fail: flows
trained on CIFAR-10 find house numbers likelier than CIFAR-10 (Nalisnick et al. 2019a, "Do Deep
Generative Models Know What They Don't Know?"). Typicality and complexity are the usual repairs.
The local score is the largest heat of a place (`evaluation/heat.py`), in standard deviations. For
each score, a larger value means further out. The others are in bits per dimension, or for a density
of noisy images in nats per dimension, where the complexity is in nats too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import Split
from flowtrain.errors import RunError
from flowtrain.evaluation.heat import HeatMaps
from flowtrain.evaluation.score import require_memory, score
from flowtrain.flow.flow import Flow
from flowtrain.flow.kinds import Kind, QuantizedImages
from flowtrain.pictures.lossless import complexity
from flowtrain.system.console import silent
from flowtrain.tools.ood.auroc import Area, auroc
from flowtrain.tools.ood.images import Collection
from flowtrain.tools.ood.verdict import p_values, threshold

SCORES = ("likelihood", "typicality", "complexity_corrected", "local")


def default_score(flow: Flow) -> str:
    """The score that decides unless another is chosen."""
    return "likelihood" if flow.num_bins is None else "complexity_corrected"


def typicality(loss: np.ndarray, entropy: float) -> np.ndarray:
    """`|-log p(x) - H|`, `(N,)`: the distance of an image's likelihood from the usual one.

    This is the test of Nalisnick et al. 2019b ("Detecting Out-of-Distribution Inputs to Deep
    Generative Models Using Typicality") with a batch of one image. `loss` is `-log p(x)`, and
    `entropy`, H, its mean over images like those trained on.
    """
    return np.asarray(np.abs(loss - entropy))


def complexity_corrected(loss: np.ndarray, complexity: np.ndarray) -> np.ndarray:
    """`-log p(x) - L(x)`, `(N,)`, in bits/dim: the model's bits beyond a general coder's.

    This is the likelihood ratio of Serra et al. 2020 ("Input Complexity and Out-of-Distribution
    Detection with Likelihood-Based Generative Models", section 3), whose other model is the coder.
    L(x) is the length by `complexity`. A density is no length: its score is known up to a constant,
    on which no AUROC depends.
    """
    return np.asarray(loss - complexity)


@dataclass(frozen=True)
class Scored:
    """The figures of a collection, each `(N,)` float64, in the unit of the kind.

    `log_prob` is in nats, and `entropy` is the H of `typicality`. `heat` are the heat maps
    `(N, H, W)`, if they were computed. Real values have no `complexity`.
    """

    collection: Collection
    log_prob: np.ndarray
    entropy: float
    kind: Kind
    heat: np.ndarray | None = None

    @cached_property
    def loss(self) -> np.ndarray:
        dims = math.prod(self.collection.images.shape[1:])
        return self.kind.loss(torch.from_numpy(self.log_prob), dims).numpy()

    @cached_property
    def complexity(self) -> np.ndarray | None:
        if not isinstance(self.kind, QuantizedImages):
            return None
        return self.kind.in_unit(complexity(self.collection.images))

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """The scores by their names, `SCORES`: the complexity-corrected one if there is a
        complexity, and the local one if there are heat maps.
        """
        found = {"likelihood": self.loss, "typicality": typicality(self.loss, self.entropy)}
        if self.complexity is not None:
            found["complexity_corrected"] = complexity_corrected(self.loss, self.complexity)
        return found if self.heat is None else {**found, "local": self.heat.max(axis=(1, 2))}

    @property
    def non_finite(self) -> list[int]:
        """The positions of the images whose likelihood is not finite."""
        return [int(index) for index in self.collection.positions[~np.isfinite(self.log_prob)]]


@dataclass(frozen=True)
class Comparison:
    """The scores of a model's images and of others, and verdicts by the score `decides`.

    An image is an outlier if its p-value is at most `false_positives`.
    """

    model: LoadedModel
    seed: int
    reference: Scored  # the images whose mean loss is H, and whose scores give the p-values
    inside: Scored
    outside: list[Scored]
    decides: str
    false_positives: float | None = None

    @property
    def compared(self) -> list[Scored]:
        return [self.inside, *self.outside]

    @cached_property
    def areas(self) -> list[dict[str, Area]]:
        """The AUROC of each score, for each of `outside`."""
        inside = self.inside.scores
        return [
            {name: auroc(values, scored.scores[name]) for name, values in inside.items()}
            for scored in self.outside
        ]

    def p_values(self, scored: Scored) -> np.ndarray:
        return p_values(self.reference.scores[self.decides], scored.scores[self.decides])

    def outliers(self, scored: Scored) -> np.ndarray:
        assert self.false_positives is not None
        return np.asarray(self.p_values(scored) <= self.false_positives)

    @cached_property
    def threshold(self) -> float:
        """The score above which an image is an outlier."""
        assert self.false_positives is not None
        return threshold(self.reference.scores[self.decides], self.false_positives)

    def check_finite(self) -> None:
        """Raises `RunError` naming the images whose likelihood is not finite."""
        found = []
        for scored in (self.reference, *self.compared):
            bad, collection = scored.non_finite, scored.collection
            if bad:
                which = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
                found.append(
                    f"{len(bad)} of {len(collection.images)} images of {collection.name} "
                    f"({collection.split or 'made'}) have a non-finite likelihood: indices {which}"
                )
        if found:
            raise RunError("; ".join(found))


def scored(
    flow: Flow,
    collection: Collection,
    entropy: float | None = None,
    *,
    heat_maps: HeatMaps | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = silent,
) -> Scored:
    """The scores of a collection. Without an `entropy`, H is the mean of its own losses.

    The likelihood is the single-draw bound of `flowtrain evaluate`, with the weights that were
    loaded.
    """
    split = Split(collection.images, np.arange(len(collection.images)))
    log_prob = score(
        flow, split, seed=seed, batch_size=batch_size, progress=progress
    ).log_prob.numpy()
    if entropy is None:
        entropy = float(flow.loss(torch.from_numpy(log_prob)).mean())
    heat = None if heat_maps is None else heat_maps(collection.images)
    return Scored(collection, log_prob, entropy, flow.kind, heat)


def score_all(
    model: LoadedModel,
    collections: list[Collection],
    *,
    decides: str | None = None,
    false_positives: float | None = None,
    heat_maps: HeatMaps | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = silent,
) -> Comparison:
    """Scores every image (`scored`) of the collections of `collect`, for verdicts by the score
    `decides` (`default_score`).

    Raises `UserError` for a `batch_size` that cannot fit into memory, and if there are too few
    held-out images for `false_positives`.
    """
    sizes = [len(collection.images) for collection in collections]
    require_memory(model.flow, max(sizes), batch_size)
    if false_positives is not None:  # before the work
        threshold(np.zeros(sizes[0]), false_positives)
    found: list[Scored] = []

    def ahead(done: int, of: int) -> None:
        progress(sum(sizes[: len(found)]) + done, sum(sizes))

    options: dict[str, Any] = {"heat_maps": heat_maps, "seed": seed, "batch_size": batch_size}
    for collection in collections:
        entropy = found[0].entropy if found else None
        found.append(scored(model.flow, collection, entropy, progress=ahead, **options))
    first, second, *rest = found
    decides = decides or default_score(model.flow)
    return Comparison(model, seed, first, second, rest, decides, false_positives)

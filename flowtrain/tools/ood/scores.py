"""Out-of-distribution detection: can a model tell other images from its training images?

Three scores of an image are computed side by side. The first, the likelihood, is known to fail:
flows trained on CIFAR-10 find house numbers likelier than CIFAR-10 (Nalisnick et al. 2019a, "Do
Deep Generative Models Know What They Don't Know?"). The other two are the usual repairs. For each
score, a larger value means further out. All are in bits per dimension, or for a density of noisy
images in nats per dimension, where the complexity is in nats too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import Split
from flowtrain.errors import RunError
from flowtrain.evaluation.score import require_memory, score
from flowtrain.flow.kinds import QuantizedImages
from flowtrain.pictures.lossless import complexity
from flowtrain.system.console import silent
from flowtrain.tools.ood.auroc import Area, auroc
from flowtrain.tools.ood.images import Collection, Collections

SCORES = ("likelihood", "typicality", "complexity_corrected")


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

    `log_prob` is in nats, and `entropy` is the H of `typicality`.
    """

    collection: Collection
    log_prob: np.ndarray
    entropy: float
    kind: QuantizedImages

    @cached_property
    def loss(self) -> np.ndarray:
        dims = math.prod(self.collection.images.shape[1:])
        return self.kind.loss(torch.from_numpy(self.log_prob), dims).numpy()

    @cached_property
    def complexity(self) -> np.ndarray:
        return self.kind.in_unit(complexity(self.collection.images))

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """The scores by their names, `SCORES`."""
        values = (
            self.loss,
            typicality(self.loss, self.entropy),
            complexity_corrected(self.loss, self.complexity),
        )
        return dict(zip(SCORES, values, strict=True))

    @property
    def non_finite(self) -> list[int]:
        """The positions of the images whose likelihood is not finite."""
        return [int(index) for index in self.collection.positions[~np.isfinite(self.log_prob)]]


@dataclass(frozen=True)
class Comparison:
    """The scores of a model's images and of others."""

    model: LoadedModel
    seed: int
    reference: Scored  # the images whose mean loss is H
    inside: Scored
    outside: list[Scored]

    @property
    def compared(self) -> list[Scored]:
        return [self.inside, *self.outside]

    @cached_property
    def areas(self) -> list[dict[str, Area]]:
        """The AUROC of each score, for each of `outside`."""
        inside = self.inside.scores
        return [
            {name: auroc(inside[name], scored.scores[name]) for name in SCORES}
            for scored in self.outside
        ]

    def check_finite(self) -> None:
        """Raises `RunError` naming the images whose likelihood is not finite."""
        found = []
        for scored in (self.reference, *self.compared):
            bad, collection = scored.non_finite, scored.collection
            if bad:
                which = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
                found.append(
                    f"{len(bad)} of {len(collection.images)} images of {collection.name} "
                    f"({collection.split or 'made'}) have a likelihood that is not finite: those "
                    f"at {which}"
                )
        if found:
            raise RunError("; ".join(found))


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
    log_probs: list[np.ndarray] = []

    def ahead(done: int, of: int) -> None:
        progress(sum(map(len, log_probs)) + done, sum(sizes))

    for collection in collections.all:
        split = Split(collection.images, np.arange(len(collection.images)))
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

"""Out-of-distribution detection: can a model tell other images from those that it was trained on?

Three scores of an image are computed side by side. The first, the likelihood, is known to fail:
flows trained on CIFAR-10 find house numbers likelier than CIFAR-10 (Nalisnick et al. 2019a, "Do
Deep Generative Models Know What They Don't Know?"). The other two are the usual repairs. For each
score, a larger value means further out. All are in bits per dimension, or for a density of noisy
images in nats per dimension, where the complexity is in nats too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

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
    def non_finite(self) -> list[int]:
        """The images whose likelihood is not finite."""
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

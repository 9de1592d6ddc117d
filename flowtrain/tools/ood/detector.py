"""Verdicts in Python, on arrays instead of data sets."""

import numpy as np

from flowtrain.evaluation.heat import HeatMaps
from flowtrain.flow.flow import Flow
from flowtrain.flow.inputs import Batch, as_tensor
from flowtrain.tools.ood.images import Collection
from flowtrain.tools.ood.scores import Scored, default_score, scored
from flowtrain.tools.ood.verdict import p_values


class Detector:
    """Verdicts by a flow, without files: p-values of images against held-out ones.

    Args:
        flow: The model, of images or of real values, which have neither complexity nor heat maps.
        held_out: Examples like the training data, `(N, C, H, W)`, which the model has not seen.
        training: Training images, for heat maps and the local score.
        score: The score that decides, of `SCORES`, by default `default_score`.
        seed: Seed of the dequantization noise.
    """

    def __init__(
        self,
        flow: Flow,
        held_out: Batch,
        training: Batch | None = None,
        score: str | None = None,
        seed: int = 0,
    ):
        self.flow, self.score, self.seed = flow, score or default_score(flow), seed
        self._heat_maps = None
        if training is not None:
            self._heat_maps = HeatMaps(flow, self._array(training), seed)
        self._reference = self._scored(held_out, None)
        if self.score not in (known := self._reference.scores):
            raise ValueError(f"score: {self.score}, expected {', '.join(known)}")

    def p_values(self, x: Batch) -> np.ndarray:
        """The p-value of each example of `(B, C, H, W)`: `(B,)`."""
        found = self._scored(x, self._reference.entropy)
        return p_values(self._reference.scores[self.score], found.scores[self.score])

    def heat(self, x: Batch) -> np.ndarray:
        """The heat maps of images, `(B, H, W)`, in standard deviations."""
        if self._heat_maps is None:
            raise ValueError("training: heat maps need training images")
        return self._heat_maps(self._array(x))

    def _array(self, x: Batch) -> np.ndarray:
        examples = as_tensor(x, self.flow.shape, self.flow.num_bins)
        self.flow.dequantizer.check(examples)
        array = examples.cpu().numpy()
        # The complexity is that of an image file, which stores wider integers in another way.
        return array if self.flow.num_bins is None else array.astype(np.uint8)

    def _scored(self, x: Batch, entropy: float | None) -> Scored:
        array = self._array(x)
        collection = Collection("", array, np.arange(len(array)))
        return scored(self.flow, collection, entropy, heat_maps=self._heat_maps, seed=self.seed)

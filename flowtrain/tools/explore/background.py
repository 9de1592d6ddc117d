"""What is known of the model's own images: principal directions, and the scores of test images.

It is computed a few images at a time, while no request waits, and grows until all is known.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.splits import DataSet, Split, sampled
from flowtrain.flow.flow import Flow
from flowtrain.flow.kinds import QuantizedImages
from flowtrain.pictures.lossless import complexity
from flowtrain.system.random import Stream, uniform
from flowtrain.tools.explore.edits import Components, Level, Stoppable, components

ENCODED = 512  # training images whose latents are kept
SCORED = 1000  # test images that are scored
REFERENCE = 256  # images whose mean loss is what typicality is measured from
PART_SECONDS = 0.1  # about as long as a part takes, which a request may have to wait for


@dataclass(frozen=True)
class Scores:
    """The loss of test images in bits/dim, and the bits/dim of general coders, `(N,)`."""

    loss: np.ndarray
    complexity: np.ndarray


class Background:
    """Grows while `step` is called.

    Attributes:
        positions: Those of the training images that are encoded, in their split.
        images: The training images that were encoded, `(N, C, H, W)`.
        latents: Their latents, `(N, D)`, on the CPU.
        components: The principal directions of each level, once all are encoded.
        scores: The scores of the test images so far.
        reference: The loss of validation images so far, or of training images where there are none.
    """

    def __init__(self, flow: Flow, levels: list[Level], data: DataSet, memory: int, at_a_time: int):
        """`memory` is what the latents may take in bytes, `at_a_time` how many images fit."""
        self.flow, self.levels = flow, levels
        train = data.split("train")
        validation = data.split("validation")
        # Samples, because the images may be sorted by class.
        self._validation = (validation if len(validation) else train).sample(REFERENCE)
        self.test = data.split("test")
        self._scored = self.test.sample(SCORED)
        self.train = train
        each = 2 * 4 * flow.latent_dims + flow.dims
        self.encoded = max(0, min(ENCODED, len(train), memory // each))
        self.positions = sampled(len(train), self.encoded)
        self.images = torch.empty(0, *flow.shape, dtype=torch.uint8)
        self.latents = torch.empty(0, flow.latent_dims)
        self.components: list[Components] = []
        self.scores = Scores(np.empty(0), np.empty(0))
        self.reference = np.empty(0)
        self._largest = at_a_time
        self._at_a_time = min(8, at_a_time)

    def step(self, check: Callable[[], None]) -> bool:
        """Does a part. Returns whether there is more to do."""
        began = time.thread_time()  # waiting for other programs does not count
        # In turns, so that all numbers are there early, and become better.
        tasks: list[tuple[float, Callable[[Callable[[], None]], None]]] = [
            (self.progress_of_encoding, self._encode),
            (len(self.reference) / self.referred, self._refer),
            (len(self.scores.loss) / self.scored, self._score),
        ]
        share, task = min(tasks, key=lambda each: each[0])
        if share >= 1:
            return False
        task(check)
        seconds = time.thread_time() - began
        factor = 2 if seconds < PART_SECONDS / 2 else 0.5 if seconds > 2 * PART_SECONDS else 1
        self._at_a_time = max(1, min(int(self._at_a_time * factor), self._largest))
        return True

    @property
    def scored(self) -> int:
        """How many test images will be scored."""
        return len(self._scored)

    @property
    def referred(self) -> int:
        return len(self._validation)

    @property
    def progress_of_encoding(self) -> float:
        if self.encoded < 2 or self.components:
            return 1.0
        return min(0.999, len(self.latents) / self.encoded)

    @property
    def progress(self) -> float:
        """The share that is done."""
        parts = (
            self.progress_of_encoding,
            len(self.reference) / self.referred,
            len(self.scores.loss) / self.scored,
        )
        return sum(parts) / len(parts)

    @property
    def entropy(self) -> float | None:
        """The mean loss of the reference images, or None before there is any."""
        return float(self.reference.mean()) if len(self.reference) else None

    def _encode(self, check: Callable[[], None]) -> None:
        start = len(self.latents)
        if start < self.encoded:
            x = self.train.take(self.positions[start : start + self._at_a_time])
            # The default executor is exact to the last bit, and slow in a causal flow.
            z = self.flow.encode(x, Stoppable(check))
            self.latents = torch.cat([self.latents, z.cpu()])
            self.images = torch.cat([self.images, x])
        else:
            self.components = [components(self.latents[:, level.where]) for level in self.levels]

    def _losses(self, split: Split, start: int, stop: int, check: Callable[[], None]) -> Tensor:
        x = split.take(slice(start, min(start + self._at_a_time, stop))).to(self.flow.device)
        return losses(self.flow, x, start, check)

    def _refer(self, check: Callable[[], None]) -> None:
        start = len(self.reference)
        found = self._losses(self._validation, start, self.referred, check).numpy()
        self.reference = np.concatenate([self.reference, found])

    def _score(self, check: Callable[[], None]) -> None:
        start = len(self.scores.loss)
        found = self._losses(self._scored, start, self.scored, check).numpy()
        x = self._scored.take(slice(start, start + len(found))).numpy()
        self.scores = Scores(
            np.concatenate([self.scores.loss, found]),
            np.concatenate([self.scores.complexity, coded(self.flow, x)]),
        )


@torch.no_grad()
def losses(flow: Flow, x: Tensor, first: int, check: Callable[[], None]) -> Tensor:
    """The loss of images `(B, C, H, W)`, float64 `(B,)` on the CPU.

    The noise is what `flowtrain evaluate` has for the images `first`, `first + 1`, ...
    """
    noise = uniform(x.shape, 0, Stream.EVALUATION, first, 0, x.device)
    parts = flow(x, noise, executor=Stoppable(check))
    return flow.loss(parts.total.double()).cpu()


def coded(flow: Flow, x: np.ndarray) -> np.ndarray:
    """What general coders need for images `(N, C, H, W)`, in the unit of the loss: `(N,)`."""
    kind = flow.kind
    assert isinstance(kind, QuantizedImages)
    return kind.in_unit(complexity(x))

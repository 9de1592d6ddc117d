"""Statistics of the model's own images: principal directions, and the scores of test images.

They are computed a few images at a time, while no request waits, and grow until all is done.
"""

import math
import time

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.splits import DataSet, Split, sampled
from flowtrain.flow.flow import Flow
from flowtrain.flow.kinds import QuantizedImages
from flowtrain.pictures.lossless import complexity
from flowtrain.system.random import Stream, uniform
from flowtrain.tools.explore.edits import Components, Level, Stoppable, components
from flowtrain.tools.explore.worker import Check

ENCODED = 512  # training images whose latents are kept
SCORED = 1000  # test images that are scored
REFERENCE = 256  # images whose mean loss is the entropy of typicality
PART_SECONDS = 0.1  # about as long as a part takes, for which a request may have to wait


class Background:
    """Grows with each call of `step`.

    Attributes:
        positions: Of the training images to encode, in their split.
        images, latents: The encoded images `(N, C, H, W)` so far, and their latents `(N, D)`.
        components: The principal directions of each level, once all are encoded.
        losses, complexities: The loss of the test images so far, and their shortest lossless code
            in the same unit, `(N,)`.
        reference: The loss of validation images so far, or of training images if there are none.
    """

    def __init__(self, flow: Flow, levels: list[Level], data: DataSet, memory: int, at_a_time: int):
        """The latents take at most `memory` bytes. At most `at_a_time` images are computed."""
        self.flow, self.levels = flow, levels
        self.train, self.test = data.split("train"), data.split("test")
        validation = data.split("validation")
        # Samples, because the images may be sorted by class.
        self._referred = (validation if len(validation) else self.train).sample(REFERENCE)
        self._scored = self.test.sample(SCORED)
        each = 2 * 4 * flow.latent_dims + flow.dims
        self.encoded = max(0, min(ENCODED, len(self.train), memory // each))
        self.positions = sampled(len(self.train), self.encoded)
        self.images = torch.empty(0, *flow.shape, dtype=torch.uint8)
        self.latents = torch.empty(0, flow.latent_dims)
        self.components: list[Components] = []
        self.losses = self.complexities = self.reference = np.empty(0)
        self._largest = at_a_time
        self._at_a_time = min(8, at_a_time)

    def step(self, check: Check) -> bool:
        """Does a part. Returns whether there is more to do."""
        began = time.thread_time()  # waiting for other programs does not count
        # In turns, so that all numbers are there early, and become better.
        shares = self._shares()
        if min(shares) >= 1:
            return False
        (self._encode, self._refer, self._score)[shares.index(min(shares))](check)
        seconds = time.thread_time() - began
        factor = 2 if seconds < PART_SECONDS / 2 else 0.5 if seconds > 2 * PART_SECONDS else 1
        self._at_a_time = max(1, min(int(self._at_a_time * factor), self._largest))
        return True

    def _shares(self) -> tuple[float, float, float]:
        """The shares that are done, of encoding, of the reference and of the scores."""
        encoding = 1.0
        if self.encoded >= 2 and not self.components:
            encoding = min(0.999, len(self.latents) / self.encoded)
        reference = len(self.reference) / len(self._referred)
        return encoding, reference, len(self.losses) / len(self._scored)

    @property
    def progress(self) -> float:
        return sum(self._shares()) / 3

    @property
    def entropy(self) -> float | None:
        """The mean loss of the reference images, or None before there is any, or if it is not
        finite.
        """
        mean = float(self.reference.mean()) if len(self.reference) else math.nan
        return mean if math.isfinite(mean) else None

    def _encode(self, check: Check) -> None:
        start = len(self.latents)
        if start < self.encoded:
            x = self.train.take(self.positions[start : start + self._at_a_time])
            # The default executor is exact to the last bit, and slow in a causal flow.
            z = self.flow.encode(x, Stoppable(check))
            self.latents = torch.cat([self.latents, z.cpu()])
            self.images = torch.cat([self.images, x])
        else:
            self.components = [components(self.latents[:, level.where]) for level in self.levels]

    def _refer(self, check: Check) -> None:
        _, losses = self._next(self._referred, len(self.reference), check)
        self.reference = np.concatenate([self.reference, losses])

    def _score(self, check: Check) -> None:
        x, losses = self._next(self._scored, len(self.losses), check)
        lengths = code_lengths(self.flow, x.numpy())
        self.losses = np.concatenate([self.losses, losses])
        self.complexities = np.concatenate([self.complexities, lengths])

    @torch.no_grad()
    def _next(self, split: Split, start: int, check: Check) -> tuple[Tensor, np.ndarray]:
        """The next images of a split, with their losses by the noise of `flowtrain evaluate`."""
        x = split.take(slice(start, start + self._at_a_time))
        device = self.flow.device
        noise = uniform(x.shape, 0, Stream.EVALUATION, start, 0, device)
        parts = self.flow(x.to(device), noise, executor=Stoppable(check))
        return x, self.flow.loss(parts.total.double()).cpu().numpy()


def code_lengths(flow: Flow, x: np.ndarray) -> np.ndarray:
    """The shortest lossless code of images `(N, C, H, W)`, in the unit of the loss: `(N,)`."""
    kind = flow.kind
    assert isinstance(kind, QuantizedImages)
    return kind.in_unit(complexity(x))

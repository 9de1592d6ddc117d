"""Heat maps: where an image needs more or fewer bits than training images need at that place."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flowtrain.errors import UserError
from flowtrain.evaluation.places import by_place, merged
from flowtrain.flow.flow import Flow
from flowtrain.flow.passes import fitting_batch_size
from flowtrain.pictures import grid
from flowtrain.system import capacity
from flowtrain.system.random import Stream, uniform

FLOOR = 0.1  # of the mean spread: the smallest spread of a place, such as a corner that is black
HOTTEST = 8.0  # standard deviations: the end of the colours


class HeatMaps:
    """The heat of each pixel: `|b - mean| / spread`, smoothed by two box filters of 3x3 pixels.

    `b` are the exact bits of a place (`places.py`), with mean and spread over training images
    there. The map belongs to the image as it stands, without its mirror image (`--mirror`).

    Args:
        flow: A model of images.
        training: Training images, uint8 `(N, C, H, W)`, at least two.
        seed: Seed of the dequantization noise.
        batch_size: Images per batch, by default as many as fit into memory.

    Raises:
        UserError: for a single training image, and a model with layers that mix all places.
    """

    def __init__(
        self, flow: Flow, training: np.ndarray, seed: int = 0, batch_size: int | None = None
    ):
        if len(training) < 2:
            raise UserError(f"heat maps need at least 2 training images, there are {len(training)}")
        self.flow, self.seed, self.batch_size = flow, seed, batch_size
        count, total, squares = len(training), np.zeros(1), np.zeros(1)
        for bits in self._bits(training):
            total, squares = total + bits.sum(axis=0), squares + (bits**2).sum(axis=0)
        self.mean = total / count  # (H, W)
        spread = np.sqrt(np.maximum(squares / count - self.mean**2, 0))
        self.spread = np.maximum(spread, FLOOR * spread.mean())

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The heat of images, uint8 `(N, C, H, W)`, in standard deviations: float32 `(N, H, W)`."""
        count, _, *size = images.shape
        capacity.require(4 * count * size[0] * size[1], f"heat maps of {count:,} images need")
        found = np.empty((count, *size), np.float32)
        start = 0
        for bits in self._bits(images):
            heat = torch.from_numpy(np.abs(bits - self.mean) / self.spread)[:, None]
            for _ in range(2):
                heat = avg_pool2d(heat, 3, stride=1, padding=1, count_include_pad=False)
            found[start : start + len(bits)] = heat[:, 0].numpy()
            start += len(bits)
        return found

    @torch.no_grad()
    def _bits(self, images: np.ndarray) -> Iterator[np.ndarray]:
        """Minus the log-likelihood by place, in nats, of each batch: float64 `(B, H, W)`."""
        flow, each = self.flow, self.batch_size or fitting_batch_size(self.flow)
        for start in range(0, len(images), each):
            x = torch.from_numpy(images[start : start + each]).to(flow.device)
            noise = uniform(x.shape, self.seed, Stream.EVALUATION, start, device=flow.device)
            by_class = flow(x, noise).by_class if flow.classes else None
            labels = None if by_class is None else by_class.argmax(dim=1)
            places, _ = by_place(flow, x, noise, labels)
            if not places:
                raise UserError(
                    "heat maps: a layer of the model mixes all pixels, or its likelihood has no "
                    "terms per pixel; use glow, realnvp or causal"
                )
            yield -merged(places, flow.shape[1:]).numpy()


def picture(x: Tensor, heat: np.ndarray, num_bins: int, columns: int) -> Tensor:
    """Images `(N, C, H, W)` with values 0..Q-1, then their heat maps `(N, H, W)`, from black to
    yellow at `HOTTEST`, as a grid: uint8 `(3, H', W')`.
    """
    from matplotlib import colormaps

    hot = colormaps["inferno"](
        np.clip(np.nan_to_num(heat, nan=HOTTEST) / HOTTEST, 0, 1), bytes=True
    )
    colours = torch.from_numpy(hot[..., :3].copy()).movedim(-1, 1)
    both = torch.cat([grid.to_8bit(x, num_bins).expand(-1, 3, -1, -1), colours])
    return grid.grid(both, 256, columns)

"""The likelihood of each image of a split."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.bijections.orders import turned
from flowtrain.data.splits import Split
from flowtrain.flow.flow import Flow
from flowtrain.flow.kinds import log_mean_exp
from flowtrain.flow.passes import fitting_batch_size, largest_activation
from flowtrain.system import capacity, distributed
from flowtrain.system.console import silent
from flowtrain.system.random import Stream, uniform


def require_memory(flow: Flow, count: int, batch_size: int | None, draws: int = 1) -> None:
    """Raises `UserError` if `count` images cannot be scored with these options of a command."""
    capacity.require(
        8 * 2 * draws * (1 + flow.classes) * count,  # in parts and as a whole
        f"--draws {draws}: the scores of {count:,} images need",
    )
    if batch_size is not None:
        largest = min(batch_size, count)
        capacity.require(
            2 * largest * largest_activation(flow),  # input and output of a layer
            f"--batch-size {batch_size}: {largest:,} images at a time need",
            flow.device,
        )


@dataclass(frozen=True)
class Scores:
    """Scores of images in nats, float64 on the CPU. K draws, C classes, N images."""

    draws: Tensor  # single-draw bounds, (K, N)
    base: Tensor  # log N(z; 0, I) of the first draw, (N,)
    log_det: Tensor  # the rest of the first draw's bound, (N,)
    # For class-conditional models: bounds on log P(x | class), (K, C, N).
    draws_by_class: Tensor | None = None
    # From draws (K, ...) to their result (...): `over_draws` of the kind of data.
    over_draws: Callable[[Tensor], Tensor] = log_mean_exp
    # Where the images are in the split, (N,), if they are a sample of it.
    positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    names: list[str] | None = None  # of the images, if they are files

    @cached_property
    def log_prob(self) -> Tensor:
        """The importance-weighted bound, or the mean log-density of noisy images, `(N,)`."""
        return self.over_draws(self.draws)

    @cached_property
    def elbo(self) -> Tensor:
        """The mean of the draws, `(N,)`, which estimates the single-draw bound."""
        return self.draws.mean(dim=0)

    @cached_property
    def log_prob_by_class(self) -> Tensor:
        """The same given each class, `(C, N)`."""
        assert self.draws_by_class is not None
        return self.over_draws(self.draws_by_class)

    def log_prob_leaving_one_out(self) -> Tensor:
        """The importance-weighted bound without each of the draws, `(K, N)`, for K > 1."""
        k = len(self.draws)
        largest, where = self.draws.max(dim=0)
        weights = (self.draws - largest).exp()
        rest = largest + (weights.sum(dim=0) - weights).log()
        # Without the largest draw the difference may be only rounding, so it is summed up anew.
        without = self.draws.scatter(0, where[None], -torch.inf).logsumexp(dim=0)
        return rest.scatter(0, where[None], without[None]) - math.log(k - 1)


@torch.no_grad()
def score(
    flow: Flow,
    split: Split,
    *,
    draws: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    side: int | None = None,
    progress: Callable[[int, int], None] = silent,
) -> Scores:
    """The bounds on log P(x) for the images of a split, in nats.

    For K = `draws` > 1 the bound is importance-weighted: `log 1/K sum_k p(y_k) / q(u_k|x)` (Burda
    et al. 2016; Ho et al. 2019, section 3.1). With Gaussian noise it is the mean log-density of K
    noisy images. An image's noise depends only on the seed, its place in the split and the draw.
    With a `side`, they are the bounds of this side of the images alone.
    Of several processes, each scores a part of the images, and all get all scores.
    """
    count = len(split)
    own = distributed.shard(count)
    batch_size = batch_size or fitting_batch_size(flow)
    # A process may have no image.
    rows = [torch.empty(draws * (1 + flow.classes) + 2, 0, dtype=torch.float64)]
    for start in range(own.start, own.stop, batch_size):
        stop = min(start + batch_size, own.stop)
        x = turned(split.take(slice(start, stop)).to(flow.device), side or 0)
        parts_of_draws = []
        for draw in range(draws):
            noise = torch.zeros_like(x)
            if not flow.kind.exact:
                noise = uniform(x.shape, seed, Stream.EVALUATION, start, draw, x.device)
            parts = flow(x, noise, side=side)
            of_classes = [] if parts.by_class is None else parts.by_class.T
            parts_of_draws.append(torch.stack([parts.log_det, parts.base, *of_classes]))
            progress(start - own.start + (stop - start) * (draw + 1) // draws, len(own))
        # (K, 2 + C, B). This waits for the device.
        by_draw = torch.stack(parts_of_draws).cpu().double()
        bounds = by_draw[:, 1:] + by_draw[:, :1]  # all classes together, then each class
        rows.append(torch.cat([bounds.flatten(0, 1), by_draw[0, :2]]))
    gathered = distributed.gather(torch.cat(rows, dim=1), count)
    bounds = gathered[:-2].unflatten(0, (draws, -1))
    by_class = bounds[:, 1:] if flow.classes else None
    return Scores(bounds[:, 0], gathered[-1], gathered[-2], by_class, flow.kind.over_draws)


def mean_loss(flow: Flow, split: Split, **options: Any) -> float:
    """The mean loss of a split, in the unit of the flow's kind of data, with options of `score`."""
    return flow.loss(score(flow, split, **options).log_prob).mean().item()

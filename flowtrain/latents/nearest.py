"""The training images that are nearest to others."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowtrain.data.splits import Split

CHUNK = 2**22  # pixels of training images that are read at a time, at most


def nearest_images(
    queries: Tensor,
    split: Split,
    num_bins: int,
    count: int,
    check: Callable[[], None] = lambda: None,
    pixels: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The `count` images of a split that are nearest to each query `(N, C, H, W)`.

    Returns the L2 distances of pixels in 0..1, `(N, count)`, in ascending order, and the positions
    in the split, `(N, count)`. The split is read in parts of about so many `pixels`, and `check`
    is called before each.
    """
    # |q|^2 - 2 qx + |x|^2 is exact for integers in float64, so a copy has distance 0.
    q = queries.flatten(1).double()  # (N, D)
    best, where = torch.empty(len(q), 0, dtype=q.dtype), torch.empty(len(q), 0, dtype=torch.int64)
    chunk = max(1, pixels // q.shape[1])
    for start in range(0, len(split), chunk):
        check()
        x = split.take(slice(start, start + chunk)).flatten(1).double()
        # (N, B)
        squared = q.square().sum(dim=1, keepdim=True) - 2 * q @ x.T + x.square().sum(dim=1)
        both = torch.cat([best, squared], dim=1)
        positions = torch.cat(
            [where, torch.arange(start, start + len(x)).expand_as(squared)], dim=1
        )
        best, order = both.topk(min(count, both.shape[1]), largest=False)
        where = positions.gather(1, order)
    return best.sqrt() / (num_bins - 1), where

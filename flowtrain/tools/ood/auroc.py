"""AUROC with its standard error."""

import math
from typing import NamedTuple

import numpy as np


class Area(NamedTuple):
    """An AUROC with its standard error; None if it cannot be computed."""

    auroc: float | None
    stderr: float | None


def auroc(inside: np.ndarray, outside: np.ndarray) -> Area:
    """The probability that an image from outside has the larger score. Ties count half.

    The standard error follows DeLong et al. 1988 for two independent samples, `(N,)` and `(M,)`.
    It is None if one sample is a single image. It is 0 if the scores do not overlap, which means
    only that there were too few images. Both are None if a score is not finite.
    """
    n, m = len(inside), len(outside)
    if not np.isfinite(np.concatenate([inside, outside])).all():
        return Area(None, None)
    placed = share_below(inside, outside)
    area = float(placed.mean())
    if min(n, m) < 2:
        return Area(area, None)
    variances = (share_below(outside, inside).var(ddof=1) / n, placed.var(ddof=1) / m)
    return Area(area, math.sqrt(sum(variances)))


def share_below(sample: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each value, the share of the sample that is smaller. Ties count half."""
    ordered = np.sort(sample)
    below = np.searchsorted(ordered, values, "left")
    not_above = np.searchsorted(ordered, values, "right")
    return (below + not_above) / (2 * len(sample))

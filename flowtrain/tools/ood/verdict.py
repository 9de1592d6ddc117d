"""Verdicts: p-values against held-out images, and the measured rate of false positives.

An image like the held-out ones has a p-value of at most alpha with probability at most alpha, for
any model, and any score that does not depend on the held-out images (conformal prediction; Bates et
al. 2023, "Testing for Outliers with Conformal p-values", arXiv:2104.08279, equation 2). Typicality
depends on them by its H, so its rate is slightly higher.
"""

import math
from typing import NamedTuple

import numpy as np

from flowtrain.errors import UserError

QUANTILE = 1.959964  # of the normal distribution, for an interval with 95% confidence


def p_values(held_out: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """`(r + 1) / (n + 1)` for each score, `(M,)`, of which r of the n held-out ones are as large.

    A score that is not a number counts as larger than any other.
    """
    ordered = np.sort(held_out)  # NaN last
    smaller = np.searchsorted(ordered, scores, "left")
    return (len(ordered) - smaller + 1) / (len(ordered) + 1)


def threshold(held_out: np.ndarray, false_positives: float) -> float:
    """The score above which a p-value is at most `false_positives`.

    Raises `UserError` if there are too few held-out images for such p-values.
    """
    count = len(held_out)
    above = math.floor(false_positives * (count + 1) + 1e-9)  # 0.29 * 100 is 28.999...
    if above == 0:
        raise UserError(
            f"--false-positives {false_positives:.3g}: {math.ceil(1 / false_positives) - 1:,} "
            f"held-out images are needed, there are {count:,} (--num-images)"
        )
    return float(np.sort(held_out)[count - above])


class Rate(NamedTuple):
    """A share of images, with its binomial interval at 95% confidence."""

    rate: float
    low: float
    high: float


def rate(flagged: np.ndarray) -> Rate:
    """The share of true values of `(N,)`, with its score interval (Wilson 1927)."""
    share, z = float(flagged.mean()), QUANTILE / math.sqrt(len(flagged))
    middle, half = share + z**2 / 2, z * math.sqrt(share * (1 - share) + z**2 / 4)
    return Rate(share, max(0.0, (middle - half) / (1 + z**2)), (middle + half) / (1 + z**2))

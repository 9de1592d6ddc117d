"""A mixture of von Mises-Fisher distributions on the unit sphere in three dimensions, in equal
parts.
"""

import math
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from flowtrain.datasets.base import Images, Split
from flowtrain.datasets.points import Count, real_valued


def build(
    root: Path,
    split: Split,
    *,
    seed: int = 0,
    count: Count = 10_000,
    test_count: Count = 10_000,
    components: Annotated[int, Field(ge=1)] = 6,
    concentration: Annotated[float, Field(gt=0)] = 20,
) -> Images:
    """`count` unit vectors to train on, `test_count` to test with. `root` is not used.

    `components` have the mean directions `means(seed, components)`, and one `concentration`, kappa:
    the density of one is `kappa / (4 pi sinh kappa) exp(kappa <mean, x>)` with respect to the area,
    and a large kappa is a spread of `1 / sqrt(kappa)` radians each way.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        mean = means(seed, components)[random.randint(components, size=n)]  # (N, 3)
        # Along the mean by the inverse of the distribution function (Jakob 2012, "Numerically
        # stable sampling of the von Mises-Fisher distribution on S^2"), written for any kappa;
        # around it uniform.
        along = 1 + np.log1p(random.uniform(size=n) * np.expm1(-2 * concentration)) / concentration
        angle = random.uniform(0, 2 * math.pi, size=n)
        # An orthonormal basis at right angles to the mean, from the axis that is the least like it.
        axis = np.eye(3)[np.abs(mean).argmin(axis=1)]
        first = np.cross(mean, axis)
        first /= np.linalg.norm(first, axis=1, keepdims=True)
        second = np.cross(mean, first)
        around = np.cos(angle)[:, None] * first + np.sin(angle)[:, None] * second
        return along[:, None] * mean + np.sqrt(np.maximum(1 - along**2, 0))[:, None] * around

    return real_valued(split, seed, count, test_count, generate, dims=3)


def means(seed: int, components: int) -> np.ndarray:
    """The mean directions, uniform on the sphere, `(components, 3)`."""
    # 0 and 1 are the splits
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, 2])))
    directions = random.normal(size=(components, 3))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)

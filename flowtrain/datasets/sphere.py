"""A mixture of von Mises-Fisher distributions on the unit sphere in three dimensions."""

import math
from pathlib import Path

import numpy as np
from pydantic import PositiveFloat

from flowtrain.datasets.base import Images, Part, frozen_random
from flowtrain.datasets.points import real_valued
from flowtrain.types import Count, Positive


def build(
    root: Path,
    split: Part,
    *,
    seed: int = 0,
    count: Count = 10_000,
    test_count: Count = 10_000,
    components: Positive = 6,
    concentration: PositiveFloat = 20,
) -> Images:
    """Unit vectors in three dimensions.

    The density of a component is `kappa / (4 pi sinh kappa) exp(kappa <mean, x>)` with respect to
    the area. Its mean is one of `means(seed, components)`, and kappa is `concentration`. A large
    kappa gives a spread of `1 / sqrt(kappa)` radians in each direction.

    Args:
        count: Points to train on, of which `data.validation` are held out.
        test_count: Points in the test split.
        components: Components of the mixture, all of equal weight.
        concentration: Concentration of each component, kappa.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        mean = means(seed, components)[random.randint(components, size=n)]  # (N, 3)
        # The component along the mean is drawn by the inverse of the distribution function (Jakob
        # 2012, "Numerically stable sampling of the von Mises-Fisher distribution on S^2"), written
        # for any kappa. The angle around the mean is uniform.
        along = 1 + np.log1p(random.uniform(size=n) * np.expm1(-2 * concentration)) / concentration
        angle = random.uniform(0, 2 * math.pi, size=n)
        # An orthonormal basis at right angles to the mean, made from the axis farthest from it.
        axis = np.eye(3)[np.abs(mean).argmin(axis=1)]
        first = np.cross(mean, axis)
        first /= np.linalg.norm(first, axis=1, keepdims=True)
        second = np.cross(mean, first)
        around = np.cos(angle)[:, None] * first + np.sin(angle)[:, None] * second
        points: np.ndarray = along[:, None] * mean
        points += np.sqrt(np.maximum(1 - along**2, 0))[:, None] * around
        return points

    return real_valued(split, seed, count, test_count, generate, dims=3)


def means(seed: int, components: int) -> np.ndarray:
    """The mean directions, uniform on the sphere, `(components, 3)`."""
    # 2, because 0 and 1 are the splits
    directions = frozen_random(seed, 2).normal(size=(components, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions

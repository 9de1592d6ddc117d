"""Densities in the plane: a seed gives any number of real-valued points."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat

from flowtrain.datasets.base import Images, Part, frozen_random
from flowtrain.types import Count, Positive

Generate = Callable[[np.random.RandomState, int], np.ndarray]  # randomness and N to (N, dims)
Noisy = Callable[[np.random.RandomState, int, float], np.ndarray]


def real_valued(
    split: Part, seed: int, count: int, test_count: int, generate: Generate, dims: int = 2
) -> Images:
    """`count` points to train on or `test_count` to test with, `(dims, 1, 1)`. Both are functions
    of the seed alone.
    """

    def read() -> np.ndarray:
        test = split == "test"
        points = generate(frozen_random(seed, int(test)), test_count if test else count)
        return np.ascontiguousarray(points.reshape(-1, dims, 1, 1), dtype=np.float32)

    return Images(shape=(dims, 1, 1), num_bins=None, read=read)


def _noisy(generate: Noisy, default: float) -> Callable[..., Images]:
    """The `build` of points with Gaussian noise, whose docstring begins with `generate`'s."""

    def build(
        root: Path,
        split: Part,
        *,
        seed: int = 0,
        count: Count = 10_000,
        test_count: Count = 10_000,
        noise: NonNegativeFloat = default,
    ) -> Images:
        """Points of the plane.

        Args:
            count: Points to train on, of which `data.validation` are held out.
            test_count: Points in the test split.
            noise: Standard deviation of the noise on each point.
        """
        return real_valued(split, seed, count, test_count, lambda r, n: generate(r, n, noise))

    build.__doc__ = f"{generate.__doc__}\n\n        {build.__doc__}"
    return build


def _two_moons(random: np.random.RandomState, n: int, noise: float) -> np.ndarray:
    """Two moons: interleaved half circles of radius 1 (scikit-learn's `make_moons`), centred."""
    from sklearn.datasets import make_moons

    points: np.ndarray = make_moons(n, noise=noise, random_state=random)[0]
    points -= [0.5, 0.25]
    return points


def _rings(random: np.random.RandomState, n: int, noise: float) -> np.ndarray:
    """Four rings, of radius 0.6 to 2.4."""
    angle = random.uniform(0, 2 * np.pi, n)
    radius = 0.6 * random.randint(1, 5, size=n)
    points: np.ndarray = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points += noise * random.standard_normal((n, 2))
    return points


def _spiral(random: np.random.RandomState, n: int, noise: float) -> np.ndarray:
    """Two arms of a spiral."""
    angle = 1.5 * 2 * np.pi * np.sqrt(random.uniform(0, 1, n))
    arm = (-1) ** random.randint(2, size=n)
    radius = arm * angle / 3
    points: np.ndarray = radius[:, None] * np.stack([-np.cos(angle), np.sin(angle)], axis=1)
    points += noise * random.standard_normal((n, 2))
    return points


def _eight_gaussians(random: np.random.RandomState, n: int, noise: float) -> np.ndarray:
    """Eight Gaussians on a circle of radius 2."""
    angle = random.randint(8, size=n) * np.pi / 4
    centre = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return centre + noise * random.standard_normal((n, 2))


def _pinwheel(
    root: Path,
    split: Part,
    *,
    seed: int = 0,
    count: Count = 10_000,
    test_count: Count = 10_000,
    arms: Positive = 5,
) -> Images:
    """A pinwheel (Johnson et al. 2016), whose Gaussian arms turn more the farther out they are.

    Points of the plane.

    Args:
        count: Points to train on, of which `data.validation` are held out.
        test_count: Points in the test split.
        arms: Arms of the pinwheel.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        radial, tangential = 0.3 * random.standard_normal(n) + 1, 0.1 * random.standard_normal(n)
        angle = 2 * np.pi * random.randint(arms, size=n) / arms + 0.25 * np.exp(radial)
        along = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        across = np.stack([-np.sin(angle), np.cos(angle)], axis=1)
        points: np.ndarray = radial[:, None] * along + tangential[:, None] * across
        points *= 1.5
        return points

    return real_valued(split, seed, count, test_count, generate)


def _checkerboard(
    root: Path, split: Part, *, seed: int = 0, count: Count = 10_000, test_count: Count = 10_000
) -> Images:
    """A checkerboard: uniform on every other square of side 1 in [-2, 2] x [-2, 2].

    Points of the plane.

    Args:
        count: Points to train on, of which `data.validation` are held out.
        test_count: Points in the test split.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        x = random.uniform(-2, 2, n)
        y = random.uniform(0, 1, n) - random.randint(2, size=n) * 2 + np.floor(x) % 2
        return np.stack([x, y], axis=1)

    return real_valued(split, seed, count, test_count, generate)


def _torus(
    root: Path,
    split: Part,
    *,
    seed: int = 0,
    count: Count = 10_000,
    test_count: Count = 10_000,
    components: Positive = 6,
    concentration: PositiveFloat = 8,
) -> Images:
    """A mixture of von Mises distributions on a torus: two angles in radians, in [-pi, pi].

    In a component, the angles are independent, with the density `exp(kappa cos(angle - mean)) /
    (2 pi I0(kappa))` each. The means are `torus_means(seed, components)`, and kappa is
    `concentration`.

    Args:
        count: Points to train on, of which `data.validation` are held out.
        test_count: Points in the test split.
        components: Components of the mixture, all of equal weight.
        concentration: Concentration of each angle in a component, kappa.
    """

    def generate(random: np.random.RandomState, n: int) -> np.ndarray:
        mean = torus_means(seed, components)[random.randint(components, size=n)]
        angles: np.ndarray = random.vonmises(mean, concentration)
        return angles

    return real_valued(split, seed, count, test_count, generate)


def torus_means(seed: int, components: int) -> np.ndarray:
    """The mean angles, uniform on the torus, `(components, 2)`."""
    # 2, because 0 and 1 are the splits
    return frozen_random(seed, 2).uniform(-np.pi, np.pi, size=(components, 2))


BUILDS = {
    "two_moons": _noisy(_two_moons, 0.05),
    "rings": _noisy(_rings, 0.05),
    "spiral": _noisy(_spiral, 0.1),
    "eight_gaussians": _noisy(_eight_gaussians, 0.2),
    "pinwheel": _pinwheel,
    "checkerboard": _checkerboard,
    "torus": _torus,
}

"""Figures of sample quality: two sets of images, compared by their features."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowtrain.datasets.base import frozen_random
from flowtrain.errors import UserError
from flowtrain.flow.inputs import Batch, as_shown, as_tensor
from flowtrain.system.arrays import ArrayFile
from flowtrain.tools.quality.features import features_of, load, name_for, torch_fidelity

NEIGHBOURS, NEIGHBOURS_OF_COVERAGE = 3, 5  # as in the two papers
MOST = 10_000  # images for the figures of neighbours, whose time is quadratic
BLOCKS = 10  # for the error of KID
ROWS = 1000  # of a matrix of distances at a time
LARGEST = 1e100  # a statistic, so that squares do not overflow


@dataclass(frozen=True)
class Statistics:
    """Mean `(F,)` and covariance `(F, F)` of the features of a set of images, float64, and the
    features themselves `(N, F)` if they are there.
    """

    mu: np.ndarray
    sigma: np.ndarray
    features: Tensor | None = None


@dataclass(frozen=True)
class Quality:
    """How similar images are to reference images. All but FID are None against bare statistics.

    features: the network. Figures of different networks are never comparable.
    fid: Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6). Few images enlarge it.
    kid: squared maximum mean discrepancy with the kernel `(x y / F + 1)^3` (Binkowski et al. 2018,
        section 4), unbiased for any number of images: the mean of `BLOCKS` disjoint blocks.
    kid_stderr: its standard error, from the spread of the blocks.
    precision, recall: share of images near a reference image, and the reverse (Kynkaanniemi et al.
        2019, eq. 2), with 3 neighbours.
    density, coverage: Naeem et al. 2020, eqs. 3 and 4, with 5 neighbours.
    """

    features: str
    num_images: int
    num_reference: int | None
    fid: float
    kid: float | None = None
    kid_stderr: float | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None


def statistics_in(path: Path) -> Statistics | None:
    """`mu` and `sigma` of an .npz file, the usual format. None for a file of images.

    Raises `UserError` for arrays of other shapes or types, values that are not finite or too
    large, and a `sigma` that is not the covariance of any features.
    """
    file = ArrayFile(path)
    if not {"mu", "sigma"} <= set(file.names):
        return None
    mu = file.read("mu", "f", (None,)).astype(np.float64)
    sigma = file.read("sigma", "f", (len(mu), len(mu))).astype(np.float64)
    if not all((np.abs(each) < LARGEST).all() for each in (mu, sigma)):
        raise UserError(f"{path}: the statistics are not finite, or beyond {LARGEST:g}")
    # Rounding of the entries to float32 moves an eigenvalue by less.
    error = sigma.size**0.5 * np.finfo(np.float32).eps * np.abs(sigma).max()
    if np.abs(sigma - sigma.T).max() > error or np.linalg.eigvalsh(sigma)[0] < -error:
        raise UserError(f"{path}: sigma is no covariance: not symmetric, or of negative variances")
    return Statistics(mu, sigma)


def statistics_of(features: Tensor, name: str) -> Statistics:
    """Statistics of features `(N, F)`, float64, of the network `name`. Raises `UserError` if one is
    not finite, and as `require_enough`.
    """
    require_enough(len(features), features.shape[1], name)
    if not features.isfinite().all():
        raise UserError(f"the features {name} of an image are not finite")
    sigma = np.atleast_2d(np.cov(features.numpy(), rowvar=False))
    return Statistics(features.mean(dim=0).numpy(), sigma, features)


def require_enough(count: int, size: int, name: str) -> None:
    """Raises `UserError` if there are too few images for FID: a covariance has full rank only if
    there are more images than features.
    """
    if count <= size:
        raise UserError(
            f"FID of features {name} needs more images than the {size} features, and there are "
            f"{count}"
        )


def require_size(reference: Statistics, size: int, name: str) -> None:
    """Raises `UserError` if the reference has another number of features than the network."""
    if len(reference.mu) != size:
        raise UserError(f"the reference has {len(reference.mu)} features, and {name} has {size}")


def quality(
    images: Batch, reference: Batch | Statistics, features: str | None, device: torch.device
) -> Quality:
    """See `flowtrain.quality`."""
    if not len(images):
        raise UserError("the figures are of images, and there are none")
    first = images[0]
    if isinstance(first, Tensor):
        first = first.cpu()
    if isinstance(first, Image.Image):
        grey = first.mode in ("1", "L", "LA") or first.mode.startswith("I")
        first = as_shown(first, 1 if grey else 3)
    a, b, c = np.atleast_3d(np.asarray(first)).shape
    shape = (a, b, c) if a in (1, 3) else (c, a, b)
    name = features or name_for(shape)
    network = load(name, shape, device)

    def described(batch: Batch) -> Statistics:
        return statistics_of(features_of(as_tensor(batch, shape, 256), network, device), name)

    known = reference if isinstance(reference, Statistics) else described(reference)
    return compare(described(images), known, name)


def compare(images: Statistics, reference: Statistics, name: str) -> Quality:
    """The figures of images whose features are known. Raises `UserError` if the reference has
    another number of them.
    """
    fidelity, x, y = torch_fidelity(), images.features, reference.features
    assert x is not None
    require_size(reference, x.shape[1], name)
    both = ({"mu": each.mu, "sigma": each.sigma} for each in (images, reference))
    (fid,) = fidelity.metric_fid.fid_statistics_to_metric(*both, verbose=False).values()
    if y is None:
        return Quality(name, len(x), None, fid)
    counts = len(x), len(y)
    x, y = (each[frozen_random(0, len(each)).permutation(len(each))] for each in (x, y))
    block = min(counts) // BLOCKS
    # Of two versions of the same images, an image is not in a block with its other version.
    apart = y.roll(block, 0) if counts[0] == counts[1] else y
    kids = [
        fidelity.metric_kid.kid_features_to_metric(
            a, b, kid_subsets=1, kid_subset_size=block, verbose=False
        )[fidelity.KEY_METRIC_KID_MEAN]
        for a, b in itertools.islice(zip(x.split(block), apart.split(block), strict=False), BLOCKS)
    ]
    few = min(*counts, MOST)  # of both, because recall depends on the number
    x, y = x[:few], y[:few]
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": ROWS, "save_cpu_ram": True}
    near = fidelity.metric_prc.prc_features_to_metric(x, y, **options, verbose=False)
    return Quality(
        *(name, *counts, fid),
        *(float(np.mean(kids)), float(np.std(kids, ddof=1) / BLOCKS**0.5)),
        *(near["precision"], near["recall"]),
        *density_and_coverage(x, y),
    )


def density_and_coverage(
    x: Tensor, y: Tensor, neighbours: int = NEIGHBOURS_OF_COVERAGE
) -> tuple[float, float]:
    """Naeem et al. 2020, eqs. 3 and 4, of features `(N, F)` against a reference `(M, F)`.

    The ball of a reference image reaches to its nearest `neighbours` in the reference. Density is
    the number of balls that hold an image of x, as a multiple of the expected one, and coverage
    the share of balls that hold any.
    """
    balls = covered = 0.0
    for part in y.split(ROWS):
        radius = torch.cdist(part, y).kthvalue(neighbours + 1, keepdim=True).values  # with itself
        inside = torch.cdist(part, x) < radius
        balls += inside.sum().item()
        covered += inside.any(dim=1).sum().item()
    return balls / (neighbours * len(x)), covered / len(y)

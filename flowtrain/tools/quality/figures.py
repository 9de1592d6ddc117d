"""Figures of sample quality: two sets of images, compared by their features."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.datasets.base import frozen_random
from flowtrain.errors import UserError
from flowtrain.flow.inputs import Batch, as_tensor
from flowtrain.system.arrays import ArrayFile
from flowtrain.tools.quality.features import features_of, load, name_for, torch_fidelity

NEIGHBOURS, NEIGHBOURS_OF_COVERAGE = 3, 5  # as in the two papers
MOST = 10_000  # images for the figures of neighbours, whose time is quadratic
BLOCKS = 10  # for the error of KID
ROWS = 1000  # of a matrix of distances at a time


@dataclass(frozen=True)
class Statistics:
    """Mean `(F,)` and covariance `(F, F)` of the features of a set of images, float64."""

    mu: np.ndarray
    sigma: np.ndarray


@dataclass(frozen=True)
class Quality:
    """How similar images are to reference images. All but FID are None against `Statistics`.

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

    Raises `UserError` for arrays of other shapes or types, or with values that are not finite.
    """
    file = ArrayFile(path)
    if not {"mu", "sigma"} <= set(file.names):
        return None
    mu = file.read("mu", "f", (None,)).astype(np.float64)
    sigma = file.read("sigma", "f", (len(mu), len(mu))).astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: the statistics are not finite")
    return Statistics(mu, sigma)


def quality(
    images: Batch, reference: Batch | Statistics, features: str | None, device: torch.device
) -> Quality:
    """See `flowtrain.quality`."""
    first = np.asarray(images[0])
    first = first[None] if first.ndim == 2 else first
    size = first.shape if first.shape[0] in (1, 3) else np.moveaxis(first, -1, 0).shape
    shape = (size[0], size[1], size[2])
    name = features or name_for(shape)
    network = load(name, shape, device)
    x = features_of(as_tensor(images, shape, 256), network, device)
    if isinstance(reference, Statistics):
        return compare(x, reference, name)
    return compare(x, features_of(as_tensor(reference, shape, 256), network, device), name)


def compare(x: Tensor, reference: Tensor | Statistics, name: str) -> Quality:
    """The figures of features `(N, F)` against those of a reference `(M, F)`, both float64, or
    against its statistics. `name` is the network's.

    Raises `UserError` for features that are not finite, and as `require_enough`.
    """
    fidelity = torch_fidelity()
    require_enough(len(x), reference, name)
    own = _statistics(x, name)
    known = reference if isinstance(reference, Statistics) else _statistics(reference, name)
    if len(known.mu) != len(own.mu):
        raise UserError(
            f"the reference has {len(known.mu)} features, and those of {name} are {len(own.mu)}"
        )
    (fid,) = fidelity.metric_fid.fid_statistics_to_metric(vars(own), vars(known), False).values()
    if isinstance(reference, Statistics):
        return Quality(name, len(x), None, fid)
    x, y = (each[frozen_random(0, len(each)).permutation(len(each))] for each in (x, reference))
    block = min(len(x), len(y)) // BLOCKS
    kids = [
        fidelity.metric_kid.kid_features_to_metric(
            a, b, kid_subsets=1, kid_subset_size=block, verbose=False
        )[fidelity.KEY_METRIC_KID_MEAN]
        for a, b in itertools.islice(zip(x.split(block), y.split(block), strict=False), BLOCKS)
    ]
    count, few = len(x), min(len(x), len(y), MOST)  # of both, because recall depends on the number
    x, y = x[:few], y[:few]
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": ROWS, "save_cpu_ram": True}
    near = fidelity.metric_prc.prc_features_to_metric(x, y, **options, verbose=False)
    return Quality(
        *(name, count, len(reference), fid),
        *(float(np.mean(kids)), float(np.std(kids, ddof=1) / BLOCKS**0.5)),
        *(near["precision"], near["recall"]),
        *density_and_coverage(x, y),
    )


def density_and_coverage(
    x: Tensor, y: Tensor, neighbours: int = NEIGHBOURS_OF_COVERAGE
) -> tuple[float, float]:
    """Naeem et al. 2020, eqs. 3 and 4, of features `(N, F)` against those of a reference `(M, F)`.

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


def require_enough(count: int, reference: Tensor | Statistics, name: str) -> None:
    """Raises `UserError` if there are too few images for FID: a covariance has full rank only if
    there are more images than features.
    """
    size = len(reference.mu) if isinstance(reference, Statistics) else reference.shape[1]
    fewest = count if isinstance(reference, Statistics) else min(count, len(reference))
    if fewest <= size:
        raise UserError(
            f"FID of features {name} needs more images than the {size} features, and there are "
            f"{fewest}"
        )


def _statistics(x: Tensor, name: str) -> Statistics:
    if not x.isfinite().all():
        raise UserError(f"the features {name} of an image are not finite")
    return Statistics(x.mean(dim=0).numpy(), np.atleast_2d(np.cov(x.numpy(), rowvar=False)))

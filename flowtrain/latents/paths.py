"""Paths through the latent space: between images, between classes, and along attributes."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet, Split
from flowtrain.errors import UserError
from flowtrain.evaluation.score import score
from flowtrain.flow.class_prior import ClassPrior
from flowtrain.flow.flow import Flow
from flowtrain.latents.directions import Direction
from flowtrain.latents.encoding import encode
from flowtrain.pictures.sample import decode
from flowtrain.system import capacity
from flowtrain.system.console import silent
from flowtrain.system.random import Stream, generator

CLASS_IMAGES = 500  # training images of a class over which the mean latent is taken, at most
TYPICAL_IMAGES = 500  # test images whose likelihoods say what is typical, at most
LOWEST = 0.01  # the share of them that is less likely than where a path stops
# The deviation of an image from the mean of its class shrinks to this share on the way to another
# class. Whole, it makes ends that are of no class (docs/edit.md).
KEPT = 0.5


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985) between latents `(D,)` at each `t` `(S,)`: `(S, D)`.

    The ends are exactly `a` and `b`. In between, the norm stays typical of a standard normal. A
    straight line would pass through the improbable middle. It is for (anti)parallel latents only,
    and for a latent of zeros, which has no angle.
    """
    cosine = torch.dot(a, b) / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    t = t[:, None]
    if not torch.sin(angle) >= 1e-4:  # or NaN
        path = a + t * (b - a)
    else:
        path = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(t == 0, a, torch.where(t == 1, b, path))


def interpolate(flow: Flow, first: Tensor, second: Tensor, steps: int) -> Tensor:
    """Paths between pairs of images, `(P, C, H, W)` each: `(P, steps, C, H, W)` with both ends.
    Raises `UserError` for a model with an `image_context`.
    """
    flow.require_no_context("paths between images")
    require_room(flow, len(first), steps)
    t = torch.linspace(0, 1, steps)
    ends = zip(encode(flow, first), encode(flow, second), strict=True)
    return decoded(flow, torch.stack([slerp(a, b, t) for a, b in ends]))


def decoded(flow: Flow, paths: Tensor) -> Tensor:
    """Latents `(P, S, D)` as images `(P, S, C, H, W)` on the CPU, all decoded together."""
    images: Tensor = decode(flow, paths.flatten(0, 1)).unflatten(0, paths.shape[:2])
    return images


def require_room(flow: Flow, pairs: int, steps: int) -> None:
    """Raises `UserError` if the paths and all pictures do not fit into memory."""
    pixels = flow.dims * (4 if flow.num_bins is None else 1)
    capacity.require(
        2 * 4 * pairs * steps * flow.latent_dims + 2 * pairs * steps * pixels,
        f"--steps {steps}: {pairs} paths of {steps:,} images need",
    )


def moved(z: Tensor, direction: Direction, target: Tensor) -> Tensor:
    """Latents `(N, D)` turned towards a direction, until their projections on it are `target`
    `(N,)`: on a great circle, so that the norm stays typical.

    An orthogonal direction keeps the projections on the others, and the rest shrinks or grows. If
    the target is too large for the norm, nothing of the rest is left.
    """
    columns = torch.stack([direction.vector, *direction.others], dim=1)
    vector, target = direction.vector.to(z), target.to(z)
    beside = torch.linalg.qr(columns)[0][:, 1:].to(z)
    kept = z @ beside @ beside.T
    rest = z - (z @ vector)[:, None] * vector - kept
    squares = z.square().sum(dim=1) - kept.square().sum(dim=1) - target.square()
    length = squares.clamp_min(0).sqrt()
    # Less than that is rounding: the directions span all.
    share = length / rest.norm(dim=1).maximum(1e-4 * z.norm(dim=1)).clamp_min(1e-12)
    turned: Tensor = target[:, None] * vector + kept + share[:, None] * rest
    return turned


def along(z: Tensor, direction: Direction, strength: float, steps: int) -> Tensor:
    """Paths from latents `(N, D)` to a strength of an attribute: `(N, steps, D)`."""
    vector = direction.vector.to(z)
    begin, end = z @ vector, direction.target(strength)
    t = torch.linspace(0, 1, steps).to(z)
    rows = [moved(z, direction, begin + s * (end - begin)) for s in t[1:]]
    return torch.stack([z, *rows], dim=1)


def between_classes(
    flow: Flow, z: Tensor, first: int, second: int, mean: Callable[[int], Tensor], steps: int
) -> Tensor:
    """Paths from latents `z` `(N, D)` of class `first` to class `second`: `(N, steps, D)`.

    With a prior for each class, the coarsest latent is carried from one Gaussian to the other. For
    other models it moves by the difference of the classes' mean latents `mean(label)` `(D,)`, as in
    Glow, section 6.2. The deviation from the mean shrinks to `KEPT` on the way.
    """
    prior = flow.class_prior
    if isinstance(prior, ClassPrior):
        end = prior.carried(z.to(flow.device), first, second, KEPT).to(z)
    else:
        end = mean(second) + KEPT * (z - mean(first))
    t = torch.linspace(0, 1, steps).to(z)
    return z[:, None] + t[:, None] * (end - z)[:, None]


def of_class(split: Split, label: int, needed: int, option: str) -> Split:
    """The images of a class. Raises `UserError` with `option` if there are fewer than `needed`."""
    if split.labels is None:
        raise UserError(f"{option} {label}: the data set has no labels")
    # numpy compares with numbers of any size
    where = (split.labels.numpy() == label).nonzero()[0]
    if len(where) < needed:
        raise UserError(
            f"{option} {label}: the split has {len(where)} images of it, {needed} are needed"
        )
    return split.at(where)


def of_classes(
    flow: Flow, data: DataSet, first: int, second: int, pairs: int, steps: int
) -> Tensor:
    """Paths from the first test images of class `first` to class `second`, by mean latents of
    training images: `(P, steps, D)`. Raises `UserError` if there are too few images of a class.
    """
    require_room(flow, pairs, steps)
    test = data.split("test")
    x = of_class(test, first, pairs, "--from-class").take(slice(0, pairs))
    of_class(test, second, 1, "--to-class")
    for option, label in (("--from-class", first), ("--to-class", second)):
        if flow.classes and label >= flow.classes:
            raise UserError(f"{option} {label}: the model has the classes 0..{flow.classes - 1}")

    def mean(label: int) -> Tensor:
        option = "--from-class" if label == first else "--to-class"
        images = of_class(data.split("train"), label, 1, option).sample(CLASS_IMAGES)
        return encode(flow, images.take(slice(None))).mean(dim=0)

    return between_classes(flow, encode(flow, x), first, second, mean, steps)


def log_probs(flow: Flow, x: Tensor) -> Tensor:
    """Log-likelihoods of images `(N, C, H, W)`, float64 `(N,)` in nats, as in `evaluate`."""
    return score(flow, Split(x.cpu().numpy(), np.arange(len(x)))).log_prob


def lowest_typical(
    flow: Flow, split: Split, progress: Callable[[int, int], None] = silent
) -> float:
    """The log-likelihood in nats that all but the lowest `LOWEST` of the images of a split reach,
    by a sample of at most `TYPICAL_IMAGES`.
    """
    found = score(flow, split.sample(TYPICAL_IMAGES), progress=progress).log_prob
    return float(found.quantile(LOWEST))


def stopped(flow: Flow, rows: Tensor, lowest: float) -> list[int]:
    """The number of images of each path `(P, S, C, H, W)` before the first that is less likely than
    `lowest` nats. The first image of a path was given, and counts.
    """
    likely = log_probs(flow, rows.flatten(0, 1)).reshape(rows.shape[:2]) >= lowest
    likely[:, 0] = True
    counts: list[int] = likely.long().cumprod(dim=1).sum(dim=1).tolist()
    return counts


def stay(rows: Tensor, counts: list[int]) -> Tensor:
    """Paths `(P, S, ...)` that stay at the last of their first `counts` images."""
    steps = torch.arange(rows.shape[1])
    return torch.stack([row[steps.clamp_max(n - 1)] for row, n in zip(rows, counts, strict=True)])


def random_images(
    model: LoadedModel, data: DataSet, count: int, seed: int, option: str, needed: int
) -> Tensor:
    """`count` random test images, all different, `(N, C, H, W)`. Raises `UserError` that names
    `option`, whose value is `needed`, if there are too few.
    """
    data.require(model.flow.shape, model.flow.num_bins, model.checkpoint.path)
    split = data.split("test")
    if len(split) < count:
        raise UserError(f"{option} {needed}: the test split has only {len(split)} images")
    order = torch.randperm(len(split), generator=generator(seed, Stream.PAIRS))
    return split.take(order[:count].numpy())

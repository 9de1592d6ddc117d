"""Edits of a latent: temperatures, mixing, principal directions, class priors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowtrain.bijections import base
from flowtrain.bijections.context import Context
from flowtrain.bijections.execution import LayerByLayer
from flowtrain.bijections.inverses import WithProgress
from flowtrain.flow.class_prior import ClassPrior
from flowtrain.flow.flow import Flow
from flowtrain.latents.directions import Direction
from flowtrain.latents.paths import KEPT, moved

COMPONENTS = 8  # principal directions of each level


@dataclass(frozen=True)
class Level:
    """A level of a flow's latent, which is the entries `where` of `(B, D)`."""

    where: slice
    shape: tuple[int, ...]  # (C, H, W), or (D,) of a latent without levels

    @property
    def entries(self) -> int:
        return math.prod(self.shape)

    @property
    def words(self) -> str:
        return " x ".join(map(str, self.shape))


def levels_of(flow: Flow) -> list[Level]:
    """The levels of a latent, the finest first."""
    levels, start = [], 0
    for part in flow.split_latents(torch.zeros(1, flow.latent_dims)):
        levels.append(Level(slice(start, start + part.numel()), tuple(part.shape[1:])))
        start += part.numel()
    return levels


def mixed(a: Tensor, b: Tensor, levels: Sequence[Level], from_b: Sequence[bool]) -> Tensor:
    """Latents `(B, D)`, with the levels of `b` for which `from_b` is true, the others of `a`."""
    parts = zip(levels, from_b, strict=True)
    return torch.cat([(b if take else a)[:, level.where] for level, take in parts], dim=1)


def towards_class(prior: ClassPrior, z: Tensor, label: int, share: float) -> Tensor:
    """A latent `(1, D)` moved by a share of the way from its likeliest class to another.

    The whole way is the one of `flowtrain interpolate --to-class`.
    """
    own = int(prior.by_class(z).argmax(dim=1))
    return torch.lerp(z, prior.carried(z, own, label, KEPT), share)


def along_attribute(z: Tensor, direction: Direction, amount: float) -> Tensor:
    """A latent `(1, D)` whose strength of an attribute is changed by `amount`.

    From -1 to 1 is the way from images without the attribute to images with it.
    """
    half = (direction.high - direction.low) / 2
    return moved(z, direction, z @ direction.vector.to(z) + amount * half)


@dataclass(frozen=True)
class Components:
    """The principal directions of a level, over encoded images.

    directions: unit vectors `(K, d)`, by descending variance.
    deviations: standard deviations of the images along them, `(K,)`.
    """

    directions: Tensor
    deviations: Tensor


def components(z: Tensor) -> Components:
    """The principal directions of latents of a level, `(N, d)`.

    The largest entry of a direction in size is positive, so that signs are reproducible.
    """
    from sklearn.decomposition import PCA

    count = min(COMPONENTS, len(z) - 1, z.shape[1])
    with np.errstate(invalid="ignore"):  # equal latents: shares of no variance
        found = PCA(count, svd_solver="full").fit(z.double().cpu().numpy())
    # The last of as many directions as there are images have no variance.
    deviations = np.sqrt(found.explained_variance_)
    return Components(
        torch.from_numpy(found.components_).float(), torch.from_numpy(deviations).float()
    )


class Stoppable(LayerByLayer):
    """Lets another executor compute, and calls `check` before each layer.

    The default executor also calls `check` at each step of a slow layer. `check` raises an
    exception if the result is no longer wanted.
    """

    def __init__(self, check: Callable[[], None], executor: LayerByLayer | None = None):
        self.check = check
        self.executor = executor or WithProgress(lambda share: check())

    def call(
        self, layer: base.Bijection, direction: base.Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        self.check()
        return self.executor.call(layer, direction, x, context)

    def prepared(
        self, layers: Sequence[base.Bijection], direction: base.Direction
    ) -> Sequence[base.Bijection]:
        return self.executor.prepared(layers, direction)

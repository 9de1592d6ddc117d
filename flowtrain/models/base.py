"""Parts of several models: transforms by name, couplings of vectors, checks of sizes, patches."""

from collections.abc import Callable
from typing import Literal

from torch import nn

from flowtrain.bijections import Bijection, Coupling, Squeeze, Transform
from flowtrain.bijections.affine import (
    AdditiveTransform,
    AffineTransform,
    ExponentialTransform,
    SigmoidTransform,
    TanhTransform,
)
from flowtrain.bijections.mixture import MixtureTransform
from flowtrain.bijections.spline import SplineTransform
from flowtrain.errors import UserError
from flowtrain.nets.dense import DenseNet
from flowtrain.types import Shape

# The names of the elementwise transforms, for options: of all, and of those that change the volume
# and have no parameters of their own.
AnyTransform = Literal["affine", "additive", "spline", "mixture", "exp", "sigmoid", "tanh"]
Elementwise = Literal["affine", "spline", "mixture", "exp", "sigmoid"]

# Affine, volume preserving, rational-quadratic spline (Durkan et al. 2019), mixture of logistics
# (Ho et al. 2019), and affine with scales of exp(h), 2 sigmoid(h), and
# exp(a tanh(h)) with learned a.
TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "affine": AffineTransform,
    "additive": AdditiveTransform,
    "spline": SplineTransform,
    "mixture": MixtureTransform,
    "exp": ExponentialTransform,
    "sigmoid": SigmoidTransform,
    "tanh": TanhTransform,  # takes the number of entries
}

_TIMES = {0: "cannot be squeezed", 1: "can be squeezed once", 2: "can be squeezed twice"}


def vector_coupling(
    index: int,
    dims: int,
    width: int,
    hidden_layers: int,
    transform: Transform,
    net: Callable[..., nn.Module] = DenseNet,
) -> Coupling:
    """Coupling number `index` of a chain on vectors `(B, dims)`, whose conditioner is a `net`.

    Even ones keep the first half, the larger one if `dims` is odd; odd ones keep the second. Raises
    `UserError` if there is only one entry.
    """
    if dims < 2:
        raise UserError(
            "model.name: couplings need at least two values per example, and the data have one; "
            "use maf or cnf"
        )
    swap = index % 2 == 1
    kept = dims // 2 if swap else (dims + 1) // 2
    parameters = transform.parameters_per_entry * (dims - kept)
    return Coupling(kept, net(kept, parameters, width, hidden_layers), transform, swap=swap)


def check_squeezes(shape: Shape, squeezes: int, levels: int) -> None:
    """Raises `UserError` unless both sides of an image can be halved `squeezes` times."""
    _, height, width = shape
    sizes = [(height, width)]
    while sizes[-1][0] % 2 == 0 and sizes[-1][1] % 2 == 0 and min(sizes[-1]) > 1:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    possible = len(sizes) - 1
    if squeezes <= possible:
        return
    path = " -> ".join(str(h) if height == width else f"{h}x{w}" for h, w in sizes)
    times = _TIMES.get(possible, f"can be squeezed {possible} times")
    raise UserError(
        f"model.levels: {height}x{width} {times}{f' ({path})' if possible else ''}; "
        f"levels: {levels} needs a multiple of {2**squeezes}"
    )


def tokens_of(shape: Shape, patch: int) -> tuple[int, int, int]:
    """Entries of a token, and rows and columns of tokens. Raises `UserError` if there is a rest."""
    channels, height, width = shape
    if height % patch or width % patch:
        raise UserError(
            f"model.patch: patches of {patch}x{patch} pixels do not fill images of "
            f"{height}x{width}: choose a patch whose side divides both"
        )
    return channels * patch**2, height // patch, width // patch


def patches(patch: int) -> list[Bijection]:
    """Layers that turn an image into tokens: a patch with a side of a power of 2 into channels."""
    return [Squeeze() for _ in range(patch.bit_length() - 1)]

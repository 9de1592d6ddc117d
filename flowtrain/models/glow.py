"""Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal 2018, arXiv:1807.03039).

Deliberate differences from the paper and its release:
- no ActNorm inside the conditioners (plain biases, PyTorch's initialization);
- the log-scale of an affine coupling is `2 tanh(h / 2)`, where the release has `log sigmoid(h + 2)`: bounded both
  ways, and the identity at the start; ActNorm's and the 1x1 convolution's log-scales are bounded by tanh to +-8;
- `initialization: whitening` sets each 1x1 convolution from the first batch by PCA (`rotation` is the paper's);
- the learned priors scale the latents instead of the base density, which is the same likelihood.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from flowtrain.bijections import (
    ActNorm,
    AdditiveTransform,
    AffineTransform,
    Bijection,
    Conv1x1,
    Conv1x1LU,
    Coupling,
    DiagonalAffine,
    Multiscale,
    Permute,
    Sequential,
    Squeeze,
)
from flowtrain.models.geometry import check_squeezes
from flowtrain.nets import GlowNet, ZeroNet


def build(
    shape: tuple[int, int, int],
    *,
    levels: Annotated[int, Field(ge=1)] = 3,
    steps: Annotated[int, Field(ge=1)] = 32,
    width: Annotated[int, Field(ge=1)] = 512,
    coupling: Literal["affine", "additive"] = "affine",
    permutation: Literal["conv1x1_lu", "conv1x1", "shuffle", "reverse"] = "conv1x1_lu",
    initialization: Literal["rotation", "whitening"] = "rotation",
) -> Bijection:
    """Glow for images of `shape` (C, H, W): `levels` times squeeze, `steps` of flow, and a split.

    Args:
        levels: L; each halves the size, so both sides must be multiples of 2**L.
        steps: K, steps of flow (ActNorm, permutation, coupling) per level.
        width: channels of the conditioners' hidden layers.
        coupling: affine, or additive (volume preserving).
        permutation: what mixes the channels before each coupling.
        initialization: of the 1x1 convolutions: random rotations, or PCA whitening of the first batch.

    Raises:
        UserError: where the image cannot be squeezed `levels` times.
    """
    check_squeezes(shape, levels, levels)
    channels, height, side = shape
    level_bijections: list[Bijection] = []
    priors: list[Bijection] = []
    latent_shapes = []
    for level in range(levels):
        channels, height, side = 4 * channels, height // 2, side // 2
        layers: list[Bijection] = [Squeeze()]
        for _ in range(steps):
            layers += [
                ActNorm((channels, 1, 1)),
                _permutation(permutation, channels, initialization),
                _coupling(coupling, channels, width),
            ]
        level_bijections.append(Sequential(*layers))
        if level < levels - 1:
            kept = channels // 2
            priors.append(Coupling(kept, ZeroNet(kept, 2 * (channels - kept)), AffineTransform()))
            latent_shapes.append((channels - kept, height, side))
            channels = kept
        else:
            priors.append(DiagonalAffine((channels, 1, 1)))
            latent_shapes.append((channels, height, side))
    return Multiscale(level_bijections, priors, latent_shapes)


def _permutation(kind: str, channels: int, initialization: str) -> Bijection:
    if kind == "conv1x1_lu":
        return Conv1x1LU(channels, initialization)
    if kind == "conv1x1":
        return Conv1x1(channels, initialization)
    if kind == "shuffle":
        return Permute(torch.randperm(channels))
    return Permute(torch.arange(channels).flip(0))


def _coupling(kind: str, channels: int, width: int) -> Bijection:
    transform = AffineTransform() if kind == "affine" else AdditiveTransform()
    kept = channels // 2
    outputs = transform.parameters_per_entry * (channels - kept)
    return Coupling(kept, GlowNet(kept, outputs, width), transform)

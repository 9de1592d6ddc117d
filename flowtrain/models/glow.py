"""Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal 2018,
arXiv:1807.03039).

Deliberate differences from the paper and its release:
- no ActNorm inside the conditioners (plain biases, PyTorch's initialization);
- the log-scale of an affine coupling is `2 tanh(h / 2)`, where the release has `log sigmoid(h +
  2)`: bounded both ways, and the identity at the start; ActNorm's and the 1x1 convolution's
  log-scales are bounded by tanh to +-8;
- `initialization: whitening` sets each 1x1 convolution from the first batch by PCA (`rotation` is
  the paper's);
- the learned priors scale the latents instead of the base density, which is the same likelihood.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from flowtrain.bijections import (
    ActNorm,
    AdditiveTransform,
    AffineTransform,
    Bijection,
    CheckerboardCoupling,
    Conv1x1,
    Conv1x1LU,
    Coupling,
    DiagonalAffine,
    MixtureTransform,
    Multiscale,
    Permute,
    Sequential,
    SplineTransform,
    Squeeze,
    Transform,
)
from flowtrain.bijections.spline import MAX_BINS
from flowtrain.errors import UserError
from flowtrain.models.geometry import check_squeezes
from flowtrain.nets.convolution import GlowNet, ZeroNet
from flowtrain.nets.residual import DepthwiseNet, GatedNet

Positive = Annotated[int, Field(ge=1)]
PerLevel = Positive | list[Positive]


def build(
    shape: tuple[int, int, int],
    *,
    levels: Positive = 3,
    steps: PerLevel = 32,
    width: PerLevel = 512,
    coupling: Literal["affine", "additive", "spline", "mixture"] = "affine",
    bins: Annotated[int, Field(ge=2, le=MAX_BINS)] = 8,
    components: Positive = 4,
    split: Literal["channel", "checkerboard", "mixed"] = "channel",
    conditioner: Literal["glow", "gated", "depthwise"] = "glow",
    blocks: Positive = 1,
    permutation: Literal["conv1x1_lu", "conv1x1", "shuffle", "reverse"] = "conv1x1_lu",
    initialization: Literal["rotation", "whitening"] = "rotation",
    prior: Literal["affine", "spline", "mixture"] = "affine",
) -> Bijection:
    """Glow for images of `shape` (C, H, W): `levels` times squeeze, `steps` of flow, and a split.

    Args:
        levels: L; each halves the size, so both sides must be multiples of 2**L.
        steps: K, steps of flow (ActNorm, permutation, coupling) per level; or one number for each
            level, finest first.
        width: channels of the conditioners' hidden layers; or one number for each level. The
            coarser ones cost less.
        coupling: affine, additive (volume preserving), spline (rational-quadratic, Durkan et al.
            2019), or mixture (of logistics, Ho et al. 2019).
        bins: of a spline.
        components: logistics of a mixture.
        split: of a coupling: by channel, by a checkerboard whose colours alternate, or mixed: by
            turns. A single pixel has no second colour: there it is by channel.
        conditioner: glow (3x3, 1x1, 3x3), gated (residual blocks with gates), or depthwise
            (separable residual blocks).
        blocks: of a gated or depthwise conditioner.
        permutation: what mixes the channels before each coupling.
        initialization: of the 1x1 convolutions: random rotations, or PCA whitening of the first
            batch.
        prior: the transform of the half that leaves at a split, given the other, to the standard
            normal; as `coupling`.

    Raises:
        UserError: where the image cannot be squeezed `levels` times, or there are not `levels`
            numbers.
    """
    check_squeezes(shape, levels, levels)
    steps_of, width_of = _per_level("steps", steps, levels), _per_level("width", width, levels)
    transforms: dict[str, Callable[[], Transform]] = {
        "affine": AffineTransform,
        "additive": AdditiveTransform,
        "spline": lambda: SplineTransform(bins),
        "mixture": lambda: MixtureTransform(components),
    }
    nets: dict[str, Callable[[int, int, int], nn.Module]] = {
        "glow": GlowNet,
        "gated": lambda inputs, outputs, width: GatedNet(inputs, outputs, width, blocks),
        "depthwise": lambda inputs, outputs, width: DepthwiseNet(inputs, outputs, width, blocks),
    }

    def couple(level: int, step: int, channels: int, size: tuple[int, int]) -> Bijection:
        transform = transforms[coupling]()
        if split == "channel" or size == (1, 1) or (split == "mixed" and step % 2 == 0):
            kept = channels // 2
            net = nets[conditioner](
                kept, transform.parameters_per_entry * (channels - kept), width_of[level]
            )
            return Coupling(kept, net, transform)
        net = nets[conditioner](
            channels, transform.parameters_per_entry * channels, width_of[level]
        )
        parity = (step // 2 if split == "mixed" else step) % 2
        return CheckerboardCoupling(size, net, transform, parity)

    channels, height, side = shape
    level_bijections: list[Bijection] = []
    priors: list[Bijection] = []
    latent_shapes = []
    for level in range(levels):
        channels, height, side = 4 * channels, height // 2, side // 2
        layers: list[Bijection] = [Squeeze()]
        for step in range(steps_of[level]):
            layers += [
                ActNorm((channels, 1, 1)),
                _permutation(permutation, channels, initialization),
            ]
            layers.append(couple(level, step, channels, (height, side)))
        level_bijections.append(Sequential(*layers))
        if level < levels - 1:
            kept = channels // 2
            transform = transforms[prior]()
            net = ZeroNet(kept, transform.parameters_per_entry * (channels - kept))
            priors.append(Coupling(kept, net, transform))
            latent_shapes.append((channels - kept, height, side))
            channels = kept
        else:
            priors.append(DiagonalAffine((channels, 1, 1)))
            latent_shapes.append((channels, height, side))
    return Multiscale(level_bijections, priors, latent_shapes)


def _per_level(key: str, value: int | list[int], levels: int) -> list[int]:
    values = value if isinstance(value, list) else [value] * levels
    if len(values) != levels:
        raise UserError(
            f"model.{key}: {values} has {len(values)} numbers, for {levels} levels (model.levels)"
        )
    return values


def _permutation(kind: str, channels: int, initialization: str) -> Bijection:
    if kind == "conv1x1_lu":
        return Conv1x1LU(channels, initialization)
    if kind == "conv1x1":
        return Conv1x1(channels, initialization)
    if kind == "shuffle":
        return Permute(torch.randperm(channels))
    return Permute(torch.arange(channels).flip(0))

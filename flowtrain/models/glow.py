"""Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal 2018,
arXiv:1807.03039).

Deliberate differences from the paper and its release:
- The conditioners have no ActNorm. They have plain biases and PyTorch's initialization.
- The log-scale of an affine coupling is `2 tanh(h / 2)`, where the release has `log sigmoid(h +
  2)`. It is bounded both ways, and zero at the start. The log-scales of ActNorm and of the 1x1
  convolution are bounded by tanh to +-8.
- The convolutions see zeros outside of the image, where the release adds a channel that is one
  there.
- `initialization: whitening` sets each 1x1 convolution from the first batch by PCA. `rotation` is
  the paper's.
- The learned priors scale the latents instead of the base density. The likelihood is the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field

from flowtrain.bijections import (
    ActNorm,
    Bijection,
    CheckerboardCoupling,
    Conv1x1,
    Conv1x1LU,
    Coupling,
    DiagonalAffine,
    Multiscale,
    Permute,
    Sequential,
    Squeeze,
)
from flowtrain.bijections.spline import MAX_BINS
from flowtrain.errors import UserError
from flowtrain.models.base import TRANSFORMS, AnyTransform, Elementwise, check_squeezes
from flowtrain.nets.convolution import GlowNet, PreactivatedNet, ZeroNet, channels_of
from flowtrain.nets.residual import GatedNet
from flowtrain.types import Positive, Shape

PerLevel = Positive | list[Positive]


def build(
    shape: Shape,
    context: Shape | None = None,
    *,
    levels: Positive = 3,
    steps: PerLevel = 32,
    width: PerLevel = 512,
    coupling: AnyTransform = "affine",
    bins: Annotated[int, Field(ge=2, le=MAX_BINS)] = 8,
    components: Positive = 4,
    split: Literal["channel", "checkerboard", "mixed"] = "channel",
    conditioner: Literal["glow", "preactivated", "gated"] = "glow",
    blocks: Positive = 1,
    permutation: Literal["conv1x1_lu", "conv1x1", "shuffle", "reverse"] = "conv1x1_lu",
    initialization: Literal["rotation", "whitening"] = "rotation",
    prior: Elementwise = "affine",
    top_prior: Literal["channel", "entry"] = "channel",
    padding: Literal["zeros", "ones"] = "zeros",
) -> Bijection:
    """Glow for images. Each level is a squeeze, steps of flow, and a split.

    All networks, also of the split priors, see a context of the shape `context` beside their
    input.

    Args:
        levels: Number of levels, L. Each halves the sides, so both must be multiples of 2**L.
        steps: Steps of flow (ActNorm, permutation, coupling) per level, K; or a list,
            finest level first.
        width: Channels of the conditioners' hidden layers; or a list, finest level first. Coarser
            levels cost less.
        coupling: Transform of the couplings: affine, additive (volume preserving), spline
            (rational-quadratic, Durkan et al. 2019), mixture (of logistics, Ho et al. 2019), or
            affine with other scales: exp (not bounded), sigmoid (2 sigmoid(h)), and tanh
            (exp(a tanh(h)) with a learned a for each channel).
        bins: Bins per spline.
        components: Logistics per mixture.
        split: How a coupling splits its input: by channel, by a checkerboard of alternating
            colours, or by both in turn (mixed). A single pixel is split by channel.
        conditioner: Network of the couplings: glow (convolutions 3x3, 1x1, 3x3), preactivated (the
            same behind a 1x1 convolution and ReLU), or gated (residual blocks with gates).
        blocks: Residual blocks in a gated conditioner.
        permutation: Mixing of the channels before each coupling: a 1x1 convolution (conv1x1_lu by
            its LU factors, or conv1x1), a random shuffle, or a reversal.
        initialization: Start of the 1x1 convolutions: random rotations, or the PCA whitening of the
            first batch.
        prior: Transform to the standard normal of the half that leaves at a split, given the other
            half, named as for `coupling`.
        top_prior: Mean and scale of the coarsest latents: per channel, as in the paper, or per
            entry.
        padding: Padding of the last convolution of a network.

    Raises:
        UserError: if the image cannot be squeezed `levels` times, or a list has not `levels`
            numbers.
    """
    check_squeezes(shape, levels, levels)
    steps_of, width_of = _per_level("steps", steps, levels), _per_level("width", width, levels)
    options = {"spline": (bins,), "mixture": (components,)}
    outside = float(padding == "ones")
    nets: dict[str, Callable[..., torch.nn.Module]] = {
        "glow": partial(GlowNet, outside=outside),
        "preactivated": partial(PreactivatedNet, outside=outside),
        "gated": partial(GatedNet, blocks=blocks, outside=outside),
    }

    def couple(level: int, step: int, channels: int, size: tuple[int, int]) -> Bijection:
        by_channel = split == "channel" or size == (1, 1) or (split == "mixed" and step % 2 == 0)
        kept = channels // 2 if by_channel else channels
        changed = channels - kept if by_channel else channels
        arguments = (changed,) if coupling == "tanh" else options.get(coupling, ())
        transform = TRANSFORMS[coupling](*arguments)
        parameters = transform.parameters_per_entry * changed
        seen = channels_of(context, size)
        net = nets[conditioner](kept, parameters, width_of[level], context_channels=seen)
        if by_channel:
            return Coupling(kept, net, transform)
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
                couple(level, step, channels, (height, side)),
            ]
        level_bijections.append(Sequential(*layers))
        if level < levels - 1:
            kept = channels // 2
            transform = TRANSFORMS[prior](*options.get(prior, ()))
            parameters = transform.parameters_per_entry * (channels - kept)
            net = ZeroNet(kept, parameters, channels_of(context, (height, side)), outside)
            priors.append(Coupling(kept, net, transform))
            latent_shapes.append((channels - kept, height, side))
            channels = kept
        else:
            size = (1, 1) if top_prior == "channel" else (height, side)
            priors.append(DiagonalAffine((channels, *size)))
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

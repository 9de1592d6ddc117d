"""y0ast/Glow-PyTorch: the `Glow` of its `model.py`, saved by its `train.py`."""

import torch
from torch import Tensor

from flowtrain.config import Dequantization
from flowtrain.errors import UserError
from flowtrain.models.base import check_squeezes
from flowtrain.tools.weights.glow import Filters, Glow, Step, of_lu, scaled, sigmoid_parameters
from flowtrain.tools.weights.tensors import Tensors
from flowtrain.types import Shape


def read(tensors: Tensors, shape: Shape, dequantization: Dequantization) -> Glow:
    """Its images are flowtrain's, centred."""
    channels, height, width = shape
    affine = tensors.side("flow.layers.1.block.4.conv.weight") == 4 * channels
    number = 0
    steps: list[list[Step]] = []
    priors: list[Filters] = []
    while not steps or len(priors) == len(steps):
        check_squeezes((1, height, width), 1, len(steps) + 1)
        channels, height, width = 4 * channels, height // 2, width // 2
        number += 1  # the squeeze has no tensors
        level: list[Step] = []
        while not level or f"flow.layers.{number}.actnorm.bias" in tensors:
            level.append(_step(tensors, f"flow.layers.{number}.", channels, affine))
            number += 1
        steps.append(level)
        if f"flow.layers.{number}.conv.conv.weight" in tensors:
            channels //= 2
            weight, bias = _zero_convolution(
                tensors, f"flow.layers.{number}.conv.", channels, 2 * channels
            )
            # Means and log-scales in turn. The latent is (x - mean) exp(-log_scale).
            order = torch.arange(2 * channels).view(-1, 2).T.flatten()
            priors.append((-weight[order], -bias[order]))
            number += 1
    mean, log_scale = (
        tensors.take("prior_h", 1, 2 * channels, height, width)[0].mean((1, 2)).chunk(2)
    )
    if "learn_top_fn.conv.weight" in tensors:  # a convolution of zeros, padded with zeros
        _, bias = _zero_convolution(tensors, "learn_top_fn.", 2 * channels, 2 * channels)
        mean, log_scale = bias.chunk(2)
    coupling = "sigmoid" if affine else "additive"
    if "project_ycond.logs" in tensors:  # one mean and log-scale for each class and channel
        classes = tensors.side("project_class.logs")
        tensors.drop(
            *(f"project_class.{each}" for each in ("linear.weight", "linear.bias", "logs"))
        )
        weight = tensors.take("project_ycond.linear.weight", 2 * channels, classes)
        bias = tensors.take("project_ycond.linear.bias", 2 * channels)
        gain = (3 * tensors.take("project_ycond.logs", 2 * channels)).exp()
        of_channels = (weight.T + bias) * gain + torch.cat([mean, log_scale])
        of_entries = of_channels.repeat_interleave(height * width, dim=1)
        means, log_scales = of_entries.chunk(2, dim=1)
        return Glow(tensors.where, steps, priors, None, coupling, classes=(means, log_scales))
    top = -mean[:, None, None], -log_scale[:, None, None]
    return Glow(tensors.where, steps, priors, top, coupling)


def _step(tensors: Tensors, name: str, channels: int, affine: bool) -> Step:
    shift, log_scale = (
        tensors.take(f"{name}actnorm.{each}", 1, channels, 1, 1).flatten()
        for each in ("bias", "logs")
    )
    half, net = channels // 2, f"{name}block."
    hidden = tensors.side(f"{net}0.conv.weight")
    first = _convolution(tensors, f"{net}0.", half, hidden, 3)
    second = _convolution(tensors, f"{net}2.", hidden, hidden, 1)
    last = _zero_convolution(tensors, f"{net}4.", hidden, channels if affine else half)
    if affine:
        last = sigmoid_parameters(last, slice(0, None, 2), slice(1, None, 2))
    weight = _mixing(tensors, f"{name}invconv.", channels)
    return Step(shift, weight * log_scale.exp(), [first, second, last])


def _mixing(tensors: Tensors, name: str, channels: int) -> Tensor:
    """The matrix of a 1x1 convolution, from its LU factors if it has them."""
    if f"{name}weight" in tensors:
        return tensors.take(f"{name}weight", channels, channels)
    if f"{name}p" not in tensors:
        raise UserError(
            f"{tensors.where}: it has no 1x1 convolutions, and the order of its channels "
            f"(flow_permutation shuffle or reverse) is not in the file"
        )
    return of_lu(tensors, name, channels, ("p", "lower", "upper"), ("sign_s", "log_s"))


def _convolution(tensors: Tensors, name: str, inputs: int, outputs: int, size: int) -> Filters:
    """A convolution without a bias, and an ActNorm."""
    weight = tensors.take(f"{name}conv.weight", outputs, inputs, size, size)
    bias, log_scale = (
        tensors.take(f"{name}actnorm.{each}", 1, outputs, 1, 1).flatten()
        for each in ("bias", "logs")
    )
    return scaled((weight, bias), log_scale.exp())


def _zero_convolution(tensors: Tensors, name: str, inputs: int, outputs: int) -> Filters:
    weight = tensors.take(f"{name}conv.weight", outputs, inputs, 3, 3)
    bias = tensors.take(f"{name}conv.bias", outputs)
    gain = (3 * tensors.take(f"{name}logs", outputs, 1, 1).flatten()).exp()
    return scaled((weight, bias), gain)

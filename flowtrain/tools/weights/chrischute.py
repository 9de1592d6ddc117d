"""chrischute/glow: the `Glow` of its `models/glow`, saved by its `train.py`."""

import torch
from torch import Tensor

from flowtrain.config import Dequantization
from flowtrain.errors import UserError
from flowtrain.models.base import check_squeezes
from flowtrain.tools.weights.glow import Filters, Glow, Step, scaled
from flowtrain.tools.weights.tensors import Tensors
from flowtrain.types import Shape

EPSILON = 1e-5  # of torch's batch normalization
DEQUANTIZATION = {"transform": "logit", "alpha": 0.05}


def read(tensors: Tensors, shape: Shape, dequantization: Dequantization) -> Glow:
    """Its images are logits of `0.05 + 0.9 y`, as flowtrain's. Its latents are N(0, I).

    The second half of the channels changes the first one, which goes on to the next level. Here the
    halves are exchanged, and exchanged back by a further step whose coupling changes nothing.
    """
    if not torch.allclose(tensors.take("bounds", 1), torch.tensor(0.9, dtype=torch.float64)):
        raise UserError(f"{tensors.where}: its bounds are not 0.9")
    channels, height, width = shape
    steps: list[list[Step]] = []
    name = "flows."
    while f"{name}steps.0.norm.bias" in tensors or not steps:
        check_squeezes((1, height, width), 1, len(steps) + 1)
        channels, height, width = 4 * channels, height // 2, width // 2
        numbers = range(tensors.count(f"{name}steps."))
        level = [_step(tensors, f"{name}steps.{i}.", channels) for i in numbers]
        steps.append(_exchanged(level))
        channels, name = channels // 2, f"{name}next."
    return Glow(tensors.where, steps, None, None, "tanh", conditioner="preactivated")


def _step(tensors: Tensors, name: str, channels: int) -> Step:
    tensors.require_set(f"{name}norm.is_initialized")
    shift, log_scale = (
        tensors.take(f"{name}norm.{each}", 1, channels, 1, 1).flatten() for each in ("bias", "logs")
    )
    weight = tensors.take(f"{name}conv.weight", channels, channels) * log_scale.exp()
    half, net = channels // 2, f"{name}coup.nn."
    hidden = tensors.side(f"{net}in_conv.weight")
    gain, bias = _batch_norm(tensors, f"{net}in_norm.", half)
    filters: list[Filters] = [(gain.diag()[:, :, None, None], bias)]
    for conv, norm, inputs, size in (("in", "mid", half, 3), ("mid", "out", hidden, 1)):
        gain, bias = _batch_norm(tensors, f"{net}{norm}_norm.", hidden)
        kernel = tensors.take(f"{net}{conv}_conv.weight", hidden, inputs, size, size)
        filters.append((scaled((kernel, bias), gain)[0], bias))
    kernel = tensors.take(f"{net}out_conv.weight", channels, hidden, 3, 3)
    bias = tensors.take(f"{net}out_conv.bias", channels)
    order = torch.arange(channels).view(-1, 2).T.flip(0).flatten()  # shifts, then scales
    limit = tensors.take(f"{name}coup.scale", half, 1, 1).flatten()
    return Step(shift, weight, [*filters, (kernel[order], bias[order])], limit)


def _batch_norm(tensors: Tensors, name: str, channels: int) -> tuple[Tensor, Tensor]:
    """Gain and bias of a batch normalization in evaluation."""
    tensors.drop(f"{name}num_batches_tracked")
    weight, bias, mean, variance = (
        tensors.take(f"{name}{each}", channels)
        for each in ("weight", "bias", "running_mean", "running_var")
    )
    gain = weight / (variance + EPSILON).sqrt()
    return gain, bias - gain * mean


def _exchanged(steps: list[Step]) -> list[Step]:
    """Steps that keep the first half of the channels, with the same result in the end."""
    channels = len(steps[0].shift)
    order = torch.arange(channels).roll(channels // 2)
    exchanged = []
    for number, step in enumerate(steps):
        columns = slice(None) if number == 0 else order
        weight = step.weight[order][:, columns]
        exchanged.append(Step(step.shift[columns], weight, step.net, step.limit))
    last = steps[-1]
    net = [(torch.zeros_like(kernel), torch.zeros_like(bias)) for kernel, bias in last.net]
    back = torch.eye(channels, dtype=torch.float64)[order]
    return [*exchanged, Step(torch.zeros_like(last.shift), back, net, last.limit)]

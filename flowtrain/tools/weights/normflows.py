"""VincentStimper/normalizing-flows: a `MultiscaleFlow` of `GlowBlock`, as in its Glow example."""

import torch
from torch import Tensor

from flowtrain.config import Dequantization
from flowtrain.errors import UserError
from flowtrain.models.base import check_squeezes
from flowtrain.tools.weights.glow import Filters, Glow, Step, of_lu, scaled, sigmoid_parameters
from flowtrain.tools.weights.tensors import Tensors
from flowtrain.types import Shape


def read(tensors: Tensors, shape: Shape, dequantization: Dequantization) -> Glow:
    """Its images are in [0, 1], or logits. Levels and layers are listed from latents to data.

    Options that leave no trace in the file are the defaults: `scale_map` sigmoid, `split_mode`
    channel, `leaky` 0, `logscale_factor` 3.
    """
    levels = tensors.count("flows.")
    check_squeezes(shape, levels, levels)
    channels, height, width = shape
    finest = f"flows.{levels - 1}.0.flows.0.flows.1.param_map.net."
    in_net = f"{finest}1.actNorm.s" in tensors
    affine = tensors.side(f"{finest}{6 if in_net else 4}.weight") == 4 * channels
    # The last side of a base that depends on the class is the number of classes.
    classes = tensors.side("q0.0.loc", -1) if tensors.side("q0.0.loc") != 1 else 0
    steps, priors, of_classes = [], [], []
    for level in reversed(range(levels)):
        channels, height, width = 4 * channels, height // 2, width // 2
        names = [f"flows.{level}.{i}.flows." for i in range(tensors.count(f"flows.{level}."))]
        steps.append([_step(tensors, name, channels, affine, in_net) for name in reversed(names)])
        if level > 0:
            channels //= 2
        latents = channels, height, width
        if classes:
            of_classes.append(_base_of_classes(tensors, f"q0.{level}.", latents, classes))
        elif level > 0:
            priors.append(_prior(tensors, f"q0.{level}.", latents))
    coupling = "sigmoid" if affine else "additive"
    offset = 0.0 if dequantization.transform == "logit" else 0.5
    if classes:
        mean, log_scale = (torch.cat(each, dim=1) for each in zip(*of_classes, strict=True))
        return Glow(
            tensors.where,
            steps,
            None,
            None,
            coupling,
            offset=offset,
            classes=(mean, log_scale),
            class_prior="all",
        )
    mean, log_scale = _base(tensors, "q0.0.", latents)
    return Glow(tensors.where, steps, priors, (-mean, -log_scale), coupling, offset=offset)


def _step(tensors: Tensors, name: str, channels: int, affine: bool, in_net: bool) -> Step:
    shift, log_scale = _actnorm(tensors, f"{name}2.", channels)
    half, net = channels // 2, f"{name}0.flows.1.param_map.net."
    hidden = tensors.side(f"{net}0.weight")
    outputs = channels if affine else half
    sizes = [(half, hidden, 3), (hidden, hidden, 1), (hidden, outputs, 3)]
    filters: list[Filters] = []
    for number, (inputs, outputs, side) in enumerate(sizes):
        place = number * (3 if in_net else 2)
        weight = tensors.take(f"{net}{place}.weight", outputs, inputs, side, side)
        if in_net and number < 2:
            bias, log_gain = _actnorm(tensors, f"{net}{place + 1}.actNorm.", outputs)
            # Here it is applied as `x exp(s) + t`, the inverse of the one in the flow.
            filters.append((weight * (-log_gain).exp()[:, None, None, None], -bias))
        else:
            filters.append((weight, tensors.take(f"{net}{place}.bias", outputs)))
    last = filters.pop()
    # From data to latents it subtracts the shift.
    sign = torch.ones_like(last[1])
    sign[:: 2 if affine else 1] = -1
    last = scaled(last, sign)
    if affine:
        last = sigmoid_parameters(last, slice(0, None, 2), slice(1, None, 2))
    weight = _mixing(tensors, f"{name}1.", channels)
    return Step(shift, weight * log_scale.exp(), [*filters, last])


def _actnorm(tensors: Tensors, name: str, channels: int) -> tuple[Tensor, Tensor]:
    """Shift and log-scale of an ActNorm from data to latents, `(x + shift) exp(log_scale)`."""
    tensors.require_set(f"{name}data_dep_init_done")
    log_scale, shift = (tensors.take(f"{name}{each}", 1, channels, 1, 1) for each in ("s", "t"))
    return -shift.flatten(), -log_scale.flatten()


def _mixing(tensors: Tensors, name: str, channels: int) -> Tensor:
    """The matrix of a 1x1 convolution, from its LU factors if it has them."""
    if f"{name}W" in tensors:
        return tensors.take(f"{name}W", channels, channels)
    tensors.drop(f"{name}eye")
    return of_lu(tensors, name, channels, ("P", "L", "U"), ("sign_S", "log_S"))


def _base(tensors: Tensors, name: str, shape: Shape) -> tuple[Tensor, Tensor]:
    """Mean and log-scale of a base, `(C, 1, 1)`, or `(C, H, W)` of a trained `DiagGaussian`."""
    channels = shape[0]
    if f"{name}loc_cc" in tensors:
        raise UserError(
            f"{tensors.where}: {name}loc_cc is of a GlowBase that depends on the class; only "
            f"ClassCondDiagGaussian may"
        )
    if f"{name}loc_logs" in tensors:
        mean, log_scale = (
            tensors.take(f"{name}{each}", 1, channels, 1, 1)[0]
            * (3 * tensors.take(f"{name}{each}_logs", 1, channels, 1, 1)[0]).exp()
            for each in ("loc", "log_scale")
        )
        return mean, log_scale
    mean, log_scale = (tensors.take(f"{name}{each}", 1, *shape)[0] for each in ("loc", "log_scale"))
    first = mean[:, :1, :1], log_scale[:, :1, :1]
    if (mean == first[0]).all() and (log_scale == first[1]).all():
        return first  # not trainable, for example
    return mean, log_scale


def _base_of_classes(
    tensors: Tensors, name: str, shape: Shape, classes: int
) -> tuple[Tensor, Tensor]:
    """Means and log-scales of a `ClassCondDiagGaussian`, `(K, C H W)`."""
    mean, log_scale = (
        tensors.take(f"{name}{each}", *shape, classes).movedim(-1, 0).flatten(1)
        for each in ("loc", "log_scale")
    )
    return mean, log_scale


def _prior(tensors: Tensors, name: str, shape: Shape) -> Filters:
    """The prior of a half that leaves, which does not depend on the other half."""
    mean, log_scale = _base(tensors, name, shape)
    if mean.shape[1:] != (1, 1):
        raise UserError(
            f"{tensors.where}: {name}loc is a mean for each entry; only the coarsest level may "
            f"have it, others one for each channel"
        )
    channels = shape[0]
    bias = -torch.cat([mean, log_scale]).flatten()
    return bias.new_zeros(2 * channels, channels, 3, 3), bias

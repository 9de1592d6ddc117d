"""rosinality/glow-pytorch: the `Glow` of its `model.py`, saved by its `train.py`."""

from torch import Tensor
from torch.nn import functional as F

from flowtrain.config import Dequantization
from flowtrain.models.base import check_squeezes
from flowtrain.tools.weights.glow import Filters, Glow, Step, of_lu, scaled, sigmoid_parameters
from flowtrain.tools.weights.tensors import Tensors
from flowtrain.types import Shape


def read(tensors: Tensors, shape: Shape, dequantization: Dequantization) -> Glow:
    """Its images are flowtrain's, centred."""
    levels = tensors.count("blocks.")
    check_squeezes(shape, levels, levels)
    channels, height, width = shape
    last = tensors.side("blocks.0.flows.0.coupling.net.4.conv.weight")
    affine = last == 4 * channels
    steps, priors = [], []
    for level in range(levels):
        channels, height, width = 4 * channels, height // 2, width // 2
        block = f"blocks.{level}."
        numbers = range(tensors.count(f"{block}flows."))
        steps.append([_step(tensors, f"{block}flows.{i}.", channels, affine) for i in numbers])
        if level + 1 < levels:
            channels //= 2
        # The latent of N(mean, exp(log_scale)) is (x - mean) exp(-log_scale).
        weight, bias = _zero_convolution(tensors, f"{block}prior.", channels, 2 * channels)
        priors.append((-weight, -bias))
    # The prior of the last level is the same convolution, of zeros that are padded with ones.
    weight, bias = priors.pop()
    ones = F.pad(weight.new_zeros(1, channels, height, width), 4 * [1], value=1.0)
    shift, log_scale = F.conv2d(ones, weight, bias)[0].chunk(2)
    coupling = "sigmoid" if affine else "additive"
    return Glow(tensors.where, steps, priors, (shift, log_scale), coupling, padding="ones")


def _step(tensors: Tensors, name: str, channels: int, affine: bool) -> Step:
    shift, scale = (
        tensors.take(f"{name}actnorm.{each}", 1, channels, 1, 1).flatten()
        for each in ("loc", "scale")
    )
    tensors.require_set(f"{name}actnorm.initialized")
    half, net = channels // 2, f"{name}coupling.net."
    hidden = tensors.side(f"{net}0.weight")
    outputs = channels if affine else half
    last = _zero_convolution(tensors, f"{net}4.", hidden, outputs)
    if affine:
        last = sigmoid_parameters(last, slice(half, None), slice(half))
    first = _convolution(tensors, f"{net}0.", half, hidden, 3)
    second = _convolution(tensors, f"{net}2.", hidden, hidden, 1)
    weight = _mixing(tensors, f"{name}invconv.", channels)
    return Step(shift, weight * scale, [first, second, last])


def _mixing(tensors: Tensors, name: str, channels: int) -> Tensor:
    """The matrix of a 1x1 convolution, from its LU factors if it has them."""
    if f"{name}weight" in tensors:
        return tensors.take(f"{name}weight", channels, channels, 1, 1)[:, :, 0, 0]
    tensors.drop(f"{name}l_mask", f"{name}u_mask", f"{name}l_eye")
    return of_lu(tensors, name, channels, ("w_p", "w_l", "w_u"), ("s_sign", "w_s"))


def _convolution(tensors: Tensors, name: str, inputs: int, outputs: int, size: int) -> Filters:
    weight = tensors.take(f"{name}weight", outputs, inputs, size, size)
    return weight, tensors.take(f"{name}bias", outputs)


def _zero_convolution(tensors: Tensors, name: str, inputs: int, outputs: int) -> Filters:
    gain = (3 * tensors.take(f"{name}scale", 1, outputs, 1, 1).flatten()).exp()
    return scaled(_convolution(tensors, f"{name}conv.", inputs, outputs, 3), gain)

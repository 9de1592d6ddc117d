"""Affine transforms of entries, with the scales of several papers and programs."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flowtrain.bijections.base import Transform


def log_scale_gate(raw: Tensor, limit: float) -> Tensor:
    """The sigmoid from which `gated_log_scale` computes `limit * tanh(raw / limit)`.

    On a CPU it is six times as fast as tanh.
    """
    return torch.sigmoid(raw * (2 / limit))


def gated_log_scale(gate: Tensor, limit: float) -> Tensor:
    """`limit * tanh(raw / limit)` from the gate of `raw`."""
    return gate * (2 * limit) - limit


class Affine(Transform):
    """`z = (x + shift) * exp(log_scale)`. The parameters are the shifts, then raw numbers."""

    parameters_per_entry = 2

    def log_scale(self, raw: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = parameters.chunk(2, dim=1)
        log_scale = self.log_scale(raw)
        return (x + shift) * log_scale.exp(), log_scale

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = parameters.chunk(2, dim=1)
        log_scale = self.log_scale(raw)
        return z * (-log_scale).exp() - shift, -log_scale


class AffineTransform(Affine):
    """A log-scale of `limit * tanh(raw / limit)`, so neither direction can overflow (RealNVP, eq.
    4, shifted first).
    """

    def __init__(self, limit: float = 2.0):
        super().__init__()
        self.limit = limit

    def log_scale(self, raw: Tensor) -> Tensor:
        return gated_log_scale(log_scale_gate(raw, self.limit), self.limit)

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        results: tuple[Tensor, Tensor] = _BoundedAffine.apply(x, parameters, self.limit)
        return results


class _BoundedAffine(torch.autograd.Function):
    """`AffineTransform`, whose gradient takes half the operations and tensors of autograd's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        shift, raw = parameters.chunk(2, dim=1)
        gate = log_scale_gate(raw, limit)
        log_scale = gated_log_scale(gate, limit)
        scale = log_scale.exp()
        z = (x + shift).mul_(scale)
        ctx.save_for_backward(gate, scale, z)
        return z, log_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log_scale: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, scale, z = ctx.saved_tensors
        grad_x = grad_z * scale  # also the gradient of the shift
        # d log_scale / d raw is 4 gate (1 - gate), and d z / d log_scale is z itself.
        grad_raw = torch.ops.aten.sigmoid_backward(
            torch.addcmul(grad_log_scale, grad_z, z), gate
        ).mul_(4)
        return grad_x, torch.cat([grad_x, grad_raw], dim=1), None


class ExponentialTransform(Affine):
    """A scale of `exp(raw)`, which may overflow (TarFlow, eq. 4, where the signs are opposite)."""

    def log_scale(self, raw: Tensor) -> Tensor:
        return raw


class SigmoidTransform(Affine):
    """A scale of `2 sigmoid(raw)`, at most 2, without a lower bound (Jet, section 3)."""

    def log_scale(self, raw: Tensor) -> Tensor:
        return F.logsigmoid(raw) + math.log(2)


class TanhTransform(Affine):
    """A scale of `exp(limit * tanh(raw))`, with a learned limit for each of the `entries` along
    dimension 1 (as in the released code of RealNVP, Dinh et al. 2017). It starts at 1.
    """

    def __init__(self, entries: int):
        super().__init__()
        self.limit = nn.Parameter(torch.ones(entries))

    def log_scale(self, raw: Tensor) -> Tensor:
        return self.limit.view(-1, *[1] * (raw.ndim - 2)) * raw.tanh()


class AdditiveTransform(Transform):
    """`z = x + shift` (NICE, eq. 8): volume preserving."""

    parameters_per_entry = 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + parameters, torch.zeros_like(x)

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return z - parameters, torch.zeros_like(z)

"""Affine transforms of entries, with the scales of other papers and programs."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.base import Transform


class UnboundedAffine(Transform):
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


class ExponentialTransform(UnboundedAffine):
    """A scale of `exp(raw)`, which may overflow (TarFlow, eq. 4, where the signs are opposite)."""

    def log_scale(self, raw: Tensor) -> Tensor:
        return raw


class SigmoidTransform(UnboundedAffine):
    """A scale of `2 sigmoid(raw)`, at most 2, without a lower bound (Jet, section 3)."""

    def log_scale(self, raw: Tensor) -> Tensor:
        return F.logsigmoid(raw) + math.log(2)


class TanhTransform(UnboundedAffine):
    """A scale of `exp(limit * tanh(raw))`, with a learned limit for each of the `entries` along
    dimension 1 (as in the released code of RealNVP, Dinh et al. 2017). It starts at 1.
    """

    def __init__(self, entries: int):
        super().__init__()
        self.limit = nn.Parameter(torch.ones(entries))

    def log_scale(self, raw: Tensor) -> Tensor:
        return self.limit.view(-1, *[1] * (raw.ndim - 2)) * raw.tanh()

"""Affine transforms of entries as in the papers of TarFlow and Jet, without two-sided bounds."""

import math

from torch import Tensor
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

"""Coupling layers (Dinh et al. 2015, 2017): one part of the input is transformed as the other part says."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, bounded, sum_per_example


class AffineTransform(nn.Module):
    """`z = (x + shift) * exp(log_scale)`, `log_scale = limit * tanh(h / limit)` (RealNVP, eq. 4, shifted first).

    Takes `2 C` parameters for C entries. Bounded both ways: one layer scales by at most `exp(limit)`, so that neither
    direction can overflow.
    """

    parameters_per_entry = 2

    def __init__(self, limit: float = 2.0):
        super().__init__()
        self.limit = limit

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = parameters.chunk(2, dim=1)
        return shift, bounded(raw, self.limit)

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, C, ...)`, `(B, 2C, ...)` to the transformed entries and their log-derivatives, both `(B, C, ...)`."""
        shift, log_scale = self._split(parameters)
        return (x + shift) * log_scale.exp(), log_scale

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._split(parameters)
        return z * (-log_scale).exp() - shift, -log_scale


class AdditiveTransform(nn.Module):
    """`z = x + shift` (NICE, eq. 8): volume preserving."""

    parameters_per_entry = 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + parameters, torch.zeros_like(x)

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return z - parameters, torch.zeros_like(z)


class _ConditionedTransform(Bijection):
    """What couplings share: the same split and conditioner in both directions, only the transform differs."""

    def __init__(self, conditioner: nn.Module, transform: nn.Module):
        super().__init__()
        self.conditioner = conditioner
        self.transform = transform

    def _couple(self, x: Tensor, context: Tensor | None, transform: Callable) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._couple(x, context, self.transform)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._couple(z, context, self.transform.inverse)  # type: ignore[arg-type]


class Coupling(_ConditionedTransform):
    """Splits dimension 1 in two; the first `kept` entries pass through and condition the transform of the rest.

    With `swap` the last `kept` entries are the ones that pass. The log-determinant is the sum of the transform's
    log-derivatives (RealNVP, eq. 6). The learned prior of a factored-out half is this same layer with the
    half that goes on as `kept` (see `Multiscale`).
    """

    def __init__(self, kept: int, conditioner: nn.Module, transform: nn.Module, swap: bool = False):
        super().__init__(conditioner, transform)
        self.kept = kept
        self.swap = swap

    def _couple(self, x: Tensor, context: Tensor | None, transform: Callable) -> tuple[Tensor, Tensor]:
        if self.swap:
            changed, kept = x.split([x.shape[1] - self.kept, self.kept], dim=1)
        else:
            kept, changed = x.split([self.kept, x.shape[1] - self.kept], dim=1)
        parameters = self.conditioner(kept, context).to(x.dtype)
        changed, log_derivative = transform(changed, parameters)
        parts = (changed, kept) if self.swap else (kept, changed)
        return torch.cat(parts, dim=1), sum_per_example(log_derivative)


class CheckerboardCoupling(_ConditionedTransform):
    """Keeps the pixels of one colour of a checkerboard and transforms the others (RealNVP, section 3.4, eq. 9).

    `parity` 0 keeps the pixels whose row and column add up to an even number. The conditioner sees the image with
    the other pixels at zero.
    """

    keep: Tensor

    def __init__(self, size: tuple[int, int], conditioner: nn.Module, transform: nn.Module, parity: int = 0):
        super().__init__(conditioner, transform)
        rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])[None, :]
        self.register_buffer("keep", (rows + columns) % 2 == parity)  # (H, W)

    def _couple(self, x: Tensor, context: Tensor | None, transform: Callable) -> tuple[Tensor, Tensor]:
        parameters = self.conditioner(x * self.keep, context).to(x.dtype)
        changed, log_derivative = transform(x, parameters)
        return torch.where(self.keep, x, changed), sum_per_example(log_derivative * ~self.keep)

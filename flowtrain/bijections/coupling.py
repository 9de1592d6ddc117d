"""Coupling layers (Dinh et al. 2015, 2017): one part of the input is transformed as the other part
says.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowtrain.bijections.base import Bijection, Transform, sum_per_example
from flowtrain.bijections.precision import conditioner_output


class AffineTransform(Transform):
    """`z = (x + shift) * exp(log_scale)`, `log_scale = limit * tanh(h / limit)` (RealNVP, eq. 4,
    shifted first).

    Takes `2 C` parameters for C entries. Bounded both ways: one layer scales by at most
    `exp(limit)`, so that neither direction can overflow.
    """

    parameters_per_entry = 2

    def __init__(self, limit: float = 2.0):
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return _Affine.apply(x, parameters, self.limit)

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = parameters.chunk(2, dim=1)
        log_scale = gated_log_scale(log_scale_gate(raw, self.limit), self.limit)
        return z * (-log_scale).exp() - shift, -log_scale


def log_scale_gate(raw: Tensor, limit: float) -> Tensor:
    return torch.sigmoid(raw * (2 / limit))


def gated_log_scale(gate: Tensor, limit: float) -> Tensor:
    """`limit * tanh(raw / limit)`, by the sigmoid, which is six times as fast as tanh on a CPU."""
    return gate * (2 * limit) - limit


class _Affine(torch.autograd.Function):
    """The affine transform with a gradient of half as many operations and tensors as autograd's."""

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
        grad_x = grad_z * scale  # of the shift too
        # d log_scale / d raw = 4 gate (1 - gate); z itself is d z / d log_scale.
        grad_raw = torch.ops.aten.sigmoid_backward(
            torch.addcmul(grad_log_scale, grad_z, z), gate
        ).mul_(4)
        return grad_x, torch.cat([grad_x, grad_raw], dim=1), None


class AdditiveTransform(Transform):
    """`z = x + shift` (NICE, eq. 8): volume preserving."""

    parameters_per_entry = 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + parameters, torch.zeros_like(x)

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return z - parameters, torch.zeros_like(z)


class _ConditionedTransform(Bijection):
    """What couplings share: the same split and conditioner in both directions, only the transform
    differs.
    """

    def __init__(self, conditioner: nn.Module, transform: Transform):
        super().__init__()
        self.conditioner = conditioner
        self.transform = transform

    def _kept(self, x: Tensor) -> Tensor:
        """What the conditioner sees of `x`: it is the same of the output."""
        raise NotImplementedError

    def _transformed(
        self, x: Tensor, parameters: Tensor, transform: Callable
    ) -> tuple[Tensor, Tensor]:
        """`x` with the rest transformed, and the log-determinant."""
        raise NotImplementedError

    def _predicted(self, x: Tensor, context: Tensor | None) -> Tensor:
        # The transform and all else of the data path are in the precision of `x`, whatever the
        # conditioner's.
        return conditioner_output(self.conditioner(self._kept(x), context), x.dtype)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._transformed(x, self._predicted(x, context), self.transform)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._transformed(z, self._predicted(z, context), self.transform.inverse)

    def reconstruct(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = z.detach().clone().requires_grad_()
        parameters = self._predicted(x, context)  # once for both directions
        with torch.no_grad():
            # Not seen by autograd, and rightly: the kept part, all that the conditioner has read,
            # stays as it is.
            x.data = self._transformed(z, parameters, self.transform.inverse)[0]
        return x, *self._transformed(x, parameters, self.transform)


class Coupling(_ConditionedTransform):
    """Splits dimension 1 in two; the first `kept` entries pass through and condition the transform
    of the rest.

    With `swap` the last `kept` entries are the ones that pass. The log-determinant is the sum of
    the transform's log-derivatives (RealNVP, eq. 6). The learned prior of a factored-out half is
    this same layer with the half that goes on as `kept` (see `Multiscale`).
    """

    def __init__(self, kept: int, conditioner: nn.Module, transform: Transform, swap: bool = False):
        super().__init__(conditioner, transform)
        self.kept = kept
        self.swap = swap

    def _kept(self, x: Tensor) -> Tensor:
        return x[:, -self.kept :] if self.swap else x[:, : self.kept]

    def _transformed(
        self, x: Tensor, parameters: Tensor, transform: Callable
    ) -> tuple[Tensor, Tensor]:
        if self.swap:
            changed, kept = x.split([x.shape[1] - self.kept, self.kept], dim=1)
        else:
            kept, changed = x.split([self.kept, x.shape[1] - self.kept], dim=1)
        changed, log_derivative = transform(changed, parameters)
        parts = (changed, kept) if self.swap else (kept, changed)
        return torch.cat(parts, dim=1), sum_per_example(log_derivative)


class CheckerboardCoupling(_ConditionedTransform):
    """Keeps the pixels of one colour of a checkerboard and transforms the others (RealNVP, section
    3.4, eq. 9).

    `parity` 0 keeps the pixels whose row and column add up to an even number. The conditioner sees
    the image with the other pixels at zero.
    """

    keep: Tensor

    def __init__(
        self, size: tuple[int, int], conditioner: nn.Module, transform: Transform, parity: int = 0
    ):
        super().__init__(conditioner, transform)
        rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])[None, :]
        self.register_buffer("keep", (rows + columns) % 2 == parity)  # (H, W)

    def of_changed(self, values: Tensor) -> Tensor:
        """Those of `(..., H, W)` at the pixels that it changes. (The transform is computed for all
        of them.)
        """
        return values[..., ~self.keep]

    def _kept(self, x: Tensor) -> Tensor:
        return x * self.keep

    def _transformed(
        self, x: Tensor, parameters: Tensor, transform: Callable
    ) -> tuple[Tensor, Tensor]:
        changed, log_derivative = transform(x, parameters)
        return torch.where(self.keep, x, changed), sum_per_example(log_derivative * ~self.keep)

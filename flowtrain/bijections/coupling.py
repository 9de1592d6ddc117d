"""Coupling layers (Dinh et al. 2015, 2017): one part of the input decides how the rest changes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowtrain.bijections.base import Bijection, Direction, Transform, sum_per_example
from flowtrain.bijections.context import Context, unguided
from flowtrain.bijections.precision import apply_conditioner, into_conditioner

# A transform, or its inverse: entries and parameters to entries and log-derivatives.
Elementwise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class AffineTransform(Transform):
    """`z = (x + shift) * exp(log_scale)` (RealNVP, eq. 4, shifted first).

    `log_scale = limit * tanh(h / limit)`, so neither direction can overflow. The parameters are the
    shifts, then the h.
    """

    parameters_per_entry = 2

    def __init__(self, limit: float = 2.0):
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        results: tuple[Tensor, Tensor] = _Affine.apply(x, parameters, self.limit)
        return results

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = parameters.chunk(2, dim=1)
        log_scale = gated_log_scale(log_scale_gate(raw, self.limit), self.limit)
        return z * (-log_scale).exp() - shift, -log_scale


def log_scale_gate(raw: Tensor, limit: float) -> Tensor:
    """The sigmoid from which `gated_log_scale` computes `limit * tanh(raw / limit)`.

    On a CPU it is six times as fast as tanh.
    """
    return torch.sigmoid(raw * (2 / limit))


def gated_log_scale(gate: Tensor, limit: float) -> Tensor:
    """`limit * tanh(raw / limit)` from the gate of `raw`."""
    return gate * (2 * limit) - limit


class _Affine(torch.autograd.Function):
    """The affine transform, whose gradient takes half the operations and tensors of autograd's."""

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


class AdditiveTransform(Transform):
    """`z = x + shift` (NICE, eq. 8): volume preserving."""

    parameters_per_entry = 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + parameters, torch.zeros_like(x)

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return z - parameters, torch.zeros_like(z)


class _ConditionedTransform(Bijection):
    """The part that couplings share: both directions have the same split and conditioner."""

    has_network = True

    def __init__(self, conditioner: nn.Module, transform: Transform):
        super().__init__()
        self.conditioner = conditioner
        self.transform = transform

    def untraceable_directions(self) -> list[Direction]:
        return ["inverse"] if self.transform.inverse_is_untraceable else []

    def _kept(self, x: Tensor) -> Tensor:
        """The part of `x`, and of the output, that the conditioner sees."""
        raise NotImplementedError

    def _transformed(
        self, x: Tensor, parameters: Tensor, transform: Elementwise
    ) -> tuple[Tensor, Tensor]:
        """`x` with all but the kept part transformed, and log-derivatives without the kept part."""
        raise NotImplementedError

    def predict(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The parameters of the transform, predicted from the layer's input or its output."""
        return apply_conditioner(self.conditioner, self._kept(x), context)

    def initialize(self, x: Tensor, context: Context | None = None) -> None:
        if (initialize := getattr(self.conditioner, "initialize", None)) is not None:
            plain = unguided(context)
            inside = None if plain is None else into_conditioner(plain)
            initialize(into_conditioner(self._kept(x)), inside)

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._with(x, self.predict(x, context), self.transform)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self._with(z, self.predict(z, context), self.transform.inverse)

    def _with(self, x: Tensor, parameters: Tensor, transform: Elementwise) -> tuple[Tensor, Tensor]:
        z, log_derivative = self._transformed(x, parameters, transform)
        return z, sum_per_example(log_derivative)

    def reconstruct(
        self, z: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = self.predict(z, context)  # once for both directions: z and x keep the same
        with torch.no_grad():
            x = self._transformed(z, parameters, self.transform.inverse)[0]
        x.requires_grad_()
        return x, *self._with(x, parameters, self.transform)

    def by_entry(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """`z`, and the log-derivatives of its entries."""
        return self._transformed(x, self.predict(x, context), self.transform)


class Coupling(_ConditionedTransform):
    """Keeps the first `kept` entries of dimension 1, and transforms the rest given them.

    With `swap` it keeps the last `kept` entries. See RealNVP, eq. 6. The learned prior of a
    factored-out half is this same layer: it keeps the half that goes on (see `Multiscale`).
    """

    def __init__(self, kept: int, conditioner: nn.Module, transform: Transform, swap: bool = False):
        super().__init__(conditioner, transform)
        self.kept = kept
        self.swap = swap

    def _kept(self, x: Tensor) -> Tensor:
        return x[:, -self.kept :] if self.swap else x[:, : self.kept]

    def _transformed(
        self, x: Tensor, parameters: Tensor, transform: Elementwise
    ) -> tuple[Tensor, Tensor]:
        if self.swap:
            changed, kept = x.split([x.shape[1] - self.kept, self.kept], dim=1)
        else:
            kept, changed = x.split([self.kept, x.shape[1] - self.kept], dim=1)
        changed, log_derivative = transform(changed, parameters)
        parts = (changed, kept) if self.swap else (kept, changed)
        return torch.cat(parts, dim=1), log_derivative


class CheckerboardCoupling(_ConditionedTransform):
    """Keeps the pixels of one colour of a checkerboard, and transforms the others given them.

    See RealNVP, section 3.4, eq. 9. `parity` 0 keeps the pixels whose row and column add up to an
    even number. The conditioner sees the image with the other pixels at zero.
    """

    keep: Tensor

    def __init__(
        self, size: tuple[int, int], conditioner: nn.Module, transform: Transform, parity: int = 0
    ):
        super().__init__(conditioner, transform)
        rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])[None, :]
        self.register_buffer("keep", (rows + columns) % 2 == parity)  # (H, W)

    def _kept(self, x: Tensor) -> Tensor:
        return x * self.keep

    def _transformed(
        self, x: Tensor, parameters: Tensor, transform: Elementwise
    ) -> tuple[Tensor, Tensor]:
        changed, log_derivative = transform(x, parameters)
        return torch.where(self.keep, x, changed), log_derivative * ~self.keep

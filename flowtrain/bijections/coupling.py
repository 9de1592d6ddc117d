"""Coupling layers (Dinh et al. 2015, 2017): one part of the input decides how the rest changes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Direction, Transform, sum_per_example
from flowtrain.bijections.context import Context, unguided
from flowtrain.bijections.precision import apply_conditioner, into_conditioner

# A transform, or its inverse: entries and parameters to entries and log-derivatives.
Elementwise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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

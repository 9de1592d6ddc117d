"""How the layers of a flow are called: fused, one by one, watched or recomputed.

A bijection made of others (`Container`) hands them to an executor. Code that watches, initializes
or recomputes layers passes another one to `Flow.forward` or `Bijection.run`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from flowtrain.bijections.base import Bijection, Direction, Executor
from flowtrain.bijections.context import Context
from flowtrain.bijections.fused import fuse
from flowtrain.errors import UserError

# Calls a layer in a direction on an input and a context, as `call` does.
Call = Callable[[Bijection, Direction, Tensor, Context | None], tuple[Tensor, Tensor]]


def call(
    layer: Bijection, direction: Direction, x: Tensor, context: Context | None = None
) -> tuple[Tensor, Tensor]:
    return layer(x, context) if direction == "forward" else layer.inverse(x, context)


def opposite(direction: Direction) -> Direction:
    return "inverse" if direction == "forward" else "forward"


class LayerByLayer:
    """Calls layers one after the other. Subclasses that watch layers override `call`."""

    call: Call = staticmethod(call)

    def prepared(self, layers: Sequence[Bijection], direction: Direction) -> Sequence[Bijection]:
        """The layers that a chain calls in place of `layers`."""
        return layers

    def chain(
        self, layers: Sequence[Bijection], direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        called = self.prepared(layers, direction)
        total = x.new_zeros(x.shape[0])
        for layer in called if direction == "forward" else reversed(called):
            if isinstance(layer, Container):
                x, log_det = layer.run(self, direction, x, context)
            else:
                x, log_det = self.call(layer, direction, x, context)
            total = total + log_det
        return x, total


class Fused(LayerByLayer):
    """Calls layers with neighbours fused where that is faster (`fuse`)."""

    def prepared(self, layers: Sequence[Bijection], direction: Direction) -> Sequence[Bijection]:
        return fuse(layers, direction)


FUSED = Fused()


class Initializing(LayerByLayer):
    """Lets each layer set itself from its actual input just before it is called."""

    def call(
        self, layer: Bijection, direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        if direction == "forward":
            layer.initialize(x, context)
        result, log_det = call(layer, direction, x, context)
        if torch.as_tensor(log_det).shape not in ((), (len(x),)):  # would be broadcast to (B, B)
            raise UserError(
                f"{type(layer).__name__}: its log-determinants have shape {tuple(log_det.shape)}, "
                f"expected ({len(x)},)"
            )
        return result, log_det


class Container(Bijection):
    """A bijection made of others. A subclass defines `inner_layers`, and `run` both ways."""

    def inner_layers(self) -> Iterable[Bijection]:
        raise NotImplementedError

    def run(
        self, executor: Executor, direction: Direction, x: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.run(FUSED, "forward", x, context)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.run(FUSED, "inverse", z, context)

    def untraceable_directions(self) -> list[Direction]:
        found = [layer.untraceable_directions() for layer in self.inner_layers()]
        return sorted({direction for directions in found for direction in directions})

    @property
    def inverse_is_sequential(self) -> bool:  # type: ignore[override]
        return any(layer.inverse_is_sequential for layer in self.inner_layers())

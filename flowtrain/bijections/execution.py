"""How the layers of a flow are called: fused, one by one, watched or recomputed.

A bijection that is made of others (`Container`) calls none of them itself. It hands them to an
executor. Code that watches, initializes or recomputes layers passes another executor to
`Flow.forward` or to `Bijection.run`.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from flowtrain.bijections.base import Bijection, Direction, Executor
from flowtrain.bijections.context import Context
from flowtrain.bijections.fused import fuse

# Calls a layer in a direction on an input and a context, as `call` does.
Call = Callable[[Bijection, Direction, Tensor, Context | None], tuple[Tensor, Tensor]]


def call(
    layer: Bijection, direction: Direction, x: Tensor, context: Context | None = None
) -> tuple[Tensor, Tensor]:
    """The layer's `forward` or `inverse`."""
    return layer(x, context) if direction == "forward" else layer.inverse(x, context)


def opposite(direction: Direction) -> Direction:
    return "inverse" if direction == "forward" else "forward"


class LayerByLayer:
    """Calls layers one after the other, each by itself. Subclasses that watch layers override
    `call`.
    """

    call: Call = staticmethod(call)  # for a single layer

    def prepared(self, layers: Sequence[Bijection], direction: Direction) -> Sequence[Bijection]:
        """The layers that a chain calls in place of `layers`."""
        return layers

    def chain(
        self, layers: Sequence[Bijection], direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        """Calls layers, listed from data to latents, and adds up their log-determinants."""
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


class Retracing(Fused):
    """Computes latents from which `inverse` gives exactly the data back (`Bijection.retrace`).

    A layer that takes long calls `note` with the share that is done of it.
    """

    def __init__(self, note: Callable[[float], None] = lambda share: None):
        super().__init__()
        self.note = note

    def call(
        self, layer: Bijection, direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        if direction == "forward":
            return layer.retrace(x, context, self.note)
        return layer.inverse(x, context)


class ByPlace(LayerByLayer):
    """Adds up the log-determinants of each place (`Bijection.forward_by_place`).

    Attributes:
        places: Sums over the layers at each size `(H, W)`, `(B, H, W)` in nats.
        without: The names of layers whose log-determinant has no places. If there are any, `places`
            do not have everything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[tuple[int, int], Tensor] = {}
        self.without: set[str] = set()

    def call(
        self, layer: Bijection, direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        result = layer.forward_by_place(x, context) if direction == "forward" else None
        if result is None:
            self.without.add(type(layer).__name__)
            return call(layer, direction, x, context)
        z, by_place = result
        size = (by_place.shape[1], by_place.shape[2])
        self.places[size] = self.places[size] + by_place if size in self.places else by_place
        return z, by_place.sum(dim=(1, 2))


class Initializing(LayerByLayer):
    """Lets each layer set itself from its actual input just before it is called."""

    def call(
        self, layer: Bijection, direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        if direction == "forward":
            layer.initialize(x, context)
        return call(layer, direction, x, context)


class Noting(Fused):
    """Calls `note` with the share of a pass of inverses that is done.

    Layers whose inverse is sequential take most of the time, so only they count. There are `layers`
    of them, as `sequential_layers` finds.
    """

    def __init__(self, note: Callable[[float], None], layers: int = 1):
        super().__init__()
        self.note, self.layers = note, layers
        self.done = 0  # layers

    def call(
        self, layer: Bijection, direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        if direction == "forward":
            return call(layer, direction, x, context)
        result = self.inverse(
            layer, x, context, lambda share: self.note((self.done + share) / self.layers)
        )
        self.done += layer.inverse_is_sequential
        return result

    def inverse(
        self, layer: Bijection, z: Tensor, context: Context | None, note: Callable[[float], None]
    ) -> tuple[Tensor, Tensor]:
        return layer.inverse_noting(z, context, note)


class Iterating(Noting):
    """Computes the inverse of a layer by fixed-point iteration where the layer has that way."""

    def inverse(
        self, layer: Bijection, z: Tensor, context: Context | None, note: Callable[[float], None]
    ) -> tuple[Tensor, Tensor]:
        return layer.inverse_by_iteration(z, context, note)


class Container(Bijection):
    """A bijection made of others. A subclass defines `parts` and `run`, in both directions."""

    def parts(self) -> Iterable[Bijection]:
        """The bijections that this one is made of."""
        raise NotImplementedError

    def run(
        self, executor: Executor, direction: Direction, x: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.run(FUSED, "forward", x, context)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return self.run(FUSED, "inverse", z, context)

    def loops(self) -> list[Direction]:
        return sorted({direction for part in self.parts() for direction in part.loops()})

    @property
    def inverse_is_sequential(self) -> bool:  # type: ignore[override]
        return any(part.inverse_is_sequential for part in self.parts())

    @property
    def iterates(self) -> bool:  # type: ignore[override]
        return any(part.iterates for part in self.parts())


def sequential_layers(bijection: Bijection) -> int:
    """How many of the layers have a sequential inverse, but at least 1."""
    layers = [module for module in bijection.modules() if isinstance(module, Bijection)]
    single = [layer for layer in layers if not isinstance(layer, Container)]
    return max(1, sum(layer.inverse_is_sequential for layer in single))

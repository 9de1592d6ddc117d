"""Bijections one after the other."""

from collections.abc import Iterable

from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Direction, Executor
from flowtrain.bijections.context import Context
from flowtrain.bijections.execution import Container


class Sequential(Container):
    """Bijections one after the other; their log-determinants are summed up."""

    def __init__(self, *layers: Bijection):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def inner_layers(self) -> Iterable[Bijection]:
        return self.layers  # type: ignore[return-value]

    def opened(self) -> list[Bijection]:
        """The layers, nested sequences opened in their place."""
        layers: list[Bijection] = []
        for layer in self.inner_layers():
            layers += layer.opened() if isinstance(layer, Sequential) else [layer]
        return layers

    def run(
        self, executor: Executor, direction: Direction, x: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        return executor.chain(self.opened(), direction, x, context)

    def latent_dims(self, dims: int) -> int:
        for layer in self.opened():
            dims = layer.latent_dims(dims)
        return dims

    def split_latents(self, z: Tensor) -> list[Tensor]:
        return list(self.inner_layers())[-1].split_latents(z)

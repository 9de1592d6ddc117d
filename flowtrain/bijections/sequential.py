"""Bijections one after the other: the one place where log-determinants are added up."""

from torch import Tensor, nn

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.fused import fuse
from flowtrain.bijections.memory import apply


class Sequential(Bijection):
    """Bijections one after the other; the sum of their log-determinants.

    `train.memory` says what a backward pass keeps of them (see `flowtrain.bijections.memory`).
    """

    def __init__(self, *layers: Bijection):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def _chain(self) -> list[Bijection]:
        """The layers as they are computed: nested sequences opened, neighbours fused."""
        return fuse(list(self._opened()))

    def _opened(self) -> list[Bijection]:
        layers: list[Bijection] = []
        for layer in self.layers:
            # type: ignore[list-item]
            layers += layer._opened() if isinstance(layer, Sequential) else [layer]
        return layers

    @property
    def inverse_is_sequential(self) -> bool:
        return any(layer.inverse_is_sequential for layer in self._opened())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return apply(self._chain(), x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[0])
        for layer in reversed(self._chain()):
            z, log_det = layer.inverse(z, context)
            total = total + log_det
        return z, total

    def stages(self, z: Tensor) -> list[Tensor]:
        stages = [z]
        for layer in reversed(self._opened()):
            stages += layer.stages(stages[-1])[1:]
        return stages

    def latent_dims(self, dims: int) -> int:
        for layer in self._opened():
            dims = layer.latent_dims(dims)
        return dims

    def split_latents(self, z: Tensor) -> list[Tensor]:
        return self.layers[-1].split_latents(z)  # type: ignore[operator]

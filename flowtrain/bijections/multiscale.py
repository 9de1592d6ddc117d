"""The multiscale architecture (RealNVP, section 3.6): half of the entries leave at each level."""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Direction, Executor
from flowtrain.bijections.context import Context
from flowtrain.bijections.execution import Container


class Multiscale(Container):
    """Runs levels in order. After each but the last, half of the channels leave as latents.

    The input of each level after the first is the half that stays. `priors[i]` maps the output of
    level i, keeping its shape, so that the part that leaves, of shape `latent_shapes[i]`, `(C, H,
    W)`, is standard normal. In the last level it is the top prior. In the others it is a coupling:
    the half that stays predicts mean and scale of the half that leaves (Glow's learned split
    prior). The latent is flat, `(B, D)`, level by level, coarsest last.
    """

    def __init__(
        self,
        levels: Sequence[Bijection],
        priors: Sequence[Bijection],
        latent_shapes: Sequence[tuple[int, int, int]],
    ):
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.priors = nn.ModuleList(priors)
        self.latent_shapes = [tuple(shape) for shape in latent_shapes]
        self.sizes = [c * h * w for c, h, w in self.latent_shapes]

    def inner_layers(self) -> Iterable[Bijection]:
        return itertools.chain(self.levels, self.priors)  # type: ignore[arg-type]

    def run(
        self, executor: Executor, direction: Direction, x: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        if direction == "inverse":
            latents = self.split_latents(x)
            x = latents[-1][:, :0]
            levels = zip(reversed(self.steps()), reversed(latents), strict=True)
            for (level, prior), latent in levels:
                x = torch.cat([x, latent], dim=1)
                x, prior_log_det = prior.run(executor, "inverse", x, context)
                x, log_det = level.run(executor, "inverse", x, context)
                total = total + log_det + prior_log_det
            return x, total
        latents = []
        for (level, prior), (channels, _, _) in zip(self.steps(), self.latent_shapes, strict=True):
            x, log_det = level.run(executor, "forward", x, context)
            x, prior_log_det = prior.run(executor, "forward", x, context)
            total = total + log_det + prior_log_det
            x, latent = x.split([x.shape[1] - channels, channels], dim=1)
            latents.append(latent.flatten(1))
        return torch.cat(latents, dim=1), total

    def steps(self) -> list[tuple[Bijection, Bijection]]:
        """Each level with its prior, finest first."""
        return list(zip(self.levels, self.priors, strict=True))  # type: ignore[arg-type]

    def split_latents(self, z: Tensor) -> list[Tensor]:
        parts = z.split(self.sizes, dim=1)
        return [
            part.reshape(-1, *shape) for part, shape in zip(parts, self.latent_shapes, strict=True)
        ]

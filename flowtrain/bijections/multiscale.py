"""The multiscale architecture (RealNVP, section 3.6): after each level half of the entries are
done.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection


class Multiscale(Bijection):
    """Runs levels one after the other; after each but the last, the second half of the channels
    leaves as latent.

    `priors[i]` maps the output of level i so that what leaves is standard normal: a coupling whose
    kept half predicts mean and scale of the half that leaves (Glow's learned split prior), the top
    prior for the last level. The latent is flat, `(B, D)`: level by level, coarsest last.

    Args:
        shape: of one example, `(C, H, W)`.
        levels: bijections; the input of each is the kept half of the one before.
        priors: as many bijections that keep the shape.
        latent_shapes: the shape `(C, H, W)` of each level's latent.
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

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        latents = []
        for level, prior, (channels, _, _) in zip(
            self.levels, self.priors, self.latent_shapes, strict=True
        ):
            x, log_det = level(x, context)
            x, prior_log_det = prior(x, context)
            total = total + log_det + prior_log_det
            x, latent = x.split([x.shape[1] - channels, channels], dim=1)
            latents.append(latent.flatten(1))
        return torch.cat(latents, dim=1), total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[0])
        latents = self.split_latents(z)
        x = latents[-1][:, :0]
        for level, prior, latent in zip(
            reversed(self.levels), reversed(self.priors), reversed(latents), strict=True
        ):
            x = torch.cat([x, latent], dim=1)
            x, prior_log_det = prior.inverse(x, context)  # type: ignore[operator]
            x, log_det = level.inverse(x, context)  # type: ignore[operator]
            total = total + log_det + prior_log_det
        return x, total

    def split_latents(self, z: Tensor) -> list[Tensor]:
        parts = z.split(self.sizes, dim=1)
        return [
            part.reshape(-1, *shape) for part, shape in zip(parts, self.latent_shapes, strict=True)
        ]

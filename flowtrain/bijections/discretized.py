"""Mixtures of discretized logistics (Salimans et al. 2017, "PixelCNN++", eq. 2) as a flow of one
entry.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowtrain.bijections.coupling import gated_log_scale, log_scale_gate

# The log-scales of the components are bounded by limit * tanh(h / limit), relative to the entry's.
LOG_SCALE_LIMIT = 8.0
# The weight of a uniform distribution over all levels in every mixture. No level is then so
# improbable that its share of the latent's range is lost to rounding.
UNIFORM = 2.0**-10
FAR = 1e30  # stands for infinity, where 0 * infinity would not be a number
ROOT_TAU = math.sqrt(2 * math.pi)


class DiscretizedMixture:
    """A distribution over the levels 0..Q-1 as an increasing map of `x + u` to a normal latent.

    With `u` in [0, 1) it is `z = Phi^-1(F(x) + u P(x))`, where F(x) is the probability of the
    levels below x (Nielsen & Winther 2020, section 3). P comes from a mixture of K logistics, whose
    mass in `[x - 1/2, x + 1/2]` belongs to the level x. The mass beyond the first and the last
    level belongs to these. A small uniform part is added.

    Everything is relative to a location and a scale of each entry, both in levels: an entry has
    K logits, K offsets in units of the scale, and K log-scales added to the entry's. The
    parameters have shape `(B, 3 K E, ...)` for entries `(B, E, ...)`.
    """

    def __init__(self, num_bins: int, components: int):
        self.num_bins, self.components = num_bins, components  # Q, K
        self.parameters_per_entry = 3 * components

    def start(self) -> Tensor:
        """Parameters of one entry `(3 K,)` that suit a normal residual of the entry's scale."""
        k = self.components
        spread = torch.arange(k) - (k - 1) / 2
        # Wide and narrow components at one place, because residuals of images have heavy tails.
        log_scales = -1.2 + spread * (2.4 / k)
        return torch.cat([torch.zeros(k), spread * (0.2 / k), log_scales])

    def forward(
        self, x: Tensor, u: Tensor, location: Tensor, log_scale: Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The latents, and their log-derivatives with respect to `x + u`, both `(B, E, ...)`.

        `x` are levels, as real numbers. The derivative is `P(x) / phi(z)`.
        """
        scale = (-log_scale).exp()
        below = ((x - 0.5 - location) * scale).masked_fill(x <= 0, -FAR)
        above = ((x + 0.5 - location) * scale).masked_fill(x >= self.num_bins - 1, FAR)
        results: tuple[Tensor, Tensor] = _Ordinal.apply(
            x, u, below, above, parameters, self.components, self.num_bins
        )
        return results

    def one_entry(self, device: torch.device) -> "OneEntry":
        return OneEntry(self.num_bins, self.components, device)


class OneEntry:
    """Makes the distribution of one entry at a time, for a batch of images.

    Tables have each level's lower edge, and its uniform part of F. The levels come in about sqrt(Q)
    groups. So a level is found from few values of F: of the groups, then of one group.
    """

    def __init__(self, num_bins: int, components: int, device: torch.device):
        self.num_bins, self.components = num_bins, components
        self.group = math.ceil(math.sqrt(num_bins))  # levels in a group; the last may have fewer
        groups = math.ceil(num_bins / self.group)
        x = torch.arange(groups * self.group + 1, device=device).clamp_(max=num_bins)
        self.lower = torch.where(x == num_bins, FAR, x - 0.5).double()
        self.lower[0] = -FAR
        self.uniform = x.double() * (UNIFORM / num_bins)
        self.starts = torch.arange(groups + 1, device=device)[:, None] * self.group
        self.within = torch.arange(self.group + 1, device=device)[:, None]

    def __call__(self, location: Tensor, log_scale: float, parameters: Tensor) -> "Entry":
        """The distribution of an entry with locations `(B,)` and parameters `(3 K, B)`."""
        return Entry(self, location.double(), log_scale, parameters.double())


class Entry:
    """The distribution of one entry in B images, the batch last.

    Double precision tells neighbours apart also where F is close to 1.
    """

    def __init__(self, tables: OneEntry, location: Tensor, log_scale: float, parameters: Tensor):
        self.tables = tables
        weights, offsets, inverse_scales, _ = _split(parameters[None], tables.components)
        self.weights = weights.mul_(1 - UNIFORM)[0, :, 0]  # (K, B)
        self.slope = inverse_scales.mul_(math.exp(-log_scale))[0, :, 0]
        center = torch.add(location, offsets[0, :, 0], alpha=math.exp(log_scale))
        self.shift = center.mul_(self.slope).neg_()

    def cumulative(self, x: Tensor) -> Tensor:
        """F at levels `(N, B)` or `(N, 1)`, the probabilities of the levels below: `(N, B)`."""
        t = torch.addcmul(self.shift, self.tables.lower[x][:, None], self.slope)
        return t.sigmoid_().mul_(self.weights).sum(dim=1).add_(self.tables.uniform[x])

    def groups(self) -> Tensor:
        """F at the first level of each group, and 1: `(G + 1, B)`."""
        return self.cumulative(self.tables.starts)

    def within(self, group: Tensor) -> Tensor:
        """F at each level of a group `(B,)`, and at the first one of the next: `(S + 1, B)`."""
        return self.cumulative(torch.add(self.tables.within, group, alpha=self.tables.group))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The groups of levels `(B,)`, and their places within these."""
        group = x.div(self.tables.group, rounding_mode="floor")
        return group, x - group * self.tables.group

    def join(self, group: Tensor, inner: Tensor) -> Tensor:
        """The inverse of `split`."""
        level = torch.add(inner, group, alpha=self.tables.group)
        # The last group may have too many levels. F is 1 there, but for parameters near infinity.
        return level.clamp_(max=self.tables.num_bins - 1)

    def find(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The levels `(B,)` whose ranges `[F(x), F(x + 1))` have the numbers, and the ranges."""
        target = target.clamp(max=1 - 2**-40)  # F(Q) is 1 with a rounding error
        group = (self.groups()[1:-1] <= target).sum(dim=0)
        edges = self.within(group)
        inner = (edges[1:-1] <= target).sum(dim=0)
        return self.join(group, inner), *_range(edges, inner)

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) and F(x + 1) of levels `(B,)`, by the arithmetic of `find`."""
        group, inner = self.split(x)
        return _range(self.within(group), inner)


def _range(edges: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    return edges.gather(0, inner[None])[0], edges.gather(0, inner[None] + 1)[0]


def _split(parameters: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, offsets, inverse scales, and the gates of the log-scales: `(B, K, E, ...)`."""
    logits, offsets, raw = parameters.unflatten(1, (3, components, -1)).unbind(1)
    gate = log_scale_gate(raw, LOG_SCALE_LIMIT)
    # exp2 is three times as fast as exp on a CPU.
    inverse_scales = gated_log_scale(gate, LOG_SCALE_LIMIT).mul_(-1 / math.log(2)).exp2_()
    return logits.softmax(dim=1), offsets, inverse_scales, gate


class _Ordinal(torch.autograd.Function):
    """The map of `DiscretizedMixture.forward`, with its gradient in few passes.

    Entries above the location are mirrored, so that every sum is about the smaller tail.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor,
        below: Tensor,
        above: Tensor,
        parameters: Tensor,
        components: int,
        num_bins: int,
    ) -> tuple[Tensor, Tensor]:
        weights, offsets, inverse_scales, gate = _split(parameters, components)
        # 1 where an entry is mirrored, else 0. (`where` is slower than `lerp` on a CPU.)
        mirrored = (below + above > 0).to(x.dtype)
        sign = 1 - 2 * mirrored
        share = torch.lerp(u, 1 - u, mirrored)
        count = torch.lerp(x, num_bins - 1 - x, mirrored).add_(share)  # levels in the tail
        slope = inverse_scales.mul_(sign[:, None])
        low = torch.lerp(below, above, mirrored)[:, None].sub(offsets).mul_(slope)
        high = torch.lerp(above, below, mirrored)[:, None].sub(offsets).mul_(slope)
        f_low, f_high = low.sigmoid(), high.sigmoid()
        mass = (weights * (f_high - f_low)).sum(dim=1)
        tail = (weights * f_low).sum(dim=1).addcmul_(share, mass)
        tail = tail.mul_(1 - UNIFORM).add_(count, alpha=UNIFORM / num_bins)
        probability = mass * (1 - UNIFORM) + UNIFORM / num_bins
        z = sign * torch.special.ndtri(tail.clamp_(max=1 - torch.finfo(x.dtype).eps))
        log_derivative = probability.log() + 0.5 * z.square() + math.log(ROOT_TAU)
        ctx.save_for_backward(
            weights, slope, gate, low, high, f_low, f_high, sign, share, probability, z
        )
        return z, log_derivative

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log: Tensor) -> tuple[Tensor | None, ...]:
        weights, slope, gate, low, high, f_low, f_high, sign, share, probability, z = (
            ctx.saved_tensors
        )
        # With respect to z in all, to the tail, and to the mass. Before a normal base the first is
        # zero, because the likelihood does not depend on u.
        total = torch.addcmul(grad_z, grad_log, z)
        over_density = total * (0.5 * z.square()).exp() * ROOT_TAU
        grad_tail = over_density * sign * (1 - UNIFORM)
        grad_mass = grad_log / probability * (1 - UNIFORM)
        grad_high = torch.addcmul(grad_mass, grad_tail, share)[:, None]
        grad_low = (grad_tail - grad_high[:, 0])[:, None]
        at_high, at_low = weights * f_high, weights * f_low
        of_weight = torch.addcmul(at_high * grad_high, at_low, grad_low)  # weight times gradient
        grad_logits = of_weight.addcmul_(weights, of_weight.sum(dim=1, keepdim=True), value=-1)
        at_high = at_high.addcmul_(at_high, f_high, value=-1).mul_(grad_high)
        at_low = at_low.addcmul_(at_low, f_low, value=-1).mul_(grad_low)
        grad_log_scales = (at_high * high).addcmul_(at_low, low).neg_()
        grad_raw = torch.ops.aten.sigmoid_backward(grad_log_scales, gate).mul_(4)
        at_high, at_low = at_high.mul_(slope), at_low.mul_(slope)
        grad_offsets = at_high.add(at_low).neg_()
        grad_parameters = torch.cat([grad_logits, grad_offsets, grad_raw], dim=1).flatten(1, 2)
        to_high, to_low, mirrored = at_high.sum(dim=1), at_low.sum(dim=1), (1 - sign) / 2
        grad_above = torch.lerp(to_high, to_low, mirrored)
        grad_below = torch.lerp(to_low, to_high, mirrored)
        grad_u = over_density * probability
        return None, grad_u, grad_below, grad_above, grad_parameters, None, None

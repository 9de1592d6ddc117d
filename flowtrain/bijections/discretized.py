"""Mixtures of discretized logistics (Salimans et al. 2017, "PixelCNN++", eq. 2) as a flow of one
entry.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowtrain.bijections.affine import gated_log_scale, log_scale_gate

# The log-scales of the components are bounded by limit * tanh(h / limit), relative to the entry's.
LOG_SCALE_LIMIT = 8.0
FAR = 1e30  # stands for infinity, where 0 * infinity would not be a number
TOGETHER = 2**18  # parameters whose gradient is computed at a time on a CPU
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

    def __init__(self, num_bins: int, components: int, uniform: float):
        self.num_bins, self.components, self.uniform = num_bins, components, uniform  # Q, K
        self.parameters_per_entry = 3 * components

    def start(self) -> Tensor:
        """Parameters of one entry `(3 K,)` that suit a normal residual of the entry's scale."""
        k = self.components
        spread = torch.arange(k) - (k - 1) / 2
        # Wide and narrow components at one place, because residuals of images have heavy tails.
        log_scales = -1.2 + spread * (2.4 / k)
        return torch.cat([torch.zeros(k), spread * (0.2 / k), log_scales])

    def log_prob(
        self, x: Tensor, location: Tensor, log_scale: Tensor, parameters: Tensor
    ) -> Tensor:
        """`log P(x)` in nats of levels `x`, real numbers `(B, E, ...)`."""
        scale = (-log_scale).exp()
        center, half = (x - location) * scale, (0.5 * scale).expand_as(x)
        log_prob: Tensor = _LogProb.apply(
            x, center, half, parameters, self.components, self.num_bins, self.uniform
        )
        return log_prob

    def forward(
        self, x: Tensor, u: Tensor, location: Tensor, log_scale: Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The latents, and their log-derivatives with respect to `x + u`, both `(B, E, ...)`.

        `x` are levels, as real numbers. The derivative is `P(x) / phi(z)`.
        """
        log_prob = self.log_prob(x, location, log_scale, parameters)
        weights, offsets, inverse_scales, _ = _split(parameters, self.components)
        # An entry above its location is mirrored, so that the sum is about the smaller tail.
        mirrored = x > location
        sign = torch.where(mirrored, -1.0, 1.0).to(x)
        share = torch.where(mirrored, 1 - u, u)
        beyond = torch.where(mirrored, self.num_bins - 1 - x, x)  # levels in the tail
        edge = ((x - location) * sign - 0.5) * (-log_scale).exp()
        edge = edge.masked_fill(beyond <= 0, -FAR)
        f_edge = ((edge[:, None] - offsets * sign[:, None]) * inverse_scales).sigmoid()
        tail = (weights * f_edge).sum(dim=1) * (1 - self.uniform)
        tail = tail + beyond * (self.uniform / self.num_bins)
        info = torch.finfo(x.dtype)  # shares of 0 and 1 have no finite latents
        tail = (tail + share * log_prob.exp()).clamp(info.tiny, 1 - info.eps)
        z = sign * torch.special.ndtri(tail)
        return z, log_prob + 0.5 * z.square() + math.log(ROOT_TAU)

    def one_entry(self, device: torch.device) -> "OneEntry":
        return OneEntry(self.num_bins, self.components, self.uniform, device)


class OneEntry:
    """Makes the distribution of one entry at a time, for a batch of images.

    Tables have each level's lower edge, and its uniform part of F. The levels come in about sqrt(Q)
    groups. So a level is found from few values of F: of the groups, then of one group.
    """

    def __init__(self, num_bins: int, components: int, uniform: float, device: torch.device):
        self.num_bins, self.components = num_bins, components
        self.group = math.ceil(math.sqrt(num_bins))  # levels in a group; the last may have fewer
        groups = math.ceil(num_bins / self.group)
        x = torch.arange(groups * self.group + 1, device=device).clamp_(max=num_bins)
        self.lower = torch.where(x == num_bins, FAR, x - 0.5).double()
        self.lower[0] = -FAR
        self.of_mixture = 1 - uniform
        self.uniform = x.double() * (uniform / num_bins)
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
        self.weights = weights.mul_(tables.of_mixture)[0, :, 0]  # (K, B)
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


class _LogProb(torch.autograd.Function):
    """`DiscretizedMixture.log_prob`. The forward pass computes the gradient, too, in few passes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        center: Tensor,
        half: Tensor,
        parameters: Tensor,
        components: int,
        num_bins: int,
        uniform: float,
    ) -> Tensor:
        log_prob = torch.empty_like(center)
        wanted = any(ctx.needs_input_grad)
        gradients = [torch.empty_like(each) for each in (center, half, parameters) if wanted]
        # A CPU is fastest if they fit into its cache.
        in_parts = center.device.type == "cpu" and not torch.compiler.is_compiling()
        images = max(1, TOGETHER // parameters[0].numel())
        parts = (
            [slice(i, i + images) for i in range(0, len(x), images)] if in_parts else [slice(None)]
        )
        for part in parts:
            log_prob[part], *results = _log_prob(
                *(x[part], center[part], half[part], parameters[part]),
                *(components, num_bins, uniform, wanted),
            )
            for gradient, result in zip(gradients, results, strict=True):
                gradient[part] = result
        ctx.save_for_backward(*gradients)
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        center, half, parameters = ctx.saved_tensors
        of_parameters = parameters.unflatten(1, (-1, grad.shape[1])) * grad[:, None].to(parameters)
        return None, grad * center, grad * half, of_parameters.flatten(1, 2), None, None, None


def _log_prob(
    x: Tensor,
    center: Tensor,
    half: Tensor,
    parameters: Tensor,
    components: int,
    num_bins: int,
    uniform: float,
    with_gradient: bool,
) -> list[Tensor]:
    """The log-probabilities of levels, and their derivatives with respect to `center`, `half` and
    `parameters`.

    A component has the mass `m = sigmoid(high) - sigmoid(low)` in a level. With `a = sigmoid(high)`
    and `b = sigmoid(-low)` it is `a b (1 - exp(low - high))`, where nothing cancels, and
    `1 - a = b - m`. In the first and the last level an edge is at infinity: a or b is 1.
    """
    first, last = x <= 0, x >= num_bins - 1
    below = (center - half).masked_fill(first, -FAR)[:, None]
    above = (center + half).masked_fill(last, FAR)[:, None]
    width = (-2 * half).masked_fill(first | last, -FAR)[:, None]
    parameters = parameters.contiguous().to(x.dtype)
    weights, offsets, slope, gate = _split(parameters, components)
    low, high = (below - offsets).mul_(slope), (above - offsets).mul_(slope)
    a, b = high.sigmoid(), low.neg().sigmoid_()
    mass = (slope * width).expm1_().neg_().mul_(a).mul_(b)
    probability = (weights * mass).sum(dim=1).mul_(1 - uniform).add_(uniform / num_bins)
    if not with_gradient:
        return [probability.log()]
    relative = weights * ((1 - uniform) / probability)[:, None]
    share = mass * relative
    of_logits = torch.addcmul(share, weights, share.sum(dim=1, keepdim=True), value=-1)
    of_offsets = share.mul_(slope).mul_(a - b)
    at_high, at_low = (b - mass).mul_(a).mul_(relative), (a - mass).mul_(b).mul_(relative)
    of_half = (at_high + at_low).mul_(slope).sum(dim=1)
    # The log of the slope is minus a log-scale.
    of_log_scales = at_low.mul_(low).sub_(at_high.mul_(high))
    of_raw = torch.ops.aten.sigmoid_backward(of_log_scales, gate).mul_(4)
    of_parameters = torch.cat([of_logits, of_offsets, of_raw], dim=1).flatten(1, 2)
    return [probability.log(), -of_offsets.sum(dim=1), of_half, of_parameters]

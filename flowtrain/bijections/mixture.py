"""Mixtures of logistics as an elementwise transform (Ho et al. 2019, "Flow++", section 3.2)."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowtrain.bijections.affine import gated_log_scale, log_scale_gate
from flowtrain.bijections.base import Transform
from flowtrain.bijections.monotone import solve_monotone


class MixtureTransform(Transform):
    """`z = logit(F(x)) * exp(a) + shift`, where F is the CDF of a mixture of K logistics.

    `F(x) = sum_i pi_i sigmoid(u_i)`, with `u_i = (x - mu_i) exp(-s_i)`. The transform takes
    `(2 + 3 K) C` parameters for C entries: the shift, K logits of pi, K means, and the log-scales
    `a, s_1, ..., s_K` before their bound `limit * tanh(h / limit)`.

    With parameters of zero the components have a scale of 1 and stand 2 / K apart around zero,
    because equal ones would never differ. For K = 4 the slope is then 0.93 at zero and 1 far out.

    The derivative of `logit(F)` is at most `max_i exp(-s_i)`, so dz/dx is at most `exp(2 limit)`.
    Between components far apart it may be small, but not below
    `min_i exp(-s_i) / cosh(max_ij |u_i - u_j| / 2)`. Everything is computed in logs, so the results
    are finite however far out `x` and the means are.
    """

    inverse_is_untraceable = True
    offsets: Tensor

    def __init__(self, components: int = 4, limit: float = 2.0):
        super().__init__()
        self.components = components
        self.limit = limit
        self.parameters_per_entry = 2 + 3 * components
        self.register_buffer(
            "offsets", (torch.arange(components) - (components - 1) / 2) * (2 / components)
        )

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        results: tuple[Tensor, Tensor] = _Mixture.apply(
            x, self.parameters_by_entry(parameters), self.offsets, self.limit
        )
        return results

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Solved by Newton's method. It has the first derivatives of the inverse function."""
        with torch.no_grad():
            shift, logits, means, gate = _split(
                self.parameters_by_entry(parameters), self.offsets, self.limit
            )
            log_scales = gated_log_scale(gate, self.limit)
            inverse_scales = (-log_scales[:, 1:]).exp()
            total = logits.logsumexp(dim=1)
            target = (z - shift) * (-log_scales[:, 0]).exp()

            def logit(x: Tensor) -> tuple[Tensor, Tensor]:
                w, log_derivative, *_ = _logit_of_mixture(x, logits, means, inverse_scales, total)
                return w, log_derivative.exp()

            # Each component alone would reach the target at its end, so F reaches it in between.
            ends = means + target[:, None] / inverse_scales
            x = solve_monotone(logit, target, ends.amin(dim=1), ends.amax(dim=1))
        if torch.is_grad_enabled():
            again, log_derivative = self(x, parameters)
            missing = z - again
            # This adds zero, with the gradient of a Newton step. In a wide gap between components
            # that gradient would overflow without the clamp.
            x = x + (missing - missing.detach()) * (-log_derivative.detach()).clamp(max=80).exp()
        return x, -self(x, parameters)[1]


def _split(
    parameters: Tensor, offsets: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shift `(B, C, ...)`, logits and means `(B, K, C, ...)`, gates `(B, 1 + K, C, ...)`."""
    k = len(offsets)
    shift, logits, means, raw = parameters.split([1, k, k, 1 + k], dim=1)
    return (
        shift[:, 0],
        logits,
        means + offsets.view(-1, *[1] * (parameters.ndim - 2)),
        log_scale_gate(raw, limit),
    )


def _log_sum(exponent: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """`log(sum_i factor_i exp(exponent_i))` over dimension 1, and each summand's share of the sum.

    Both come from one softmax, whose largest value is the inverse of logsumexp's sum.
    """
    share = exponent.softmax(dim=1)
    largest = share.amax(dim=1)
    share = share.mul_(factor)
    total = share.sum(dim=1)
    return exponent.amax(dim=1) + (total / largest).log(), share.div_(total[:, None])


def _logit_of_mixture(
    x: Tensor, logits: Tensor, means: Tensor, inverse_scales: Tensor, total: Tensor
) -> tuple[Tensor, ...]:
    """`logit(F(x))` and its log-derivative, `(B, C, ...)`; then, `(B, K, C, ...)`, the `u_i`, and
    the shares of the components in F, in 1 - F and in the density.

    `total` is the logsumexp of the logits. No logarithm of a component is needed, because
    `sigmoid(u) = v exp(min(u, 0))` with `v = sigmoid(|u|)` in [1/2, 1].
    """
    u = (x[:, None] - means).mul_(inverse_scales)
    v = u.abs().sigmoid_()
    negative = u.clamp(max=0)
    below = logits + negative
    above = below - u
    log_below, in_below = _log_sum(below, v)
    log_above, in_above = _log_sum(above, v)
    log_density, in_density = _log_sum(above + negative, v.square().mul_(inverse_scales))
    return (
        log_below - log_above,
        log_density - log_below - log_above + total,
        u,
        in_below,
        in_above,
        in_density,
    )


class _Mixture(torch.autograd.Function):
    """The transform, with a gradient from the components' shares that the forward pass computed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parameters: Tensor, offsets: Tensor, limit: float
    ) -> tuple[Tensor, Tensor]:
        shift, logits, means, gate = _split(parameters, offsets, limit)
        log_scales = gated_log_scale(gate, limit)
        # exp2 is four times as fast as exp on a CPU.
        inverse_scales = (log_scales[:, 1:] * -math.log2(math.e)).exp2_()
        scale = log_scales[:, 0].exp()
        weights = logits.softmax(dim=1)
        total = logits.amax(dim=1) - weights.amax(dim=1).log()
        w, log_derivative, u, *shares = _logit_of_mixture(x, logits, means, inverse_scales, total)
        w = w.mul_(scale)
        ctx.save_for_backward(gate, inverse_scales, scale, weights, w, u, *shares)
        return w + shift, log_derivative + log_scales[:, 0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_z: Tensor, grad_log_derivative: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        gate, inverse_scales, scale, weights, w, u, in_below, in_above, in_density = (
            ctx.saved_tensors
        )
        # Gradients with respect to the logs of F, of 1 - F, and of the density. The last is also
        # the gradient with respect to the log of the sum of the weights.
        grad_w = grad_z * scale
        grad_below = (grad_w - grad_log_derivative)[:, None]
        grad_above = (-grad_w - grad_log_derivative)[:, None]
        grad_density = grad_log_derivative[:, None]

        density = grad_density * in_density
        # Gradients with respect to log sigmoid(u) and log sigmoid(-u).
        rising = torch.addcmul(density, grad_below, in_below)
        falling = torch.addcmul(density, grad_above, in_above)
        grad_logits = torch.addcmul(rising + falling - density, grad_density, weights)
        grad_u = rising - u.sigmoid().mul(rising + falling)
        grad_means = grad_u * -inverse_scales
        grad_a = torch.addcmul(grad_log_derivative, grad_z, w)
        grad_log_scales = torch.cat([grad_a[:, None], -torch.addcmul(density, grad_u, u)], dim=1)
        grad_raw = torch.ops.aten.sigmoid_backward(grad_log_scales, gate).mul_(4)
        grad_parameters = torch.cat([grad_z[:, None], grad_logits, grad_means, grad_raw], dim=1)
        return -grad_means.sum(dim=1), grad_parameters, None, None

"""A Glow of another project, and its weights for `flowtrain.models.glow`.

All of these are rewritten exactly: the order of channels after a squeeze, a scale of ActNorm (also
a negative one), LU factors, gains of zero convolutions, and means and scales of latents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowtrain.bijections import ActNorm, Bijection, Conv1x1, Coupling, DiagonalAffine, Squeeze
from flowtrain.bijections.actnorm import LOG_SCALE_LIMIT
from flowtrain.bijections.base import unbounded
from flowtrain.bijections.multiscale import Multiscale
from flowtrain.errors import UserError
from flowtrain.flow.class_prior import ClassPrior
from flowtrain.flow.flow import Flow
from flowtrain.nets.convolution import Conv2d
from flowtrain.tools.weights.tensors import Tensors

Filters = tuple[Tensor, Tensor]  # of a convolution: (O, I, k, k) and biases (O,)


@dataclass
class Step:
    """A step of flow on C channels: `W (x + shift)` at every pixel, then a coupling.

    The first half of the channels changes the second one: `(x + t) sigmoid(h)`, `x + t`, or
    `(x + t) exp(limit tanh(h))`. The last of the convolutions `net` predicts all t, then all h.
    """

    shift: Tensor  # (C,)
    weight: Tensor  # W, (C, C)
    net: list[Filters]
    limit: Tensor | None = None  # (C / 2,)


@dataclass
class Glow:
    """A model whose levels are a squeeze, steps, and a split, as in flowtrain.

    In a squeezed image, entry `(i, j)` of the 2x2 patch of channel c is channel `4 c + 2 i + j`.
    The second half of the channels leaves. It is `(x + s) exp(r)` that is N(0, I). Each of the
    `priors` predicts all s, then all r. `top` are s and r of the last level, `(C, 1, 1)` or
    `(C, H, W)`. None stands for zeros. The model sees `v + offset`, where v is the input of
    flowtrain's.

    A class-conditional model has means and log-scales of all latents, or of the coarsest ones, for
    each class, `(K, D)`, as flowtrain orders them.
    """

    where: str  # begins messages
    levels: list[list[Step]]
    priors: list[Filters] | None
    top: tuple[Tensor, Tensor] | None
    coupling: str  # sigmoid, additive or tanh
    conditioner: str = "glow"
    padding: str = "zeros"
    offset: float = 0.0
    classes: tuple[Tensor, Tensor] | None = None
    class_prior: str = "coarsest"

    @property
    def options(self) -> dict[str, Any]:
        """The section `model` of the configuration. Raises `UserError` if there is none."""
        widths = [{len(step.net[-2][1]) for step in steps} for steps in self.levels]
        if max(map(len, widths)) > 1:
            raise UserError(f"{self.where}: the networks of a level have different widths")
        return {
            "name": "glow",
            "levels": len(self.levels),
            "steps": [len(steps) for steps in self.levels],
            "width": [width for (width,) in widths],
            "coupling": self.coupling,
            "conditioner": self.conditioner,
            "permutation": "conv1x1",
            "prior": "exp",
            "top_prior": "entry" if self.top and self.top[0].shape[1:] != (1, 1) else "channel",
            "padding": self.padding,
            "classes": len(self.classes[0]) if self.classes else 0,
            "class_prior": self.class_prior,
        }

    @torch.no_grad()
    def fill(self, flow: Flow) -> None:
        """Sets the weights of a new model with these `options`, in its precision.

        Raises `UserError` for a scale of latents beyond the limit.
        """
        model = flow.bijection
        assert isinstance(model, Multiscale)
        for number, (steps, (level, _)) in enumerate(zip(self.levels, model.steps(), strict=True)):
            self._fill_level(steps, level, self.offset if number == 0 else 0.0)
        # As 2 sigmoid(h) is twice the scale there, the changed channels are twice as large.
        double = 2.0 if self.coupling == "sigmoid" else 1.0
        log_double = torch.tensor(double).double().log()
        for filters, (_, prior) in zip(self.priors or [], model.steps(), strict=False):
            weight, bias = (each.clone() for each in filters)
            half = len(bias) // 2
            weight[:half] *= double
            bias[:half] *= double
            bias[half:] -= log_double
            assert isinstance(prior, Coupling)
            _fill_convolutions(prior, [(weight, bias)])
        of_latents = torch.full((sum(model.sizes),), double, dtype=torch.float64)
        coarsest = model.sizes[-1]
        of_latents[-coarsest : -coarsest // 2] = 1.0
        if self.top is not None:
            top = model.steps()[-1][1]
            assert isinstance(top, DiagonalAffine)
            shift, log_scale = self.top
            top.shift.copy_(shift * log_scale.exp())
            halves = torch.ones_like(log_scale)
            halves[len(halves) // 2 :] = double
            top.log_scale.copy_(self._unbounded(log_scale - halves.log()))
        if self.classes is not None:
            assert isinstance(flow.class_prior, ClassPrior)
            mean, log_scale = self.classes
            of_latents = of_latents[-mean.shape[1] :]
            flow.class_prior.mean.copy_(mean * of_latents)
            flow.class_prior.log_scale.copy_(self._unbounded(log_scale + of_latents.log()))

    def _unbounded(self, log_scale: Tensor) -> Tensor:
        limit = 0.99 * LOG_SCALE_LIMIT  # of `unbounded`
        if log_scale.abs().max() > limit:
            raise UserError(
                f"{self.where}: a log-scale of its latents is {log_scale.abs().max():.3g}, and "
                f"flowtrain's are at most {limit:g}"
            )
        return unbounded(log_scale, LOG_SCALE_LIMIT)

    def _fill_level(self, steps: list[Step], level: Bijection, offset: float) -> None:
        channels = len(steps[0].shift)
        patches = [4 * c + 2 * i + j for i, j in Squeeze.OFFSETS for c in range(channels // 4)]
        half = torch.ones(channels, dtype=torch.float64)
        half[channels // 2 :] = 0.5 if self.coupling == "sigmoid" else 1.0
        layers = iter(level.layers)  # type: ignore[arg-type]
        assert isinstance(next(layers), Squeeze)
        for number, step in enumerate(steps):
            actnorm, convolution, coupling = next(layers), next(layers), next(layers)
            assert isinstance(actnorm, ActNorm) and isinstance(convolution, Conv1x1)
            if number == 0:
                shift, weight = step.shift[patches] + offset, step.weight[:, patches]
            else:
                shift, weight = step.shift / half, step.weight * half
            actnorm.shift.copy_(shift[:, None, None])
            actnorm.initialized.fill_(True)
            convolution.set_weight(weight)
            _fill_convolutions(coupling, step.net)
            if step.limit is not None:
                coupling.transform.limit.copy_(step.limit)


def _fill_convolutions(coupling: Coupling, filters: Iterable[Filters]) -> None:
    layers = [each for each in coupling.conditioner.modules() if isinstance(each, Conv2d)]
    for layer, (weight, bias) in zip(layers, filters, strict=True):
        layer.weight.copy_(weight.movedim(1, -1).flatten(1))
        layer.bias.copy_(bias)


def scaled(filters: Filters, gain: Tensor) -> Filters:
    """A convolution whose outputs are multiplied by `gain` `(O,)`."""
    weight, bias = filters
    return weight * gain[:, None, None, None], bias * gain


def of_lu(
    tensors: Tensors, name: str, channels: int, matrices: Sequence[str], diagonal: Sequence[str]
) -> Tensor:
    """The matrix `P L (U + diag(sign exp(log_scale)))` of a 1x1 convolution (Glow, eq. 10), from
    the tensors of these names.
    """
    permutation, lower, upper = (
        tensors.take(f"{name}{each}", channels, channels) for each in matrices
    )
    sign, log_scale = (tensors.take(f"{name}{each}", channels) for each in diagonal)
    unit_lower = lower.tril(-1) + torch.eye(channels, dtype=lower.dtype)
    return permutation @ unit_lower @ (upper.triu(1) + (sign * log_scale.exp()).diag())


def sigmoid_parameters(filters: Filters, shifts: slice, scales: slice) -> Filters:
    """The last convolution of a coupling `(x + t) sigmoid(h + 2)`, whose outputs t and h are at
    these places.
    """
    weight, bias = filters
    return (
        torch.cat([weight[shifts], weight[scales]]),
        torch.cat([bias[shifts], bias[scales] + 2]),
    )

"""Optimizers, the learning rate, and the moving average of the weights."""

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.config import Train
from flowtrain.flow.flow import Flow

# The attribute `found_inf` of every optimizer here is a number on the device, None at first. If it
# is 1, a step changes nothing, and the host need not wait for it. torch's fused kernels, which do
# the arithmetic in one pass over all parameters, have it for mixed precision
# (`torch.amp.GradScaler`).

# Devices for whose kernels some versions of torch refuse it, and others ignore it.
HOST_DECIDES = ("mps",)


@torch.no_grad()
def descend(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    rate: float,
    decay: float,
    unless: Tensor | None,
    ascend: bool = False,
) -> None:
    """`weight -= rate * (direction + decay * weight)`, in one kernel; nothing if `unless` is 1.

    Each direction has the memory order of its weight. `ascend` reverses the direction.
    """
    torch._fused_sgd_(
        list(weights),
        list(directions),
        [],
        weight_decay=decay,
        momentum=0.0,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=ascend,
        is_first_step=False,
        found_inf=unless,
    )


def approach(
    values: Sequence[Tensor], targets: Sequence[Tensor], part: float, unless: Tensor | None
) -> None:
    """Moves each value this part of the way to its target: ascent along it, with a decay of 1."""
    descend(values, targets, part, 1.0, unless, ascend=True)


class Adamax(torch.optim.Adamax):
    """torch's, which has no fused kernel. So it takes each step, and undoes it if necessary."""

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], lr: float):
        on_device = groups[0]["params"][0].device.type != "cpu"
        super().__init__(groups, lr, capturable=on_device)  # keeps the number of steps there

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        kept = [
            tensor
            for parameter in parameters_of(self)
            for tensor in (parameter, *self.state[parameter].values())
        ]
        before = [tensor.clone() for tensor in kept]
        super().step()
        if self.found_inf is not None:
            for tensor, earlier in zip(kept, before, strict=True):
                tensor.copy_(torch.where(self.found_inf > 0, earlier, tensor))


ADAM_AND_KIN = {
    "adam": functools.partial(torch.optim.Adam, fused=True),
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "adamax": Adamax,
}


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices.

    The steps are as by `torch.optim.Muon` with its default scale and `UNIT` times the rate.
    The change of a layer's outputs depends on the rate, but not on the layer's width. Matrices of
    one shape are orthogonalized together, in a third of the time on a CPU, and in a few kernels
    on a GPU.
    """

    MOMENTUM = 0.95
    # The root mean square of a step equals Adam's for square matrices of width 160 (Liu et al.
    # 2025, eq. 4). So one rate suits both.
    UNIT = 2.5
    # Numbers that are orthogonalized together. It bounds the memory of a step beside the weights.
    # A CPU is fastest if they fit into its caches, a GPU with few kernels.
    TOGETHER = 2**20
    TOGETHER_ON_A_GPU = 2**26

    found_inf: Tensor | None = None

    def __init__(self, weights: list[Tensor], lr: float, weight_decay: float):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    of_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in of_shape.items():
                on_cpu = weights[0].device.type == "cpu"
                together = self.TOGETHER if on_cpu else self.TOGETHER_ON_A_GPU
                count = max(1, together // shape.numel())
                for start in range(0, len(weights), count):
                    self._step(weights[start : start + count], group["lr"], group["weight_decay"])

    def _step(self, weights: list[Tensor], lr: float, weight_decay: float) -> None:
        """Moves matrices of one shape."""
        gradients: list[Tensor] = [weight.grad for weight in weights]  # type: ignore[misc]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        approach(momenta, gradients, 1 - self.MOMENTUM, self.found_inf)
        nesterov = torch._foreach_lerp(gradients, momenta, self.MOMENTUM)
        update = orthogonalized(torch.stack(nesterov))
        update = update.to(weights[0].dtype, memory_format=torch.contiguous_format)
        rows, columns = update.shape[1:]
        size = self.UNIT * math.sqrt(max(1, rows / columns))
        descend(weights, update.unbind(), lr * size, weight_decay / size, self.found_inf)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Approximates `U V^T` of `U S V^T` for each matrix of `(K, M, N)`, in bfloat16.

    Five steps of a Newton-Schulz iteration whose polynomial is steep at zero (Jordan et al. 2024)
    bring the singular values to between about 0.7 and 1.2.
    """
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
    return x.mT if tall else x


def build_optimizers(flow: nn.Module, config: Train) -> list[torch.optim.Optimizer]:
    """The optimizers of a step. With `muon` there are two: Muon for the weights of the
    conditioners, if there are any, and AdamW for the rest.

    Weight decay acts only on the conditioners' convolutions and linear layers.
    It would pull ActNorm scales, 1x1 convolutions and biases away from the maximum likelihood.
    """
    optimizers: list[torch.optim.Optimizer] = []
    kind, of_muon = config.optimizer, []
    if kind == "muon":
        kind, of_muon = "adamw", matrices(flow)  # its decay acts as Muon's does
        if of_muon:
            optimizers.append(Muon(of_muon, config.lr, config.weight_decay))
    theirs = set(of_muon)
    parameters = [p for p in flow.parameters() if p not in theirs]
    decayed = {m.weight for m in flow.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    groups = [
        {"params": [p for p in parameters if p in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(ADAM_AND_KIN[kind](groups, lr=config.lr))  # type: ignore[operator]
    return optimizers


def copies_of_weights(config: Train, device: torch.device) -> int:
    """How many times the weights have to fit into the host's memory: the weights, their gradients,
    their average, and the optimizer's state.
    """
    if device.type != "cpu":
        return 1
    return 2 + (1 if config.optimizer == "muon" else 2) + (config.ema > 0)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def first_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter before its first gradient: zeros, in no memory, with the names,
    shapes and types of every later state.
    """
    zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
    if isinstance(optimizer, Muon):
        return {"momentum_buffer": zeros}
    second = "exp_inf" if isinstance(optimizer, torch.optim.Adamax) else "exp_avg_sq"
    kind = torch.float32 if optimizer.defaults.get("fused") else torch.get_default_dtype()
    return {"step": torch.zeros((), dtype=kind), "exp_avg": zeros, second: zeros}


def learning_rate(config: Train, step: int, seconds: float) -> float:
    """The rate of step `step` (counted from 0), `seconds` after the start of the run.

    Warm-up is counted in steps. The decay to zero ends at `num_steps`, or with the time budget.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.num_steps is not None:
        length = max(1, config.num_steps - config.warmup_steps)
        progress = (step - config.warmup_steps) / length
    else:
        assert config.budget is not None
        progress = seconds / config.budget
    progress = min(max(progress, 0.0), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}[config.schedule]
    return config.lr * warmup * decay


class EMA:
    """An exponential moving average of the weights: a copy of the flow, moved by `update`.

    The decay is at most `(1 + n) / (10 + n)` after n steps, so the initial weights are soon
    forgotten. (torch's `AveragedModel` takes four times as long.)
    """

    def __init__(self, flow: Flow, decay: float):
        self.flow = copy.deepcopy(flow).requires_grad_(False)
        self.decay = decay
        self._averages: list[Tensor] = list(self.flow.parameters())
        self._current: list[Tensor] = list(flow.parameters())

    def update(self, n: int, unless: Tensor | None = None) -> None:
        """Moves the average towards the current weights, unless `unless` is 1 on the device.

        `n` is the number of earlier updates.
        """
        part = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        approach(self._averages, self._current, part, unless)


def matrices(module: nn.Module) -> list[Tensor]:
    """The weights of all conditioners."""
    return [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]

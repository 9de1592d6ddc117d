"""The state of a run: everything that a step changes, to a checkpoint and back."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.checkpoints.description import Progress
from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import load_weights, require_tensors
from flowtrain.config import Config
from flowtrain.flow.flow import Flow
from flowtrain.system import distributed
from flowtrain.training.loss import CudaGraphStep, chosen_loss
from flowtrain.training.optim import EMA, HOST_DECIDES, first_state, parameters_of


@dataclass
class State:
    config: Config
    flow: Flow
    optimizers: list[torch.optim.Optimizer]
    ema: EMA | None
    data: dict[str, Any]  # the fingerprint of the data set
    progress: Progress = field(default_factory=Progress)
    loss: nn.Module = field(init=False)  # `Loss`, or DistributedDataParallel around it
    cuda_graph: CudaGraphStep | None = field(init=False)  # replaces calls of `loss`
    # Of compiling, capturing, and comparing with the plain loss. None before it, 0 without it.
    compile_seconds: float | None = field(init=False)
    # On the device: 1 from a non-finite step until the rollback. Meanwhile steps change nothing.
    found_inf: Tensor = field(init=False)
    unless: Tensor | None = field(init=False)  # the same; None for `HOST_DECIDES`

    def __post_init__(self) -> None:
        if self.flow.device.type == "cuda":
            # cuDNN tries its algorithms for each shape of a convolution, which training repeats.
            torch.backends.cudnn.benchmark = True
        train = self.config.train
        loss = chosen_loss(self.flow, train)
        self.loss = loss if train.cuda_graph else distributed.parallel(loss)
        self.cuda_graph = CudaGraphStep(loss) if train.cuda_graph else None
        self.compile_seconds = None if train.cuda_graph or train.compile != "off" else 0.0
        self.found_inf = torch.zeros((), dtype=torch.float32, device=self.flow.device)
        self.unless = None if self.flow.device.type in HOST_DECIDES else self.found_inf
        for optimizer in self.optimizers:
            optimizer.found_inf = self.unless  # type: ignore[attr-defined]

    @property
    def ema_flow(self) -> Flow:
        """The flow to validate and sample: with averaged weights if they are kept."""
        return self.flow if self.ema is None else self.ema.flow

    def reached_end(self, seconds: float, share: float = 1.0) -> bool:
        """Whether the steps are done, or `seconds` use up the time budget, or this share of it."""
        train = self.config.train
        if train.num_steps is not None:
            return self.progress.step >= share * train.num_steps
        assert train.budget is not None
        return seconds >= share * train.budget

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def weights_are_finite(self) -> bool:
        """Waits for the device, once."""
        weights = [p.detach() for p in self.flow.parameters()]  # one kernel needs plain tensors
        largest = torch.nn.utils.get_total_norm(weights, norm_type=math.inf)
        return math.isfinite(largest.item())

    def meta(self) -> dict[str, Any]:
        """The description in the checkpoint."""
        return {
            "config": self.config.resolved(),
            "shape": list(self.flow.shape),
            "levels": self.flow.num_bins,
            "step": self.progress.step,
            "data": self.data,
            "processes": distributed.world(),
            "threads": torch.get_num_threads(),
            "progress": dataclasses.asdict(self.progress),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint: `model.*`, `ema.*` and, after a step, `optimizer.*`."""
        stepped = any(optimizer.state for optimizer in self.optimizers)
        return self._weights() | (self._optimizer_state() if stepped else {})

    def _weights(self) -> dict[str, Tensor]:
        parts = {"model": self.flow.state_dict()}
        if self.ema is not None:
            parts["ema"] = self.ema.flow.state_dict()
        return {f"{part}.{name}": t for part, state in parts.items() for name, t in state.items()}

    def _optimizer_state(self) -> dict[str, Tensor]:
        """The state of each parameter, also of one without a gradient so far."""
        names, tensors = self._names(), dict[str, Tensor]()
        for optimizer in self.optimizers:
            for parameter in parameters_of(optimizer):
                values = optimizer.state.get(parameter) or first_state(optimizer, parameter)
                tensors |= {f"optimizer.{key}.{names[parameter]}": v for key, v in values.items()}
        return tensors

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.flow.named_parameters()}

    def restore(self, saved: Checkpoint) -> None:
        """Takes over everything from a checkpoint of a run with this model and optimizer.

        Raises `UserError`, and changes nothing, if its tensors do not fit such a run.
        """
        progress = Progress(**saved.meta["progress"])
        own = self._weights() | (self._optimizer_state() if progress.step else {})
        require_tensors(saved.path, saved.tensors, own)
        load_weights(self.flow, saved, "raw")
        if self.ema is not None:
            load_weights(self.ema_flow, saved, "ema")
        self.progress = progress
        self.found_inf.zero_()
        by_name: dict[str, dict[str, Tensor]] = {}
        for full_name, value in saved.part("optimizer").items():
            key, _, name = full_name.partition(".")
            by_name.setdefault(name, {})[key] = value
        names = self._names()
        for optimizer in self.optimizers:
            parameters = parameters_of(optimizer)
            state = {i: by_name[names[p]] for i, p in enumerate(parameters) if names[p] in by_name}
            # Through torch's own format, which puts each value on the right device.
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

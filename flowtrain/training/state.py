"""The state of a run: everything that a step changes, to a checkpoint and back."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import load_weights
from flowtrain.config import Config
from flowtrain.flow.flow import Flow
from flowtrain.system import distributed
from flowtrain.training.optim import Average


@dataclass
class Progress:
    """How far a run is, in plain numbers. They are stored in the checkpoint."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    best: float | None = None  # validation loss in bits/dim, or in nats for real-valued data
    best_step: int | None = None
    lr_scale: float = 1.0
    non_finite: int = 0
    averaged: int = 0  # updates of the average of the weights
    finished: bool = False  # including the last validation and the last samples
    window_loss: float = 0.0  # sum of the training loss since the last row of metrics
    window_steps: int = 0  # steps in that sum


@dataclass
class State:
    """Everything that a step changes."""

    config: Config
    flow: Flow
    optimizers: list[torch.optim.Optimizer]
    average: Average | None
    data: dict[str, Any]  # the fingerprint of the data set
    progress: Progress = field(default_factory=Progress)
    parallel: nn.Module = field(init=False)  # the flow to call in training

    def __post_init__(self) -> None:
        self.parallel = distributed.parallel(self.flow)

    @property
    def evaluated(self) -> Flow:
        """The flow that is validated and sampled: with averaged weights if they are kept."""
        return self.flow if self.average is None else self.average.flow

    def reached_end(self) -> bool:
        """Whether the steps are done or the time budget is used up.

        `progress.finished` also means that the last validation, samples and checkpoint are done.
        """
        train = self.config.train
        if train.num_steps is not None:
            return self.progress.step >= train.num_steps
        assert train.budget is not None
        return self.progress.seconds >= train.budget

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def weights_are_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.flow.parameters())

    def meta(self) -> dict[str, Any]:
        """The description in the checkpoint."""
        return {
            "config": self.config.resolved(),
            "shape": list(self.flow.shape),
            "levels": self.flow.levels,
            "step": self.progress.step,
            "data": self.data,
            "processes": distributed.world(),
            "progress": dataclasses.asdict(self.progress),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint: `model.*`, `ema.*` and `optimizer.*`."""
        parts = {"model": self.flow.state_dict()}
        if self.average is not None:
            parts["ema"] = self.average.flow.state_dict()
        tensors = {
            f"{part}.{name}": t for part, state in parts.items() for name, t in state.items()
        }
        names: dict[Tensor, str] = {
            parameter: name for name, parameter in self.flow.named_parameters()
        }
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                tensors |= {
                    f"optimizer.{key}.{names[parameter]}": value for key, value in values.items()
                }
        return tensors

    def restore(self, saved: Checkpoint) -> None:
        """Takes over everything from a checkpoint of a run with this model and optimizer."""
        load_weights(self.flow, saved, "raw")
        self.progress = Progress(**saved.meta["progress"])
        if self.average is not None:
            load_weights(self.evaluated, saved, "ema")
        by_name: dict[str, dict[str, Tensor]] = {}
        for full_name, value in saved.part("optimizer").items():
            key, _, name = full_name.partition(".")
            by_name.setdefault(name, {})[key] = value
        names = {parameter: name for name, parameter in self.flow.named_parameters()}
        for optimizer in self.optimizers:
            parameters = [
                parameter for group in optimizer.param_groups for parameter in group["params"]
            ]
            state = {i: by_name[names[p]] for i, p in enumerate(parameters) if names[p] in by_name}
            # Through torch's own format, which puts each value on the right device.
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

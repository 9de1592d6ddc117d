"""The computation of a step: the loss of images and its gradient.

The same code is called as it is, compiled (`train.compile`), or replayed as a CUDA graph
(`train.cuda_graph`). What is compiled or replayed is compared with the plain computation on the
first batch, so that a wrong one ends the run at once.
"""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Executor
from flowtrain.bijections.memory import directions_of, executor_of
from flowtrain.config import Train
from flowtrain.errors import RunError, UserError, cut
from flowtrain.flow.flow import Flow
from flowtrain.system import distributed
from flowtrain.system.console import console, duration

# How far the gradient on the first batch may be from the plain one, relative to its norm. Another
# order of rounding changes it by far less, and an error in one layer by more.
TOLERANCE = {"fp32": 1e-2, "bf16": 0.1}
KINDS = 64  # of layers, by shape, that one function is compiled for
WARM_UP = 3  # passes before a CUDA graph is captured
ALIGNED = 4  # gradients begin at multiples of so many numbers, as fast kernels want them

# Images `(B, C, H, W)`, noise of that shape, and labels `(B,)` or None.
Batch = tuple[Tensor, Tensor, Tensor | None]

# Adds the gradient of the losses of a batch, divided by a number of images, to the gradients of the
# parameters. The last argument says whether more images follow in the same step. Returns the sum of
# the losses divided by that number, 0-dimensional.
Adding = Callable[[Batch, int, bool], Tensor]

# Runs a computation whose result is always in the same place, and returns a function that runs it
# again, and the result.
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bf16 for the conditioners. The data path casts back, and computes its products in float32."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )


def require_possible(flow: Flow, train: Train, device: torch.device) -> None:
    """Raises `UserError` where `train.compile` or `train.cuda_graph` does not suit flow or device.

    Loops whose length depends on the values can be neither compiled nor captured.
    """
    if train.cuda_graph and device.type != "cuda":
        raise UserError(f"train.cuda_graph: needs a CUDA device, and this run is on {device.type}")
    directions = directions_of(train.memory)
    loops = [name for name in directions if name in flow.bijection.untraceable_directions()]
    if loops and (train.compile == "step" or train.cuda_graph):
        key = "train.compile: step" if train.compile == "step" else "train.cuda_graph: true"
        advice = "" if "forward" in loops else ", or another train.memory"
        raise UserError(
            f"{key}: the {loops[0]} pass of this model is a loop whose length depends on the data; "
            f"use train.compile=off and train.cuda_graph=false{advice}"
        )


class Losses(nn.Module):
    """The sum of the losses of images, 0-dimensional, in the precision of `train.precision`."""

    def __init__(self, flow: Flow, train: Train, executor: Executor):
        super().__init__()
        self.flow = flow
        self.precision = train.precision
        self.executor = executor

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        with autocast(self.precision, x.device):
            log_prob = self.flow(x, noise, labels, self.executor).total
        return self.flow.loss(log_prob).sum()


class Computation:
    """Adds the gradient of images to the gradients of the parameters.

    Raises `UserError` where compiling or capturing fails, and `RunError` where the result is not
    that of the plain computation.
    """

    def __init__(self, flow: Flow, train: Train):
        self.train = train
        self.seconds: float | None = None  # for compiling, capturing and checking, once done
        self._plain = Losses(flow, train, executor_of(train.memory))
        losses = self._plain
        if train.compile != "off":
            configure_compiler()
        if train.compile == "layers":
            losses = Losses(flow, train, executor_of(train.memory, compiler(train)))
        if train.compile == "step":
            losses = Losses(flow, train, executor_of(train.memory))
            losses.compile(fullgraph=True, dynamic=False)
        self._add: Adding = Replayed(losses, captured) if train.cuda_graph else Called(losses)
        self._checked = train.compile == "off" and not train.cuda_graph

    def __call__(
        self, x: Tensor, noise: Tensor, labels: Tensor | None, images: int, more: bool
    ) -> Tensor:
        """Adds the gradient of the sum of the losses of `x`, divided by `images`.

        Returns that sum, divided likewise. If no `more` images follow in the same step, the
        gradients become the means over all processes.
        """
        if not self._checked:
            self._checked = self._is_right((x, noise, labels))
        return self._add((x, noise, labels), images, more)

    def _is_right(self, batch: Batch) -> bool:
        """Compares with the plain computation. False if that is not finite, which shows nothing."""
        started = time.perf_counter()
        parameters = [p for p in self._plain.parameters() if p.requires_grad]
        loss = self._plain(*batch) / len(batch[0])
        expected = torch.autograd.grad(loss, parameters, allow_unused=True)
        settings = f"train.compile={self.train.compile}"
        remedy = "set train.compile=off"
        if self.train.cuda_graph:
            settings += ", train.cuda_graph=true"
            remedy += " and train.cuda_graph=false"
        try:
            found_loss = self._add(batch, len(batch[0]), True)
        except Exception as error:  # the same computation has just run without compiling
            reason = str(error).partition("\nSet TORCH")[0]  # advice for torch's developers
            raise UserError(
                f"{settings}: failed: {cut(reason, 300) or type(error).__name__}\n{remedy}; "
                f"compiling needs a C++ compiler such as g++ on a CPU, and a C compiler on a GPU"
            ) from error
        found = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        if not math.isfinite(loss.item()):
            return False
        error_of_gradient = _distance(found, expected)
        error_of_loss = abs((found_loss - loss).item()) / max(1.0, abs(loss.item()))
        if not max(error_of_gradient, error_of_loss) <= TOLERANCE[self.train.precision]:
            raise RunError(
                f"{settings}: the first batch has another gradient than without (by "
                f"{error_of_gradient:.2g} of its norm, the loss by {error_of_loss:.2g}): {remedy}"
            )
        self.seconds = time.perf_counter() - started
        console.print(
            f"{settings}: ready after {duration(self.seconds)}; on the first batch the gradient "
            f"is the same within {error_of_gradient:.0e}"
        )
        return True


def _distance(found: list[Tensor | None], expected: tuple[Tensor | None, ...]) -> float:
    """The norm of the difference, relative to that of `expected`. None stands for zeros."""
    differences, sizes = [], []
    for one, other in zip(found, expected, strict=True):
        if one is not None and other is not None:
            differences.append(one - other)
            sizes.append(other)
        else:
            differences += [tensor for tensor in (one, other) if tensor is not None]
    size = float(torch.nn.utils.get_total_norm(sizes)) if sizes else 0.0
    return float(torch.nn.utils.get_total_norm(differences)) / (size or 1.0)


def one_unless_bad(loss: Tensor) -> Tensor:
    """The gradient to begin a backward pass with: 1, or NaN for a loss that is not finite.

    The whole gradient is NaN then. So its norm, which all processes know, tells that a loss was
    not finite, even if only one process has the image.
    """
    return 1 + 0 * loss.detach()


# --- plain or compiled ----------------------------------------------------------------------------


class Called:
    """Calls the losses and their backward pass. See `Adding`."""

    def __init__(self, losses: Losses):
        self.parallel = distributed.parallel(losses)

    def __call__(self, batch: Batch, images: int, more: bool) -> Tensor:
        with distributed.accumulating(self.parallel, more):
            loss: Tensor = self.parallel(*batch) / images
            loss.backward(one_unless_bad(loss))
        return loss.detach()


def configure_compiler() -> None:
    """Settings of torch's compiler for which `torch.compile` has no argument."""
    import torch._dynamo  # takes seconds

    settings = torch._dynamo.config
    if not hasattr(settings, "trace_autograd_ops"):
        raise UserError(f"train.compile: torch {torch.__version__} is too old; install a newer one")
    settings.trace_autograd_ops = True  # `gradient_of_layer` asks autograd for gradients
    settings.recompile_limit = max(settings.recompile_limit, KINDS)
    # It would cut the graph where gradients are exchanged, and cannot cut our autograd functions.
    settings.optimize_ddp = False


def compiler(train: Train) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function whose first argument is a layer, for the layers that have a network.

    Layers with the same code and shapes share what is compiled. Loops are called as they are.
    """
    directions = directions_of(train.memory)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        fast = torch.compile(function, fullgraph=True, dynamic=False)

        def run(layer: Bijection, *arguments: Any) -> Any:
            suits = layer.has_network and not set(directions) & set(layer.untraceable_directions())
            return (fast if suits else function)(layer, *arguments)

        return run

    return compiled


# --- CUDA graphs ----------------------------------------------------------------------------------


class Replayed:
    """Replays forward and backward pass on images that are copied to one place. See `Adding`.

    The gradients lie in one piece of memory, to which each replay adds. DistributedDataParallel has
    no part in it: the processes average that piece.
    """

    def __init__(self, losses: Losses, recorder: Recorder):
        self.losses = losses
        self.recorder = recorder
        self.parameters = [p for p in losses.parameters() if p.requires_grad]
        sizes = [math.ceil(p.numel() / ALIGNED) * ALIGNED for p in self.parameters]
        self.gradients = self.parameters[0].new_zeros(sum(sizes))
        pieces = self.gradients.split(sizes)
        self.parts = [
            piece[: p.numel()].view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)
        ]
        self.share = self.parameters[0].new_ones(())
        self.place: list[Tensor] = []  # where the recorded computation finds its batch
        self.replay: Callable[[], object]
        self.loss: Tensor

    def __call__(self, batch: Batch, images: int, more: bool) -> Tensor:
        if self.parameters[0].grad is not self.parts[0]:  # the first images of a step
            self.gradients.zero_()
            for parameter, part in zip(self.parameters, self.parts, strict=True):
                parameter.grad = part
        tensors = [tensor for tensor in batch if tensor is not None]
        self.share.fill_(1 / images)
        if [t.shape for t in tensors] != [t.shape for t in self.place]:
            self._record(tensors)
        for place, tensor in zip(self.place, tensors, strict=True):
            place.copy_(tensor)
        self.replay()
        if not more:
            distributed.average(self.gradients)
        return self.loss * self.share

    def _record(self, tensors: list[Tensor]) -> None:
        before = self.gradients.clone()
        self.place = [tensor.clone() for tensor in tensors]

        def run() -> Tensor:
            x, noise, *labels = self.place
            loss: Tensor = self.losses(x, noise, labels[0] if labels else None)
            loss.backward(self.share * one_unless_bad(loss))
            return loss.detach()

        self.replay, self.loss = self.recorder(run)
        self.gradients.copy_(before)


def captured(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Captures a CUDA graph of `run`. See `Recorder`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads that read data may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result

"""The loss of images in a training step: plain, compiled, or replayed as a CUDA graph."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.memory import directions_of, executor_of, unchanged
from flowtrain.config import Train
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow

KINDS = 64  # of layers, by shape, that one function is compiled for
WARM_UP = 3  # passes before a CUDA graph is captured
ALIGNED = 4  # gradients begin at multiples of so many numbers, as fast kernels want them

# Images `(B, C, H, W)`, noise of that shape, and labels `(B,)` or None.
Batch = tuple[Tensor, Tensor, Tensor | None]

# Compiles a function whose first argument is a layer.
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]

# Runs a computation, and returns a function that repeats it, and the place of its result.
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bf16 for the conditioners. The data path casts back, and computes its products in float32."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )


def require_possible(flow: Flow, train: Train, device: torch.device) -> None:
    """Raises `UserError` if `train.compile` or `train.cuda_graph` does not suit flow or device.
    Data-dependent loops can be neither compiled nor captured.
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


class Loss(nn.Module):
    """The sum of the losses of images, 0-dimensional, in the precision of `train.precision`."""

    def __init__(self, flow: Flow, train: Train, compiler: Compiler = unchanged):
        super().__init__()
        self.flow = flow
        self.precision = train.precision
        self.executor = executor_of(train.memory, compiler, not flow.bijection.is_discrete)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        with autocast(self.precision, x.device):
            log_prob = self.flow(x, noise, labels, self.executor).total
        return self.flow.loss(log_prob).sum()


def chosen_loss(flow: Flow, train: Train) -> Loss:
    """The loss of `flow`, which compiles at its first call if `train.compile` is set.

    Raises `UserError` if torch is too old for that.
    """
    if train.compile != "off":
        configure_compiler()
    loss = Loss(flow, train, layer_compiler(train) if train.compile == "layers" else unchanged)
    if train.compile == "step":
        loss.compile(fullgraph=True, dynamic=False)
    return loss


def one_unless_bad(loss: Tensor) -> Tensor:
    """The gradient to begin a backward pass with: 1, or NaN for a non-finite loss.

    Then the whole gradient is NaN, and its norm, which all processes share, is too, even if only
    one process has the image.
    """
    return 1 + 0 * loss.detach()


# --- compiled -------------------------------------------------------------------------------------


def configure_compiler() -> None:
    """Settings of torch's compiler for which `torch.compile` has no argument."""
    import torch._dynamo  # takes seconds

    settings = torch._dynamo.config
    if not hasattr(settings, "trace_autograd_ops"):
        version = torch.__version__
        raise UserError(f"train.compile: torch {version} is too old; install 2.11 or newer")
    settings.trace_autograd_ops = True  # `gradient_of_layer` asks autograd for gradients
    settings.recompile_limit = max(settings.recompile_limit, KINDS)
    # It would cut the graph at exchanges of gradients, and cannot cut our autograd functions.
    settings.optimize_ddp = False


def layer_compiler(train: Train) -> Compiler:
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


class CudaGraphStep:
    """Replays the loss and its backward pass on images that are copied to one place.

    Each replay adds to the gradients, which lie in one piece of memory. The processes average that
    piece, without DistributedDataParallel.
    """

    def __init__(self, loss: Loss, recorder: Recorder | None = None):
        self.loss = loss
        self.recorder = recorder or captured
        self.parameters = [p for p in loss.parameters() if p.requires_grad]
        sizes = [math.ceil(p.numel() / ALIGNED) * ALIGNED for p in self.parameters]
        self.gradients = self.parameters[0].new_zeros(sum(sizes))
        pieces = self.gradients.split(sizes)
        self.views = [
            piece[: p.numel()].view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)
        ]
        self.weight = self.parameters[0].new_ones(())
        self.batch: list[Tensor] = []  # where the recorded computation finds its batch
        self.replay: Callable[[], object]
        self.sum: Tensor  # of the losses of that batch

    def __call__(self, parts: Sequence[Batch], images: int) -> Tensor:
        """The sum of all losses of the parts of a batch, divided by `images`, 0-dimensional.
        The parameters get its gradient, of this process alone.
        """
        self.gradients.zero_()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view
        self.weight.fill_(1 / images)
        total = torch.zeros_like(self.weight)
        for part in parts:
            tensors = [tensor for tensor in part if tensor is not None]
            if [t.shape for t in tensors] != [t.shape for t in self.batch]:
                self._record(tensors)
            for place, tensor in zip(self.batch, tensors, strict=True):
                place.copy_(tensor)
            self.replay()
            total += self.sum * self.weight
        return total

    def _record(self, tensors: list[Tensor]) -> None:
        before = self.gradients.clone()
        self.batch = [tensor.clone() for tensor in tensors]

        def run() -> Tensor:
            x, noise, *labels = self.batch
            loss: Tensor = self.loss(x, noise, labels[0] if labels else None)
            loss.backward(self.weight * one_unless_bad(loss))
            return loss.detach()

        self.replay, self.sum = self.recorder(run)
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

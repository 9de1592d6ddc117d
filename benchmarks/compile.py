"""Training steps with `train.compile`: seconds beside those without it, graphs, the time of
compiling, and the operator calls that compiling replaces.

The variants of one precision take turns in one process. Works for any configuration of images.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.metrics as metrics
from common import SHAPE, arguments, begin, flowtrain_step, images, in_turns, table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowtrain.checkpoints.build import build_flow
from flowtrain.config import Config, load_config
from flowtrain.flow.dequantize import draw_noise
from flowtrain.flow.flow import initialize
from flowtrain.training.optim import Average, build_optimizers
from flowtrain.training.state import State
from flowtrain.training.step import optimizer_step, train_step

CONFIGS = Path(__file__).parent.parent / "configs"


class Counting(TorchDispatchMode):
    """Counts operator calls that compute. On a GPU most of them are kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # The results of views share memory with their arguments.
        self.calls += all(result.alias_info is None for result in func._schema.returns) or any(
            result.alias_info is not None and result.alias_info.is_write
            for result in func._schema.returns
        )
        return func(*args, **(kwargs or {}))


def state_of(config: Config) -> State:
    """A model after data-dependent initialization, with its optimizers and average."""
    torch.manual_seed(0)
    flow = build_flow(config, SHAPE, 256)
    x = images(256)
    initialize(flow, x, draw_noise(x.shape, None, x.device))
    average = Average(flow, config.train.ema) if config.train.ema else None
    return State(config, flow, build_optimizers(flow, config.train), average, {})


def operator_calls(state: State, x: Tensor) -> str:
    flowtrain_step(state, x)  # makes what is made once
    with Counting() as gradient:
        _, grad_norm = train_step(state, x)
    with Counting() as optimizer:
        optimizer_step(state, grad_norm)
    return f"{gradient.calls:,} for the gradient, {optimizer.calls:,} for the optimizer"


def main() -> None:
    parser = arguments(__doc__, config="glow_cifar_small.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--variants", nargs="+", default=["layers", "step"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--count", action="store_true", help="count operator calls, and stop")
    parser.add_argument(
        "--processor",
        action="store_true",
        help="the processor's time instead of the clock's, for one thread on a busy machine",
    )
    options = parser.parse_args()
    begin(f"{options.config} {' '.join(options.set)}: train.compile", options)
    for precision in options.precisions:
        contenders, against = {}, {}
        for variant in ["off"] if options.count else ["off", *options.variants]:
            keys = [f"train.precision={precision}", f"train.compile={variant}"]
            config = load_config(CONFIGS / options.config, [*options.set, *keys])
            state = state_of(config)
            x = images(config.train.batch_size * config.train.accumulate)
            if variant == "off":
                print(f"- {precision}: operator calls: {operator_calls(state, x)}", flush=True)
                against = {"to off": f"{precision} off"}
            else:
                torch._dynamo.utils.counters.clear()
                metrics.generated_kernel_count = 0
                started = time.perf_counter()
                flowtrain_step(state, x)
                seconds = time.perf_counter() - started
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                kernels = metrics.generated_kernel_count
                print(
                    f"- {precision} {variant}: first step {seconds:.0f} s, {graphs} graphs, "
                    f"{kernels:,} generated kernels\n",
                    flush=True,
                )
            contenders[f"{precision} {variant}"] = lambda state=state, x=x: flowtrain_step(state, x)
        if not options.count:
            clock = time.process_time if options.processor else time.perf_counter
            table(in_turns(contenders, options.repeats, warmup=1, clock=clock), against)


if __name__ == "__main__":
    main()

"""Training steps beside their floor: the same step's convolutions and matrix products alone.

The floor is recorded from the step itself, with the shapes, types and orders in memory that it has.
So this works for any configuration. There are two floors: the products of the forward and backward
pass, and of the whole step, which include Muon's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from common import arguments, begin, flowtrain_step, images, in_turns, state_of, table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.training.step import train_step

NAMES = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
PRODUCTS = {getattr(torch.ops.aten, name) for name in NAMES}


class Recorder(TorchDispatchMode):
    """Keeps the convolutions and products, with tensors like those that they were called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in PRODUCTS:
            like = tree_map_only(Tensor, lambda x: torch.empty_like(x).uniform_(-0.1, 0.1), args)
            self.calls.append(lambda: func(*like))
        return func(*args, **(kwargs or {}))

    def run(self) -> None:
        for call in self.calls:
            call()


def main() -> None:
    parser = arguments(__doc__, config="causal_cifar_small.yaml")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    config = load_config(find_config(options.config), options.set)
    begin(f"{options.config} {' '.join(options.set)}: a training step and its products", options)
    state = state_of(config)
    x = images(config.train.batch_size * config.train.accumulate)
    with Recorder() as passes:
        train_step(state, x)
    with Recorder() as whole:
        flowtrain_step(state, x)
    parameters = sum(p.numel() for p in state.flow.parameters())
    products = len(passes.calls)
    print(
        f"{parameters:,} parameters, {products} convolutions and products in the passes, "
        f"{len(whole.calls) - products} in the optimizer\n"
    )
    contenders = {
        "products of the passes": passes.run,
        "products of the whole step": whole.run,
        "forward and backward pass": lambda: train_step(state, x),
        "whole step": lambda: flowtrain_step(state, x),
    }
    floors = {
        "to those of the passes": "products of the passes",
        "to all products": "products of the whole step",
    }
    table(in_turns(contenders, options.repeats), floors, "ms")


if __name__ == "__main__":
    main()

"""Memory against depth: the peak of a training step's activations for each `train.memory` and for
the peers, and their times.

The peak does not include parameters, gradients, the optimizer state and the average. `--picture
FILE.png` draws it.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from common import (
    WORK,
    arguments,
    begin,
    flowtrain_state,
    flowtrain_step,
    heading,
    images,
    in_turns,
    markdown,
    peers,
    pyplot,
    table,
)

from flowtrain.system.capacity import moments

MODES = ("store", "checkpoint", "reversible")
DEPTHS = (8, 16, 32, 64)
MIB = 2**20


def main() -> None:
    parser = arguments(__doc__, work="S", precision="fp32", picture="")
    options = parser.parse_args()
    _times(options)
    _peaks(options)


def _times(options: argparse.Namespace) -> None:
    work = WORK[options.work]
    begin(
        f"A training step with each `train.memory`, {options.work}, {options.precision}: {work}",
        options,
    )
    x = images(work.batch_size)
    states = {
        mode: flowtrain_state(work, memory=mode, precision=options.precision) for mode in MODES
    }
    steps = {mode: lambda state=state: flowtrain_step(state, x) for mode, state in states.items()}
    table(in_turns(steps, options.repeats), {"to store": "store"})


def _peaks(options: argparse.Namespace) -> None:
    work = WORK[options.work]
    heading(
        f"Peak of the activations (MiB) against K, {options.work}, {options.precision}: {work}",
        options.threads,
    )
    x = images(work.batch_size)
    rows: dict[str, list[float]] = {}
    for depth in DEPTHS:
        deep = replace(work, steps=depth)
        for mode in MODES:
            state = flowtrain_state(deep, memory=mode, precision=options.precision)
            step = functools.partial(flowtrain_step, state, x)
            rows.setdefault(f"flowtrain, {mode}", []).append(_activations(step, state.flow))
        for name, peer in peers(deep).items():
            rows.setdefault(name, []).append(
                _activations(functools.partial(peer.step, x), peer.model)
            )
    titles = ["", *(f"K = {depth}" for depth in DEPTHS), f"{DEPTHS[-1]} to {DEPTHS[0]}"]
    cells = [
        [name, *(f"{value:.1f}" for value in values), f"{values[-1] / values[0]:.2f}"]
        for name, values in rows.items()
    ]
    markdown(titles, cells)
    if options.picture:
        _draw(rows, options.picture)


def _activations(step: Callable[[], object], model: torch.nn.Module) -> float:
    step()  # makes the optimizer state
    model.zero_grad(set_to_none=True)
    peak = max(moments(step, torch.device("cpu")))
    return (peak - sum(p.nbytes for p in model.parameters())) / MIB


def _draw(rows: dict[str, list[float]], path: str) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    for name, values in rows.items():
        axes.plot(DEPTHS, values, "o-" if "flowtrain" in name else "s--", label=name)
    axes.set(xscale="log", xlabel="K, steps of flow per level")
    axes.set(yscale="log", ylabel="peak of the activations (MiB)")
    axes.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""Validation bits/dim of several settings after equal processor time.

`python benchmarks/equal_time.py --config glow_cifar_small.yaml --seconds 400 --try "" --try
"model.split=mixed model.steps=[10,5,3]"` trains the configuration as it is, and with the settings
of the second row. It reads the training split alone, and holds out validation images of it.

The steps are as in `flowtrain train`, except that the budget and the rate's decay go by processor
time, or by steps. On a busy machine a step takes more processor time, too. So the table has the
first decile of the step times.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence

import torch
from common import heading
from torch import Tensor

from flowtrain import config as configuration
from flowtrain.checkpoints.build import build_flow
from flowtrain.cli.configs import find_config
from flowtrain.config import Config
from flowtrain.data.batches import Batches
from flowtrain.data.splits import DataSet
from flowtrain.evaluation.score import mean_loss
from flowtrain.system.allocator import keep_freed_memory
from flowtrain.training.optim import learning_rate
from flowtrain.training.resume import start
from flowtrain.training.state import State
from flowtrain.training.step import optimizer_step, train_step


def trained(config: Config, data: DataSet) -> tuple[State, list[float]]:
    """Trains to the end. Returns the processor seconds of each step, too.

    Every hundred steps there is a line on standard error: their mean loss.
    """
    device = torch.device("cpu")
    flow = build_flow(config, data.shape, data.num_bins)
    batches = Batches(data, config, config.train.batch_size * config.train.accumulate, device)
    state = start(config, flow, {}, None, None, batches)
    progress = state.progress
    losses: list[Tensor] = []
    seconds: list[float] = []
    while not state.reached_end(progress.seconds):
        began = time.process_time()
        x, labels = batches.at(progress)
        loss, gradient = train_step(state, x, labels)
        state.set_learning_rate(learning_rate(config.train, progress.step, progress.seconds))
        optimizer_step(state, gradient)
        losses.append(loss)
        progress.step += 1
        progress.images += batches.all_processes
        seconds.append(time.process_time() - began)
        progress.seconds += seconds[-1]
        if progress.step % 100 == 0:
            mean = torch.stack(losses[-100:]).mean()
            print(f"step {progress.step}: {mean:.4f}", file=sys.stderr, flush=True)
    batches.close()
    return state, seconds


def row(settings: Sequence[str], config: Config) -> str:
    data = DataSet(config.data)
    state, seconds = trained(config, data)
    loss = mean_loss(state.ema_flow, data.split("validation"), seed=config.seed)
    weights = sum(parameter.numel() for parameter in state.flow.parameters())
    progress = state.progress
    shown = ", ".join(f"`{setting}`" for setting in settings)
    quick = sorted(seconds)[len(seconds) // 10]
    return (
        f"| {shown} | {config.seed} | {weights:,} | {progress.step:,} | {progress.images:,} | "
        f"{progress.seconds:.0f} | {1000 * quick:.0f} | {loss:.4f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="glow_cifar_small.yaml", help="a file in configs/")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=float, help="of the processor, for each row")
    length.add_argument("--steps", type=int, help="for each row, whatever they take")
    parser.add_argument("--threads", type=int, default=1, help="threads of one operation")
    parser.add_argument("--set", action="append", default=[], help="a setting of all rows")
    parser.add_argument(
        "--try", action="append", dest="rows", metavar="SETTINGS", help="the settings of a row"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each row for each seed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    budget = f"train.num_steps={options.steps}"
    if options.seconds:
        budget = f"train.budget={options.seconds}s"
    heading(f"{options.config}: {budget}", options.threads)
    print("| settings | seed | parameters | steps | images | seconds | ms of a step | validation |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for seed in options.seeds:
        for settings in map(shlex.split, options.rows or [""]):
            words = [*options.set, *settings, f"seed={seed}", budget]
            config = configuration.load_config(find_config(options.config), words)
            print(row(settings, config), flush=True)


if __name__ == "__main__":
    main()

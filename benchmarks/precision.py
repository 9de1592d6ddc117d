"""What bf16 conditioners cost in likelihood. This trains with fp32 and with bf16 for equal steps,
with two seeds each.

It then evaluates the weights of each model with float32 and with bf16 conditioners on the
validation images. For CIFAR-10: `python benchmarks/precision.py --config glow_cifar_small.yaml
--set data.name=npz --set data.path=cifar10.npz`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import arguments, heading

from flowtrain import config as configuration
from flowtrain.checkpoints.load import load_model
from flowtrain.cli import configs
from flowtrain.data.splits import DataSet
from flowtrain.evaluation.score import mean_loss
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory

CPU = torch.device("cpu")


def main() -> None:
    parser = arguments(__doc__, config="glow_digits.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        help="a key of the configuration, as for flowtrain train",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heading(
        f"Likelihood of bf16 conditioners: {options.config} {' '.join(options.set)}",
        options.threads,
    )
    print(
        "| trained with | seed | steps | evaluated in float32 | evaluated with bf16 | difference |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "bf16"):
            for seed in (0, 1):
                _row(options, precision, seed, Path(folder) / f"{precision}-{seed}")


def _row(options: argparse.Namespace, precision: str, seed: int, run: Path) -> None:
    overrides = [*options.set, f"train.precision={precision}", f"seed={seed}"]
    config = configuration.load_config(configs.find_config(options.config), overrides)
    fit(config, RunDirectory(run), CPU)
    model = load_model(str(run / "checkpoints" / "last.safetensors"), CPU)
    images = DataSet(model.config.data).split("validation")
    bits = mean_loss(model.flow, images)
    with torch.autocast("cpu", torch.bfloat16):
        low = mean_loss(model.flow, images)
    step = model.checkpoint.meta["step"]
    print(
        f"| {precision} | {seed} | {step} | {bits:.4f} | {low:.4f} | {low - bits:+.4f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()

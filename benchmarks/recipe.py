"""The final comparison of recipes. It trains each configuration for its budget, then reads the test
split once.

`python benchmarks/recipe.py` prints a table of test bits/dim. `--picture FILE.png` draws validation
bits/dim against time, and `--scaling FILE.png` test bits/dim against FLOPs. All recipes take six
hours; `--only NAME...` runs some of them. A run that
exists is resumed. `--cifar` and `--mnist` say where the data lie, as `--set` of `flowtrain train`
does.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import flowtrain, heading, pyplot

from flowtrain.config import load_config
from flowtrain.system.console import duration
from flowtrain.training.dry_run import dry_run


@dataclass(frozen=True)
class Recipe:
    dataset: str
    title: str
    config: str
    settings: tuple[str, ...] = ()


DATASETS = {"cifar": "CIFAR-10", "mnist": "MNIST"}
RECIPES = {
    "cifar-baseline": Recipe(
        "cifar", "the usual recipe (baseline_cifar.yaml)", "baseline_cifar.yaml"
    ),
    "cifar": Recipe("cifar", "Glow", "glow_cifar_small.yaml"),
    "cifar-3min": Recipe("cifar", "Glow, 3 min", "glow_cifar_small.yaml", ("train.budget=3min",)),
    "cifar-causal": Recipe("cifar", "causal", "causal_cifar_small.yaml"),
    "cifar-causal-5min": Recipe(
        "cifar",
        "causal, 5 min",
        "causal_cifar_small.yaml",
        ("train.budget=5min", "model.width=160"),
    ),
    "cifar-causal-15min": Recipe(
        "cifar", "causal, 15 min", "causal_cifar_small.yaml", ("train.budget=15min",)
    ),
    "cifar-causal-90min": Recipe(
        "cifar",
        "causal, 90 min",
        "causal_cifar_small.yaml",
        (
            "train.budget=90min",
            "model.width=224",
            "model.units=48",
            "train.validate_every=2000",
            "train.sample_every=10000",
        ),
    ),
    "cifar-tarflow": Recipe("cifar", "TarFlow", "tarflow_cifar_small.yaml"),
    "cifar-jet": Recipe("cifar", "Jet", "jet_cifar_small.yaml"),
    "mnist-tarflow": Recipe("mnist", "TarFlow", "tarflow_mnist_small.yaml"),
    "mnist-causal": Recipe("mnist", "causal", "causal_mnist_small.yaml"),
    "mnist": Recipe(
        "mnist", "uniform dequantization", "glow_mnist_small.yaml", ("dequantization.name=uniform",)
    ),
    "mnist-variational": Recipe(
        "mnist",
        "variational dequantization",
        "glow_mnist_small.yaml",
        ("dequantization.name=variational",),
    ),
}


# Published models of CIFAR-10: training FLOPs, bits/dim. docs/results.md says where they come from.
PUBLISHED = {"PixelCNN++": (1.5e18, 2.92), "Sparse Transformer": (7.5e18, 2.80)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="which recipes"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/recipe"), help="where the run directories are"
    )
    for dataset, name in DATASETS.items():
        parser.add_argument(
            f"--{dataset}",
            action="append",
            default=[],
            metavar="data.KEY=VALUE",
            help=f"for the recipes of {name}",
        )
    parser.add_argument("--picture", help="a PNG of validation bits/dim against time")
    parser.add_argument("--scaling", help="a PNG of test bits/dim of CIFAR-10 against FLOPs")
    options = parser.parse_args()
    heading("Bits per dimension for equal time", torch.get_num_threads())
    print("| recipe | configuration | budget | images seen | test bits/dim | validation |")
    print("|---|---|---|---|---|---|", flush=True)
    runs = {name: options.runs / name for name in options.only}
    for name, run in runs.items():
        recipe = RECIPES[name]
        settings = [*recipe.settings, *getattr(options, recipe.dataset)]
        flowtrain("train", "--config", recipe.config, *settings, "--run-dir", str(run))
        result = run / "evaluate-test.json"
        if not result.exists():
            flowtrain("evaluate", str(run), "--json", str(result))
        print(_row(recipe, run, json.loads(result.read_text())), flush=True)
    if options.picture:
        _draw(runs, options.picture)
    if options.scaling:
        _draw_scaling(runs, options.scaling)


def _row(recipe: Recipe, run: Path, test: dict[str, Any]) -> str:
    summary = json.loads((run / "summary.json").read_text())
    changes = "".join(f" `{setting}`" for setting in recipe.settings)
    title = f"{DATASETS[recipe.dataset]}, {recipe.title}"
    return (
        f"| {title} | `{recipe.config}`{changes} | {duration(summary['seconds'])} | "
        f"{summary['images']:,} "
        f"| {test['bits_per_dim']:.3f} +- {test['bits_per_dim_stderr']:.3f} "
        f"| {summary['best_validation_bits_per_dim']:.3f} |"
    )


def curve(run: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Minutes of training, and validation bits/dim."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "validation" and row["bits_per_dim"] is not None]
    return [row["seconds"] / 60 for row in rows], [row["bits_per_dim"] for row in rows]


def _draw(runs: dict[str, Path], path: str) -> None:
    sets = sorted({RECIPES[name].dataset for name in runs})
    figure, panels = pyplot().subplots(
        1, len(sets), figsize=(6.5 * len(sets), 4.5), layout="constrained", squeeze=False
    )
    for axes, dataset in zip(panels[0], sets, strict=True):
        for name, run in runs.items():
            if RECIPES[name].dataset == dataset:
                axes.plot(*curve(run), ".-", label=RECIPES[name].title)
        axes.set(
            title=DATASETS[dataset], xlabel="minutes of training", ylabel="validation bits/dim"
        )
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def training_flops(run: Path) -> float:
    """All products and convolutions of a run's training steps."""
    cost = dry_run(load_config(run / "config.yaml"), torch.device("cpu"))
    seen: int = json.loads((run / "summary.json").read_text())["images"]
    return cost.compute.step_flops / cost.images * seen


def _draw_scaling(runs: dict[str, Path], path: str) -> None:
    figure, axes = pyplot().subplots(figsize=(6.5, 4.5), layout="constrained")
    points = {
        RECIPES[name].title: (
            training_flops(run),
            json.loads((run / "evaluate-test.json").read_text())["bits_per_dim"],
        )
        for name, run in runs.items()
        if RECIPES[name].dataset == "cifar"
    }
    for names, marker in ((points, "o"), (PUBLISHED, "s")):
        axes.plot(*zip(*names.values(), strict=True), marker, linestyle="none")
        for name, point in names.items():
            axes.annotate(
                name, point, xytext=(5, 4), textcoords="offset points", rotation=20, fontsize=8
            )
    axes.margins(0.4, 0.4)
    axes.set(xscale="log", xlabel="FLOPs of training", ylabel="test bits/dim", title="CIFAR-10")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""Attributes of MNIST digits by labels that are computed from the pixels: thick against thin by
ink, and tilted right against left by second moments.

`python benchmarks/attributes_mnist.py RUN --out FOLDER` writes the first test images and a table of
their labels into FOLDER, and runs `flowtrain attributes` on them: once as they are, and once each
direction orthogonal to the other. It prints the accuracies, and draws paths along both. Any model
of digits on black will do.
"""

import argparse
import csv
from pathlib import Path

import torch
from common import flowtrain
from torch import Tensor

from flowtrain import config as configuration
from flowtrain.checkpoints.load import load_model
from flowtrain.data.splits import DataSet
from flowtrain.pictures.grid import to_8bit
from flowtrain.pictures.lossless import encoded


def ink(x: Tensor) -> Tensor:
    """The mean level of images `(N, 1, H, W)`: `(N,)`."""
    return x.double().flatten(1).mean(dim=1)


def tilt(x: Tensor) -> Tensor:
    """How far a row moves to the right for each row upwards, `(N,)`: the covariance of column and
    row over the variance of the row, both weighted by ink.
    """
    weights = x[:, 0].double()
    weights = weights / weights.sum(dim=(1, 2), keepdim=True).clamp_min(1e-9)
    rows = -torch.arange(weights.shape[1], dtype=torch.float64)[:, None]
    columns = torch.arange(weights.shape[2], dtype=torch.float64)[None]
    row = (weights * rows).sum(dim=(1, 2))[:, None, None]
    column = (weights * columns).sum(dim=(1, 2))[:, None, None]
    both = (weights * (rows - row) * (columns - column)).sum(dim=(1, 2))
    return both / (weights * (rows - row).square()).sum(dim=(1, 2)).clamp_min(1e-9)


def write(folder: Path, x: Tensor, levels: int) -> Path:
    """Writes images as PNG files and their labels, each the upper half by its measure."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = {name: (m := measure(x)) > m.median() for name, measure in MEASURES.items()}
    table = folder / "labels.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *labels])
        for i, image in enumerate(to_8bit(x, levels)):
            (folder / f"{i:05}.png").write_bytes(encoded(image, "PNG"))
            writer.writerow([f"{i:05}.png", *(int(each[i]) for each in labels.values())])
    return table


MEASURES = {"thick": ink, "tilted": tilt}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("runs/attributes"))
    parser.add_argument("--num-images", type=int, default=4000)
    parser.add_argument("--set", action="append", default=[], metavar="data.KEY=VALUE")
    options = parser.parse_args()
    model = load_model(options.model, torch.device("cpu"))
    values = configuration.override(dict(model.checkpoint.meta["config"]), options.set)
    x = DataSet(configuration.parse(values).data).split("test").take(slice(0, options.num_images))
    assert model.flow.levels is not None
    table = write(options.out / "images", x, model.flow.levels)
    count = ["--num-images", str(options.num_images)]
    moved = [word for each in options.set for word in ("--set", each)]
    flowtrain("attributes", options.model, "--csv", str(table), *count, "--orthogonal")
    flowtrain("attributes", options.model, "--csv", str(table), *count)
    for name in MEASURES:
        for strength in (2, -2):
            out = options.out / f"{name}{strength:+d}.png"
            words = ["--along", name, "--strength", str(strength), "--out", str(out)]
            flowtrain("interpolate", options.model, *words, *moved)


if __name__ == "__main__":
    main()

"""A model of images given a part of them (`model.context`), beside what needs no model.

`python benchmarks/conditional.py runs/srflow_cifar_small` prints the bits/dim of test images given
their part, and how near the mean of 16 samples is to the truth: the mean PSNR over images, in dB,
beside bicubic interpolation, or beside the grey image itself. The picture has a row for each of
eight images: what is given, the baseline, the truth, and five samples.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowtrain import config as configuration
from flowtrain.checkpoints.load import load_model, run_of
from flowtrain.data.splits import DataSet
from flowtrain.evaluation.evaluate import evaluate
from flowtrain.flow.flow import Flow
from flowtrain.pictures import grid
from flowtrain.pictures.sample import sample
from flowtrain.system.console import figure

AVERAGED = 16  # samples
ROWS, SHOWN = 8, 5  # images of the picture, and samples of each


def baseline(flow: Flow, contexts: Tensor) -> tuple[str, Tensor]:
    """The name of the baseline, and its images `(B, C, H, W)`."""
    context = flow.image_context
    assert context is not None
    if context.kind == "grey":
        return "the grey image", context.shown(contexts)
    _, height, width = flow.shape
    bicubic = [
        Image.fromarray(channel).resize((width, height), Image.Resampling.BICUBIC)
        for channel in contexts.flatten(0, 1).numpy()
    ]
    enlarged = torch.from_numpy(np.stack([np.asarray(channel) for channel in bicubic]))
    return "bicubic interpolation", enlarged.unflatten(0, contexts.shape[:2])


def psnr(flow: Flow, found: Tensor, truth: Tensor) -> tuple[float, float]:
    """The mean over images in dB, with its standard error."""
    assert flow.levels is not None
    squared = (found.double() - truth.double()).square().flatten(1).mean(dim=1).clamp_min(1e-6)
    decibels = 10 * torch.log10((flow.levels - 1) ** 2 / squared)
    return decibels.mean().item(), (decibels.std() / len(decibels) ** 0.5).item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run directory or a checkpoint")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], help="data.KEY=VALUE"
    )
    parser.add_argument("--num-images", type=int, default=1000, help="test images, for bits/dim")
    parser.add_argument("--psnr-images", type=int, default=100, help="test images, for PSNR")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="the picture; conditional.png in the run")
    options = parser.parse_args()
    model = load_model(options.model, torch.device("cpu"))
    values = configuration.override(model.checkpoint.meta["config"], options.settings)
    data = DataSet(configuration.parse(values, "--set").data)
    flow = model.flow
    result, _ = evaluate(model, data, "test", num_images=options.num_images)
    print(
        f"{figure(*result.loss)} bits/dim given {result.given}, {result.num_images:,} test images"
    )

    truth = data.split("test").take(slice(0, options.psnr_images))
    contexts = flow.context_of(truth)
    assert contexts is not None
    drawn = sample(flow, AVERAGED, [options.temperature], 0, contexts=contexts)
    drawn = drawn.unflatten(0, (len(truth), AVERAGED))
    name, plain = baseline(flow, contexts)
    rows = {
        f"mean of {AVERAGED} samples": drawn.double().mean(dim=1),
        "one sample": drawn[:, 0],
        name: plain,
    }
    print(f"PSNR of {len(truth)} test images, temperature {options.temperature:g}:")
    for what, images in rows.items():
        value, error = psnr(flow, images, truth)
        print(f"  {what:24} {value:.2f} +- {error:.2f} dB")
    context = flow.image_context
    assert context is not None and flow.levels is not None
    given = context.shown(contexts)
    columns = [given, plain, truth, *drawn[:, :SHOWN].unbind(1)]
    picture = torch.stack([column[:ROWS] for column in columns], dim=1).flatten(0, 1)
    path = options.out or run_of(model.checkpoint.path) / "conditional.png"
    grid.save_png(path, grid.grid(picture, flow.levels, len(columns)))
    print(f"{path}: given, {name}, truth, {SHOWN} samples")


if __name__ == "__main__":
    main()

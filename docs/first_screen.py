"""Draws the moving picture of the README: a 4 becomes a 9, and its bits light up.

`python docs/first_screen.py --set data.root=DIR` writes docs/first_screen.gif, with MNIST in DIR.
It is what `flowtrain explore glow_mnist_conditional` shows, with its slider between two classes.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowtrain.checkpoints.load import load_model
from flowtrain.cli.base import data_of
from flowtrain.flow.flow import Flow
from flowtrain.latents import paths
from flowtrain.pictures.grid import gif
from flowtrain.tools.explore.accounts import account

MODEL = "glow_mnist_conditional"
STEPS = 24
OUT = Path(__file__).with_name("first_screen.gif")
COLOURS = {"vmin": -2, "vmax": 12}  # bits of a pixel


def frame(flow: Flow, image: Tensor, t: float) -> Image.Image:
    found = account(flow, image[None], torch.full((1, *flow.shape), 0.5))
    figure, axes = plt.subplots(1, 2, figsize=(3.6, 2.1), dpi=100)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.16, wspace=0.04)
    axes[0].imshow(image[0], cmap="gray")
    axes[1].imshow(found.map, cmap="inferno", **COLOURS)
    for each, title in zip(axes, ("an image", "bits of each pixel"), strict=True):
        each.set_title(title, fontsize=9, pad=3)
        each.axis("off")
    slider = figure.add_axes((0.1, 0.05, 0.55, 0.06))
    slider.plot([0, 1], [0, 0], color="0.7", linewidth=3, solid_capstyle="round")
    slider.plot([t], [0], "o", color="tab:orange", markersize=9)
    slider.text(-0.07, 0, "4", ha="center", va="center", fontsize=10)
    slider.text(1.07, 0, "9", ha="center", va="center", fontsize=10)
    slider.set(xlim=(-0.1, 1.1), ylim=(-1, 1))
    slider.axis("off")
    figure.text(0.98, 0.055, f"{found.total:.2f} bits/dim", ha="right", fontsize=9)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
    plt.close(figure)
    return Image.fromarray(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="data.KEY=VALUE")
    parser.add_argument("--index", type=int, default=0, help="which test image of a 4")
    options = parser.parse_args()
    plt.switch_backend("agg")
    model = load_model(MODEL, torch.device("cpu"))
    flow, data = model.flow, data_of(model, options.set)
    latents = paths.of_classes(flow, data, 4, 9, options.index + 1, STEPS)[options.index :]
    images = paths.decoded(flow, latents)[0]
    frames = [frame(flow, image, step / (STEPS - 1)) for step, image in enumerate(images)]
    hold = 6  # frames at each end
    OUT.write_bytes(gif([frames[0]] * hold + frames + [frames[-1]] * hold + frames[::-1]))


if __name__ == "__main__":
    main()

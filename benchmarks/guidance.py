"""Are samples with guidance digits of their class, and how much do they differ? A classifier of
pixels judges them, for constant weights and for weights that grow along the tokens.

`python benchmarks/guidance.py runs/tarflow_mnist_pictures --set data.root=DIR`. The samples of all
weights have the same latents.
"""

import argparse

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from flowtrain.bijections.context import Guidance
from flowtrain.checkpoints.load import load_model
from flowtrain.cli.base import data_of
from flowtrain.pictures.sample import sample

WEIGHTS = (0.5, 1.0, 2.0, 3.0)
TRAINED_ON = 10_000  # images, of the classifier


def pixels(x: Tensor) -> np.ndarray:
    return x.flatten(1).numpy() / 255


def spread(x: Tensor, labels: np.ndarray) -> float:
    """The standard deviation of a pixel within a class, the root of its mean square over all."""
    variances = [pixels(x[labels == label]).var(axis=0, ddof=1).mean() for label in set(labels)]
    return float(np.sqrt(np.mean(variances)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--num-images", type=int, default=20, help="for each class")
    parser.add_argument("--set", action="append", default=[], help="keys of data")
    options = parser.parse_args()
    loaded = load_model(options.model, torch.device("cpu"))
    data, flow = data_of(loaded, options.set), loaded.flow
    train, test = data.split("train"), data.split("test")
    assert train.labels is not None and test.labels is not None
    some = slice(TRAINED_ON)
    judge = SVC(C=10).fit(pixels(train.take(some)), train.labels[some].numpy())
    x, labels = test.take(slice(1000)), test.labels[:1000].numpy()
    right = judge.score(pixels(x), labels)
    print(f"test images: {right:.3f} right, spread {spread(x, labels):.3f}")
    print("| weight | right, constant | right, growing | spread, constant | spread, growing |")
    print("|---|---|---|---|---|")
    asked = np.repeat(np.arange(flow.classes), options.num_images)
    for weight in (0.0, *WEIGHTS):
        found = []
        for grows in (False, True):
            drawn = sample(
                *(flow, options.num_images, [1.0], 0),
                classes=range(flow.classes),
                guidance=Guidance(weight, grows),
                denoise=flow.dequantizer.sigma is not None,
            )
            found.append((judge.score(pixels(drawn), asked), spread(drawn, asked)))
        rows = [f"{value:.3f}" for of_each in zip(*found, strict=True) for value in of_each]
        print(f"| {weight:g} | {' | '.join(rows)} |", flush=True)


if __name__ == "__main__":
    main()

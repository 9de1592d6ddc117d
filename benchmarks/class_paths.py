"""Do paths from one class end at the other? Judged by a classifier of pixels, for each share of
what an image has beyond the mean of its class (`latents.paths.KEPT`).

`python benchmarks/class_paths.py` takes the 8x8 digits, `glow_digits`, and all pairs of classes.
"""

import argparse
import itertools

import numpy as np
import torch
from sklearn.svm import SVC

from flowtrain.checkpoints.load import load_model
from flowtrain.data.splits import DataSet
from flowtrain.latents import paths
from flowtrain.latents.encoding import encode
from flowtrain.pictures.sample import decode

SHARES = (1.0, 0.85, 0.7, 0.5, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="glow_digits")
    model = load_model(parser.parse_args().model, torch.device("cpu"))
    flow, data = model.flow, DataSet(model.config.data)
    train, test = data.split("train"), data.split("test")
    assert train.labels is not None and test.labels is not None and flow.levels is not None
    scale = flow.levels - 1

    def pixels(x: torch.Tensor) -> np.ndarray:
        return x.flatten(1).numpy() / scale

    judge = SVC().fit(pixels(train.take(slice(None))), train.labels.numpy())
    accuracy = judge.score(pixels(test.take(slice(None))), test.labels.numpy())
    print(f"the classifier is right about {accuracy:.3f} of the test images")
    z = {
        part: [
            encode(flow, paths.of_class(split, label, 1, "").take(slice(None)))
            for label in range(10)
        ]
        for part, split in (("train", train), ("test", test))
    }

    def mean(label: int) -> torch.Tensor:
        return z["train"][label].mean(dim=0)

    lowest = paths.lowest_typical(flow, test)
    for kept in SHARES:
        paths.KEPT = kept
        right: list[bool] = []
        typical: list[bool] = []
        for first, second in itertools.permutations(range(10), 2):
            rows = paths.between_classes(flow, z["test"][first], first, second, mean, 2)
            ends = decode(flow, rows[:, 1])
            right += (judge.predict(pixels(ends)) == second).tolist()
            typical += (paths.log_probs(flow, ends) >= lowest).tolist()
        error = np.std(right) / len(right) ** 0.5
        print(
            f"kept {kept:4.2f}: {np.mean(right):.3f} +- {error:.3f} end at the other class, "
            f"{np.mean(typical):.3f} are as likely as test images",
            flush=True,
        )


if __name__ == "__main__":
    main()

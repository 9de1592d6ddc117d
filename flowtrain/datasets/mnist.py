"""MNIST handwritten digits: LeCun, Bottou, Bengio & Haffner, 1998."""

from pathlib import Path

from flowtrain.datasets import torchvision_source
from flowtrain.datasets.base import Images, Part


def build(root: Path, split: Part, *, seed: int = 0) -> Images:
    """1x28x28 images: 60,000 for training, 10,000 for test, under `root/MNIST/raw`."""
    return torchvision_source.idx("MNIST", root, split)

"""CIFAR-10: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009."""

from pathlib import Path

from flowtrain.datasets import torchvision_source
from flowtrain.datasets.base import Images, Part


def build(root: Path, split: Part, *, seed: int = 0) -> Images:
    """3x32x32 images: 50,000 for training, 10,000 for test; `root/cifar-10-batches-py`."""
    return torchvision_source.cifar(
        "CIFAR10", root, split, "cifar-10-python.tar.gz", "cifar-10-batches-py"
    )

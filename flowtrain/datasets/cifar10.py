"""CIFAR-10: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009."""

from pathlib import Path

from flowtrain.datasets import torchvision_source
from flowtrain.datasets.base import Images, Split

COUNTS = {"train": 50000, "test": 10000}


def build(root: Path, split: Split, *, seed: int = 0) -> Images:
    """3x32x32 images: 50,000 for training, 10,000 for test; `root/cifar-10-batches-py`."""
    return torchvision_source.images(
        "CIFAR10",
        root,
        shape=(3, 32, 32),
        count=COUNTS[split],
        load=lambda cls, r: cls(r, train=split == "train", download=True).data.transpose(
            0, 3, 1, 2
        ),
        labels=lambda cls, r: cls(r, train=split == "train", download=True).targets,
        urls=lambda cls: [cls.url],
        files=["cifar-10-python.tar.gz"],
        unpacked=["cifar-10-batches-py"],
        flip=True,
    )

"""Fashion-MNIST, clothes in the format of MNIST: Xiao, Rasul & Vollgraf, arXiv:1708.07747."""

from pathlib import Path

from flowtrain.datasets import torchvision_source
from flowtrain.datasets.base import Images, Split

COUNTS = {"train": 60000, "test": 10000}
SIZES = torchvision_source.IDX_SIZES


def build(root: Path, split: Split, *, seed: int = 0) -> Images:
    """1x28x28 images: 60,000 for training, 10,000 for test, under `root/FashionMNIST/raw`."""
    return torchvision_source.images(
        "FashionMNIST",
        root,
        shape=(1, 28, 28),
        count=COUNTS[split],
        load=lambda cls, r: cls(r, train=split == "train", download=True).data.numpy()[:, None],
        labels=lambda cls, r: cls(r, train=split == "train", download=True).targets,
        urls=lambda cls: cls.mirrors,
        folder="FashionMNIST/raw",
        files=[f"{file}.gz" for file in SIZES],
        unpacked=SIZES,
        sizes=SIZES,
    )

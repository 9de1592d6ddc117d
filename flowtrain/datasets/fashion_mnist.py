"""Fashion-MNIST, clothes in the format of MNIST: Xiao, Rasul & Vollgraf, arXiv:1708.07747."""

from pathlib import Path

from flowtrain.datasets import torchvision_source
from flowtrain.datasets.base import Images, Part


def build(root: Path, split: Part, *, seed: int = 0) -> Images:
    """1x28x28 images: 60,000 for training, 10,000 for test, under `root/FashionMNIST/raw`."""
    return torchvision_source.idx("FashionMNIST", root, split)

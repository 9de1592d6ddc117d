"""Street View House Numbers, cropped digits: Netzer et al., 2011 (without the `extra` images)."""

from pathlib import Path

from flowtrain.datasets import torchvision_source
from flowtrain.datasets.base import Images, Split

COUNTS = {"train": 73257, "test": 26032}


def build(root: Path, split: Split, *, seed: int = 0) -> Images:
    """3x32x32 images: 73,257 for training, 26,032 for test; `root/<split>_32x32.mat`."""
    file = f"{split}_32x32.mat"
    return torchvision_source.images(
        "SVHN",
        root,
        shape=(3, 32, 32),
        count=COUNTS[split],
        load=lambda cls, r: cls(r, split=split, download=True).data,
        labels=lambda cls, r: cls(r, split=split, download=True).labels,
        urls=lambda cls: [cls.split_list[split][0]],
        files=[file],
        unpacked=[file],
    )

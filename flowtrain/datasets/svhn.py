"""Street View House Numbers, cropped digits: Netzer et al., 2011 (without the `extra` images)."""

from pathlib import Path
from typing import Any

from flowtrain.datasets import torchvision_source
from flowtrain.datasets.base import Images, Part

COUNTS = {"train": 73257, "test": 26032}


def build(root: Path, split: Part, *, seed: int = 0) -> Images:
    """3x32x32 images: 73,257 for training, 26,032 for test; `root/<split>_32x32.mat`."""

    def read(source: Any, home: str) -> tuple[Any, Any]:
        data = source(home, split=split, download=True)
        return data.data, data.labels

    file = f"{split}_32x32.mat"
    return torchvision_source.images(
        "SVHN",
        root,
        torchvision_source.Files([file], {file: None}),
        (3, 32, 32),
        COUNTS[split],
        read,
        lambda source: [source.split_list[split][0]],
    )

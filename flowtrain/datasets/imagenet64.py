"""ImageNet in 64x64 pixels, in one of the two versions that circulate."""

from pathlib import Path

from flowtrain.datasets import imagenet
from flowtrain.datasets.base import Images, Part
from flowtrain.datasets.imagenet import Version


def build(root: Path, split: Part, *, seed: int = 0, version: Version) -> Images:
    """3x64x64 images: 1.28 million for training, 50,000 for test; `root/imagenet64`.

    Args:
        version: Which of two data sets this is. Their bits/dim do not compare. `oord2016` is that
            of van den Oord et al. (PixelRNN, Glow), with 49,999 test images. `chrabaszcz2017` is
            that of Chrabaszcz et al., with classes and 50,000 test images.

    The official validation images are the test split.
    """
    return imagenet.images(root, split, 64, version)

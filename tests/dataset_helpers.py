"""What the tests of data sets share."""

import numpy as np

from flowtrain.config import Data, component


def build(name, *arguments, **options):
    return component(Data, name).build(*arguments, **options)


def check(images, count=None):
    """What every data set promises about its pixels; returns those of this part."""
    pixels = images.read()
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert pixels.shape[1:] == images.shape and pixels.max() < images.levels
    pixels = pixels if images.rows is None else pixels[images.rows()]
    assert count is None or len(pixels) == count
    return pixels


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def corrupt(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])

"""Lossless formats: the bytes that they need, and that they give every pixel back."""

import importlib.util
import io
import math

import numpy as np
import pytest
import torch
from helpers import images
from PIL import Image

from flowtrain.pictures import lossless
from flowtrain.pictures.lossless import complexity, decoded, encoded, formats

WEBP = {"format": "WEBP", "lossless": True, "quality": 100, "method": 2, "exact": True}
NAMES = ["PNG", "WEBP"] + ["JXL"] * bool(importlib.util.find_spec("pillow_jxl"))


@pytest.mark.parametrize("shape", [(1, 9, 7), (3, 8, 8)])
def test_complexity_is_the_shorter_code(shape, monkeypatch):
    """Without the constant bytes. In a PNG they are its signature, IHDR, IEND, and IDAT's frame."""
    pixels = np.stack([*images(3, shape).numpy(), np.zeros(shape, "u1")])
    sizes = []
    for x in pixels:
        picture = Image.fromarray(x[0] if shape[0] == 1 else x.transpose(1, 2, 0))
        for options, container in (({"format": "PNG", "optimize": True}, 57), (WEBP, 20)):
            buffer = io.BytesIO()
            picture.save(buffer, **options)
            sizes.append(buffer.tell() - container)
    expected = np.array(sizes).reshape(-1, 2) * 8 / math.prod(shape)
    assert complexity(pixels).tolist() == expected.min(axis=1).tolist()
    assert expected[3].min() < 0.25 * expected[0].min()
    monkeypatch.delitem(Image.SAVE, "WEBP")
    assert lossless.coders() == ["PNG"] and complexity(pixels).tolist() == expected[:, 0].tolist()


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 6, 5)])
def test_what_is_decoded_is_what_was_encoded(name, shape, slow):
    assert name in formats()
    image = images(1, shape)[0]
    data = encoded(image, name, slow)
    assert torch.equal(decoded(data, shape, [name]), image)
    with pytest.raises(ValueError, match="no picture of the format"):
        decoded(data, shape, [other for other in formats() if other != name])

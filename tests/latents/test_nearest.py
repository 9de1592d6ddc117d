"""The training images that are nearest to others."""

import numpy as np
import pytest
import torch
from helpers import images

from flowtrain.data.splits import Split
from flowtrain.latents.nearest import CHUNK, nearest_images


@pytest.mark.parametrize("pixels, levels, parts", [(1, 256, 40), (7 * 48, 256, 6), (CHUNK, 32, 1)])
def test_nearest_is_that_of_all_distances(pixels, levels, parts):
    split = Split(images(50, (3, 4, 4)).numpy(), np.arange(40, 0, -1), levels)
    calls = []
    queries = torch.cat([images(5, (3, 4, 4), levels, seed=1), split.take(slice(12, 13))])
    found, positions = nearest_images(queries, split, levels, 3, lambda: calls.append(1), pixels)
    flat = (x.flatten(1).double() for x in (queries, split.take(slice(None))))
    expected, where = (torch.cdist(*flat) / (levels - 1)).topk(3, largest=False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(positions, where) and len(calls) == parts
    assert found[5, 0] == 0 and positions[5, 0] == 12


def test_nearest_of_few_images_is_all_of_them():
    split = Split(images(2, (1, 2, 2)).numpy(), np.arange(2))
    distances, positions = nearest_images(images(4, (1, 2, 2), seed=1), split, 256, 3)
    assert distances.shape == positions.shape == (4, 2) and sorted(positions[0].tolist()) == [0, 1]

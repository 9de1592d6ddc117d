"""The training images that are nearest to others."""

import numpy as np
import pytest
import torch
from helpers import images

from flowtrain.data.splits import Split
from flowtrain.latents import nearest
from flowtrain.latents.nearest import nearest_images


@pytest.mark.parametrize("chunk, drop_bits", [(1, 0), (7 * 48, 0), (2**22, 3)])
def test_nearest_is_that_of_all_distances(chunk, drop_bits, monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK", chunk)
    split = Split(images(50, (3, 4, 4)).numpy(), np.arange(40, 0, -1), drop_bits)
    levels = 256 >> drop_bits
    queries = torch.cat([images(5, (3, 4, 4), levels, seed=1), split.take(slice(12, 13))])
    distances, positions = nearest_images(queries, split, levels, 3)
    every = torch.cdist(
        queries.flatten(1).double(), split.take(slice(None)).flatten(1).double()
    ) / (levels - 1)
    expected, where = every.topk(3, largest=False)
    torch.testing.assert_close(distances, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(positions, where)
    assert distances[5, 0] == 0 and positions[5, 0] == 12


def test_parts_are_asked_for_and_may_be_small():
    split = Split(images(50, (3, 4, 4)).numpy(), np.arange(50), 0)
    queries, calls = images(2, (3, 4, 4), seed=1), []
    found = nearest_images(queries, split, 256, 3, lambda: calls.append(1), 480)
    for one, other in zip(found, nearest_images(queries, split, 256, 3), strict=True):
        assert torch.equal(one, other)
    assert len(calls) == 5


def test_nearest_of_few_images_is_all_of_them():
    split = Split(images(2, (1, 2, 2)).numpy(), np.arange(2), 0)
    distances, positions = nearest_images(images(4, (1, 2, 2), seed=1), split, 256, 3)
    assert distances.shape == positions.shape == (4, 2) and sorted(positions[0].tolist()) == [0, 1]

"""Grids of images."""

import pytest
import torch
from torchvision.utils import make_grid

from flowtrain.pictures import grid


@pytest.mark.parametrize(
    "count, channels, columns", [(64, 3, 8), (7, 1, 3), (2, 3, 5), (5, 1, 1), (1, 1, 4), (1, 3, 1)]
)
def test_a_grid_is_that_of_torchvision(count, channels, columns):
    x = torch.randint(0, 256, (count, channels, 40, 33), dtype=torch.uint8)
    expected = make_grid(x, nrow=columns, padding=2, pad_value=64)
    assert torch.equal(grid.grid(x, 256, columns), expected)

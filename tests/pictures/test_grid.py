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
    picture = grid.grid(x, 256, columns)
    factor = 1 if count == 1 else -(-800 // (33 * min(columns, count)))
    assert count == 1 or picture.shape[2] >= 800
    enlarged = x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    assert torch.equal(picture, make_grid(enlarged, nrow=columns, padding=2, pad_value=64))

"""Heat maps: the formula, and models without them."""

import math

import numpy as np
import pytest
import torch
from helpers import images, tiny_flow
from torch.distributions import Independent, Normal

from flowtrain.errors import UserError
from flowtrain.evaluation.heat import FLOOR, HeatMaps, picture
from flowtrain.evaluation.places import by_place
from flowtrain.foreign.contract import Foreign
from flowtrain.foreign.model import ForeignModel
from flowtrain.system.random import Stream, uniform


def box(maps):
    """The mean of 3x3 pixels, of fewer at the edges."""
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.nanmean(windows, axis=(-1, -2))


@pytest.mark.parametrize("name", ["glow", "causal"])
@pytest.mark.parametrize("classes", [0, 3])
def test_the_heat_is_the_deviation_of_the_bits(name, classes):
    flow, x = tiny_flow(name, (3, 8, 8), classes=classes), images(20, (3, 8, 8))

    def bits(x):
        noise = uniform(x.shape, 5, Stream.EVALUATION)
        labels = flow(x, noise).by_class.argmax(dim=1) if classes else None
        places, _ = by_place(flow, x, noise, labels)
        whole = np.zeros((len(x), 8, 8))
        for (side, _), each in places.items():
            whole -= np.kron(each.numpy(), np.ones((1, 8 // side, 8 // side)))
        return whole

    with torch.no_grad():
        training, others = bits(x[:12]), bits(x[12:])
    spread = training.std(axis=0)
    deviation = abs(others - training.mean(axis=0)) / spread.clip(FLOOR * spread.mean())
    heat = HeatMaps(flow, x[:12].numpy(), seed=5, batch_size=5)(x[12:].numpy())
    assert heat.shape == (8, 8, 8) and heat.dtype == np.float32
    np.testing.assert_allclose(heat, box(box(deviation)), rtol=1e-3)  # float32 log-determinants


def test_images_without_heat_maps():
    with pytest.raises(UserError, match="at least 2 training images, there are 1"):
        HeatMaps(tiny_flow("glow"), images(1, (1, 4, 4)).numpy())
    density = Independent(Normal(torch.zeros(1, 4, 4), torch.ones(1, 4, 4)), 3)
    for flow in (tiny_flow("maf"), ForeignModel(Foreign(density, (1, 4, 4), 256))):
        with pytest.raises(UserError, match="mixes all pixels"):
            HeatMaps(flow, images(5, (1, 4, 4)).numpy())


def test_a_place_that_never_varies():
    """Its heat is finite for training images, and large for another one."""
    x = images(20, (1, 5, 6))
    x[:, :, :2] = 7
    maps = HeatMaps(tiny_flow("causal", (1, 5, 6)), x.numpy())
    other = x[:1].clone()
    other[:, :, 0, 0] = 200
    assert np.isfinite(maps(x.numpy())).all()
    assert maps(other.numpy())[0, 0, 0] > 3 * maps(x.numpy())[:, 0, 0].max()


def test_the_picture():
    heat = np.array([[[0.0, 8, 99, math.nan]]])
    found = picture(torch.tensor([[[[0, 1, 1, 0]]]], dtype=torch.uint8), heat, 2, 2)
    assert found.shape[0] == 3 and found.dtype == torch.uint8
    middle = found[:, found.shape[1] // 2]
    colours = [tuple(each) for each in middle.T.unique_consecutive(dim=0).tolist()]
    black, yellow = (0, 0, 3), (252, 254, 164)  # the ends of inferno
    assert colours.count((255, 255, 255)) == 1 and colours[-3:-1] == [black, yellow]

"""Convolutions whose weights are matrices."""

import pytest
import torch

from flowtrain.nets.convolution import Conv2d, ZeroConv2d


@pytest.mark.parametrize("size, groups", [(1, 1), (3, 1), (3, 4), (5, 2)])
def test_convolution_by_a_matrix(size, groups):
    """A row of the weight is a filter, its channels last."""
    layer = Conv2d(4, 8, size, groups=groups)
    x = torch.randn(2, 4, 5, 6)
    filters = layer.weight.detach().reshape(8, size, size, 4 // groups).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(x, filters, layer.bias, padding=size // 2, groups=groups)
    torch.testing.assert_close(layer(x), expected)
    # As torch initializes a convolution: uniform, variance 1 / (3 fan-in).
    wide = Conv2d(64, 64, size, groups=groups).weight.detach()
    assert wide.std().item() == pytest.approx((3 * wide.shape[1]) ** -0.5, rel=0.1)


def test_zero_convolution_has_a_gain():
    layer = ZeroConv2d(2, 3, 3)
    x = torch.randn(2, 2, 4, 4)
    assert layer(x).count_nonzero() == 0
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
        before = layer(x)
        layer.log_gain.fill_(0.1)
    torch.testing.assert_close(layer(x), before * torch.tensor(0.3).exp())

"""Convolutions whose weights are matrices, and ReLU of bfloat16 by integers."""

import pytest
import torch
from helpers import seeded

from flowtrain.nets.convolution import Conv2d, ZeroConv2d, relu_, with_context


@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolution_by_a_matrix(size):
    """A row of the weight is a filter, its channels last."""
    layer = Conv2d(4, 8, size)
    x = torch.randn(2, 4, 5, 6)
    filters = layer.weight.detach().reshape(8, size, size, 4).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(x, filters, layer.bias, padding=size // 2)
    torch.testing.assert_close(layer(x), expected)
    # As torch initializes a convolution: uniform, variance 1 / (3 fan-in).
    wide = Conv2d(64, 64, size).weight.detach()
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


def test_ones_outside_of_the_image():
    layer = ZeroConv2d(2, 3, 3, outside=1.0)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 2, 4, 5)
    inside = layer(torch.nn.functional.pad(x, 4 * [1], value=1.0))[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(layer(x), inside)


def test_a_context_stays_in_place():
    x, context = torch.randn(2, 3, 2, 4), torch.randn(2, 1, 2, 4)
    assert torch.equal(with_context(x, context), torch.cat([x, context], dim=1))


def test_integer_relu_is_relu():
    """For every bfloat16: also infinities, both zeros, NaN of either sign, and denormals."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    torch.testing.assert_close(relu_(x.clone()), torch.relu(x), rtol=0, atol=0, equal_nan=True)
    leaf = torch.randn(50, generator=seeded()).bfloat16().requires_grad_()
    (relu_(leaf * 1) * 3).sum().backward()
    assert torch.equal(leaf.grad, 3.0 * (leaf > 0).bfloat16())

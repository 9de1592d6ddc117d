"""Ones outside of an image, a context, and ReLU of bfloat16 by integers."""

import torch
from helpers import seeded

from flowtrain.nets.convolution import ZeroConv2d, relu_, with_context


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

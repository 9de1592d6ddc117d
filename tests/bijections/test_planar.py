"""Planar layers: their constraint, and their inverse at its edge."""

import math

import pytest
import torch
from helpers import seeded

from flowtrain.bijections import Inverse, Planar
from flowtrain.bijections.planar import MIN_DERIVATIVE

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def layer_of(w, u, b=0.0, dtype=torch.float64):
    layer = Planar(len(w)).to(dtype)
    with torch.no_grad():
        for parameter, value in ((layer.w, w), (layer.u, u), (layer.b, b)):
            parameter.copy_(torch.as_tensor(value, dtype=torch.float64))
    return layer


def at_the_edge(dims=5, b=0.3, dtype=torch.float64):
    """A layer whose `w^T u` of about -20 is moved to `-1 + MIN_DERIVATIVE`."""
    w, aside = torch.randn(2, dims, generator=seeded(), dtype=torch.float64)
    return layer_of(w, -20 * w / w.square().sum() + aside, b, dtype)


@pytest.mark.parametrize("product", [0.0, 0.3, 40.0, -0.01, -0.9, -3.0, -1e4])
@DTYPES
def test_the_constraint(product, dtype):
    """`w^T u` is above -1. u moves only along w, and stays if the product is not negative."""
    w = torch.tensor([1.0, 2.0, -1.0], dtype=dtype)
    aside = torch.tensor([1.0, 0.0, 1.0], dtype=dtype)
    layer = layer_of(w, product * w / 6 + aside, dtype=dtype)
    u, found = layer.constrained()
    precision = 40 * torch.finfo(dtype).eps * max(1, abs(product))
    if product >= 0:
        assert found.item() == pytest.approx(product, abs=precision)
    else:
        assert max(product if product > -5 else -1, -1 + MIN_DERIVATIVE - 1e-6) < found.item() < 0
    assert (w @ u).item() == pytest.approx(found.item(), abs=precision)
    torch.testing.assert_close(u - found * w / 6, aside, rtol=0, atol=precision)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_vanishing_w(scale, sign):
    """Nothing is divided by |w|, nor by its square, which underflows first."""
    w, u = scale * torch.tensor([3.0, -4.0]), sign * torch.tensor([0.6, -0.2])
    layer = layer_of(w, u, 0.5, torch.float32)
    x = torch.randn(6, 2, generator=seeded())
    z, log_det = layer(x)
    expected = x + math.tanh(0.5) * layer.u
    torch.testing.assert_close(z, expected.detach(), rtol=0, atol=10 * scale + 1e-6)
    torch.testing.assert_close(log_det, torch.zeros(6), rtol=0, atol=10 * scale)
    torch.testing.assert_close(layer.inverse(z)[0], x, rtol=0, atol=1e-5)
    (z.square().sum() + log_det.sum()).backward()
    for parameter in layer.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() < 1e3


@DTYPES
def test_a_layer_at_the_edge_still_inverts(dtype):
    """At `w^T x + b = 0` the derivative along w is 0.001, so x has 1000 times the rounding of z."""
    layer = at_the_edge(dtype=dtype)
    u, product = layer.constrained()
    assert product.item() == pytest.approx(-1 + MIN_DERIVATIVE, abs=1e-6)
    near = torch.cat([torch.zeros(1), 10.0 ** torch.arange(-9, 3)]).to(dtype)
    c = torch.cat([near, -near])  # w^T x + b
    aside = torch.randn(len(c), 5, generator=seeded(2), dtype=dtype)
    w = layer.w.detach()
    x = aside + ((c - layer.b.detach() - aside @ w) / w.square().sum())[:, None] * w
    with torch.no_grad():
        z, log_det = layer(x)
        back, inverse_log_det = layer.inverse(z)
        again, _ = layer(back)
    assert log_det.isfinite().all() and log_det.min() >= math.log(MIN_DERIVATIVE) - 1e-3
    assert log_det[0].item() == pytest.approx(math.log(MIN_DERIVATIVE), abs=1e-3)
    rounding = torch.finfo(dtype).eps * z.abs().amax(dim=1).clamp(min=10)
    assert ((again - z).abs().amax(dim=1) < 10 * rounding).all()
    assert ((back - x).abs().amax(dim=1) < 10 * rounding / log_det.exp()).all()
    precision = 2e-2 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=precision)


def test_gradients_at_the_edge():
    layer = Inverse(at_the_edge(3))
    z = torch.randn(4, 3, generator=seeded(3), dtype=torch.float64).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def inverse(z, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, named, (z,))

    assert torch.autograd.gradcheck(inverse, (z, *layer.parameters()))


def test_far_out_and_not_a_number():
    layer = at_the_edge(2, dtype=torch.float32)
    z = torch.tensor([[1e6, -1e6], [1e30, 1e30], [float("nan"), 0.0], [0.0, 1.0]])
    with torch.no_grad():
        x, log_det = layer.inverse(z)
        torch.testing.assert_close(layer(x[[0, 1, 3]])[0], z[[0, 1, 3]], rtol=1e-6, atol=1e-5)
    assert x[2, 0].isnan() and log_det[2].isnan() and log_det[[0, 1, 3]].isfinite().all()

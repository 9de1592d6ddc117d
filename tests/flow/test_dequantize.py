"""Integers to reals and back: every value, at the edges of its bin, and what the likelihood makes
of it.
"""

import math

import pytest
import torch
from helpers import images, seeded
from torch import nn

from flowtrain.bijections import Bijection, DiagonalAffine, Flatten, Sequential
from flowtrain.bijections.base import sum_per_example
from flowtrain.flow.dequantize import EDGE, Dequantizer, draw_noise
from flowtrain.flow.flow import Flow

every_q = pytest.mark.parametrize("levels", [2, 16, 17, 256])
both = pytest.mark.parametrize(
    "transform, alpha", [("center", 0.05), ("logit", 0.05), ("logit", 1e-5)]
)
LARGEST = 1 - 2.0**-24  # the largest float32 below 1: 255 + LARGEST is 256


def every_value(levels):
    return torch.arange(levels).to(torch.uint8).reshape(levels, 1, 1, 1)


def test_the_largest_noise_is_one_that_overflows():
    assert torch.tensor(255.0) + torch.tensor(LARGEST) == 256 and torch.tensor(LARGEST) < 1


@both
@every_q
@pytest.mark.parametrize("u", [0.0, 2.0**-24, EDGE, 0.5, 1 - EDGE, LARGEST, "random"])
def test_noise_stays_in_its_bin(levels, transform, alpha, u):
    dequantizer = Dequantizer(levels, transform, alpha)
    x = every_value(levels).expand(-1, 1, 8, 8)
    noise = torch.rand(x.shape, generator=seeded()) if u == "random" else torch.full(x.shape, u)
    v, log_terms = dequantizer(x, noise)
    assert (
        v.dtype == log_terms.dtype == torch.float32
        and torch.isfinite(v).all()
        and torch.isfinite(log_terms).all()
    )
    assert torch.equal(dequantizer.to_data(v), x)
    y = dequantizer.to_unit(v)
    assert (y >= 0).all() and (y < 1).all()


@both
@every_q
def test_middle(levels, transform, alpha):
    dequantizer, x = Dequantizer(levels, transform, alpha), every_value(levels)
    v = dequantizer.middle(x)
    assert torch.equal(dequantizer.to_data(v), x)
    torch.testing.assert_close(dequantizer.to_unit(v) * levels, x + 0.5, rtol=0, atol=1e-4)
    assert torch.equal(v, dequantizer(x, torch.full(x.shape, 0.5))[0])
    assert dequantizer.middle(x, torch.float64).dtype == torch.float64


@every_q
def test_centring_is_about_zero(levels):
    v = Dequantizer(levels).middle(every_value(levels))
    torch.testing.assert_close(v.mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert v.min() > -0.5 and v.max() < 0.5


@both
@every_q
def test_log_terms_are_the_log_derivative_of_the_noise(levels, transform, alpha):
    # v is a function of u with the bin's density: log|dv/du| = log|dv/dy| - log Q, a figure for
    # each image.
    dequantizer = Dequantizer(levels, transform, alpha)
    x = images(3, (2, 2, 1), levels)
    noise = torch.rand(x.shape, generator=seeded(1), dtype=torch.float64)
    v, log_terms = dequantizer(x, noise)
    jacobian = torch.autograd.functional.jacobian(lambda u: dequantizer(x, u)[0], noise).reshape(
        3, 4, 3, 4
    )
    expected = torch.stack([torch.linalg.slogdet(jacobian[b, :, b]).logabsdet for b in range(3)])
    assert log_terms.shape == (3,)
    torch.testing.assert_close(log_terms, expected, rtol=1e-10, atol=1e-10)


def test_logit_is_as_in_the_paper():
    v = Dequantizer(256, "logit", 0.05).middle(
        torch.full((1, 1, 1, 1), 100, dtype=torch.uint8), torch.float64
    )
    s = 0.05 + 0.9 * 100.5 / 256
    assert v.item() == pytest.approx(math.log(s / (1 - s)), rel=1e-14)


@both
@every_q
def test_what_lies_outside_is_clamped(levels, transform, alpha):
    dequantizer = Dequantizer(levels, transform, alpha)
    for far in (20.0, 1e4, 1e30):
        v = torch.tensor([-far, far]).reshape(1, 1, 1, 2)
        assert dequantizer.to_data(v).flatten().tolist() == [0, levels - 1]
    assert dequantizer.to_data(v).dtype == torch.uint8


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_raise(transform, alpha, bad):
    v = torch.zeros(4, 1, 2, 2)
    v[1, 0, 1, 1] = v[3, 0, 0, 0] = bad
    with pytest.raises(FloatingPointError, match="2 of 4"):
        Dequantizer(256, transform, alpha).to_data(v)


@both
def test_nothing_is_changed_in_place(transform, alpha):
    dequantizer = Dequantizer(256, transform, alpha)
    x, noise = images(4, (1, 2, 2)), torch.rand(4, 1, 2, 2)
    noise[0] = 0  # would be clamped
    x_before, noise_before = x.clone(), noise.clone()
    v = dequantizer(x, noise)[0]
    dequantizer.middle(x)
    v_before = v.clone()
    dequantizer.to_unit(v), dequantizer.to_data(v)
    for now, before in ((x, x_before), (noise, noise_before), (v, v_before)):
        assert torch.equal(now, before)


def test_noise_is_uniform_and_belongs_to_its_generator():
    noise = draw_noise((200, 1, 8, 8), seeded(3), torch.device("cpu"))
    assert noise.dtype == torch.float32 and noise.min() >= 0 and noise.max() < 1
    assert noise.mean().item() == pytest.approx(
        0.5, abs=0.01
    ) and noise.var().item() == pytest.approx(1 / 12, abs=3e-3)
    assert torch.equal(noise, draw_noise((200, 1, 8, 8), seeded(3), torch.device("cpu")))
    in_parts = seeded(3)
    parts = [draw_noise((n, 1, 8, 8), in_parts, torch.device("cpu")) for n in (1, 7, 192)]
    assert torch.equal(torch.cat(parts), noise)


# ---------------------------------------------------------------- flows whose likelihood is known


class UniformOnTheCube(Bijection):
    """The normal quantile of each entry of [-1/2, 1/2]: the model under which every image is as
    likely.
    """

    def __init__(self):
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros((), dtype=torch.float64))  # gives the flow its dtype

    def forward(self, x, context=None):
        z = math.sqrt(2) * torch.erfinv(2 * x.flatten(1).double())
        # dz/dv = 1 / N(z; 0, 1)
        return z, sum_per_example(0.5 * z.square() + 0.5 * math.log(2 * math.pi))


@every_q
def test_a_model_uniform_on_the_cube_scores_log2_q(levels):
    shape = (3, 4, 4)
    flow = Flow(UniformOnTheCube(), Dequantizer(levels), shape)
    bits = flow.bits_per_dim(images(20, shape, levels), seeded())
    torch.testing.assert_close(
        bits, torch.full((20,), math.log2(levels), dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@every_q
@pytest.mark.parametrize("transform", ["center", "logit"])
def test_a_gaussian_model_scores_its_density(levels, transform):
    shape = (2, 3, 2)
    layer = DiagonalAffine((12,)).double()
    with torch.no_grad():
        layer.log_scale.copy_(torch.linspace(-1, 2, 12))
        layer.shift.copy_(torch.linspace(-0.5, 0.5, 12))
    dequantizer = Dequantizer(levels, transform)
    flow = Flow(Sequential(Flatten(shape), layer), dequantizer, shape)
    x = images(5, shape, levels)
    noise = torch.rand(x.shape, generator=seeded(1))
    sigma = (-8 * torch.tanh(layer.log_scale / 8)).exp().detach()
    normal = torch.distributions.Normal(-layer.shift.detach() * sigma, sigma)
    y = (x.double() + noise.double().clamp(EDGE, 1 - EDGE)) / levels
    if transform == "center":
        density = normal.log_prob(y.flatten(1) - 0.5).sum(1)
    else:
        s = 0.05 + 0.9 * y.flatten(1)
        density = (normal.log_prob(torch.logit(s)) + math.log(0.9) - torch.log(s * (1 - s))).sum(1)
    expected = -(density - 12 * math.log(levels)) / (12 * math.log(2))
    torch.testing.assert_close(
        flow.bits_per_dim(x, seeded(1)).detach(), expected, rtol=1e-9, atol=1e-9
    )

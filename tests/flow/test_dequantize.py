"""Integers to reals and back: every value, at the edges of its bin, and its likelihood."""

import math

import pytest
import torch
from helpers import images, jacobians, seeded

from flowtrain.flow.dequantize import EDGE, Dequantizer

LARGEST = 1 - 2.0**-24  # the largest float32 below 1: 255 + LARGEST is 256
every_q = pytest.mark.parametrize("levels", [2, 16, 17, 256])
both = pytest.mark.parametrize(
    "transform, alpha", [("center", 0.05), ("logit", 0.05), ("logit", 1e-5)]
)


def every_value(levels):
    return torch.arange(levels).to(torch.uint8).reshape(levels, 1, 1, 1)


@both
@every_q
def test_noise_stays_in_its_bin(levels, transform, alpha):
    dequantizer = Dequantizer(levels, transform, alpha)
    x = every_value(levels).expand(-1, 1, 8, 8)
    noise = torch.rand(x.shape, generator=seeded())
    for row, extreme in enumerate((0.0, 2.0**-24, EDGE, 1 - EDGE, LARGEST)):
        noise[:, :, row] = extreme
    before = noise.clone()
    v, log_terms = dequantizer(x, noise)
    assert v.dtype == log_terms.dtype == torch.float32
    assert torch.isfinite(v).all() and torch.isfinite(log_terms).all()
    same = v.clone()
    y = dequantizer.to_unit(v)
    assert (y >= 0).all() and (y < 1).all()
    assert torch.equal(dequantizer.to_data(v), x) and torch.equal(noise, before)
    assert torch.equal(v, same) and torch.equal(x[:, 0, 0, 0], torch.arange(levels).to(x.dtype))


@both
@every_q
def test_middle(levels, transform, alpha):
    dequantizer, x = Dequantizer(levels, transform, alpha), every_value(levels)
    assert torch.equal(dequantizer.middle(x), dequantizer(x, torch.full(x.shape, 0.5))[0])
    s = alpha + (1 - 2 * alpha) * (x.double() + 0.5) / levels  # RealNVP, section 4.1
    expected = (x.double() + 0.5) / levels - 0.5 if transform == "center" else torch.logit(s)
    found = dequantizer.middle(x, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


@both
@every_q
def test_log_terms_are_the_log_derivative_of_the_noise(levels, transform, alpha):
    """v is a function of u with the bin's density: log|dv/du| = log|dv/dy| - log Q."""
    dequantizer = Dequantizer(levels, transform, alpha)
    x = images(3, (2, 2, 1), levels)
    noise = torch.rand(x.shape, generator=seeded(1), dtype=torch.float64)
    expected = torch.linalg.slogdet(jacobians(lambda u: dequantizer(x, u), noise)).logabsdet
    log_terms = dequantizer(x, noise)[1]
    torch.testing.assert_close(log_terms, expected, rtol=1e-10, atol=1e-10)


@both
def test_far_values_are_clamped_and_those_that_are_not_finite_raise(transform, alpha):
    dequantizer = Dequantizer(17, transform, alpha)
    for far in (20.0, 1e4, 1e30):
        x = dequantizer.to_data(torch.tensor([-far, far]).reshape(1, 1, 1, 2))
        assert x.flatten().tolist() == [0, 16] and x.dtype == torch.uint8
    for bad in (math.nan, math.inf, -math.inf):
        v = torch.zeros(4, 1, 2, 2)
        v[1, 0, 1, 1] = v[3, 0, 0, 0] = bad
        with pytest.raises(FloatingPointError, match="2 of 4"):
            dequantizer.to_data(v)

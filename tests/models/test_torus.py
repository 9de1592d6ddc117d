"""Flows on a torus: the data, the period, and the density by quadrature."""

import math

import numpy as np
import pytest
import torch
from catalogue import TORUS
from helpers import a_config, perturb, seeded
from scipy.special import i0, i1

from flowtrain.checkpoints.build import build_flow
from flowtrain.datasets import points
from flowtrain.evaluation.evaluate import reconstruction_error
from flowtrain.latents.encoding import difference
from flowtrain.pictures import draw

TURN = 2 * math.pi


def a_flow(scale=0.3, angles=2, seed=0):
    return perturb(build_flow(a_config(TORUS), (angles, 1, 1), None), scale, seed).double()


def test_von_mises():
    """Cosines from the mean have the mean I1/I0, and both angles of a component are independent."""
    n, kappa = 20_000, 2.0
    x = points.BUILDS["torus"]("", "train", count=n, components=1, concentration=kappa).read()
    assert np.abs(x).max() <= np.float32(np.pi)
    away = x.reshape(-1, 2) - points.torus_means(0, 1)
    cosines = np.cos(away)
    error = cosines.std() / math.sqrt(n)
    assert cosines.mean(axis=0) == pytest.approx([i1(kappa) / i0(kappa)] * 2, abs=4 * error)
    assert abs(np.sin(away).prod(axis=1).mean()) < 4 * 0.5 / math.sqrt(n)
    many = points.BUILDS["torus"]("", "train", components=3, concentration=1e6).read()
    assert len(np.unique(many.round(1), axis=0)) in range(3, 13)  # on both sides of a rounding


def test_it_starts_uniform():
    x = torch.randn(5, 3, 1, 1, generator=seeded(), dtype=torch.float64)
    found = a_flow(0, angles=3).log_prob(x)
    torch.testing.assert_close(found, torch.full_like(found, -3 * math.log(TURN)))


def test_the_density_integrates_to_one():
    """Points are rounded to float32, by at most 2.4e-7, so the density by some 1e-6."""
    flow = a_flow().requires_grad_(False)
    cells, area = draw.mesh(flow, (-math.pi, math.pi, -math.pi, math.pi), 500)
    total = flow.log_prob(cells).exp().sum().item() * area
    assert total == pytest.approx(1, abs=1e-4)  # the splines have kinks


def test_whole_turns_do_not_matter():
    flow = a_flow()
    x = flow.sample(50, generator=seeded())
    assert x.abs().max() <= math.pi and x.std() > 0.5
    turned = x + TURN * torch.tensor([1.0, -2.0]).reshape(2, 1, 1)
    # In float32, turned angles have a spacing of 1e-6; the log-density has slopes below 100.
    torch.testing.assert_close(flow.log_prob(turned), flow.log_prob(x), rtol=0, atol=1e-4)
    for each in (x, turned):
        torch.testing.assert_close(flow.decode(flow.encode(each)), x, rtol=0, atol=1e-5)
        assert reconstruction_error(flow, each) < 1e-5 and difference(flow, each, x, []) < 1e-5

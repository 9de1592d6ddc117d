"""Precision of the data path."""

import pytest
import torch
from catalogue import TINY
from fake_device import NAME, device_without_float64
from helpers import a_config, images, perturb, seeded

from flowtrain.bijections import continuous, ordinal
from flowtrain.checkpoints.build import build_flow
from flowtrain.flow.flow import initialize
from flowtrain.pictures.sample import sample


@pytest.mark.run
@pytest.mark.parametrize(
    "model, noise, options",
    [
        ("glow", "variational", {}),
        ("causal", "uniform", {}),
        ("cnf", "uniform", {"solver": "dopri5", "rtol": 0.1, "atol": 0.1}),  # few steps
    ],
)
def test_a_device_without_double_precision(model, noise, options, monkeypatch):
    """Models train, score, sample and encode there, with the results of the CPU."""
    for module in (ordinal, continuous):
        monkeypatch.setattr(module, "has_float64", lambda x: x.device.type != NAME)
    shape = (1, 4, 4)
    config = a_config({"name": model, **TINY[model], **options}, dequantization={"name": noise})
    flow = perturb(build_flow(config, shape, 17), 0.1)
    x = images(8, shape, 17)
    u = torch.rand(x.shape, generator=seeded())
    initialize(flow, x, u)
    with torch.no_grad():
        expected = flow(x, u).total
    z, drawn = flow.encode(x), sample(flow, 3, [1.0], seed=0)
    new = build_flow(config, shape, 17)  # outside: it uses the device of this name itself
    with device_without_float64() as device:
        there = flow.to(device)
        initialize(new.to(device), x.to(device), u.to(device))
        log_prob = there(x.to(device), u.to(device)).total
        (-log_prob.mean()).backward()
        assert log_prob.device == device
        assert all(p.grad is not None for p in there.parameters() if p.requires_grad)
        torch.testing.assert_close(log_prob.detach().cpu(), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(there.encode(x.to(device)).cpu(), z, rtol=1e-3, atol=1e-3)
        assert torch.equal(sample(there, 3, [1.0], seed=0), drawn)

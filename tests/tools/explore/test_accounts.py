"""The accounts of an image add up to its bits/dim, for each kind of model."""

from unittest.mock import Mock

import pytest
import torch
from helpers import images, perturb, seeded, tiny_flow

from flowtrain.bijections import AffineTransform, Coupling
from flowtrain.evaluation.places import forward_by_place
from flowtrain.nets.convolution import GlowNet
from flowtrain.tools.explore.accounts import account
from flowtrain.tools.explore.worker import Superseded

LEARNED = {"noise": {"name": "variational", "steps": 2, "width": 4}}
MODELS = {
    "glow": ("glow", (1, 4, 4), {}),
    "glow of colours": ("glow", (3, 8, 8), {}),
    "glow by a logit": ("glow", (1, 4, 4), {"transform": "logit"}),
    "glow with learned noise": ("glow", (1, 4, 4), LEARNED),
    "glow with normal noise": ("glow", (1, 4, 4), {"noise": {"name": "gaussian", "sigma": 0.1}}),
    "glow with mixtures": ("glow", (1, 4, 4), {"coupling": "mixture", "split": "mixed"}),
    "glow with classes": ("glow", (1, 4, 4), {"classes": 3}),
    "realnvp": ("realnvp", (3, 8, 8), {}),
    "causal": ("causal", (3, 5, 6), {}),
    "causal with classes": ("causal", (3, 5, 6), {"classes": 3}),
    "maf": ("maf", (1, 4, 4), {}),
}


def prepared(name):
    model, shape, options = MODELS[name]
    flow = tiny_flow(model, shape, **options)
    x = images(1, shape)
    return flow, x, torch.rand(x.shape, generator=seeded(3))


SIZES = {
    "glow of colours": [(4, 4), (2, 2)],  # of the latents
    "glow by a logit": [(4, 4), (2, 2), (1, 1)],
    "causal": [(5, 6)],
    "maf": [],  # layers that mix all places
}


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_add_up(name):
    flow, x, noise = prepared(name)
    found = account(flow, x, noise)
    assert list(found.places) == SIZES.get(name, list(found.places))
    expected = flow.loss(flow(x, noise).total).item()
    assert found.total == pytest.approx(expected, rel=1e-5)
    if name == "maf":
        return
    parts = [each.mean().item() for each in found.places.values()]
    parts += [found.noise, found.of_class.loss if found.of_class else 0]
    assert sum(parts) == pytest.approx(expected, rel=1e-5)
    assert found.map.mean().item() == pytest.approx(sum(parts[: len(found.places)]), rel=1e-9)
    assert "noise" not in name or (found.noise != 0) == ("learned" in name)


@pytest.mark.parametrize("name", ["causal", "causal with classes"])
def test_a_pixel_of_a_causal_flow_has_its_conditional_probability(name):
    """A later pixel does not change the bits of one before it, and neither does the noise."""
    flow, x, noise = prepared(name)
    before = account(flow, x, noise)
    y = x.clone()
    y[0, :, 4, 5] = 255 - y[0, :, 4, 5]
    after = account(flow, y, noise)
    if before.of_class:
        assert before.of_class.label == after.of_class.label
    changed = (before.map - after.map).abs() > 1e-6
    assert changed[4, 5] and not changed[:4].any()
    other = account(flow, x, 1 - noise).map
    torch.testing.assert_close(before.map, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_an_account_that_is_not_wanted_ends(last):
    """Before each layer, in both of its passes."""
    flow, x, noise = prepared("glow of colours")
    check = Mock()
    account(flow, x, noise, check)
    assert check.call_count > 20
    wanted = [None] * (check.call_count - 1 if last else 0)
    with pytest.raises(Superseded):
        account(flow, x, noise, Mock(side_effect=[*wanted, Superseded]))


def test_a_term_stays_at_its_place():
    """A coupling and what comes after a squeeze, by the Jacobian of each place."""
    layer = perturb(Coupling(1, GlowNet(1, 4, 4), AffineTransform()))
    x = torch.randn(1, 3, 2, 3)
    _, places = forward_by_place(layer, x, None)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)[0, :, :, :, 0]
    for i, j in ((0, 0), (1, 2)):
        own = jacobian[:, i, j, :, i, j]
        torch.testing.assert_close(places[0, i, j], torch.linalg.slogdet(own).logabsdet)

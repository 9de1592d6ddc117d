"""Guidance: parameters in two contexts, extrapolated. For each layer, see `assert_guidance`."""

import pytest
import torch
from helpers import perturb, seeded

from flowtrain.bijections import AffineTransform, Coupling
from flowtrain.bijections.context import Guided, unguided
from flowtrain.bijections.memory import executor_of
from flowtrain.bijections.precision import apply_conditioner
from flowtrain.nets.convolution import GlowNet


def test_predictions_are_extrapolated_but_not_in_training():
    net = perturb(GlowNet(2, 6, 6, 3), 0.4)
    x = torch.randn(6, 5, 2, 2, generator=seeded())
    guided = Guided(*torch.randn(2, 6, 3, 1, 1, generator=seeded(7)), 1.5)
    given, without = net(x[:, :2], guided.given), net(x[:, :2], guided.without)
    found = apply_conditioner(net, x[:, :2], guided)
    torch.testing.assert_close(found, without + 2.5 * (given - without))
    assert (found - given).abs().max() > 0.01
    assert unguided(None) is None and unguided(guided.given) is guided.given
    layer = Coupling(2, net, AffineTransform())
    for training in (unguided, lambda c: executor_of("checkpoint").chain([layer], "forward", x, c)):
        with pytest.raises(TypeError, match="for samples alone"):
            training(guided)
    moved = guided.to("cpu")
    assert torch.equal(moved.given, guided.given) and moved.weight == 1.5

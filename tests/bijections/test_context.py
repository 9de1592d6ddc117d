"""Guidance: parameters in two contexts, extrapolated, for every layer with a conditioner."""

import pytest
import torch
from helpers import perturb, seeded

from flowtrain import bijections as b
from flowtrain.bijections.context import Guided, unguided
from flowtrain.bijections.inverses import inverse_by_iteration
from flowtrain.bijections.memory import executor_of
from flowtrain.bijections.precision import apply_conditioner
from flowtrain.nets.convolution import GlowNet
from flowtrain.nets.masked import MaskedDenseNet
from flowtrain.nets.transformer import CausalTransformer


def contexts(count, weight):
    given, without = torch.randn(2, count, 3, 1, 1, generator=seeded(7)).double()
    return Guided(given, without, weight)


# A layer, and the shape of an example.
LAYERS = {
    "coupling": (lambda: b.Coupling(2, GlowNet(2, 6, 6, 3), b.AffineTransform()), (5, 2, 2)),
    "checkerboard": (
        lambda: b.CheckerboardCoupling((4, 4), GlowNet(2, 4, 6, 3), b.AffineTransform()),
        (2, 4, 4),
    ),
    "autoregressive": (
        lambda: b.MaskedAutoregressive(MaskedDenseNet(5, 8, 8, 2, 3), b.SplineTransform(3)),
        (5,),
    ),
    "tokens": (
        lambda: b.TokenAutoregressive(CausalTransformer(2, 2, 6, 8, 1, 3), b.AffineTransform()),
        (2, 2, 3),
    ),
}


def a_layer(name):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    return perturb(build(), 0.4).double(), torch.randn(6, *shape, generator=seeded()).double()


def test_predictions_are_extrapolated():
    layer, x = a_layer("checkerboard")
    net, guided = layer.conditioner, contexts(6, 1.5)
    given, without = net(x, guided.given), net(x, guided.without)
    found = apply_conditioner(net, x, guided)
    torch.testing.assert_close(found, without + 2.5 * (given - without))
    assert (found - given).abs().max() > 0.01


@pytest.mark.parametrize("name", LAYERS)
def test_guidance_of_a_layer(name):
    layer, x = a_layer(name)
    guided = contexts(6, 0.0)  # the model given the class
    assert all(map(torch.equal, layer(x, guided), layer(x, guided.given)))
    # An autoregressive layer computes both contexts as one batch, which rounds otherwise.
    torch.testing.assert_close(layer.inverse(x, guided), layer.inverse(x, guided.given))
    guided = contexts(6, -1.0)  # the model without a class
    for direction in (layer, layer.inverse):
        torch.testing.assert_close(direction(x, guided), direction(x, guided.without))
    guided = contexts(6, 2.0)
    z, log_det = layer(x, guided)
    assert (z - layer(x, guided.given)[0]).abs().max() > 0.01
    back = layer.inverse(z, guided)
    torch.testing.assert_close(back, (x, -log_det))
    torch.testing.assert_close(inverse_by_iteration(layer, z, guided, lambda share: None), back)
    alone = Guided(guided.given[2:3], guided.without[2:3], 2.0)  # an example has its own contexts
    torch.testing.assert_close(layer.inverse(z[2:3], alone)[0], x[2:3])


def test_guidance_has_no_part_in_training():
    guided = contexts(1, 1.0)
    assert unguided(None) is None and unguided(guided.given) is guided.given
    with pytest.raises(TypeError, match="for samples alone"):
        unguided(guided)
    layer, x = a_layer("coupling")
    with pytest.raises(TypeError, match="for samples alone"):
        executor_of("checkpoint").chain([layer], "forward", x, guided)
    moved = guided.to("cpu")
    assert torch.equal(moved.given, guided.given) and moved.weight == 1

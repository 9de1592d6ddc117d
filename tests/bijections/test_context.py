"""Guidance: parameters in two contexts, extrapolated, for every layer with a conditioner."""

import pytest
import torch
from helpers import perturb, seeded
from torch import nn

from flowtrain.bijections import (
    AffineTransform,
    CheckerboardCoupling,
    Coupling,
    MaskedAutoregressive,
    SplineTransform,
    TokenAutoregressive,
)
from flowtrain.bijections.context import Guided, unguided
from flowtrain.bijections.inverses import inverse_by_iteration
from flowtrain.bijections.memory import executor_of
from flowtrain.bijections.precision import apply_conditioner
from flowtrain.nets.convolution import GlowNet
from flowtrain.nets.masked import MaskedDenseNet
from flowtrain.nets.transformer import CausalTransformer


class OfVectors(nn.Module):
    """A conditioner `(B, 2)` to `(B, 6)` that sees a context `(B, 3)`."""

    def __init__(self):
        super().__init__()
        self.first, self.outside, self.last = nn.Linear(2, 8), nn.Linear(3, 8), nn.Linear(8, 6)

    def forward(self, x, context=None):
        return self.last(torch.tanh(self.first(x) + self.outside(context)))


def contexts(count, weight, *shape):
    given, without = torch.randn(2, count, *(shape or (3,)), generator=seeded(7)).double()
    return Guided(given, without, weight)


LAYERS = {
    "coupling": (lambda: Coupling(2, OfVectors(), AffineTransform()), (5,), ()),
    "checkerboard": (
        lambda: CheckerboardCoupling(
            (4, 4), GlowNet(2, 4, 6, context_channels=3), AffineTransform()
        ),
        (2, 4, 4),
        (3, 4, 4),
    ),
    "autoregressive": (
        lambda: MaskedAutoregressive(MaskedDenseNet(5, 2, 8, 2, 3), AffineTransform()),
        (5,),
        (),
    ),
    "tokens": (
        lambda: TokenAutoregressive(CausalTransformer(2, 2, 6, 8, 1, 3), AffineTransform()),
        (2, 2, 3),
        (),
    ),
    "autoregressive spline": (
        lambda: MaskedAutoregressive(MaskedDenseNet(5, 8, 8, 1, 3), SplineTransform(3)),
        (5,),
        (),
    ),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    make, shape, of_context = LAYERS[request.param]
    torch.manual_seed(0)
    made = perturb(make(), 0.4).double()
    return made, torch.randn(6, *shape, generator=seeded()).double(), of_context


def test_what_a_network_predicts_is_extrapolated():
    net = perturb(OfVectors())
    x, guided = torch.randn(4, 2, generator=seeded()), contexts(4, 1.5)
    guided = Guided(guided.given.float(), guided.without.float(), 1.5)
    given, without = net(x, guided.given), net(x, guided.without)
    found = apply_conditioner(net, x, guided)
    torch.testing.assert_close(found, without + 2.5 * (given - without))
    assert (found - given).abs().max() > 0.01


def test_weight_0_is_the_model_given_the_class(layer):
    made, x, of_context = layer
    guided = contexts(6, 0.0, *of_context)
    for found, expected in zip(made(x, guided), made(x, guided.given), strict=True):
        assert torch.equal(found, expected)
    # An autoregressive layer computes both contexts as one batch, which rounds otherwise.
    torch.testing.assert_close(made.inverse(x, guided), made.inverse(x, guided.given))


def test_weight_minus_1_is_the_model_without_a_class(layer):
    made, x, of_context = layer
    guided = contexts(6, -1.0, *of_context)
    for direction in (made, made.inverse):
        torch.testing.assert_close(direction(x, guided), direction(x, guided.without))


def test_both_directions_are_inverse_to_each_other(layer):
    made, x, of_context = layer
    guided = contexts(6, 2.0, *of_context)
    z, log_det = made(x, guided)
    assert (z - made(x, guided.given)[0]).abs().max() > 0.01
    back, log_det_back = made.inverse(z, guided)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(log_det_back, -log_det)


def test_an_inverse_by_iteration_is_guided_too(layer):
    made, x, of_context = layer
    guided = contexts(6, 1.0, *of_context)
    found = inverse_by_iteration(made, x, guided, lambda share: None)
    torch.testing.assert_close(found, made.inverse(x, guided))


def test_an_example_is_guided_by_its_own_contexts(layer):
    made, x, of_context = layer
    guided = contexts(6, 2.0, *of_context)
    alone = Guided(guided.given[2:3], guided.without[2:3], 2.0)
    torch.testing.assert_close(made.inverse(x[2:3], alone)[0], made.inverse(x, guided)[0][2:3])


def test_guidance_has_no_part_in_training():
    guided = contexts(1, 1.0)
    assert unguided(None) is None and unguided(guided.given) is guided.given
    with pytest.raises(TypeError, match="for samples alone"):
        unguided(guided)
    made = Coupling(2, OfVectors(), AffineTransform()).double()
    with pytest.raises(TypeError, match="for samples alone"):
        executor_of("checkpoint").chain([made], "forward", torch.zeros(1, 5).double(), guided)
    moved = guided.to("cpu")
    assert torch.equal(moved.given, guided.given) and moved.weight == 1

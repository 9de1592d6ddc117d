"""Guidance: parameters in two contexts, extrapolated, for every layer with a conditioner."""

import functools

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


def contexts(count, weight, shape=(3,)):
    given, without = torch.randn(2, count, *shape, generator=seeded(7)).double()
    return Guided(given, without, weight)


LAYERS = {
    "coupling": (lambda: Coupling(2, OfVectors(), AffineTransform()), (5,), (3,)),
    "checkerboard": (
        lambda: CheckerboardCoupling(
            (4, 4), GlowNet(2, 4, 6, context_channels=3), AffineTransform()
        ),
        (2, 4, 4),
        (3, 4, 4),
    ),
    "autoregressive": (
        lambda: MaskedAutoregressive(MaskedDenseNet(5, 8, 8, 2, 3), SplineTransform(3)),
        (5,),
        (3,),
    ),
    "tokens": (
        lambda: TokenAutoregressive(CausalTransformer(2, 2, 6, 8, 1, 3), AffineTransform()),
        (2, 2, 3),
        (3,),
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
    x, (given, without, _) = torch.randn(4, 2, generator=seeded()), contexts(4, 1.5)
    guided = Guided(given.float(), without.float(), 1.5)
    given, without = net(x, guided.given), net(x, guided.without)
    found = apply_conditioner(net, x, guided)
    torch.testing.assert_close(found, without + 2.5 * (given - without))
    assert (found - given).abs().max() > 0.01


def test_guidance_of_a_layer(layer):
    made, x, of_context = layer
    contexts_of = functools.partial(contexts, 6, shape=of_context)
    guided = contexts_of(0.0)  # the model given the class
    assert all(map(torch.equal, made(x, guided), made(x, guided.given)))
    # An autoregressive layer computes both contexts as one batch, which rounds otherwise.
    torch.testing.assert_close(made.inverse(x, guided), made.inverse(x, guided.given))
    guided = contexts_of(-1.0)  # the model without a class
    for direction in (made, made.inverse):
        torch.testing.assert_close(direction(x, guided), direction(x, guided.without))
    guided = contexts_of(2.0)
    z, log_det = made(x, guided)
    assert (z - made(x, guided.given)[0]).abs().max() > 0.01
    back = made.inverse(z, guided)
    torch.testing.assert_close(back, (x, -log_det))
    torch.testing.assert_close(inverse_by_iteration(made, z, guided, lambda share: None), back)
    alone = Guided(guided.given[2:3], guided.without[2:3], 2.0)  # an example has its own contexts
    torch.testing.assert_close(made.inverse(z[2:3], alone)[0], x[2:3])


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

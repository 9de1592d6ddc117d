"""Masked autoregressive layers: their dependencies, their sequential inverse, and IAF."""

import pytest
import torch
from helpers import a_config, perturb, ready, seeded, tiny_flow
from torch.autograd.functional import jacobian

from flowtrain.bijections import (
    AffineTransform,
    Inverse,
    MaskedAutoregressive,
    MixtureTransform,
    SplineTransform,
)
from flowtrain.errors import UserError
from flowtrain.models import iaf, maf
from flowtrain.nets.masked import MaskedDenseNet, MaskedLinear
from flowtrain.training.step import require_trainable

CPU = torch.device("cpu")

# dims, width, hidden layers, features of a context
SIZES = [
    (1, 4, 1, 0),
    (2, 5, 2, 0),
    (6, 40, 1, 0),
    (6, 40, 3, 0),
    (9, 3, 2, 0),
    (5, 30, 2, 3),
    (1, 4, 1, 3),
]
TRANSFORMS = {
    "affine": AffineTransform,
    "spline": lambda: SplineTransform(3),
    "mixture": lambda: MixtureTransform(2),
}
every_size = pytest.mark.parametrize("dims, width, hidden_layers, context_features", SIZES)


def net_of(dims, width, hidden_layers, context_features, parameters_per_entry=2):
    torch.manual_seed(0)
    return perturb(
        MaskedDenseNet(dims, parameters_per_entry, width, hidden_layers, context_features)
    ).double()


def some(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def context_of(features, batch):
    return some(batch, features, 1, 1, seed=1) if features else None


def entry_after_entry(layer, z, context):
    """The inverse as in the paper (MAF, eq. 4): a whole pass of the conditioner per entry."""
    x = torch.zeros_like(z)
    for d in range(z.shape[1]):
        x = torch.where(
            torch.arange(z.shape[1]) == d,
            layer.transform.inverse(z, layer.conditioner(x, context))[0],
            x,
        )
    return x, layer.transform.inverse(z, layer.conditioner(x, context))[1].sum(1)


def test_reversible_is_refused_in_bf16():
    """The inverse in float32 does not give back the input from which bf16 computed the output."""
    for model in ("maf", "iaf"):
        flow, train = tiny_flow(model), {"memory": "reversible", "precision": "bf16"}
        with pytest.raises(UserError, match="train.memory: reversible"):
            require_trainable(flow, a_config(model, train=train), CPU)
        for key in train:
            require_trainable(
                flow,
                a_config(model, train={**train, key: {"memory": "store"}.get(key, "fp32")}),
                CPU,
            )
    require_trainable(tiny_flow("glow"), a_config("glow", train=train), CPU)


def test_reversible_is_refused_where_it_saves_nothing():
    flow = tiny_flow("causal")
    for memory in ("store", "checkpoint"):
        require_trainable(flow, a_config("causal", train={"memory": memory}), CPU)
    with pytest.raises(UserError, match="train.memory: reversible saves nothing here"):
        require_trainable(flow, a_config("causal", train={"memory": "reversible"}), CPU)


# ---------------------------------------------------------------- the conditioner


@every_size
def test_parameters_depend_on_the_entries_before(dims, width, hidden_layers, context_features):
    net = net_of(dims, width, hidden_layers, context_features)
    points = some(20, dims)  # every ReLU is active at one of them
    context = context_of(context_features, len(points))
    # Dimensions: the parameter, its entry, the entry of x.
    found = jacobian(lambda x: net(x, context).sum(0), points).abs().amax(1).view(2, dims, dims)
    before = torch.ones(dims, dims).tril(-1).bool()
    assert (found[:, ~before] == 0).all()
    # With few units some dependencies are missing, but the last entry depends on all others.
    assert (
        found[:, before if width > dims else before & (torch.arange(dims)[:, None] == dims - 1)] > 0
    ).all()


@every_size
def test_every_unit_can_matter(dims, width, hidden_layers, context_features):
    """Units are divided evenly among degrees. Each has inputs and is an input of the next layer."""
    net = net_of(dims, width, hidden_layers, context_features)
    assert sum(net.units) == width and len(net.units) == dims
    present = [n for n in net.units if n]
    assert max(present) - min(present) <= 1
    if dims > 1:
        assert net.units[-1] and bool(net.units[0]) == bool(context_features)
    for layer in [*net.hidden[1:], net.last]:
        assert layer.mask.any(dim=0).all()
    if dims > 1 and not context_features:
        assert all(layer.mask.any(dim=1).all() for layer in net.hidden)


def test_context_is_seen_by_every_entry():
    net = net_of(5, 30, 2, 3)
    x, context = some(20, 5), context_of(3, 20)
    found = jacobian(lambda c: net(x, c).sum(0), context).abs().amax(1).view(10, 3)
    assert (found > 0).all()


def test_a_missing_context():
    for call in (
        net_of(5, 30, 2, 3),
        MaskedAutoregressive(net_of(5, 30, 2, 3), AffineTransform()).inverse,
    ):
        with pytest.raises(ValueError, match="expected a context of 3 entries"):
            call(some(4, 5))


def test_masked_weights_start_by_what_they_see():
    mask = torch.ones(400, 300).tril().bool()
    layer = MaskedLinear(mask)
    x = some(200, 300).float()
    with torch.no_grad():
        spread = (layer(x) - layer.bias).std(0)
    # Each unit has the standard deviation of torch's units, 1 / sqrt(3), however little it sees.
    for some_units in (spread[2:60], spread[-60:]):
        assert some_units.square().mean().sqrt().item() == pytest.approx(3**-0.5, rel=0.1)
    assert "mask" not in layer.state_dict()


# ---------------------------------------------------------------- the layer


@every_size
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_jacobian_is_triangular(dims, width, hidden_layers, context_features, transform):
    transform = TRANSFORMS[transform]().double()
    layer = MaskedAutoregressive(
        net_of(dims, width, hidden_layers, context_features, transform.parameters_per_entry),
        transform,
    )
    x, context = some(1, dims), context_of(context_features, 1)
    for function, point in ((layer.forward, x), (layer.inverse, layer(x, context)[0].detach())):
        found = jacobian(lambda v, f=function: f(v, context)[0], point).view(dims, dims)
        assert found.triu(1).count_nonzero() == 0
        log_det = function(point, context)[1]
        torch.testing.assert_close(
            found.diagonal().log().sum()[None], log_det.detach(), rtol=1e-9, atol=1e-9
        )


@every_size
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_inverse_is_that_of_a_pass_for_each_entry(
    dims, width, hidden_layers, context_features, transform
):
    transform = TRANSFORMS[transform]().double()
    layer = MaskedAutoregressive(
        net_of(dims, width, hidden_layers, context_features, transform.parameters_per_entry),
        transform,
    )
    z, context = some(7, dims), context_of(context_features, 7)
    with torch.no_grad():
        torch.testing.assert_close(
            layer.inverse(z, context), entry_after_entry(layer, z, context), rtol=1e-11, atol=1e-11
        )


def test_gradients_of_the_inverse():
    layer = MaskedAutoregressive(net_of(5, 12, 2, 3), AffineTransform())
    z, context = some(4, 5), context_of(3, 4)
    found = []
    for inverse in (layer.inverse, lambda z, context: entry_after_entry(layer, z, context)):
        inputs = [z.clone().requires_grad_(), context.clone().requires_grad_()]
        x, log_det = inverse(*inputs)
        found.append(
            torch.autograd.grad(
                x.square().sum() + log_det.exp().sum(), [*inputs, *layer.parameters()]
            )
        )
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_inverse_computes_each_unit_once(monkeypatch):
    """The multiplications are those of one pass without the masked weights, about half."""
    dims, width = 64, 96
    layer = MaskedAutoregressive(net_of(dims, width, 2, 0), AffineTransform())
    products = []
    addmm = torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda c, a, b: products.append(a.numel()) or addmm(c, a, b)
    )
    layer.inverse(some(3, dims))
    weights = sum(
        m.mask.count_nonzero().item() for m in layer.modules() if isinstance(m, MaskedLinear)
    )
    assert sum(products) == weights


def test_inverse_is_in_full_precision():
    layer = MaskedAutoregressive(net_of(6, 20, 1, 0), AffineTransform()).float()
    z = some(4, 6).float()
    with torch.no_grad():
        expected = layer.inverse(z)
        with torch.autocast("cpu", torch.bfloat16):
            found = layer.inverse(z)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- the models


@pytest.mark.parametrize("options", [{}, {"order": "random", "hidden_layers": 2}])
def test_round_trip_of_an_mnist_image(options):
    torch.manual_seed(0)
    flow = ready(perturb(maf.build((1, 28, 28), layers=3, width=100, **options), 0.03))
    z = torch.randn(4, 784, generator=seeded())
    with torch.no_grad():
        x, inverse_log_det = flow.inverse(z)
        again, log_det = flow(x)
    assert x.shape == (4, 1, 28, 28)
    torch.testing.assert_close(again, z, rtol=0, atol=1e-3)
    torch.testing.assert_close(log_det, -inverse_log_det, rtol=0, atol=1e-2)


def test_iaf_is_maf_the_other_way_round():
    torch.manual_seed(0)
    there = ready(perturb(maf.build((1, 3, 2), layers=1, width=8)).double())
    torch.manual_seed(0)
    back = ready(perturb(iaf.build((1, 3, 2), layers=1, width=8)).double())
    assert isinstance(back.layers[-1], Inverse)
    x = some(3, 6)
    for a, b in (
        (there.layers[-1].forward, back.layers[-1].inverse),
        (there.layers[-1].inverse, back.layers[-1]),
    ):
        torch.testing.assert_close(a(x), b(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["maf", "iaf"])
def test_samples_are_decoded_to_what_was_encoded(name):
    flow = tiny_flow(name, (1, 3, 3))
    x = flow.sample(16, generator=seeded())
    assert torch.equal(flow.decode(flow.encode(x)), x)


def test_which_inverse_is_sequential():
    """For a model with a sequential inverse, `evaluate` leaves out the reconstruction."""
    flows = {name: tiny_flow(name) for name in ("maf", "iaf", "glow", "realnvp", "nice")}
    assert {name for name, flow in flows.items() if flow.bijection.inverse_is_sequential} == {"maf"}

"""Masked autoregressive layers: their dependencies, their sequential inverse, and IAF."""

from unittest import mock

import pytest
import torch
from helpers import perturb, seeded
from torch.autograd.functional import jacobian

from flowtrain.bijections import AffineTransform, MaskedAutoregressive
from flowtrain.nets.masked import MaskedDenseNet, MaskedLinear

# dims, width, hidden layers, features of a context
SIZES = [(1, 4, 1, 0), (2, 5, 2, 0), (6, 40, 3, 0), (9, 3, 2, 0), (5, 30, 2, 3), (1, 4, 1, 3)]


def net_of(dims, width, hidden_layers, context_features):
    torch.manual_seed(0)
    return perturb(MaskedDenseNet(dims, 2, width, hidden_layers, context_features)).double()


def some(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("dims, width, hidden_layers, context_features", SIZES)
def test_parameters_depend_on_the_entries_before(dims, width, hidden_layers, context_features):
    net = net_of(dims, width, hidden_layers, context_features)
    points = some(20, dims)  # every ReLU is active at one of them
    context = some(20, context_features, 1, 1, seed=1) if context_features else None
    # Dimensions: the parameter, its entry, the entry of x.
    found = jacobian(lambda x: net(x, context).sum(0), points).abs().amax(1).view(2, dims, dims)
    before = torch.ones(dims, dims).tril(-1).bool()
    assert (found[:, ~before] == 0).all()
    # With few units some dependencies are missing, but the last entry depends on all others.
    far = before if width > dims else before & (torch.arange(dims)[:, None] == dims - 1)
    assert (found[:, far] > 0).all()
    if context is not None:
        found = jacobian(lambda c: net(points, c).sum(0), context).abs().amax(1)
        assert (found > 0).all()  # every entry sees it
        for call in (net, MaskedAutoregressive(net, AffineTransform()).inverse):
            with pytest.raises(ValueError, match="expected a context of 3 entries"):
                call(points)


def test_inverse_computes_each_unit_once(monkeypatch):
    """It multiplies as often as one pass without the masked weights, about half."""
    dims, width = 64, 96
    layer = MaskedAutoregressive(net_of(dims, width, 2, 0), AffineTransform())
    addmm = mock.Mock(wraps=torch.addmm)
    monkeypatch.setattr(torch, "addmm", addmm)
    layer.inverse(some(3, dims))
    masks = [m.mask for m in layer.modules() if isinstance(m, MaskedLinear)]
    products = sum(call.args[1].numel() for call in addmm.call_args_list)
    assert products == sum(mask.count_nonzero().item() for mask in masks)

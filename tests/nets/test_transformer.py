"""Transformers over tokens: classes, heads and positions (see `test_token_autoregressive.py`)."""

import itertools

import pytest
import torch
from helpers import perturb, seeded

from flowtrain.nets.attention import heads_of
from flowtrain.nets.transformer import CausalTransformer, VisionTransformer

SIZE = (3, 2)
TOKENS = 6


def causal(context=0):
    torch.manual_seed(0)
    return perturb(CausalTransformer(3, 2, TOKENS, 8, 2, context)).double()


def tokens(batch=2):
    return torch.randn(batch, 3, *SIZE, generator=seeded(1), dtype=torch.float64)


def test_the_first_token_sees_all():
    net, x = perturb(VisionTransformer(3, 4, TOKENS, 8, 1)).double(), tokens().requires_grad_()
    assert torch.autograd.grad(net(x)[..., 0, 0].sum(), x)[0].all()


def test_without_a_class_it_sees_the_mean_of_all():
    net, x = causal(context=4), tokens()
    torch.testing.assert_close(net(x), net(x, torch.full((2, 4), 0.25).double()))
    assert not torch.allclose(net(x), net(x, torch.eye(4)[:2].double()))


@pytest.mark.parametrize("width, heads", [(8, 1), (96, 1), (128, 2), (130, 2), (768, 12), (131, 1)])
def test_heads_have_about_64_channels(width, heads):
    assert heads_of(width, 64) == heads
    assert {layer.heads for layer in CausalTransformer(1, 2, 2, width, 2).layers} == {heads}


def test_positions_tell_tokens_apart():
    """Without them, a token that attends to equal tokens is the same everywhere."""
    net = perturb(VisionTransformer(3, 4, TOKENS, 8, 1)).double()
    y = net(torch.ones(1, 3, *SIZE).double()).flatten(2)[0].T
    assert all(not torch.allclose(a, b) for a, b in itertools.pairwise(y))

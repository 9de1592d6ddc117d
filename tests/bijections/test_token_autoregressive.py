"""The layer over tokens: who sees whom, and iteration as another way back."""

import torch
from helpers import perturb, seeded

from flowtrain.bijections import AffineTransform, ExponentialTransform, TokenAutoregressive
from flowtrain.bijections.inverses import inverse_by_iteration, inverse_with_progress
from flowtrain.bijections.token_autoregressive import TokenConditioner
from flowtrain.nets.transformer import CausalTransformer

SHAPE = (2, 3, 3)


def layer(scale=0.2):
    torch.manual_seed(0)
    net = CausalTransformer(2, 2, 9, 8, 2)
    return perturb(TokenAutoregressive(net, AffineTransform()), scale).double()


def latents(batch=3):
    return torch.randn(batch, *SHAPE, generator=seeded(1), dtype=torch.float64)


def test_two_heads_are_kept_too():
    torch.manual_seed(0)
    tokens = TokenAutoregressive(CausalTransformer(2, 2, 9, 128, 2), AffineTransform())
    tokens, x = perturb(tokens, 0.02).double(), latents()
    torch.testing.assert_close(tokens.inverse(tokens(x)[0])[0], x, rtol=1e-9, atol=1e-9)


def test_both_ways_note_how_far_they_are_and_iteration_ends_once_nothing_changes():
    def steps(way, scale):
        shares = []
        way(layer(scale), latents(), None, shares.append)
        assert shares == [(n + 1) / 9 for n in range(len(shares))]
        return len(shares)

    assert steps(inverse_with_progress, 0.2) == 9
    few, more, most = (steps(inverse_by_iteration, scale) for scale in (0.0, 1e-3, 0.5))
    assert few == 1 < more < most <= 9


class Sums(TokenConditioner):
    """Log-scales of a token: weights times the tokens before it. The product has all tokens."""

    def __init__(self, weights):
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, x, context=None):
        raw = (self.weights @ x.flatten(2).mT).mT
        return torch.cat([torch.zeros_like(raw), raw], dim=1).view(len(x), -1, *x.shape[2:])


def test_a_guess_that_overflows_spoils_no_other_token():
    weights = torch.zeros(4, 4)
    weights[1, 0], weights[2, 1], weights[3, 2] = 40.0, 40.0, 1.0
    tokens = TokenAutoregressive(Sums(weights), ExponentialTransform())
    z = torch.tensor([1.0, -5.0, 1.0, 2.0]).view(1, 1, 2, 2)  # exp(200) is too large for float32
    assert tokens.transform.inverse(z, tokens.conditioner(z))[0].isinf().any()
    x, log_det = inverse_by_iteration(tokens, z, None, lambda share: None)
    again, back = tokens(x)
    torch.testing.assert_close(again, z)
    torch.testing.assert_close(back, -log_det)

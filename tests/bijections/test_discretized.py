"""The distribution of one entry: its function, and the search in groups of levels."""

import pytest
import torch
from helpers import seeded

from flowtrain.bijections import discretized
from flowtrain.bijections.discretized import DiscretizedMixture

BATCH, COMPONENTS, UNIFORM = 40, 3, 2e-4


def entry(levels: int, scale: float):
    mixture = DiscretizedMixture(levels, COMPONENTS, UNIFORM)
    randomness = torch.Generator().manual_seed(levels)
    parameters = 2 * torch.randn(3 * COMPONENTS, BATCH, generator=randomness)
    location = levels * torch.rand(BATCH, generator=randomness)
    log_scale = torch.tensor(scale).log().item()
    found = mixture.one_entry(torch.device("cpu"))(location, log_scale, parameters)
    # `forward` wants the entry where images have height and width.
    x = torch.arange(levels).repeat(BATCH, 1)[:, None].double()
    z, _ = mixture.forward(
        x,
        torch.full_like(x, 0.5),
        location.double()[:, None, None],
        torch.tensor([[[log_scale]]]).double(),
        parameters.T.double()[..., None].expand(-1, -1, levels),
    )
    return found, torch.special.ndtr(z[:, 0]).T


OF_256 = [(256, 1e-4), (256, 3.0), (256, 1e4)]


@pytest.mark.parametrize("levels, scale", [(2, 3.0), (3, 3.0), (17, 3.0), (250, 3.0), *OF_256])
def test_a_level_is_found_from_few_values_of_its_function(levels, scale):
    found, middles = entry(levels, scale)
    for target, end in ((0.0, 0), (1.0, levels - 1)):
        level, low, high = found.find(torch.full((BATCH,), target).double())
        assert (level == end).all() and (low < high).all()
    edges = found.cumulative(torch.arange(levels + 1)[:, None])
    assert (edges[0] == 0).all() and (edges[-1] - 1).abs().max() < 1e-14
    assert edges.diff(dim=0).min() >= 0.999 * UNIFORM / levels
    torch.testing.assert_close((edges[1:] + edges[:-1]) / 2, middles, rtol=0, atol=1e-12)
    for x in range(levels):
        expected = torch.full((BATCH,), x)
        level, low, high = found.find(middles[x])
        assert torch.equal(level, expected)
        assert torch.equal(low, found.range(expected)[0])
        assert torch.equal(high, found.range(expected)[1])
        torch.testing.assert_close(torch.stack([low, high]), edges[x : x + 2], rtol=0, atol=1e-14)


@pytest.mark.parametrize("shift, level", [(-1e38, 0), (1e38, 16)])
def test_offsets_near_infinity_give_a_level(shift, level):
    """As with `sample --guidance 1e38`. The last of the groups of 17 levels has too many."""
    tables = DiscretizedMixture(17, 1, UNIFORM).one_entry(torch.device("cpu"))
    parameters = torch.tensor([[0.0], [shift], [0.0]])
    found = tables(torch.zeros(1), 0.0, parameters).find(torch.full((1,), 0.5).double())
    assert found[0].tolist() == [level]


@pytest.mark.parametrize("scale", [0.05, 1.0, 40.0])
def test_log_probabilities_have_their_gradient(scale, monkeypatch):
    """Of levels at both ends and between, near and far, in parts of a batch and as a whole."""
    mixture = DiscretizedMixture(256, 2, UNIFORM)
    x = torch.tensor([0.0, 0, 1, 7, 128, 254, 255, 255]).double().view(4, 2, 1)
    location = (x + torch.tensor([[2.0], [-30.0]])).requires_grad_()
    log_scale = torch.full((2, 1), scale).log().double().requires_grad_()
    parameters = torch.randn(4, 12, 1, generator=seeded()).double().requires_grad_()
    inputs = x, location, log_scale, parameters
    whole = mixture.log_prob(*inputs)
    for together in (1, 30):
        monkeypatch.setattr(discretized, "TOGETHER", together)
        assert torch.equal(mixture.log_prob(*inputs), whole)
        assert torch.autograd.gradcheck(mixture.log_prob, inputs)
    in_float32 = [each.detach().float() for each in inputs]
    torch.testing.assert_close(mixture.log_prob(*in_float32), whole.float(), rtol=1e-5, atol=1e-5)

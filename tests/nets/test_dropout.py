"""Dropout whose masks are a function of the examples."""

import pytest
import torch
from helpers import images, seeded, tiny_flow

from flowtrain.bijections.memory import executor_of
from flowtrain.nets.dropout import Dropout


def numbers(count=20, dims=30, seed=0):
    return torch.rand(count, dims, generator=seeded(seed)) - 0.5


def kept(probability, example, calls=1, shape=(8, 8, 9)):
    drop = Dropout(probability, example)
    return [drop(torch.ones(len(example), *shape)) for _ in range(calls)][-1]


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.99])
def test_a_share_is_dropped_and_the_mean_stays(probability):
    found = kept(probability, numbers(100))
    dropped = found == 0
    error = (probability * (1 - probability) / found.numel()) ** 0.5
    assert dropped.float().mean().item() == pytest.approx(probability, abs=4 * error + 1e-5)
    scale = 1 / (1 - probability)
    assert found[~dropped].unique().item() == pytest.approx(scale, rel=1e-3)
    # Neighbours are dropped independently of each other: in a row, a channel, an image, a batch.
    for dim in range(4):
        both = dropped & dropped.roll(1, dim)
        assert both.float().mean().item() == pytest.approx(probability**2, abs=0.01)


def test_masks_are_a_function_of_the_example_and_of_the_call():
    example = numbers()
    mask = kept(0.5, example)
    assert torch.equal(kept(0.5, example), mask)
    assert torch.equal(kept(0.5, example[7:9]), mask[7:9])  # not of its batch mates
    assert not torch.equal(kept(0.5, example, calls=2), mask)
    other = example.clone()
    other[:, 3] += 2**-16  # any entry, by as little as the noise at 256 levels
    changed = (kept(0.5, other) != mask).flatten(1).float().mean(dim=1)
    assert (changed - 0.5).abs().max() < 0.1
    same = (mask[1:] == mask[:1]).flatten(1).float().mean(dim=1)
    assert (same - 0.5).abs().max() < 0.1


def test_entries_of_any_number_and_type():
    for shape in ((1,), (3,), (5, 5)):
        assert kept(0.5, numbers(), shape=shape).shape == (20, *shape)
    x = torch.ones(20, 6, dtype=torch.bfloat16, requires_grad=True)
    dropped = Dropout(0.25, numbers())(x)
    dropped.sum().backward()
    assert dropped.dtype == torch.bfloat16 and torch.equal(x.grad, dropped.detach())


@pytest.fixture
def flow():
    return tiny_flow("causal", (1, 6, 6), 17, attention=1, downsample=1, dropout=0.3, width=12)


def in_training(flow, x, seed=1, mode="store"):
    noise = torch.rand(x.shape, generator=seeded(seed))
    return flow(x, noise, executor=executor_of(mode)).total


def test_only_a_training_step_drops_by_its_noise_alone(flow):
    x = images(8, (1, 6, 6), 17)
    plain = tiny_flow("causal", (1, 6, 6), 17, attention=1, downsample=1, width=12)
    wanted = plain.log_prob(x, seeded(1))
    first = in_training(flow, x)
    assert not torch.allclose(first, wanted, atol=0.01)
    assert flow.training and torch.equal(flow.log_prob(x, seeded(1)), wanted)
    # The likelihood of a causal flow does not depend on the noise otherwise.
    assert torch.equal(first, in_training(flow, x))
    assert ((in_training(flow, x, seed=2) - first).abs() > 1e-3).all()


@torch.no_grad()
def test_every_kind_of_block_drops(flow):
    x = images(8, (1, 6, 6), 17)
    conditioner = flow.bijection.conditioner
    for block in conditioner.blocks:
        others = [each for each in conditioner.blocks if each is not block]
        for each in others:  # they add nothing
            each.last.weight.zero_()
        assert not torch.allclose(in_training(flow, x), flow.log_prob(x, seeded(1)), atol=1e-3)
        for each in others:
            torch.nn.init.normal_(each.last.weight, generator=seeded(3))


def test_activations_that_are_computed_again_have_the_same_masks(flow):
    x, gradients = images(8, (1, 6, 6), 17), []
    for mode in ("store", "checkpoint"):
        total = in_training(flow, x, mode=mode).sum()
        gradients.append(torch.autograd.grad(total, list(flow.parameters())))
    assert all(map(torch.equal, *gradients))

"""The mixture over the sides of an image: its likelihoods and samples, and who has it."""

import math

import pytest
import torch
from helpers import a_config, images, seeded, tiny_flow

import flowtrain
from flowtrain.bijections.orders import turned
from flowtrain.checkpoints.load import _sides
from flowtrain.errors import UserError
from flowtrain.pictures.sample import sample
from flowtrain.training.loss import Loss

SHAPE = (3, 4, 4)
OF_SMALL = {"context": "downsample", "context_factor": 2}


def mean(one, other):
    return torch.logaddexp(one, other) - math.log(2)


@pytest.mark.parametrize(
    "model, options",
    [
        ("glow", {"transform": "logit"}),
        ("glow", {"classes": 3}),
        ("causal", {"classes": 3}),
        ("causal", OF_SMALL),
    ],
)
def test_the_likelihood_is_the_mean_of_both_sides(model, options):
    flow = tiny_flow(model, SHAPE, **options).double()
    x, labels = images(6, SHAPE), torch.tensor([0, 1, 2, 0, 1, 2]) if flow.classes else None
    noise = torch.rand(x.shape, generator=seeded())
    sides = [(x, noise), (x.flip(-1), noise.flip(-1))]
    plain = [flow(*side) for side in sides]
    given = [flow(*side, labels).total for side in sides]
    assert (plain[0].total - plain[1].total).abs().min() > 1e-3
    flow.sides = 2
    for side in sides:
        found = flow(*side)
        torch.testing.assert_close(found.total, mean(*(part.total for part in plain)))
        torch.testing.assert_close(flow(*side, labels).total, mean(*given))
        if flow.classes:
            each = [part.by_class + part.log_det[:, None] for part in (*plain, found)]
            torch.testing.assert_close(each[2], mean(*each[:2]))


@pytest.mark.parametrize(
    "shape, levels, options, words",
    [
        ((1, 1, 2), 3, {}, "the image and its mirror image"),
        ((1, 1, 2), 3, {"classes": 2}, "the image and its mirror image"),
        ((1, 2, 2), 2, {"orders": 8}, "8 orders of the image"),
    ],
)
def test_all_sides_of_a_model_are_one_distribution(shape, levels, options, words):
    """Of all images of a few pixels, which are as frequent as their probabilities."""
    flow, sides = tiny_flow("causal", shape, levels, scale=0.5, **options), options.get("orders", 2)
    every = torch.cartesian_prod(*[torch.arange(levels)] * flow.dims).view(-1, *shape).byte()
    noise = torch.zeros(every.shape)
    with torch.no_grad():
        each = torch.stack([flow(turned(every, k), noise, side=k).total for k in range(sides)])
        torch.testing.assert_close(each[0], flow.log_prob(every))
        if "orders" in options:  # each has its own distribution
            assert (each.std(dim=0) > 1e-3).all()
        torch.testing.assert_close(each.exp().sum(dim=1), torch.ones(sides))
        assert words not in repr(flow)
        flow.sides = sides
        assert f"the mean over {words}, in bits/dim" in repr(flow)
        probability = flow.log_prob(every).exp()
        torch.testing.assert_close(probability, each.exp().mean(dim=0))
    for x in (sample(flow, 4000, [1.0], 0), flow.sample(4000, generator=seeded())):
        found = (x == every[:, None]).flatten(2).all(dim=2).sum(dim=1)
        expected = len(x) * probability
        assert ((found - expected).abs() < 5 * expected.sqrt()).all()  # standard deviations


def test_a_training_step_draws_an_order_for_each_image():
    """The loss of each image is that of one of its sides, all equally often."""
    flow = tiny_flow("causal", (1, 4, 6), orders=4)  # four orders need no square
    x = images(400, flow.shape)
    noise = torch.rand(x.shape, generator=seeded())
    each = torch.stack([flow(turned(x, k), turned(noise, k), side=k).total for k in range(4)])
    total = flow(x, noise, executor=Loss(flow, a_config().train).executor).total
    near = (total - each).abs() < 1e-3  # of sums of rounded logs, which differ by whole nats
    assert (near.sum(dim=0) == 1).all()
    assert (near.sum(dim=1) - 100).abs().max() < 5 * math.sqrt(400 * 0.25 * 0.75)
    total.sum().backward()
    assert flow.bijection.conditioner.of_orders.weight.grad.abs().min() > 0


def by_seed(flow, count, contexts):
    x = sample(flow, count, [0.5, 1.0], 3, contexts=contexts)
    return x.unflatten(0, (2, 2, count)).transpose(0, 2)


def by_generator(flow, count, contexts):
    return flow.sample(count, generator=seeded(), context=contexts[:1].expand(count, -1, -1, -1))


@pytest.mark.parametrize("drawn", [by_seed, by_generator])
def test_samples_take_a_side_by_their_latents(drawn):
    """Given a context, a sample is the mirror image of one given the mirrored context."""
    flow = tiny_flow("glow", SHAPE, **OF_SMALL)
    contexts = images(2, (3, 2, 2))
    kept = contexts.clone()
    plain, other = drawn(flow, 20, contexts), drawn(flow, 20, contexts.flip(-1)).flip(-1)
    flow.sides = 2
    x = drawn(flow, 20, contexts)
    is_plain, is_other = ((x == each).flatten(-3).all(-1).view(20, -1) for each in (plain, other))
    assert torch.equal(is_plain, ~is_other) and 4 < is_other[:, 0].sum() < 16
    assert (is_other == is_other[:, :1]).all(), "other sides at other temperatures or contexts"
    assert torch.equal(drawn(flow, 5, contexts), x[:5]) and torch.equal(contexts, kept)
    with pytest.raises(ValueError, match="context"):
        flow.sample(3, context=contexts)


def test_a_model_trained_with_flips_has_it():
    flow = flowtrain.load("causal_cifar_small", "cpu", mirror=True)
    assert flow.sides == 2 and flowtrain.load("causal_cifar_small", "cpu").sides == 1
    with pytest.raises(UserError, match="trained without mirror images .data.flip is null, data.n"):
        flowtrain.load("glow_digits", "cpu", mirror=True)
    with pytest.raises(UserError, match="--mirror: the model is of real values"):
        flowtrain.load("two_moons", "cpu", mirror=True)
    flow = tiny_flow("glow")
    assert _sides(flow, a_config(data={"name": "cifar10", "root": "nowhere"})) == 2
    with pytest.raises(UserError, match="--mirror: data.flip is null, so it depends on the data"):
        _sides(flow, a_config(data={"name": "npz", "path": "nowhere.npz"}))

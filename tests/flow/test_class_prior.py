"""Class-conditional models: the prior, the likelihoods, labels of data sets, and the commands."""

import math

import numpy as np
import pytest
import torch
from catalogue import TINY
from helpers import CNF, CPU, a_config, images, npz, perturb, seeded, tiny_flow
from torch.distributions import Normal

from flowtrain.bijections.context import Guided
from flowtrain.bijections.inverses import Iterating
from flowtrain.data.batches import Batches
from flowtrain.data.splits import DataSet, Split
from flowtrain.evaluation.score import score
from flowtrain.flow.class_prior import ClassPrior
from flowtrain.system import distributed

SHAPE = (1, 4, 4)


def test_the_prior_is_a_gaussian_for_each_class_on_the_coarsest_level():
    z, labels = torch.randn(5, 10, generator=seeded()), torch.tensor([0, 1, 2, 0, 1])
    standard = ClassPrior(5, (10,)).by_class(z)  # before training
    torch.testing.assert_close(standard, Normal(0, 1).log_prob(z).sum(1, True).expand(5, 5))
    prior = perturb(ClassPrior(3, (2, 1, 2)), 0.7)
    scale = (8 * torch.tanh(prior.log_scale / 8)).exp()
    for label in range(3):
        coarse = Normal(prior.mean[label], scale[label]).log_prob(z[:, 6:])
        expected = Normal(0, 1).log_prob(z[:, :6]).sum(1) + coarse.sum(1)
        torch.testing.assert_close(prior.log_prob(z, torch.full((5,), label)), expected)
        torch.testing.assert_close(prior.by_class(z)[:, label], expected)
    of_each = prior.log_prob(z, labels)
    torch.testing.assert_close(of_each, prior.by_class(z)[range(5), labels])
    torch.testing.assert_close(prior.log_prob_by_entry(z, labels).sum(1), of_each)
    drawn = torch.cat([z[:, :6], z[:, 6:] * scale[labels] + prior.mean[labels]], dim=1)
    torch.testing.assert_close(prior.latents_of_classes(z, labels), drawn)
    beyond = (z[:, 6:] - prior.mean[0]) / scale[0]
    moved = torch.cat([z[:, :6], prior.mean[2] + 0.5 * scale[2] * beyond], dim=1)
    torch.testing.assert_close(prior.carried(z, 0, 2, 0.5), moved)


@pytest.mark.parametrize("model", [*sorted(TINY.keys() - {"cnf"}), CNF])
def test_without_a_label_the_likelihood_is_the_mean_over_the_classes(model):
    flow = tiny_flow(model, classes=3).double()
    x = images(6, SHAPE)
    given = torch.stack([flow.log_prob(x, seeded(), torch.full((6,), label)) for label in range(3)])
    assert given.std(dim=0).min() > 1e-3
    torch.testing.assert_close(flow.log_prob(x, seeded()), given.logsumexp(dim=0) - math.log(3))
    parts = flow(x, torch.rand(x.shape, generator=seeded()))
    torch.testing.assert_close(parts.by_class.T + parts.log_det, given)
    mixed = flow.log_prob(x, seeded(), torch.tensor([0, 1, 2, 0, 1, 2]))
    torch.testing.assert_close(mixed, given[[0, 1, 2, 0, 1, 2], range(6)])
    mixed.sum().backward()
    names = ("class_prior.", "conditioner.context.")
    of_classes = [p for name, p in flow.named_parameters() if any(n in name for n in names)]
    assert of_classes and all(parameter.grad.abs().min() > 0 for parameter in of_classes)


@pytest.mark.parametrize("model", ["glow", "causal", "tarflow", "jet"])
def test_images_come_back_and_samples_have_a_class(model):
    flow, x = tiny_flow(model, classes=3), images(8, SHAPE)
    assert torch.equal(flow.decode(flow.encode(x)), x)
    of_class = flow.sample(8, generator=seeded(), labels=torch.tensor([2] * 8))
    by_turns = flow.sample(8, generator=seeded())
    assert torch.equal(of_class[2::3], by_turns[2::3]) and not torch.equal(of_class[0], by_turns[0])


def test_labels_that_the_model_does_not_have():
    for classes, labels, message in (
        (3, [0, -1], "classes in 0..2, got .-1, 0"),
        (3, [0, 3], "classes in 0..2, got .0, 3"),
        (3, [0], "expected 2 labels, got .1,."),
        (3, [0.0, 1.0], "integers as labels, got torch.float32"),
        (2, [True, False], "integers as labels, got torch.bool"),  # not a mask of the classes
        (0, [0, 0], "not class-conditional"),
    ):
        flow = tiny_flow(classes=classes)
        for use in (
            lambda labels, flow=flow: flow.log_prob(images(2, SHAPE), labels=labels),
            lambda labels, flow=flow: flow.log_density(torch.rand(2, *SHAPE), labels),
            lambda labels, flow=flow: flow.sample(2, labels=labels),
            lambda labels, flow=flow: flow.decode(torch.zeros(2, 16), labels),
        ):
            with pytest.raises(ValueError, match=message):
                use(torch.tensor(labels))


@pytest.mark.parametrize("dropped, seen", [(0.0, 1 / 3), (0.1, 0.0)])
def test_without_a_class_the_networks_see_the_mean_of_all_or_zeros(dropped, seen):
    """Zeros if labels were dropped in training."""
    flow, x = tiny_flow("causal", classes=3, label_dropout=dropped), images(5, SHAPE)
    z = flow.encode(x)
    again, log_det = flow.bijection(flow.dequantizer.middle(x), torch.full((5, 3), seen))
    torch.testing.assert_close(again, z)
    assert torch.equal(flow.decode(z), x)
    assert not torch.equal(flow.decode(z, torch.tensor([0, 1, 2, 0, 1])), x)
    if dropped:
        noise = torch.full(x.shape, 0.5)
        without = flow(x, noise, torch.full((5,), 3)).total  # the label beyond those of the classes
        base = Normal(0, 1).log_prob(z).sum(1)
        torch.testing.assert_close(without, base + log_det - 16 * math.log(256))
        assert (flow(x, noise).total - without).abs().min() > 1e-3


def test_guidance_needs_a_model_of_images_without_a_class():
    for words, model, classes in (
        ("not class-conditional", "causal", 0),
        ("each class has its own prior", "glow", 3),
        ("model.label_dropout, for example 0.1", "causal", 3),
    ):
        with pytest.raises(ValueError, match=f"guidance: .*{words}"):
            tiny_flow(model, classes=classes).sample(2, guidance=0.0)


@pytest.mark.parametrize("model", ["causal", "tarflow"])
def test_guided_samples_are_by_the_extrapolated_parameters(model):
    flow = tiny_flow(model, classes=3, label_dropout=0.1).double()
    z, labels = flow.draw_latents(6, seeded()), torch.arange(6) % 3
    context = torch.nn.functional.one_hot(labels, 3).double()
    guided = Guided(context, torch.zeros_like(context), 1.5)
    x = flow.decode(z, labels, guidance=1.5)
    assert torch.equal(x, flow.dequantizer.to_data(flow.bijection.inverse(z, guided)[0]))
    assert torch.equal(flow.decode(z, labels, Iterating(lambda share: None), 1.5), x)
    assert torch.equal(flow.sample(6, 1, seeded(), labels, 1.5), x)
    plain = flow.decode(z, labels)
    assert torch.equal(flow.decode(z, labels, guidance=0.0), plain) and not torch.equal(x, plain)


@pytest.mark.parametrize("streamed", [{}, {"max_in_memory": 0, "workers": 1}])
def test_labels_go_with_their_images(tmp_path, streamed, monkeypatch):
    """The class of an image is in its first pixel."""
    section = npz(tmp_path / "a.npz", train=50, test=20, validation=10)
    arrays = dict(np.load(section["path"]))
    arrays |= {f"y_{part}": arrays[f"x_{part}"][:, :1, 0, 0] % 3 for part in ("train", "test")}
    np.savez(section["path"], **arrays)
    config = a_config({"name": "glow", "classes": 3, **TINY["glow"]}, data={**section, **streamed})
    data = DataSet(config.data)
    for group in (None, distributed.Group(None, 1, 2)):
        monkeypatch.setattr(distributed, "group", group)
        batches = Batches(data, config, 7, CPU)
        for step in range(4, 16):  # over the end of the data
            x, labels = batches.at(step * batches.all_processes)
            assert torch.equal(labels, (x[:, 0, 0, 0] % 3).long())
        batches.close()
    for name, count in [("train", 40), ("validation", 10), ("test", 20)]:
        split = data.split(name)
        assert len(split) == count
        assert torch.equal(split.labels, (split.take(slice(None))[:, 0, 0, 0] % 3).long())
    assert Batches(data, a_config("glow", data=section), 7, CPU).at(0)[1] is None
    # without a test split of their own
    np.savez(tmp_path / "b.npz", x_train=arrays["x_train"], y_train=arrays["y_train"])
    split = DataSet(config.data.model_copy(update={"path": tmp_path / "b.npz"})).split("test")
    assert torch.equal(split.labels, (split.take(slice(None))[:, 0, 0, 0] % 3).long())


def test_bounds_by_class_are_those_of_the_draws():
    flow = tiny_flow(classes=3).eval().requires_grad_(False)
    scores = score(flow, Split(images(9, SHAPE).numpy(), np.arange(9)), draws=2, batch_size=4)
    assert scores.draws_by_class.shape == (2, 3, 9)
    torch.testing.assert_close(scores.draws, scores.draws_by_class.logsumexp(dim=1) - math.log(3))

"""Edits of latents: mixing, principal directions, class priors."""

import math

import pytest
import torch
from helpers import images, seeded, tiny_flow

from flowtrain.latents.directions import Direction
from flowtrain.latents.paths import KEPT
from flowtrain.tools.explore.edits import (
    Stoppable,
    along_attribute,
    components,
    levels_of,
    towards_class,
)
from flowtrain.tools.explore.worker import Superseded


def test_levels_are_those_of_the_flow():
    flow = tiny_flow("glow", (3, 8, 8))
    levels = levels_of(flow)
    z = flow.encode(images(2, flow.shape))
    for level, part in zip(levels, flow.split_latents(z), strict=True):
        assert torch.equal(z[:, level.where].reshape(part.shape), part)
    assert [level.words for level in levels] == ["6 x 4 x 4", "24 x 2 x 2"]
    assert [level.shape for level in levels_of(tiny_flow("nice", (1, 4, 4)))] == [(16,)]


@pytest.mark.parametrize("count", [20, 400])  # fewer and more images than entries
def test_principal_directions_are_those_of_the_covariance(count):
    scales = torch.tensor([5.0, 3.0, *[0.1] * 28])
    rotation = torch.linalg.qr(torch.randn(30, 30, generator=seeded()))[0]
    z = torch.randn(count, 30, generator=seeded(1)) * scales @ rotation.T + 7
    found = components(z, 4)
    _, singular, vectors = torch.linalg.svd((z - z.mean(dim=0)).double(), full_matrices=False)
    same = (found.directions.double() * vectors[:4]).sum(dim=1).abs()
    torch.testing.assert_close(same[:2], torch.ones(2, dtype=torch.double), rtol=1e-4, atol=0)
    expected = singular[:4] / math.sqrt(count - 1)
    torch.testing.assert_close(found.deviations.double(), expected, rtol=1e-4, atol=0)
    assert (found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(found.directions.norm(dim=1), torch.ones(4))


@pytest.mark.filterwarnings("error")
def test_few_or_equal_images_have_few_directions_and_no_warning():
    assert len(components(torch.randn(3, 30, generator=seeded())).directions) == 2
    assert components(torch.ones(5, 4)).deviations.max() < 1e-6


def test_towards_a_class():
    flow = tiny_flow("glow", (1, 4, 4), classes=3)
    prior = flow.class_prior.requires_grad_(False)
    prior.mean += 4 * torch.randn(prior.mean.shape, generator=seeded(1))
    z = prior.latents_of_classes(0.1 * torch.randn(1, 16, generator=seeded()), torch.tensor([2]))
    assert prior.by_class(z).argmax() == 2
    assert torch.equal(towards_class(prior, z, 1, 0.0), z)
    end = towards_class(prior, z, 1, 1.0)
    torch.testing.assert_close(end, prior.carried(z, 2, 1, KEPT))
    middle = towards_class(prior, z, 1, 0.5)
    torch.testing.assert_close(middle, (z + end) / 2)
    assert torch.equal(middle[:, :8], z[:, :8])  # only the coarsest level has a prior


def test_along_an_attribute():
    z = torch.randn(1, 16, generator=seeded())
    vector = torch.nn.functional.normalize(torch.randn(16, generator=seeded(1)), dim=0)
    direction = Direction("thick", vector, -1.0, 2.0, "difference", 1.0, 0.0, 10)
    torch.testing.assert_close(along_attribute(z, direction, 0.0), z)
    further = along_attribute(z, direction, 0.5)
    strengths = direction.strength(torch.cat([z, further]))
    assert float(strengths[1] - strengths[0]) == pytest.approx(0.5, abs=1e-5)
    torch.testing.assert_close(further.norm(), z.norm())  # as typical as it was


@pytest.mark.parametrize("model, least", [("glow", 10), ("causal", 20)])
def test_decoding_checks_often_whether_it_is_wanted(model, least):
    flow = tiny_flow(model, (1, 4, 6) if model == "causal" else (1, 4, 4))
    calls = []
    z = flow.draw_latents(1, seeded())
    x = flow.decode(z, executor=Stoppable(lambda: calls.append(1)))
    assert torch.equal(x, flow.decode(z)) and len(calls) >= least

    def stop():
        raise Superseded("")

    with pytest.raises(Superseded):
        flow.decode(z, executor=Stoppable(stop))

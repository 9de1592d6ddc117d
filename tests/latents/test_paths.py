"""Paths through the latent space: where they begin and end, and where they stop; nearest images."""

import math

import numpy as np
import pytest
import torch
from helpers import a_config, images, perturb, seeded, tiny_flow

from flowtrain.data.splits import DataSet, Split
from flowtrain.errors import UserError
from flowtrain.evaluation.score import score
from flowtrain.flow.class_prior import ClassPrior
from flowtrain.latents import paths
from flowtrain.latents.directions import Direction
from flowtrain.latents.encoding import encode
from flowtrain.latents.nearest import CHUNK, nearest_images

D = 16


def test_a_latent_turns_until_its_projection_is_the_target():
    z = torch.randn(6, D, generator=seeded(0))
    vector = torch.nn.functional.normalize(torch.randn(D, generator=seeded(5)), dim=0)
    direction = Direction("a", vector, -1.0, 2.0, "difference", 0.9, 0.01, 100)
    target = torch.linspace(-2, 2, 6)
    found = paths.moved(z, direction, target)
    torch.testing.assert_close(found @ vector, target)
    torch.testing.assert_close(found.norm(dim=1), z.norm(dim=1))  # which stays typical
    # What is beside the direction only shrinks or grows.
    rest, old = (x - (x @ vector)[:, None] * vector for x in (found, z))
    torch.testing.assert_close(torch.cosine_similarity(rest, old), torch.ones(6))
    far = paths.moved(z, direction, torch.full((6,), 50.0))
    torch.testing.assert_close(far, 50 * vector.expand(6, D))
    found = paths.along(z, direction, 1.0, 5)
    assert found.shape == (6, 5, D) and torch.equal(found[:, 0], z)
    projections = found @ vector
    torch.testing.assert_close(projections[:, -1], torch.full((6,), direction.high))
    steps = projections.diff(dim=1)
    torch.testing.assert_close(steps, steps[:, :1].expand(6, 4), rtol=1e-3, atol=1e-4)
    back = paths.along(z, direction, -1.0, 2)[:, -1] @ vector
    torch.testing.assert_close(back, torch.full((6,), direction.low))


def test_a_sphere_joins_latents_of_one_norm():
    a, b = torch.randn(2, D, generator=seeded(0))
    b *= a.norm() / b.norm()
    found = paths.slerp(a, b, torch.tensor([0, 0.25, 0.5, 1]))
    assert torch.equal(found[0], a) and torch.equal(found[-1], b)
    torch.testing.assert_close(found.norm(dim=1), a.norm().expand(4))
    angles = torch.arccos(torch.cosine_similarity(found, a[None]))
    torch.testing.assert_close(angles[1] * 4, angles[3])
    torch.testing.assert_close(paths.slerp(a, 3 * a, torch.tensor([0.5])), 2 * a[None])
    # The mode of the base, a sample at temperature 0, has no angle.
    torch.testing.assert_close(paths.slerp(0 * a, b, torch.tensor([0.5])), b[None] / 2)


def test_paths_between_classes_by_the_means_and_by_their_priors():
    flow, (a, b) = tiny_flow(shape=(1, 4, 4), q=17), torch.randn(2, D, generator=seeded(1))
    z = torch.randn(4, D, generator=seeded(0))
    found = paths.between_classes(flow, z, 0, 1, (a, b).__getitem__, 5)
    torch.testing.assert_close(found[:, 0], z)
    torch.testing.assert_close(found[:, -1], b + paths.KEPT * (z - a))
    torch.testing.assert_close(found[:, 2], (found[:, 0] + found[:, -1]) / 2)
    flow.class_prior = perturb(ClassPrior(3, (4, 2, 1)), 0.7)
    with torch.no_grad():
        found = paths.between_classes(flow, z, 0, 2, z.__getitem__, 3)
        mean, scale = flow.class_prior.mean, flow.class_prior.bounded_log_scale().exp()
    assert torch.equal(found[:, -1, :8], z[:, :8])  # the finer levels stay
    beyond = (z[:, 8:] - mean[0]) / scale[0]
    torch.testing.assert_close(found[:, -1, 8:], mean[2] + paths.KEPT * scale[2] * beyond)


def test_a_path_stops_before_the_first_image_that_is_not_typical(monkeypatch):
    flow, values = tiny_flow(shape=(1, 4, 4), q=17), torch.tensor([[-9, 1, 2, 3], [1, 2, -9, 3.0]])
    monkeypatch.setattr(paths, "log_probs", lambda flow, x: values.flatten())
    rows = images(8, (1, 4, 4), 17).unflatten(0, (2, 4))
    counts = paths.stopped(flow, rows, 0.0)
    assert counts == [4, 2]  # the first image of a path is given, and counts
    stays = paths.stay(rows, counts)
    assert torch.equal(stays[0], rows[0]) and torch.equal(stays[1], rows[1, [0, 1, 1, 1]])


def test_what_is_typical_is_what_all_but_one_in_a_hundred_have():
    flow, x = tiny_flow(shape=(1, 4, 4), q=17), images(300, (1, 4, 4), 17)
    split = Split(x.numpy(), np.arange(300))
    lowest = paths.lowest_typical(flow, split)
    found = score(flow, split).log_prob
    assert int((found < lowest).sum()) == math.ceil(0.01 * 299)
    torch.testing.assert_close(paths.log_probs(flow, x), found)


def test_paths_begin_at_the_first_test_images_of_a_class():
    flow, data = tiny_flow(shape=(1, 8, 8), q=17), DataSet(a_config("glow").data)
    z = paths.of_classes(flow, data, 4, 9, 3, 2)
    four, nine = (data.split("train").labels == label for label in (4, 9))
    means = [encode(flow, data.split("train").take(of.numpy())).mean(dim=0) for of in (four, nine)]
    test = data.split("test")
    first = encode(flow, test.take((test.labels == 4).numpy())[:3])
    end = means[1] + paths.KEPT * (first - means[0])
    torch.testing.assert_close(z, torch.stack([first, end], dim=1), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="--from-class 4: the split has .* of it, 999 are needed"):
        paths.of_classes(flow, data, 4, 9, 999, 2)


@pytest.mark.parametrize("pixels, levels, parts", [(1, 256, 40), (7 * 48, 256, 6), (CHUNK, 32, 1)])
def test_nearest_is_that_of_all_distances(pixels, levels, parts):
    split = Split(images(50, (3, 4, 4)).numpy(), np.arange(40, 0, -1), levels)
    calls = []
    queries = torch.cat([images(5, (3, 4, 4), levels, seed=1), split.take(slice(12, 13))])
    found, positions = nearest_images(queries, split, levels, 3, lambda: calls.append(1), pixels)
    flat = (x.flatten(1).double() for x in (queries, split.take(slice(None))))
    expected, where = (torch.cdist(*flat) / (levels - 1)).topk(3, largest=False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(positions, where) and len(calls) == parts
    assert found[5, 0] == 0 and positions[5, 0] == 12


def test_nearest_of_few_images_is_all_of_them():
    split = Split(images(2, (1, 2, 2)).numpy(), np.arange(2))
    distances, positions = nearest_images(images(4, (1, 2, 2), seed=1), split, 256, 3)
    assert distances.shape == positions.shape == (4, 2) and sorted(positions[0].tolist()) == [0, 1]

"""Coordinates of images of which a part is known: all coordinates satisfy the constraint."""

import math

import pytest
import torch
from helpers import agrees, images, seeded

from flowtrain.flow.image_context import ImageContext
from flowtrain.tools.inpaint.constraints import Averages, Pixels

SHAPE = (2, 4, 6)


def constraint_of(name, levels, **options):
    x = images(1, SHAPE, levels, seed=3)[0]
    if name == "pixels":
        return Pixels(x, torch.rand(SHAPE, generator=seeded(1)) < 0.5, levels, **options)
    context = ImageContext("downsample", 2, SHAPE, levels)
    return Averages(context.of(x[None])[0], context)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("name", ["pixels", "averages"])
def test_every_image_satisfies_the_constraint(name, levels):
    constraint = constraint_of(name, levels)
    for spread in (0.1, 1.0, 2.0):
        y, _ = constraint.images(spread * torch.randn(200, *SHAPE, generator=seeded(0)))
        x = (y * levels).floor().clamp(0, levels - 1).to(torch.uint8)
        assert agrees(constraint, x).all()
    for others in (torch.zeros_like(x), torch.full_like(x, levels - 1)):
        assert not agrees(constraint, others).any()


@pytest.mark.parametrize("name", ["pixels", "averages"])
def test_the_distance_of_an_image_from_the_constraint(name):
    constraint = constraint_of(name, 17)
    y, _ = constraint.images(torch.zeros(2, *SHAPE))  # known values are in the middle of cells
    shift = torch.tensor([0.0, 0.25]).view(2, 1, 1, 1)
    count = constraint.known.sum() if name == "pixels" else constraint.mean.numel()
    expected = torch.tensor([0, 0.25**2 / 2]) * count
    torch.testing.assert_close(constraint.miss(y + shift), expected, rtol=1e-4, atol=1e-6)


def test_coordinates_of_images_give_the_images():
    constraint = constraint_of("pixels", 17)
    s = torch.randn(5, *SHAPE, generator=seeded(0))
    back = constraint.coordinates(constraint.images(s)[0])
    torch.testing.assert_close(back, s, rtol=1e-3, atol=1e-3)


def test_known_entries_of_a_model_of_levels_do_not_move():
    constraint = constraint_of("pixels", 17, within=False)
    known = constraint.known
    y, _ = constraint.images(torch.randn(5, *SHAPE, generator=seeded(0)))
    assert torch.equal(constraint.moves, ~known)
    assert torch.equal((17 * y).floor()[:, known], constraint.x.float()[known].expand(5, -1))


def test_the_volume_of_images_with_known_averages():
    """Against the Jacobian: from coordinates without their mean to three of the four pixels, of
    which the fourth follows. And its derivative, through the solution, against differences.
    """
    context = ImageContext("downsample", 2, (1, 2, 2), 5)
    constraint = Averages(torch.tensor([[[1]]]), context)
    basis = torch.linalg.qr(torch.eye(4, dtype=torch.float64) - 0.25)[0][:, :3]

    def three(w):
        return constraint.images((basis @ w).reshape(1, 1, 2, 2))[0].flatten()[:3]

    def extra(w):
        return constraint.images((basis @ w).reshape(1, 1, 2, 2))[1]

    found = []
    for seed in range(4):
        w = torch.randn(3, generator=seeded(seed), dtype=torch.float64, requires_grad=True)
        jacobian = torch.autograd.functional.jacobian(three, w)
        exact = torch.linalg.det(jacobian).abs().log() + 0.5 * w.square().sum()
        found.append(float((exact - extra(w)).detach()))
        assert torch.autograd.gradcheck(three, w, eps=1e-5, atol=1e-8, rtol=1e-6)
        assert torch.autograd.gradcheck(extra, w)
    assert max(found) - min(found) < 1e-6 and math.isfinite(found[0])  # up to a constant

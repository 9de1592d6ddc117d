"""Principal directions of latents."""

import math

import pytest
import torch
from helpers import seeded

from flowtrain.tools.explore.edits import components


@pytest.mark.parametrize("count", [20, 400])  # fewer and more images than entries
def test_principal_directions_are_those_of_the_covariance(count):
    scales = torch.tensor([5.0, 3.0, *[0.1] * 28])
    rotation = torch.linalg.qr(torch.randn(30, 30, generator=seeded()))[0]
    z = torch.randn(count, 30, generator=seeded(1)) * scales @ rotation.T + 7
    found = components(z)
    _, singular, vectors = torch.linalg.svd((z - z.mean(dim=0)).double(), full_matrices=False)
    same = (found.directions.double() * vectors[:8]).sum(dim=1).abs()
    torch.testing.assert_close(same[:2], torch.ones(2, dtype=torch.double), rtol=1e-4, atol=0)
    expected = singular[:8] / math.sqrt(count - 1)
    torch.testing.assert_close(found.deviations.double(), expected, rtol=1e-4, atol=0)
    assert (found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(found.directions.norm(dim=1), torch.ones(8))


@pytest.mark.filterwarnings("error")
def test_few_or_equal_images_have_few_directions_and_no_warning():
    assert len(components(torch.randn(3, 30, generator=seeded())).directions) == 2
    assert components(torch.ones(5, 4)).deviations.max() < 1e-6

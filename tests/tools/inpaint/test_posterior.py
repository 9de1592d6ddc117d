"""Samples of missing pixels against posteriors in closed form."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from catalogue import TINY
from helpers import agrees, images, seeded, tiny_flow
from torch import nn

from flowtrain.bijections.base import Bijection
from flowtrain.bijections.ordinal import discrete_model
from flowtrain.errors import UserError
from flowtrain.flow.dequantize import Dequantizer, GaussianDequantizer, RealValued
from flowtrain.flow.flow import Flow
from flowtrain.flow.image_context import ImageContext
from flowtrain.tools.inpaint import posterior
from flowtrain.tools.inpaint.constraints import Averages, Pixels
from flowtrain.tools.inpaint.posterior import require, sample


class Linear(Bijection):
    """`z = A (v - mean)`, so v is Gaussian with the precision `A^T A`."""

    def __init__(self, matrix, mean, shape):
        super().__init__()
        self.shape = shape
        self.matrix, self.mean = nn.Parameter(matrix), nn.Parameter(mean)

    def forward(self, x, context=None):
        z = (x.flatten(1) - self.mean) @ self.matrix.T
        return z, torch.linalg.slogdet(self.matrix)[1].expand(len(x))

    def inverse(self, z, context=None):
        x = torch.linalg.solve(self.matrix, z.T).T + self.mean
        return x.unflatten(1, self.shape), -torch.linalg.slogdet(self.matrix)[1].expand(len(z))


def gaussian(shape, levels, sd, seed=0):
    """A flow that is Gaussian, with its mean and covariance of dequantized images in [0, 1]."""
    dims = math.prod(shape)
    matrix = torch.eye(dims) + 0.4 * torch.randn(dims, dims, generator=seeded(seed))
    mean = 0.1 * torch.rand(dims, generator=seeded(seed + 1)) - 0.05
    flow = Flow(Linear(matrix / sd, mean, shape), Dequantizer(levels), shape)
    return flow, mean + 0.5, torch.linalg.inv(matrix.T @ matrix / sd**2)


# From random images, so narrow a density as the second would not be found in so few moves.
@pytest.mark.parametrize("of, sd", [("pixels", 0.06), ("pixels", 0.006), ("averages", 0.06)])
def test_an_image_of_a_gaussian(of, sd):
    """Given known pixels, or averages: the mean and covariance given a linear map of the image."""
    shape = (1, 2, 3) if of == "pixels" else (1, 2, 4)
    flow, mean, covariance = gaussian(shape, 256, sd)
    if of == "pixels":
        x = (256 * (mean + sd * torch.tensor([-1, 0.5, 0, 1, -1, 0])).view(shape)).byte()
        known = torch.tensor([[[1, 0, 1], [0, 1, 0]]], dtype=torch.bool)
        constraint, linear = Pixels(x, known, 256), torch.eye(6)[known.flatten()]
        given, free = x[known], ~known.flatten()
    else:
        given, free = torch.tensor([120, 135]), torch.ones(8, dtype=torch.bool)
        context = ImageContext("downsample", 2, shape, 256)
        constraint = Averages(given.view(1, 1, 2), context)
        linear = torch.tensor([[1, 1, 0, 0] * 2, [0, 0, 1, 1] * 2]) / 4.0
    found = sample(flow, constraint, 600, 24, seed=0)
    assert agrees(constraint, found.x).all()
    assert 0.5 < found.accepted < 0.99 and found.effective > 2
    gain = covariance @ linear.T @ torch.linalg.inv(linear @ covariance @ linear.T)
    expected = mean + gain @ ((given + 0.5) / 256 - linear @ mean)
    # The noise in the cells of known pixels, and the rounding of the others.
    cells = torch.eye(len(mean)) + (gain @ gain.T if of == "pixels" else 0)
    rest = covariance - gain @ linear @ covariance + cells / 12 / 256**2
    y = (found.x.flatten(1) + 0.5) / 256
    found, mean, covariance = y[:, free], expected[free], rest[free][:, free]
    error = (found.mean(0) - mean) / (covariance.diagonal() / len(found)).sqrt()
    assert error.abs().max() < 4
    scale = covariance.diagonal().sqrt()
    difference = (found.T.cov() - covariance) / (scale[:, None] * scale)
    assert difference.abs().max() < 5 / len(found) ** 0.5


def test_the_effective_size_is_of_missing_entries():
    flow, _, _ = gaussian((1, 12, 20), 256, sd=0.06)
    known = torch.ones(1, 12, 20, dtype=torch.bool)
    known[0, 5, 7] = False  # one of so many that not all are followed
    found = sample(flow, Pixels(images(1, (1, 12, 20))[0], known, 256), 4, 16, seed=0)
    assert found.effective > 1


def test_the_posterior_is_of_cells_not_of_their_middles():
    """Three levels are so coarse that the place in the cell of the known entry matters: it is
    rather at the lower end, near which the other entry is.
    """
    matrix = torch.tensor([[4.0, 0.0], [-12.0, 12.0]])
    flow = Flow(Linear(matrix, torch.tensor([-0.3, -0.3]), (1, 1, 2)), Dequantizer(3), (1, 1, 2))
    # The probabilities of all images, by the density on a mesh.
    y = (torch.arange(300) + 0.5) / 300
    mesh = torch.cartesian_prod(y, y).reshape(-1, 1, 1, 2)
    density = flow.log_density(mesh).detach().exp().view(3, 100, 3, 100).mean((1, 3))
    x, known = torch.tensor([[[2, 0]]]), torch.tensor([[[True, False]]])
    expected = density[2] / density[2].sum()
    found = sample(flow, Pixels(x, known, 3), 1500, 20, seed=0)
    share = torch.bincount(found.x[:, 0, 0, 1], minlength=3) / 1500
    error = (share - expected) / (expected * (1 - expected) / 1500).sqrt()
    assert error.abs().max() < 4


LEVELS = 3
SQUARE = (1, 2, 2)
EVERYTHING = torch.tensor(list(itertools.product(range(LEVELS), repeat=4)), dtype=torch.uint8)
EVERYTHING = EVERYTHING.view(-1, *SQUARE)


def causal(scale=0.3):
    """A causal model, and its probabilities of `EVERYTHING`."""
    flow = tiny_flow("causal", SQUARE, LEVELS, scale=scale, token=1).eval()
    with torch.no_grad():
        return flow, flow.log_prob(EVERYTHING, seeded()).exp()


def distance(x, weights):
    """Total variation from the weights of `EVERYTHING`, in units of that of independent samples."""
    probability = weights / weights.sum()
    places = LEVELS ** torch.arange(3, -1, -1)
    found = torch.bincount((x.flatten(1) * places).sum(1), minlength=LEVELS**4) / len(x)
    noise = (probability * (1 - probability) / len(x)).sqrt().sum() / (2 * math.pi) ** 0.5
    return float((found - probability).abs().sum() / 2 / noise)


@pytest.mark.parametrize(
    "mask, moves",
    [([1, 1, 0, 0], False), ([0, 1, 0, 1], True), ([0, 0, 1, 0], True)],
    ids=["before", "between", "after"],
)
@pytest.mark.run  # takes long
def test_missing_entries_of_a_causal_model(mask, moves, monkeypatch):
    a_second_each = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(posterior, "time", a_second_each)
    (flow, probability), x = causal(), EVERYTHING[50]
    known = torch.tensor(mask, dtype=torch.bool).view(SQUARE)
    constraint = Pixels(x, known, LEVELS)
    probability = probability * agrees(constraint, EVERYTHING)
    found = sample(flow, constraint, 800, 6, seed=0)
    assert agrees(constraint, found.x).all()
    assert (found.accepted is not None) == moves
    expected = 2 * 6 * posterior.LEAPFROG if moves else None
    assert posterior.estimated_seconds(flow, constraint, 5, 6) == expected
    assert distance(found.x, probability) < 1.6


@pytest.mark.run  # takes long
def test_known_averages_of_a_causal_model():
    """The noise makes up for the difference of the integers' mean from the one that is held. So an
    image counts by the density of the sum of four uniform numbers: 1/6 at 1 and 3, 4/6 at 2.
    """
    flow, probability = causal(scale=0.05)
    constraint = Averages(torch.tensor([[[1]]]), ImageContext("downsample", 2, SQUARE, LEVELS))
    total = EVERYTHING.flatten(1).sum(1)
    probability = probability * ((total == 4) * 4 + (total == 3) * 1 + (total == 5) * 1)
    found = sample(flow, constraint, 400, 24, seed=0)
    assert agrees(constraint, found.x).all()
    assert distance(found.x, probability) < 1.6


def test_the_force_of_levels_is_a_derivative():
    flow, probability = causal()
    layer, x = discrete_model(flow.bijection), torch.tensor([[[[1.0, 2.0], [1.0, 2.0]]]])
    x.requires_grad_()
    total = layer.log_probs(x).sum()
    torch.testing.assert_close(total.exp(), probability[(x == EVERYTHING).flatten(1).all(1)][0])
    (force,) = torch.autograd.grad(total, x)
    step = torch.zeros_like(x)
    step[0, 0, 0, 0] = 1e-2
    with torch.no_grad():
        numeric = (layer.log_probs(x + step).sum() - layer.log_probs(x - step).sum()) / 2e-2
    torch.testing.assert_close(force[0, 0, 0, 0], numeric, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("shape, token", [((2, 3, 4), 1), ((2, 3, 5), 2)])
def test_the_order_and_all_probabilities_of_a_layer(shape, token):
    layer = discrete_model(tiny_flow("causal", shape, 5, token=token).eval().bijection)
    drawn = []
    layer.in_order(lambda entry, i: drawn.append(i) or torch.tensor([0]), 1)
    assert layer.order().flatten().argsort().tolist() == drawn
    x = images(3, shape, 5).float()
    entries = torch.tensor([0, 7, 29, 23][: 3 if token == 1 else 4]) % math.prod(shape)
    terms, table = layer.log_probs_of_all(x, entries)
    assert table.shape == (3, len(entries), 5)
    torch.testing.assert_close(table.exp().sum(2), torch.ones(3, len(entries)))
    levels = x.flatten(1)[:, entries, None].long()
    torch.testing.assert_close(table.gather(2, levels)[..., 0], terms.flatten(1)[:, entries])


@pytest.mark.run  # takes long
def test_the_volume_counts_in_the_posterior():
    """A wide density of patches with a dark mean, against weighted uniform samples of them."""
    flow = Flow(Linear(2 * torch.eye(4), torch.zeros(4), SQUARE), Dequantizer(256), SQUARE)
    constraint = Averages(torch.tensor([[[31]]]), ImageContext("downsample", 2, SQUARE, 256))
    found = sample(flow, constraint, 600, 40, seed=0)
    shares = -torch.rand(20_000, *SQUARE, generator=seeded()).log()
    y = 4 * 31.5 / 256 * shares / shares.sum((1, 2, 3), keepdim=True)
    weights = flow.log_density(y).detach().exp()
    expected = (weights * y.square().flatten(1).mean(1)).sum() / weights.sum()
    squares = ((found.x + 0.5) / 256).square().flatten(1).mean(1)
    assert abs(squares.mean() - expected) < 4 * squares.std() / 600**0.5


@pytest.mark.parametrize("name", [name for name in TINY if name != "planar"])
@pytest.mark.run  # takes long
def test_every_model_of_images_has_a_posterior(name):
    options = {"rtol": 1e-4, "atol": 1e-4, "solver": "dopri5"} if name == "cnf" else {}
    flow, x = tiny_flow(name, (1, 4, 4), 17, **options).eval(), images(1, (1, 4, 4), 17)[0]
    constraint = Pixels(x, torch.rand(1, 4, 4, generator=seeded(0)) < 0.5, 17)
    found = sample(flow, constraint, 2, 6, seed=1)
    assert found.x.shape == (2, 1, 4, 4) and agrees(constraint, found.x).all()
    assert all(parameter.grad is None for parameter in flow.parameters())
    if name in ("nice", "causal"):
        again, other = (sample(flow, constraint, 2, 6, seed=seed).x for seed in (1, 2))
        assert torch.equal(found.x, again) and not torch.equal(found.x, other)


@pytest.mark.parametrize("model", ["nice", "causal"])
@pytest.mark.run  # takes long
def test_the_class_of_the_image(model):
    flow, x = tiny_flow(model, SQUARE, 3, scale=0.5, classes=2), images(1, SQUARE, 3)[0]
    constraint = Pixels(x, torch.tensor([[[True, False], [True, False]]]), 3)
    a, b = (sample(flow.eval(), constraint, 20, 6, 0, label) for label in (0, 1))
    assert not torch.equal(a.x, b.x)
    if model == "nice":  # without a class it is the mean of the classes
        assert agrees(constraint, sample(flow, constraint, 2, 6, 0).x).all()
    else:
        with pytest.raises(UserError, match="give the class of the image, --class 0 to 1"):
            require(flow, 2)
    with pytest.raises(UserError, match=r"--class 2: the model has the classes 0\.\.1"):
        require(flow, 2, label=2)


def test_models_without_a_posterior():
    flow = tiny_flow("causal", SQUARE, 3)
    for dequantizer, label, words in (
        (flow.dequantizer, 3, "--class 3: the model is not class-conditional"),
        (GaussianDequantizer(3, 0.1), None, "so known pixels have no probability"),
        (RealValued(), None, "the model is of real-valued data"),
    ):
        flow.dequantizer = dequantizer
        with pytest.raises(UserError, match=words):
            require(flow, 2, label)

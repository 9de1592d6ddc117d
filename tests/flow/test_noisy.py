"""Gaussian noise: the density of noisy images, and denoising, against Gaussians by hand."""

import pytest
import torch
from catalogue import TINY
from helpers import images, perturb, seeded, tiny_flow
from torch.distributions import MultivariateNormal, Normal

from flowtrain.bijections import Bijection
from flowtrain.flow.class_prior import ClassContext, ClassPrior
from flowtrain.flow.dequantize import GaussianDequantizer
from flowtrain.flow.flow import Flow
from flowtrain.pictures.sample import sample
from flowtrain.system.random import Stream, generator

SIGMA = 0.2
SHAPE = (1, 2, 2)
MEAN = torch.tensor([0.1, -0.2, 0.3, 0.0]).double()
COVARIANCE = torch.tensor(
    [[0.09, 0.03, 0, 0], [0.03, 0.04, 0.01, 0], [0, 0.01, 0.16, 0.02], [0, 0, 0.02, 0.01]]
).double()
OF_NOISY = COVARIANCE + SIGMA**2 * torch.eye(4)


class Whitening(Bijection):
    """Maps N(mean, covariance) to N(0, I). A context `(B, 4)` moves the mean."""

    def __init__(self, mean, covariance):
        super().__init__()
        self.mean = torch.nn.Parameter(mean)
        self.factor = torch.nn.Parameter(torch.linalg.cholesky(covariance))

    def forward(self, x, context=None):
        centred = x.flatten(1) - self.mean - (0 if context is None else context)
        z = torch.linalg.solve_triangular(self.factor, centred.T, upper=False).T
        return z, -self.factor.diagonal().log().sum().expand(len(x))

    def inverse(self, z, context=None):
        x = z @ self.factor.T + self.mean + (0 if context is None else context)
        return x.unflatten(1, SHAPE), self.factor.diagonal().log().sum().expand(len(z))


def gaussian(class_prior=None):
    """The flow of noisy images whose images without noise are N(MEAN, COVARIANCE)."""
    return Flow(Whitening(MEAN, OF_NOISY), GaussianDequantizer(256, SIGMA), SHAPE, class_prior)


def posterior_mean(v, mean=MEAN):
    """E[x | x + sigma eps = v] for x ~ N(mean, COVARIANCE)."""
    gain = COVARIANCE @ torch.linalg.inv(OF_NOISY)
    return (mean + (v.flatten(1) - mean) @ gain.T).view_as(v)


def test_denoising_under_a_gaussian_is_its_posterior_mean():
    v = torch.randn(20, *SHAPE, generator=seeded()).double()
    found = gaussian().denoised(v)
    torch.testing.assert_close(found, posterior_mean(v))
    assert (found - v).abs().max() > 0.1 and not found.requires_grad
    with torch.no_grad():
        assert torch.equal(gaussian().eval().requires_grad_(False).denoised(v), found)
    flow = gaussian()
    with torch.inference_mode():
        assert torch.equal(flow.denoised(v.clone()), found)


def test_denoising_given_a_class_uses_the_density_of_the_class():
    v, labels = torch.randn(8, *SHAPE, generator=seeded()).double(), torch.arange(8) % 4
    found = gaussian(ClassContext(4)).denoised(v, labels)  # a unit vector moves the mean
    expected = [posterior_mean(v[i : i + 1], MEAN + torch.eye(4)[i % 4]) for i in range(8)]
    torch.testing.assert_close(found, torch.cat(expected))
    prior = perturb(ClassPrior(4, (4,)).double(), 0.5)
    flow = gaussian(prior)
    with torch.no_grad():  # the class has a Gaussian in latent space, so the data have one too
        scale = torch.diag((2 * prior.bounded_log_scale()[2]).exp())
        noisy = flow.bijection.factor @ scale @ flow.bijection.factor.T
        mean = MEAN + flow.bijection.factor @ prior.mean[2]
        score = -(v.flatten(1) - mean) @ torch.linalg.inv(noisy)
        expected = v + SIGMA**2 * score.view_as(v)
    torch.testing.assert_close(flow.denoised(v, torch.full((8,), 2)), expected)


def test_denoised_samples_are_decoded_and_moved():
    flow = gaussian()
    z = flow.draw_latents(6, seeded())
    v = flow.bijection.inverse(z)[0].detach()
    expected = flow.dequantizer.to_data(posterior_mean(v))
    assert torch.equal(flow.decode(z, denoise=True), expected)
    assert torch.equal(flow.sample(6, generator=seeded(), denoise=True), expected)
    assert not torch.equal(flow.decode(z), expected)
    with pytest.raises(ValueError, match="not trained with Gaussian noise"):
        tiny_flow("nice").sample(1, denoise=True)


def test_samples_given_a_context_are_denoised():
    flow = tiny_flow(context="downsample", noise={"name": "gaussian", "sigma": 0.1})
    contexts = images(2, (1, 2, 2))
    z = flow.draw_latents(3, generator(0, Stream.LATENTS)).repeat(2, 1)
    expected = flow.decode(z, denoise=True, context=contexts.repeat_interleave(3, dim=0))
    found = sample(flow, 3, [1.0], 0, denoise=True, contexts=contexts)
    assert torch.equal(found, expected)


def test_the_density_is_that_of_noisy_images_in_0_to_1():
    flow = gaussian()
    x, noise = images(5, SHAPE), torch.rand(5, *SHAPE, generator=seeded()).double()
    y = (x.double() + 0.5) / 256 + SIGMA * Normal(0, 1).icdf(noise)
    expected = MultivariateNormal(MEAN + 0.5, OF_NOISY).log_prob(y.flatten(1))
    torch.testing.assert_close(flow(x, noise).total, expected)
    torch.testing.assert_close(flow.loss(expected), -expected / 4)


def test_the_noise_is_finite_and_images_come_back():
    dequantizer = GaussianDequantizer(17, 0.1)
    x = torch.full((4, 1, 1, 1), 3)
    ends = torch.tensor([0, 2.0**-24, 1 - 2.0**-24, 0.5]).view_as(x)
    extreme, log_det = dequantizer(x, ends)
    assert extreme.isfinite().all() and extreme[3] == dequantizer.middle(x[:1])
    assert torch.equal(log_det, torch.zeros(4))
    levels = torch.arange(17, dtype=torch.uint8)[:, None, None, None]
    assert torch.equal(dequantizer.to_data(dequantizer.middle(levels)), levels)
    # TarFlow has images in [-1, 1]: there, the noise is twice as large.
    v = GaussianDequantizer(256, 0.05)(x[:1], torch.full((1, 1, 1, 1), 0.8413447))[0]
    assert 2 * (v.item() - 3.5 / 256 + 0.5) == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("model", sorted(TINY.keys() - {"causal", "cnf"}))
def test_every_model_of_images_can_be_denoised(model):
    """By the gradient of the density, also with the fixed weights of a loaded model."""
    flow = tiny_flow(model, noise={"name": "gaussian", "sigma": 0.1}).double()
    v = flow.dequantizer(images(3, (1, 4, 4)), torch.full((3, 1, 4, 4), 0.3))[0].double()
    moved = v.clone().requires_grad_()
    z, log_det = flow.bijection(moved)
    (slope,) = torch.autograd.grad(Normal(0, 1).log_prob(z).sum() + log_det.sum(), moved)
    found = flow.eval().requires_grad_(False).denoised(v)
    torch.testing.assert_close(found, v + 0.1**2 * slope)
    assert (found - v).abs().min() > 0

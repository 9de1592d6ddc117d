"""Flows on the sphere: data, circular splines, volumes on the surface, and the density."""

import math

import numpy as np
import pytest
import torch
from catalogue import SPHERE
from helpers import a_config, jacobians, perturb, seeded
from torch.nn.functional import normalize

import flowtrain
from flowtrain.bijections import CircularSplineTransform, SphereToAngles
from flowtrain.checkpoints.build import build_flow
from flowtrain.datasets import sphere as data_set
from flowtrain.evaluation.evaluate import reconstruction_error
from flowtrain.pictures import draw

UNIFORM = math.log(1 / (4 * math.pi))


def a_flow(scale=0.3, seed=0, **options):
    return perturb(build_flow(a_config({**SPHERE, **options}), (3, 1, 1), None), scale, seed)


def points(x):
    return torch.as_tensor(x, dtype=torch.float32).reshape(-1, 3, 1, 1)


def uniform(count, seed=0, dtype=torch.float32):
    return normalize(torch.randn(count, 3, 1, 1, generator=seeded(seed), dtype=dtype), dim=1)


def at(longitude, latitude):
    """Points at angles, computed in float64 and rounded once: `(N, 3, 1, 1)` in float32."""
    longitude, latitude = (torch.as_tensor(t, dtype=torch.float64) for t in (longitude, latitude))
    longitude, latitude = torch.broadcast_tensors(longitude, latitude)
    parts = [latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()]
    return points(torch.stack(parts, dim=-1))


@pytest.mark.parametrize("concentration", [1e-6, 0.5, 1e4])
def test_von_mises_fisher(concentration):
    """The mean has the length coth k - 1/k. All directions around it are alike."""
    n = 20_000
    x = data_set.build("", "train", count=n, components=1, concentration=concentration).read()
    x = x.reshape(-1, 3).astype(np.float64)
    assert np.abs(np.linalg.norm(x, axis=1) - 1).max() < 1e-6
    (mean,) = data_set.means(0, 1)
    k = concentration
    expected = 1 / math.tanh(k) - 1 / k if k > 1e-3 else k / 3
    along = x @ mean
    assert along.mean() == pytest.approx(expected, abs=4 * along.std() / math.sqrt(n) + 1e-7)
    across = x - along[:, None] * mean
    spread = across.std()
    assert np.abs(across.mean(axis=0)).max() < 4 * spread * math.sqrt(3 / n)
    covariance = across.T @ across / n
    isotropic = (np.eye(3) - np.outer(mean, mean)) / 2
    np.testing.assert_allclose(covariance / np.trace(covariance), isotropic, atol=0.03)


def test_components_have_equal_parts():
    x = data_set.build("", "test", seed=3, components=4, concentration=500).read().reshape(-1, 3)
    means = data_set.means(3, 4)
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1)
    counts = np.bincount((x @ means.T).argmax(axis=1), minlength=4)
    assert counts == pytest.approx(2500, abs=200)
    assert np.array_equal(means, data_set.means(3, 5)[:4])
    assert not np.isclose(means, data_set.means(4, 4)).any()


def circular(count, seed=0, scale=1.5):
    """A circular spline with one set of random parameters, repeated for `count` values."""
    transform = CircularSplineTransform(5)
    shape = 1, transform.parameters_per_entry
    one = scale * torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
    return transform, one.expand(count, -1)


@pytest.mark.parametrize("seed", range(2))
def test_a_circular_spline_is_a_smooth_map_of_the_circle(seed):
    x = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)[:, None]
    transform, parameters = circular(len(x), seed)
    z, log_derivative = transform(x, parameters)
    assert (z.diff(dim=0) > 0).all() and z[-1].item() - z[0].item() == pytest.approx(2 * math.pi)
    assert log_derivative[0].item() == pytest.approx(log_derivative[-1].item(), abs=1e-9)
    # The cut of the spline is at pi minus the turn. Neither the map nor its derivative jumps there.
    turn = math.pi * math.tanh(parameters[0, 0].item() / math.pi)
    cut = math.pi - turn + torch.tensor([[-1e-7], [0.0], [1e-7]], dtype=torch.float64)
    z_there, log_there = transform(cut, parameters[:3])
    assert abs(log_there.diff(dim=0)).max() < 1e-4 and abs(log_there[1]) > 1e-3
    slopes = (z_there.diff(dim=0) / 1e-7).log().flatten().tolist()
    assert slopes == pytest.approx([log_there[1].item()] * 2, abs=1e-4)
    for turns in (-2, 1, 5):
        again = transform(x + turns * 2 * math.pi, parameters)
        torch.testing.assert_close(again, (z + turns * 2 * math.pi, log_derivative))
        inside = slice(1, -1)
        back = transform.inverse(z[inside] + turns * 2 * math.pi, parameters[inside])
        expected = x[inside] + turns * 2 * math.pi, -log_derivative[inside]
        torch.testing.assert_close(back, expected)


@pytest.mark.parametrize(
    "bijection", [SphereToAngles(), a_flow().double().bijection], ids=["end", "model"]
)
def test_the_volume_change_is_that_of_the_surface(bijection):
    """Against autograd: on the tangent plane towards the latent, by the Gram determinant back."""
    x = uniform(50, dtype=torch.float64)
    z, log_det = (t.detach() for t in bijection(x))
    normal = x.flatten(1)
    tangents = torch.linalg.svd(normal[:, None]).Vh[:, 1:].mT  # (B, 3, 2), orthonormal
    there = torch.linalg.slogdet(jacobians(bijection.forward, x) @ tangents).logabsdet
    torch.testing.assert_close(log_det, there, rtol=0, atol=1e-9)
    back = jacobians(bijection.inverse, z)
    gram = torch.linalg.slogdet(back.mT @ back).logabsdet / 2
    torch.testing.assert_close(bijection.inverse(z)[1].detach(), gram, rtol=0, atol=1e-9)
    torch.testing.assert_close(gram, -log_det, rtol=0, atol=1e-9)


def test_the_start_is_the_uniform_density():
    flow = build_flow(a_config({"name": "sphere"}), (3, 1, 1), None)
    x = torch.cat([uniform(100), points([[0, 0, 1], [0, 0, -1], [-1, 0, 0], [1, 0, 0]])])
    torch.testing.assert_close(flow.log_prob(x), torch.full((104,), UNIFORM), rtol=0, atol=1e-5)
    off = points([[1.01, 0, 0], [1.00001, 0, 0], [0, 0, 0]])  # off the sphere there is none
    assert torch.isneginf(a_flow().log_prob(off)).tolist() == [True, False, True]


def test_samples_are_from_a_density():
    flow = a_flow(0.2).requires_grad_(False)
    x = flow.sample(40_000, generator=seeded())
    assert x.dtype == torch.float32 and x.shape == (40_000, 3, 1, 1)
    assert (-flow.log_prob(x)).exp().mean().item() == pytest.approx(4 * math.pi, rel=0.03)
    cells, area = draw.mesh(flow, (-math.pi, math.pi, -1, 1), 150)
    density = flow.double().log_prob(cells.double()).exp()
    assert density.sum().item() * area == pytest.approx(1, abs=0.01)
    assert density.max() > 3 * density.min()
    mean = (cells.flatten(1) * density[:, None]).sum(dim=0) * area
    torch.testing.assert_close(x.flatten(1).mean(dim=0), mean.float(), rtol=0, atol=0.02)


def test_round_trips():
    flow = a_flow(0.2).requires_grad_(False)
    near_a_pole = [1.5707, 1.57079, -1.57, math.pi / 2, -math.pi / 2]
    at_the_cut = [math.pi, -math.pi, math.pi - 1e-6, 1e-6 - math.pi]
    poles = at(torch.linspace(-3, 3, 7)[:, None], near_a_pole)
    x = torch.cat([uniform(1000), poles, at(at_the_cut, 0.3)])
    z, log_det = flow.bijection(x)
    assert z.shape == (len(x), 2) and log_det.shape == (len(x),)
    back, inverse_log_det = flow.bijection.inverse(z)
    assert (back - x).abs().max() < 1e-5
    torch.testing.assert_close(inverse_log_det[:1000], -log_det[:1000], rtol=0, atol=1e-3)
    assert reconstruction_error(flow, x) < 1e-5
    z = torch.randn(1000, 2, generator=seeded())
    torch.testing.assert_close(flow.encode(flow.decode(z)), z, rtol=1e-2, atol=1e-3)
    far = torch.tensor([[0.0, 1e3], [0, -1e3], [1e3, 0], [-1e3, 0], [40, 40]])
    torch.testing.assert_close(flow.decode(far).norm(dim=1).flatten(), torch.ones(5))


def test_the_density_has_no_jump_at_the_cut():
    flow = a_flow(0.2).double()
    latitude = torch.linspace(-1.5, 1.5, 50)
    angles = math.pi - 1e-6, -math.pi, 1e-6 - math.pi
    east, cut, west = (flow.log_prob(at(angle, latitude)) for angle in angles)
    for side in (east, west):
        torch.testing.assert_close(side, cut, rtol=0, atol=1e-3)
    assert cut.std() > 0.1


def test_the_density_at_the_poles_is_its_limit():
    """Points approach a pole along the meridian 0, which is also the longitude of the pole."""
    flow = a_flow(0.2)
    distances = torch.tensor([1e-3, 1e-4, 1e-5, 0])
    for pole in (1, -1):
        along = flow.log_prob(at(0.0, pole * (math.pi / 2 - distances.double()))).tolist()
        precise = flow.double().log_prob(at(0.0, pole * (math.pi / 2 - 1e-4)).double()).item()
        flow.float()
        assert along == pytest.approx([precise] * 4, abs=0.05) and abs(precise - UNIFORM) > 0.05
    x = points([[0, 0, 1], [0, 0, -1], [-1, 0.0, 0], [-1, -0.0, 0], [1, 0, 0]])
    flow.log_prob(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.count_nonzero() for p in flow.parameters())


@pytest.mark.run
def test_a_wrong_volume_is_found(monkeypatch):
    assert not {f.check for f in flowtrain.check(a_flow(0.05), uniform(8)) if f.verdict == "bad"}
    forward = SphereToAngles.forward
    wrong = lambda *args: (forward(*args)[0], forward(*args)[1] + 0.1)  # noqa: E731
    monkeypatch.setattr(SphereToAngles, "forward", wrong)
    findings = flowtrain.check(a_flow(0.05), uniform(8))
    found = {(f.check, f.layer) for f in findings if f.verdict == "bad"}
    assert found == {("log-det", "layers.0"), ("log-det", ""), ("integral", "")}

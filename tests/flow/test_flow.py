"""The flow as a whole: its likelihood, that it is one, and that decoding gives the images back."""

import itertools
import math

import numpy as np
import pytest
import torch
from catalogue import TINY
from helpers import CNF, images, seeded, tiny_flow

from flowtrain.bijections import ActNorm
from flowtrain.bijections.execution import LayerByLayer

OPTIONS = [(model, {}) for model in sorted(TINY.keys() - {"cnf"})]
OPTIONS += [(model, {"transform": "logit"}) for model in ("glow", "maf", "nice", "realnvp")]
OPTIONS += [pytest.param("cnf", {}, marks=pytest.mark.run)]


@pytest.mark.parametrize("levels", [17, 256])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint16])
def test_any_integer_type_will_do(levels, dtype):
    flow = tiny_flow("nice", q=levels)
    x = images(3, flow.shape, levels)
    x[0, 0, 0, :2] = torch.tensor([0, levels - 1], dtype=torch.uint8)
    assert torch.equal(flow.log_prob(x.to(dtype), seeded()), flow.log_prob(x, seeded()))
    assert not torch.equal(flow.log_prob(x), flow.log_prob(x))  # noise without a generator is fresh


@pytest.mark.parametrize(
    "levels, shape, value, dtype, message",
    [
        (256, (2, 1, 4, 5), 0, torch.uint8, r"shape \(B, 1, 4, 4\), got \(2, 1, 4, 5\)"),
        (256, (0, 1, 4, 4), 0, torch.uint8, r"shape \(B, 1, 4, 4\), got \(0, 1, 4, 4\)"),
        (256, (2, 1, 4, 4), 0, torch.float32, "integers in 0..255, got torch.float32"),
        (256, (2, 1, 4, 4), 0, torch.bool, "integers"),
        (17, (2, 1, 4, 4), 17, torch.uint8, "values in 0..16, got 17..17"),
        (256, (2, 1, 4, 4), 256, torch.int64, "values in 0..255, got 256..256"),
        (256, (2, 1, 4, 4), -1, torch.int64, "values in 0..255, got -1..-1"),
    ],
)
def test_wrong_input_is_refused(levels, shape, value, dtype, message):
    flow = tiny_flow("nice", q=levels)
    for method in (flow.log_prob, flow.bits_per_dim, flow.encode):
        with pytest.raises(ValueError, match=message):
            method(torch.full(shape, value, dtype=dtype))


def test_half_precision_is_refused():
    """Levels above 128 would lose their noise."""
    flow = tiny_flow("nice").bfloat16()
    with pytest.raises(ValueError, match="in torch.bfloat16, and likelihoods need float32"):
        flow.log_prob(images(2, flow.shape))


@pytest.mark.parametrize("model, u", [("glow", 0.25), ("causal", 0.25), ("causal", 0.0)])
def test_the_density_is_that_of_dequantized_images(model, u):
    """Of a model of levels also at the edge of each level."""
    flow = tiny_flow(model, classes=3)
    x, labels = images(6, flow.shape), torch.tensor([0, 1, 2, 0, 1, 2])
    x[0], x[1] = 0, 255
    y = ((x + u) / 256).requires_grad_()
    found = flow.log_density(y, labels)
    expected = flow(x, torch.full(y.shape, u), labels).total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    assert torch.autograd.grad(found.sum(), y)[0].isfinite().all()


OF_COLOURS = {"shape": (3, 8, 4), "initialization": "whitening", "scale": 0.05}
OF_8X8 = {"shape": (1, 8, 8), "scale": 0.1}


# Fewer levels are the same computation with wider bins. A causal model computes with the levels.
# Far-off triangular factors of 24 channels make a matrix that float32 cannot invert, and layers of
# splines have slopes of 1/1000 one after the other: there, parameters are less far off.
@pytest.mark.parametrize(
    "model, options",
    [
        *OPTIONS,
        *[(model, {"q": q}) for model in ("glow", "causal") for q in (2, 17)],
        *[("glow", {"q": q, "transform": "logit"}) for q in (2, 17)],
        ("glow", OF_COLOURS),
        ("glow", {**OF_8X8, "coupling": "spline", "prior": "mixture"}),
        ("glow", {**OF_8X8, "coupling": "mixture", "prior": "spline"}),
        ("glow", {**OF_8X8, "split": "checkerboard", "conditioner": "gated"}),
        ("glow", {**OF_8X8, "split": "mixed"}),
        ("glow", {**OF_8X8, "split": "checkerboard", "coupling": "mixture"}),
        ("glow", {**OF_8X8, "conditioner": "gated", "coupling": "spline"}),
    ],
)
def test_decode_inverts_encode(model, options):
    flow = tiny_flow(model, **options)
    x = images(100, flow.shape, flow.num_bins, seed=9)
    x[0], x[1], x[2:5] = 0, flow.num_bins - 1, (flow.num_bins - 1) * (x[2:5] % 2)
    before = x.clone()
    z = flow.encode(x)
    assert z.shape == (100, flow.dims) and torch.equal(z, flow.encode(x)) and not z.requires_grad
    back = flow.decode(z)
    assert back.dtype == torch.uint8 and back.is_contiguous() and torch.equal(back, before)
    assert torch.equal(torch.cat([flow.decode(part) for part in z.split([1, 7, 92])]), x)

    def likelihoods():
        densities = flow.log_density((x[:9] + 0.5) / flow.num_bins)
        return torch.stack([flow.log_prob(x[:9], seeded(4)), densities])

    expected = likelihoods()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow.decode(flow.encode(x[:40])), x[:40])
        assert torch.equal(likelihoods(), expected)


def test_several_draws_are_the_importance_weighted_bound():
    flow = tiny_flow("glow")
    x = images(3, flow.shape, flow.num_bins)
    random = seeded(4)  # so an image has the same noise in any batch
    each = [flow.log_prob(image, random) for image in x.split(1) for _ in range(5)]
    singles = torch.cat(each).view(3, 5).T
    expected = singles.double().exp().mean(dim=0).log().float()
    torch.testing.assert_close(flow.log_prob(x, seeded(4), draws=5), expected)
    bits = flow.bits_per_dim(x, seeded(4), draws=5)
    torch.testing.assert_close(bits, -expected / (flow.dims * math.log(2)))
    with pytest.raises(ValueError, match="draws: 0"):
        flow.log_prob(x, draws=0)
    with pytest.raises(ValueError, match="draws: 2, where the likelihood is exact"):
        tiny_flow("causal").log_prob(x, draws=2)


@pytest.mark.parametrize("model", [*sorted(TINY.keys() - {"cnf"}), CNF])
def test_samples(model):
    flow = tiny_flow(model, q=17)
    x = flow.sample(9, generator=seeded(4))
    assert x.shape == (9, 1, 4, 4) and x.dtype == torch.uint8 and x.max() <= 16
    assert torch.equal(flow.sample(3, generator=seeded(4)), x[:3])
    assert not torch.equal(flow.sample(9, generator=seeded(5)), x)
    mode = flow.sample(4, temperature=0, generator=seeded(4))
    assert torch.equal(mode, flow.decode(torch.zeros(1, 16)).expand_as(mode))
    assert flow.draw_latents(2000, seeded()).std().item() == pytest.approx(1, abs=0.02)
    with pytest.raises(FloatingPointError, match="1 of 2"):
        flow.decode(torch.tensor([[0.0], [math.nan]]).expand(2, 16))
    for shape in [(16,), (2, 1), (2, 1, 4, 4), (0, 16)]:
        with pytest.raises(ValueError, match=r"expected latents \(B, 16\), got \(\d+,"):
            flow.decode(torch.zeros(shape))
    lines = repr(flow).splitlines()
    assert len(lines) == 5 and ("exact" in lines[1]) == flow.exact
    assert ("sequential" in lines[2]) == flow.bijection.inverse_is_sequential


@pytest.mark.parametrize("model", [*sorted(TINY.keys() - {"causal", "cnf"}), CNF])  # with ActNorm
def test_initialize_sets_each_layer_from_its_own_input(model):
    flow = tiny_flow(model, **({"initialization": "whitening"} if model == "glow" else {}))
    x = images(64, flow.shape)
    seen = []

    def hook(layer, inputs, output):
        values = output[0].detach().clone()  # a ReLU may work in place
        seen.append(values.movedim(1, -1).flatten(0, -2) if layer.shift.ndim == 3 else values)

    hooks = [m.register_forward_hook(hook) for m in flow.modules() if isinstance(m, ActNorm)]
    # the batch that tiny_flow initialized it on
    flow(x, torch.rand(x.shape, generator=seeded()), executor=LayerByLayer())
    assert len(seen) == len(hooks) > 0
    for values in seen:
        assert values.mean(0).abs().max() < 1e-3
        assert (values.std(0, correction=0) - 1).abs().max() < 1e-2


def every_image(flow):
    values = itertools.product(range(flow.num_bins), repeat=flow.dims)
    return torch.tensor(list(values), dtype=torch.uint8).reshape(-1, *flow.shape)


@torch.no_grad()
def total_probability(flow, nodes):
    """P(x) summed over every image there is, where Gauss-Legendre integrates every entry of u."""
    points, weights = (torch.from_numpy(a).float() for a in np.polynomial.legendre.leggauss(nodes))
    points, weights = (points + 1) / 2, weights / 2
    noise = torch.cartesian_prod(*[points] * flow.dims).reshape(-1, *flow.shape)
    weight = torch.cartesian_prod(*[weights] * flow.dims).prod(dim=1).double()
    return sum(
        (weight * flow(x.expand_as(noise), noise).total.double().exp()).sum().item()
        for x in every_image(flow)
    )


@pytest.mark.run
@pytest.mark.parametrize(
    "model, shape, q, transform, alpha, nodes",
    [
        ("realnvp", (1, 1, 2), 3, "logit", 1e-6, 60),
        ("nice", (1, 1, 2), 4, "logit", 1e-6, 60),
        ("realnvp", (1, 1, 2), 3, "logit", 0.05, 30),
        ("nice", (1, 2, 1), 5, "center", 0.05, 30),
        ("glow", (1, 2, 2), 2, "center", 0.05, 8),
    ],
)
def test_the_probabilities_of_all_images_add_up_to_one(model, shape, q, transform, alpha, nodes):
    options = {} if model == "nice" else {"levels": 1}
    flow = tiny_flow(model, shape, q, transform, alpha, **options)
    # It is trained on images of which some are far more likely than others.
    weights = torch.rand(flow.num_bins**flow.dims, generator=seeded(1)) ** 4
    every = every_image(flow)
    optimizer, generator = torch.optim.Adam(flow.parameters(), lr=1e-2), seeded()
    for _ in range(100):
        x = every[weights.multinomial(64, True, generator=generator)]
        optimizer.zero_grad()
        flow.bits_per_dim(x, generator).mean().backward()
        optimizer.step()
    total = total_probability(flow, nodes)
    assert total < 1.001
    # What is missing is what the model puts outside of the cube. An open cube that the logit
    # stretches over nearly all of space misses nothing.
    with torch.no_grad():
        y = flow.dequantizer.to_unit(flow.bijection.inverse(flow.draw_latents(20000, seeded(7)))[0])
    inside = ((y >= 0) & (y < 1)).flatten(1).all(dim=1).float().mean().item()
    assert total == pytest.approx(inside, abs=0.012)
    assert total > (0.998 if alpha < 0.01 else 0.5)
    flow.sides = 2  # the nodes are symmetric, so only rounding differs
    assert total_probability(flow, nodes) == pytest.approx(total, abs=1e-5)

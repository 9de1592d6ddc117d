"""The flow as a whole: its likelihood, that it is one, and that decoding gives the images back."""

import itertools
import math

import numpy as np
import pytest
import torch
from catalogue import TINY
from helpers import assert_an_image_scores_alone, images, perturb, ready, seeded, tiny_flow

from flowtrain.bijections import (
    ActNorm,
    AffineTransform,
    Bijection,
    Conv1x1LU,
    Coupling,
    Flatten,
    Multiscale,
    Sequential,
)
from flowtrain.bijections.base import DataDependentInit
from flowtrain.bijections.execution import LayerByLayer
from flowtrain.flow.dequantize import Dequantizer, draw_noise
from flowtrain.flow.flow import Flow, initialize
from flowtrain.flow.kinds import bits_per_dim
from flowtrain.nets.convolution import GlowNet

every_model = pytest.mark.parametrize("model", TINY)
EACH_TRANSFORM = [(model, "center") for model in TINY]
EACH_TRANSFORM += [(model, "logit") for model in sorted(TINY.keys() - {"causal"})]
with_each_transform = pytest.mark.parametrize("model, transform", EACH_TRANSFORM)


@with_each_transform
def test_log_prob_is_the_sum_of_its_parts(model, transform):
    flow = tiny_flow(model, q=17, transform=transform)
    x = images(5, flow.shape, 17)
    noise = torch.rand(x.shape, generator=seeded(1))
    v, log_terms = flow.dequantizer(x, noise)
    z, log_det = flow.bijection(v)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1)
    expected = (base + log_det + log_terms).detach()
    parts = flow(x, noise)
    torch.testing.assert_close(parts.base, base)
    torch.testing.assert_close(flow.log_prob(x, seeded(1)).detach(), expected)
    torch.testing.assert_close(
        flow.bits_per_dim(x, seeded(1)).detach(), -expected / (16 * math.log(2))
    )
    assert expected.shape == (5,) and expected.dtype == torch.float32


def test_bits_per_dim():
    assert bits_per_dim(torch.tensor(-10 * math.log(2)), 5).item() == pytest.approx(2.0)


@every_model
def test_an_image_scores_the_same_in_any_batch(model):
    assert_an_image_scores_alone(tiny_flow(model))


def test_noise_is_fresh_without_a_generator_and_fixed_with_one():
    flow, x = tiny_flow("glow"), images(4, (1, 4, 4))
    assert not torch.equal(flow.log_prob(x), flow.log_prob(x))
    assert torch.equal(flow.log_prob(x, seeded(2)), flow.log_prob(x, seeded(2)))


def test_the_callers_batch_is_unchanged():
    flow, x = tiny_flow("glow"), images(4, (1, 4, 4))
    before = x.clone()
    flow.log_prob(x)
    flow.encode(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integer_type_will_do(levels, dtype):
    flow = tiny_flow("nice", q=levels)
    x = images(3, flow.shape, levels)
    x[0, 0, 0, :2] = torch.tensor([0, levels - 1], dtype=torch.uint8)
    assert torch.equal(flow.log_prob(x.to(dtype), seeded()), flow.log_prob(x, seeded()))


@pytest.mark.parametrize(
    "levels, x, message",
    [
        (
            256,
            torch.zeros(2, 1, 4, 5, dtype=torch.uint8),
            r"shape \(B, 1, 4, 4\), got \(2, 1, 4, 5\)",
        ),
        (256, torch.zeros(1, 4, 4, dtype=torch.uint8), "shape"),
        (256, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "shape"),
        (256, torch.zeros(1, 1, 1, 4, 4, dtype=torch.uint8), "shape"),
        (256, torch.zeros(2, 1, 4, 4), "integers in 0..255, got torch.float32"),
        (256, torch.zeros(2, 1, 4, 4, dtype=torch.float64), "integers"),
        (256, torch.zeros(2, 1, 4, 4, dtype=torch.bool), "integers"),
        (17, torch.full((2, 1, 4, 4), 17, dtype=torch.uint8), "values in 0..16, got 17..17"),
        (17, torch.full((2, 1, 4, 4), 17, dtype=torch.int64), "values in 0..16"),
        (2, torch.full((2, 1, 4, 4), 2, dtype=torch.uint8), "values in 0..1"),
        (256, torch.full((2, 1, 4, 4), 256, dtype=torch.int64), "values in 0..255, got 256..256"),
        (256, torch.full((2, 1, 4, 4), -1, dtype=torch.int64), "values in 0..255, got -1..-1"),
    ],
)
def test_wrong_input_is_refused(levels, x, message):
    flow = tiny_flow("nice", q=levels)
    for method in (flow.log_prob, flow.bits_per_dim, flow.encode):
        with pytest.raises(ValueError, match=message):
            method(x)


def test_the_number_of_levels_changes_the_figure():
    # The same pixels under the same weights; n_bits that the loss ignores would give the same
    # figure.
    x = images(8, (1, 4, 4), 16)
    flows = [tiny_flow("glow", q=256) for _ in range(2)]
    flows[1].dequantizer = Dequantizer(16)
    y = [flow.dequantizer.to_unit(flow.dequantizer.middle(x)) for flow in flows]
    torch.testing.assert_close(y[1] - 0.5 / 16, 16 * (y[0] - 0.5 / 256))
    assert (flows[0].log_prob(x, seeded()) - flows[1].log_prob(x, seeded())).abs().min() > 1


# ---------------------------------------------------------------- latents and samples


# Fewer levels are the same computation with wider bins. A causal model computes with the levels.
@pytest.mark.parametrize(
    "model, transform, levels",
    [(model, transform, 256) for model, transform in EACH_TRANSFORM]
    + [("glow", "center", 2), ("glow", "logit", 2), ("causal", "center", 2)]
    + [("glow", "center", 17), ("glow", "logit", 17), ("causal", "center", 17)],
)
def test_decode_inverts_encode(model, transform, levels):
    flow = tiny_flow(model, q=levels, transform=transform)
    x = images(100, flow.shape, levels, seed=9)
    x[0], x[1] = 0, levels - 1
    z = flow.encode(x)
    assert z.shape == (100, 16) and torch.equal(z, flow.encode(x))
    back = flow.decode(z)
    assert back.dtype == torch.uint8 and back.is_contiguous() and torch.equal(back, x)
    assert not z.requires_grad


@pytest.mark.parametrize(
    "shape, options", [((3, 8, 8), {}), ((3, 8, 4), {"initialization": "whitening"})]
)
def test_decode_inverts_encode_for_glow_on_colours(shape, options):
    # Of 24 channels, far-off triangular factors make a matrix that float32 cannot invert: less far
    # off.
    flow = tiny_flow("glow", shape, scale=0.05, **options)
    x = images(50, shape, seed=9)
    assert torch.equal(flow.decode(flow.encode(x)), x)


@pytest.mark.parametrize("transform", ["spline", "mixture"])
@pytest.mark.parametrize("key", ["coupling", "prior"])
def test_decode_inverts_encode_for_every_transform(key, transform):
    # Much further off, layers of a spline have slopes of 1/1000 one after the other, and float32
    # seven digits.
    flow = tiny_flow("glow", (1, 8, 8), scale=0.1, **{key: transform})
    x = images(50, flow.shape, seed=9)
    assert torch.equal(flow.decode(flow.encode(x)), x)


@pytest.mark.parametrize("coupling", ["affine", "spline", "mixture"])
@pytest.mark.parametrize(
    "options",
    [
        {"split": "checkerboard"},
        {"split": "mixed"},
        {"conditioner": "gated"},
    ],
)
@pytest.mark.run  # takes long
def test_decode_inverts_encode_for_every_split_and_conditioner(coupling, options):
    flow = tiny_flow("glow", (1, 8, 8), scale=0.1, coupling=coupling, **options)
    x = images(50, flow.shape, seed=9)
    assert torch.equal(flow.decode(flow.encode(x)), x)


def test_several_draws_are_the_importance_weighted_bound():
    flow = tiny_flow("glow")
    x = images(3, flow.shape, flow.levels)
    random, again = seeded(4), seeded(4)
    singles = torch.stack([flow.log_prob(x, random) for _ in range(5)])
    expected = singles.double().exp().mean(dim=0).log().float()
    torch.testing.assert_close(flow.log_prob(x, again, draws=5), expected)
    assert torch.equal(flow.log_prob(x, seeded(4)), singles[0])
    bits = flow.bits_per_dim(x, seeded(4), draws=5)
    torch.testing.assert_close(bits, -expected / (flow.dims * math.log(2)))
    with pytest.raises(ValueError, match="draws: 0"):
        flow.log_prob(x, draws=0)
    with pytest.raises(ValueError, match="draws: 2, where the likelihood is exact"):
        tiny_flow("causal").log_prob(x, draws=2)


def test_samples_with_their_log_prob():
    flow = tiny_flow("glow")
    x, log_prob = flow.sample_with_log_prob(4, 0.7, seeded(1))
    random = seeded(1)
    assert torch.equal(x, flow.sample(4, 0.7, random))
    assert torch.equal(log_prob, flow.log_prob(x, random)) and not log_prob.requires_grad


@every_model
def test_a_flow_is_described_in_five_lines(model):
    flow = tiny_flow(model)
    lines = repr(flow).splitlines()
    assert len(lines) == 5
    count = sum(p.numel() for p in flow.parameters())
    assert f"{count:,}" in lines[3] and "x".join(map(str, flow.shape)) in lines[0]
    assert ("exact" in lines[1]) == flow.exact and ("sequential" in lines[2]) == (
        flow.sampling == "sequential"
    )


@every_model
def test_samples(model):
    flow = tiny_flow(model, q=17)
    x = flow.sample(9, generator=seeded(4))
    assert x.shape == (9, 1, 4, 4) and x.dtype == torch.uint8 and x.max() <= 16
    assert torch.equal(flow.sample(3, generator=seeded(4)), x[:3])
    assert not torch.equal(flow.sample(9, generator=seeded(5)), x)
    mode = flow.sample(4, temperature=0, generator=seeded(4))
    assert torch.equal(mode, mode[:1].expand_as(mode))
    assert torch.equal(mode[:1], flow.decode(torch.zeros(1, 16)))
    torch.testing.assert_close(
        flow.draw_latents(2000, seeded()).std(), torch.tensor(1.0), rtol=0.02, atol=0
    )


def test_samples_follow_the_model():
    # A model of known mean and spread: sampling that is not the inverse of preprocessing would
    # shift it.
    flow = tiny_flow("nice", (1, 1, 2), prior="gaussian")
    for parameter in flow.parameters():
        torch.nn.init.zeros_(parameter)
    diagonal = flow.bijection.layers[-1]
    # a standard deviation of 1/10
    torch.nn.init.constant_(diagonal.log_scale, 8 * math.atanh(math.log(10) / 8))
    # a mean of 1/10: a level of 256 * (1/2 + 1/10), less 1/2
    torch.nn.init.constant_(diagonal.shift, -1.0)
    x = flow.sample(4000, generator=seeded()).float()
    assert x.mean().item() == pytest.approx(153.1, abs=1) and x.std().item() == pytest.approx(
        25.6, abs=0.7
    )


@every_model
def test_decoding_what_is_not_finite_raises(model):
    flow = tiny_flow(model)
    with pytest.raises(FloatingPointError, match="1 of 2"):
        flow.decode(torch.tensor([[0.0], [math.nan]]).expand(2, 16))


@pytest.mark.parametrize(
    "model, shape, shapes",
    [
        ("glow", (1, 4, 4), [(2, 2, 2), (8, 1, 1)]),
        ("glow", (3, 8, 8), [(6, 4, 4), (24, 2, 2)]),
        ("realnvp", (1, 4, 4), [(2, 2, 2), (2, 2, 2)]),
        ("nice", (1, 4, 4), [(16,)]),
    ],
)
def test_split_latents(model, shape, shapes):
    flow = tiny_flow(model, shape)
    z = flow.encode(images(2, shape))
    parts = flow.split_latents(z)
    assert [tuple(part.shape[1:]) for part in parts] == shapes
    assert torch.equal(torch.cat([part.flatten(1) for part in parts], dim=1), z)


# ---------------------------------------------------------------- initialization


@pytest.mark.parametrize("model", sorted(TINY.keys() - {"causal"}))  # it has no ActNorm
def test_initialize_sets_each_layer_from_its_own_input(model):
    flow = tiny_flow(model, initialization="whitening") if model == "glow" else tiny_flow(model)
    x = images(64, flow.shape)
    seen = []

    def hook(layer, inputs, output):
        values = output[0].detach().clone()  # a ReLU may work in place
        seen.append(values.movedim(1, -1).flatten(0, -2) if layer.shift.ndim == 3 else values)

    hooks = [m.register_forward_hook(hook) for m in flow.modules() if isinstance(m, ActNorm)]
    # the batch that tiny_flow initialized it on
    flow(x, draw_noise(x.shape, seeded(), x.device), executor=LayerByLayer())
    assert len(seen) == len(hooks) > 0
    for values in seen:
        assert (
            values.mean(0).abs().max() < 1e-3
            and (values.std(0, correction=0) - 1).abs().max() < 1e-2
        )
    for handle in hooks:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in flow.modules())


@every_model
def test_an_uninitialized_model_raises(model):
    flow = tiny_flow(model)
    x = images(3, flow.shape)
    z = flow.encode(x)
    for layer in flow.modules():
        if isinstance(layer, DataDependentInit):
            layer.initialized.fill_(False)
    flow.load_state_dict(flow.state_dict())
    for use in (
        lambda: flow.log_prob(x),
        lambda: flow.encode(x),
        lambda: flow.decode(z),
        lambda: flow.sample(1),
    ):
        with pytest.raises(RuntimeError, match="not initialized"):
            use()


def test_initialize_leaves_no_hooks_where_it_fails():
    flow = tiny_flow("glow")
    with pytest.raises(RuntimeError):
        initialize(flow, images(2, (1, 4, 8)), torch.rand(2, 1, 4, 4))
    assert not any(m._forward_pre_hooks for m in flow.modules())


# ---------------------------------------------------------------- it is a density, and a
# distribution


def glow_layers():
    """Glow's layers on one pixel of two channels."""
    torch.manual_seed(0)
    steps = [
        layer
        for _ in range(3)
        for layer in (
            ActNorm((2, 1, 1)),
            Conv1x1LU(2),
            Coupling(1, GlowNet(1, 2, 8), AffineTransform()),
        )
    ]
    return ready(perturb(Sequential(*steps, Flatten((2, 1, 1))))), (2, 1, 1)


TWO_DIMENSIONS = {
    "glow's layers": glow_layers,
    "realnvp": lambda: (tiny_flow("realnvp", (1, 1, 2), levels=1, seed=1).bijection, (1, 1, 2)),
    "nice": lambda: (tiny_flow("nice", (1, 1, 2)).bijection, (1, 1, 2)),
    "multiscale": lambda: (
        Multiscale(
            [Sequential(glow_layers()[0].layers[1], glow_layers()[0].layers[2]), Sequential()],
            [perturb(Coupling(1, GlowNet(1, 2, 8), AffineTransform())), Sequential()],
            [(1, 1, 1), (1, 1, 1)],
        ),
        (2, 1, 1),
    ),
}


@pytest.mark.parametrize("name", TWO_DIMENSIONS)
@torch.no_grad()
@pytest.mark.run  # takes long
def test_a_density_integrates_to_one(name):
    torch.manual_seed(0)
    bijection, shape = TWO_DIMENSIONS[name]()
    bijection = bijection.double()
    # The region that holds all the mass, from the model's own samples; and some of them lie well
    # inside.
    samples = bijection.inverse(torch.randn(2000, 2, generator=seeded()).double() * 1.5)[0].reshape(
        -1, 2
    )
    low, high = samples.min(0).values - 1, samples.max(0).values + 1
    axes = [
        torch.linspace(a, b, 300).double() for a, b in zip(low.tolist(), high.tolist(), strict=True)
    ]
    points = torch.cartesian_prod(*axes)
    z, log_det = bijection(points.reshape(-1, *shape))
    density = (-0.5 * (z.square() + math.log(2 * math.pi)).sum(1) + log_det).exp()
    cell = math.prod((axis[1] - axis[0]).item() for axis in axes)
    assert density.sum().item() * cell == pytest.approx(1, abs=2e-3)


def total_probability(flow, nodes):
    """P(x) summed over every image there is, with P(x) = E_u[...] by Gauss-Legendre in every entry
    of u.
    """
    points, weights = (torch.from_numpy(a).float() for a in np.polynomial.legendre.leggauss(nodes))
    points, weights = (points + 1) / 2, weights / 2
    noise = torch.cartesian_prod(*[points] * flow.dims).reshape(-1, *flow.shape)
    weight = torch.cartesian_prod(*[weights] * flow.dims).prod(dim=1).double()
    total = 0.0
    with torch.no_grad():
        for values in itertools.product(range(flow.levels), repeat=flow.dims):
            x = (
                torch.tensor(values, dtype=torch.uint8)
                .reshape(1, *flow.shape)
                .expand(len(noise), -1, -1, -1)
            )
            total += (weight * flow(x, noise).total.double().exp()).sum().item()
    return total


def train(flow, steps):
    """On images of which some are far more likely than others."""
    weights = torch.rand(flow.levels**flow.dims, generator=seeded(1)) ** 4
    every_image = torch.tensor(
        list(itertools.product(range(flow.levels), repeat=flow.dims)), dtype=torch.uint8
    )
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    generator = seeded()
    for _ in range(steps):
        x = every_image[weights.multinomial(64, True, generator=generator)].reshape(-1, *flow.shape)
        optimizer.zero_grad()
        flow.bits_per_dim(x, generator).mean().backward()
        optimizer.step()


@pytest.mark.run
@pytest.mark.parametrize(
    "model, shape, q, transform, alpha, nodes",
    [
        ("realnvp", (1, 1, 2), 3, "logit", 1e-6, 60),
        ("nice", (1, 1, 2), 4, "logit", 1e-6, 60),
        ("realnvp", (1, 1, 2), 3, "logit", 0.05, 30),
        ("realnvp", (1, 1, 2), 3, "center", 0.05, 30),
        ("nice", (1, 2, 1), 5, "center", 0.05, 30),
        ("glow", (1, 2, 2), 2, "center", 0.05, 8),
    ],
)
def test_the_probabilities_of_all_images_add_up_to_one(model, shape, q, transform, alpha, nodes):
    flow = tiny_flow(
        model, shape, q, transform, alpha, **({} if model == "nice" else {"levels": 1})
    )
    train(flow, 100)
    total = total_probability(flow, nodes)
    assert total < 1.001
    # What is missing is what the model puts outside of the cube. An open cube that the logit
    # stretches over nearly all of space misses nothing.
    with torch.no_grad():
        y = flow.dequantizer.to_unit(flow.bijection.inverse(flow.draw_latents(20000, seeded(7)))[0])
    inside = ((y >= 0) & (y < 1)).flatten(1).all(dim=1).float().mean().item()
    assert total == pytest.approx(inside, abs=0.012)
    assert total > (0.998 if alpha < 0.01 else 0.5)


def test_the_contract_raises_where_it_is_not_kept():
    with pytest.raises(NotImplementedError):
        Bijection()(torch.zeros(1, 2))
    with pytest.raises(NotImplementedError):
        Bijection().inverse(torch.zeros(1, 2))
    assert Flow(Flatten((1, 1, 2)), Dequantizer(4), (1, 1, 2)).dims == 2

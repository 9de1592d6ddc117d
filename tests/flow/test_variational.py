"""Variational dequantization: q(u|x) is a density in the bin, its bound is one, and learning it
tightens the bound.
"""

import itertools
import math

import pytest
import torch
from catalogue import TINY, WORDS, sets
from cli_helpers import assert_same_run, copy_of, last, quick
from helpers import a_config, assert_an_image_scores_alone, images, perturb, seeded
from torch import nn

import flowtrain
from flowtrain.bijections import DiagonalAffine, Flatten, Sequential
from flowtrain.bijections.memory import executor_of
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.build import build_flow
from flowtrain.evaluation.layers import first_non_finite, log_scale_ranges
from flowtrain.flow.dequantize import EDGE, Dequantizer, UniformNoise, draw_noise
from flowtrain.flow.flow import Flow, initialize
from flowtrain.flow.variational import VariationalNoise
from flowtrain.nets.convolution import Conv2d, ZeroConv2d

pytestmark = pytest.mark.run  # many seconds in all

every_model = pytest.mark.parametrize("model", sorted(TINY.keys() - {"causal"}))  # it is refused
every_shape = pytest.mark.parametrize("shape", [(3, 4, 2), (3, 3, 3), (1, 3, 2), (2, 1, 1)])
SHAPES = {
    **{"glow": (3, 8, 4), "realnvp": (1, 6, 2), "nice": (3, 3, 3)},
    **{"planar": (3, 2, 2), "maf": (3, 3, 2), "iaf": (3, 2, 2), "cnf": (3, 2, 2)},
    **{"tarflow": (1, 6, 2), "jet": (3, 4, 2)},
}


def noise_model(shape, scale=0.2, seed=0):
    torch.manual_seed(seed)
    return perturb(VariationalNoise(shape, steps=4, width=6), scale, seed)


def variational_flow(model="glow", shape=(1, 4, 4), q=256, scale=0.2, **options):
    """`helpers.tiny_flow`, with learned noise."""
    dequantization = {"name": "variational", "steps": 4, "width": 6}
    config = a_config({"name": model, **TINY[model], **options}, dequantization=dequantization)
    flow = perturb(build_flow(config, shape, q), scale)
    x = images(64, shape, q)
    initialize(flow, x, draw_noise(x.shape, seeded(), x.device))
    return flow


def scaled(x, levels=256):
    return x / levels - 0.5


# ---------------------------------------------------------------- the density of the noise


@every_shape
def test_it_starts_as_uniform_noise(shape):
    torch.manual_seed(0)
    noise = torch.rand(5, *shape, generator=seeded())
    u, log_q = VariationalNoise(shape, steps=4, width=6)(noise, scaled(images(5, shape)))
    torch.testing.assert_close(u, EDGE + (1 - 2 * EDGE) * noise, rtol=0, atol=1e-6)
    volume = -math.prod(shape) * math.log(1 - 2 * EDGE)
    torch.testing.assert_close(log_q, torch.full((5,), volume), rtol=0, atol=1e-4)


@every_shape
def test_log_q_is_the_density_of_u(shape):
    # Of uniform noise u is a function: log q(u|x) = -log|det du/dnoise|.
    model = noise_model(shape, 0.1).double()
    x = scaled(images(3, shape)).double()
    noise = torch.rand(3, *shape, generator=seeded(1), dtype=torch.float64)
    u, log_q = model(noise, x)
    jacobian = torch.autograd.functional.jacobian(lambda noise: model(noise, x)[0], noise)
    jacobian = jacobian.reshape(3, u[0].numel(), 3, u[0].numel())
    expected = -torch.stack([torch.linalg.slogdet(jacobian[b, :, b]).logabsdet for b in range(3)])
    assert log_q.abs().min() > 0.01
    torch.testing.assert_close(log_q, expected, rtol=1e-9, atol=1e-9)
    assert all(jacobian[a, :, b].abs().max() == 0 for a, b in itertools.permutations(range(3), 2))


@every_shape
def test_it_depends_on_the_image_and_on_neighbours(shape):
    model = noise_model(shape, 0.1)
    noise = torch.rand(1, *shape, generator=seeded(1))
    a, b = images(2, shape).split(1)
    assert (model(noise, scaled(a))[0] - model(noise, scaled(b))[0]).abs().min() > 0
    if math.prod(shape[1:]) > 1:
        jacobian = torch.autograd.functional.jacobian(
            lambda noise: model(noise, scaled(a))[0], noise
        )
        assert (jacobian.abs().flatten(4).sum(dim=(0, 4)) > 0).all()
        assert jacobian.reshape(a.numel(), -1).count_nonzero() > 2 * a.numel()


@pytest.mark.parametrize("transform", ["center", "logit"])
@pytest.mark.parametrize("levels", [2, 16, 17, 256])
@pytest.mark.parametrize("push", [0.0, 1e3])
@pytest.mark.parametrize("size", [8, 7])
def test_noise_stays_in_its_bin(levels, transform, push, size):
    shape = (1, size, size)
    model = noise_model(shape)
    for layer in model.modules():
        if isinstance(layer, ZeroConv2d):
            nn.init.uniform_(layer.bias, -push, push)  # w so far out that Phi is exactly 0 or 1
    dequantizer = Dequantizer(levels, transform, noise_model=model)
    x = torch.arange(levels).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, *shape)
    noise = torch.rand(x.shape, generator=seeded())
    for row, extreme in enumerate((0.0, 2.0**-24, 1 - 2.0**-24)):
        noise[:, :, row] = extreme
    before = noise.clone()
    v, log_terms = dequantizer(x, noise)
    assert (
        v.dtype == log_terms.dtype == torch.float32
        and torch.isfinite(v).all()
        and torch.isfinite(log_terms).all()
    )
    assert torch.equal(dequantizer.to_data(v), x) and torch.equal(noise, before)
    drawn = model(noise, scaled(x, levels))[0]
    assert drawn.min() >= EDGE and drawn.max() <= 1 - EDGE
    if push:
        assert drawn.min() == EDGE and drawn.max() == 1 - EDGE


def test_the_density_goes_into_the_bound():
    flow = variational_flow()
    x, noise = images(5, flow.shape), torch.rand(5, *flow.shape, generator=seeded(1))
    u, log_q = flow.dequantizer.noise_model(noise, scaled(x))
    given = Dequantizer(256)
    given.noise_model.forward = lambda noise, x, executor: (u, torch.zeros(5))
    z, log_det = flow.bijection(given(x, noise)[0])
    expected = (
        -0.5 * (z.square() + math.log(2 * math.pi)).sum(1) + log_det - log_q - 16 * math.log(256)
    )
    torch.testing.assert_close(flow(x, noise).total, expected, rtol=1e-5, atol=1e-3)
    assert log_q.abs().min() > 0.01


# ---------------------------------------------------------------- the bound


def probabilities(flow):
    """P(x) of every image there is, by the trapezoidal rule in the normal quantiles of the
    noise.
    """
    quantiles = torch.linspace(-5.2, 5.2, 100, dtype=torch.float64)
    weights = (-0.5 * quantiles.square()).exp() / math.sqrt(2 * math.pi) * quantiles.diff()[0]
    noise = torch.special.ndtr(torch.cartesian_prod(*[quantiles] * flow.dims)).reshape(
        -1, *flow.shape
    )
    weight = torch.cartesian_prod(*[weights] * flow.dims).prod(dim=1)
    with torch.no_grad():
        scores = [flow(x.expand(len(noise), -1, -1, -1), noise).total for x in every_image(flow)]
    return torch.stack([(weight * score.exp()).sum() for score in scores])


def every_image(flow):
    values = itertools.product(range(flow.levels), repeat=flow.dims)
    return torch.tensor(list(values), dtype=torch.uint8).reshape(-1, *flow.shape)


@pytest.mark.parametrize(
    "model, shape", [("realnvp", (1, 1, 2)), ("nice", (1, 2, 1)), ("nice", (2, 1, 1))]
)
@pytest.mark.run
def test_the_noise_does_not_change_the_probabilities(model, shape):
    # P(x) is the integral of the flow's density over the bin, whatever q it is computed with.
    options = {} if model == "nice" else {"levels": 1}
    flow = variational_flow(model, shape, q=3, scale=0.05, **options).double()
    found = probabilities(flow)
    flow.dequantizer.noise_model = UniformNoise()
    torch.testing.assert_close(found, probabilities(flow), rtol=1e-3, atol=0)
    assert 0.3 < found.sum() < 1


@pytest.mark.run
def test_more_draws_tighten_the_bound():
    flow = variational_flow("realnvp", (1, 1, 2), q=3, scale=0.05, levels=1).double()
    exact = probabilities(flow).log()
    draws = 4096
    with torch.no_grad():
        single = [
            flow(x.expand(draws, -1, -1, -1), noise_of(flow, draws)).total
            for x in every_image(flow)
        ]
    bounds = [
        torch.stack([s.reshape(-1, k).logsumexp(1).mean() - math.log(k) for s in single])
        for k in (1, 8, 64, draws)
    ]
    for looser, tighter in itertools.pairwise(bounds):
        assert (looser < tighter).all()
    assert (bounds[0] < exact - 1e-3).all()
    torch.testing.assert_close(bounds[-1], exact, rtol=0, atol=0.05)


def noise_of(flow, count, seed=3):
    return torch.rand(count, *flow.shape, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.run
@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 3, 3), (1, 1, 1)])
def test_learning_it_closes_the_gap(shape):
    """Under a fixed Gaussian, of which each image's probability is known."""
    dims, levels, sigma, steps = math.prod(shape), 3, 0.15, 120
    layer = DiagonalAffine((dims,)).requires_grad_(False)
    layer.log_scale.fill_(8 * math.atanh(-math.log(sigma) / 8))
    torch.manual_seed(0)
    model = VariationalNoise(shape, steps=4, width=16)
    flow = Flow(Sequential(Flatten(shape), layer), Dequantizer(levels, noise_model=model), shape)
    x = images(64, shape, levels)
    edges = torch.special.ndtr(
        (torch.arange(levels + 1, dtype=torch.float64) / levels - 0.5) / sigma
    )
    exact = edges.diff().log()[x.long()].flatten(1).sum(1)

    def gap():
        with torch.no_grad():
            draws = [flow.log_prob(x, seeded(seed)).double() for seed in range(50)]
        return (exact - torch.stack(draws).mean(0)).mean().item() / dims

    at_the_start = gap()
    optimizer, generator = torch.optim.Adam(model.parameters()), seeded(99)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.zero_grad()
        flow.bits_per_dim(x, generator).mean().backward()
        optimizer.step()
    assert at_the_start > 0.5
    assert -0.001 < gap() < 0.25 * at_the_start


@every_model
def test_an_image_scores_the_same_in_any_batch(model):
    flow = variational_flow(model)
    assert_an_image_scores_alone(flow)
    x, others = images(33, flow.shape), images(33, flow.shape, seed=5)
    others[10] = x[10]
    drawn, same = (
        flow.dequantizer(images, draw_noise(x.shape, seeded(1), x.device))[0][10]
        for images in (x, others)
    )
    torch.testing.assert_close(drawn, same, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- in a model, in training


def gradients(flow, mode="store", precision=None):
    x = images(4, flow.shape, flow.levels)
    noise = draw_noise(x.shape, seeded(1), x.device)
    flow.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        total = flow(x, noise, executor=executor_of(mode)).total
        total.mean().backward()
    return total.detach(), {name: p.grad for name, p in flow.named_parameters()}


@every_model
def test_every_parameter_gets_a_gradient(model):
    found = gradients(variational_flow(model, SHAPES[model]))[1]
    assert sum(name.startswith("dequantizer.noise_model.context.") for name in found) == 4
    assert [name for name, grad in found.items() if grad is None or grad.count_nonzero() == 0] == []


@every_model
@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
def test_memory_modes_give_the_same_gradients(model, mode):
    flow = variational_flow(model, SHAPES[model], scale=0.1).double()
    total, stored = gradients(flow)
    same_total, recomputed = gradients(flow, mode)
    torch.testing.assert_close(same_total, total, rtol=0, atol=0)
    torch.testing.assert_close(recomputed, stored, rtol=1e-10, atol=1e-10)


@every_model
@pytest.mark.parametrize("mode", ["store", "checkpoint", "reversible"])
def test_bf16_reaches_its_networks_only(model, mode):
    flow = variational_flow(model, SHAPES[model], scale=0.1)
    seen = {}

    def hook(module, inputs, output):
        seen.setdefault(type(module), set()).update(
            t.dtype for t in (output if type(output) is tuple else [output])
        )

    for module in flow.dequantizer.modules():
        module.register_forward_hook(hook)
    expected, exact = gradients(flow)
    seen.clear()
    total, found = gradients(flow, mode, "bf16")
    assert total.dtype == torch.float32
    assert seen[Conv2d] == seen[ZeroConv2d] == {torch.bfloat16}
    assert seen[VariationalNoise] == seen[Dequantizer] == {torch.float32}
    assert (total - expected).abs().max() < 0.02 * flow.dims
    both = [
        torch.cat([grads[name].flatten() for name in exact if "noise_model" in name])
        for grads in (found, exact)
    ]
    assert torch.cosine_similarity(*both, dim=0) > 0.99


@every_model
def test_decoding_and_sampling_do_without_it(model):
    flow = variational_flow(model, q=17)
    expected = flow.sample(3, generator=seeded())

    def must_not_be_called(*_):
        raise AssertionError

    flow.dequantizer.noise_model.forward = must_not_be_called
    x = images(9, flow.shape, 17)
    assert torch.equal(flow.sample(3, generator=seeded()), expected)
    assert torch.equal(flow.decode(flow.encode(x)), x)
    with pytest.raises(AssertionError):
        flow.log_prob(x)


def test_the_weights_are_a_function_of_the_seed():
    def built(name, seed=3):
        return build_flow(
            a_config(dequantization={"name": name}, seed=seed), (1, 4, 4), 256
        ).state_dict()

    uniform, first, again, other = (
        built("uniform"),
        built("variational"),
        built("variational"),
        built("variational", 4),
    )
    assert set(uniform) == {name for name in first if not name.startswith("dequantizer.")}
    # another noise, the same bijection
    assert all(torch.equal(uniform[name], first[name]) for name in uniform)
    assert all(torch.equal(again[name], first[name]) for name in first)
    name = "dequantizer.noise_model.context.0.weight"
    assert not torch.equal(other[name], first[name])


# ---------------------------------------------------------------- looking inside


def test_diagnostics_name_its_layers():
    flow = variational_flow(scale=0.05)
    x, noise = images(4, flow.shape), draw_noise((4, *flow.shape), seeded(), torch.device("cpu"))
    assert first_non_finite(flow, x, noise) is None
    ranges = log_scale_ranges(flow, x, noise)
    assert sum(name.startswith("dequantizer.noise_model.flow.") for name in ranges) == 4
    # of which a checkerboard keeps all, or nothing
    pixel = variational_flow("planar", shape=(1, 1, 1))
    ranges = log_scale_ranges(pixel, images(4, pixel.shape), torch.full((4, 1, 1, 1), 0.5))
    assert sum(name.startswith("dequantizer.noise_model.flow.") for name in ranges) == 2

    weight = flow.dequantizer.noise_model.context[0].weight
    kept = weight.detach().clone()
    nn.init.constant_(weight, 3e38)
    assert first_non_finite(flow, x, noise) == "output of dequantizer.noise_model.context.0"
    nn.init.constant_(weight, math.nan)
    assert first_non_finite(flow, x, noise) == "parameter dequantizer.noise_model.context.0.weight"
    with torch.no_grad():
        weight.copy_(kept)
    # It comes before the bijection, and so its gradient after.
    weight.grad = torch.full_like(weight, math.nan)
    assert (
        first_non_finite(flow, x, noise) == "gradient of dequantizer.noise_model.context.0.weight"
    )
    for parameter in flow.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert first_non_finite(flow, x, noise).startswith("gradient of bijection.")


# ---------------------------------------------------------------- as a user does

VARIATIONAL = sets(
    dequantization__name="variational", dequantization__steps=2, dequantization__width=4
)
RUN = [
    *sets(
        train__num_steps=8,
        train__checkpoint_every=4,
        train__keep_checkpoints=5,
        train__ema=0.9,
        data__shift=1,
    )
]
RUN += sets(train__log_every=3, train__validate_every=4, train__sample_every=8, train__accumulate=2)


@pytest.mark.parametrize(
    "model",
    [
        [*WORDS["glow"], *sets(train__precision="bf16", train__memory="reversible")],
        WORDS["realnvp"],
        WORDS["nice"],
    ],
    ids=["glow", "realnvp", "nice"],
)
def test_it_is_trained_saved_resumed_and_evaluated(model, tmp_path):
    command = ["train", *model, *RUN, *VARIATIONAL]
    parameters = quick(*command, "--dry-run", cwd=tmp_path).ok().out
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    quick(*command, "--run-dir", whole, cwd=tmp_path).ok()
    copy_of(whole, halves)
    last(halves).unlink()
    last(halves).hardlink_to(halves / "checkpoints" / "step-00000004.safetensors")
    assert "at step 4" in quick(*command, "--run-dir", halves, cwd=tmp_path).ok().out
    assert_same_run(whole, halves)

    saved = checkpoint_format.read(last(whole))
    assert {"model", "ema", "optimizer"} <= {
        n.partition(".")[0] for n in saved.tensors if ".dequantizer." in n
    }
    flow = flowtrain.load(str(last(whole)))
    assert f"parameters: {sum(p.numel() for p in flow.parameters())}\n" in parameters
    assert {p.numel() > 0 for p in flow.dequantizer.parameters()} == {True}
    out = (
        quick("evaluate", whole, "--num-images", "20", "--draws", "2", "--json", "-", cwd=tmp_path)
        .ok()
        .out
    )
    assert '"bound": "iwbo"' in out and '"non_finite_images": 0' in out
    quick("sample", whole, "--num-images", "4", cwd=tmp_path).ok()

    key = "dequantization.name"
    other = [*command, *sets(dequantization__name="uniform"), "--run-dir", whole]
    quick(*other, cwd=tmp_path).failed(2, key, "'variational'", "'uniform'")

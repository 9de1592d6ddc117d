"""The autoregressive layer of levels: a distribution over images, causal, and exact both ways."""

import itertools
import math

import pytest
import torch
from catalogue import TINY
from helpers import a_config, images, initialized, perturb, seeded, tiny_flow

from flowtrain.bijections.execution import FUSED
from flowtrain.bijections.memory import executor_of
from flowtrain.checkpoints.build import build_flow
from flowtrain.datasets import digits
from flowtrain.errors import UserError
from flowtrain.nets.prediction import LinearPrediction
from flowtrain.nets.window import Window
from flowtrain.system import capacity

# Shape, levels, token: divided by the token or not, one channel or several, down to one pixel.
# The last ones have blocks of every kind.
GEOMETRIES = [
    ((3, 2, 4), 256, 2, {}),
    ((2, 3, 5), 8, 2, {}),
    ((1, 5, 6), 17, 4, {}),
    ((1, 1, 1), 256, 2, {}),
    ((3, 1, 1), 4, 4, {}),
    ((1, 1, 7), 256, 1, {}),
    ((1, 6, 3), 17, 1, {"attention": 1, "downsample": 1, "dropout": 0.5}),
    ((2, 5, 3), 4, 1, {"attention": 2, "downsample": 2, "blocks": 2}),
    ((2, 3, 5), 8, 2, {"attention": 2, "pixels": True}),
]


def causal(shape, levels, token=2, **options):
    flow = tiny_flow("causal", shape, levels, token=token, **options)
    perturb(flow.bijection.prediction, 5)  # off the solution of least squares, in units of 0.01
    return flow.eval()


@pytest.fixture(scope="module")
def trained():
    """A model trained on digits until its mixtures are narrow."""
    x = torch.from_numpy(digits.build("data", "train").read()[:512])
    config = a_config({"name": "causal", **TINY["causal"], "width": 16, "uniform": 2**-12})
    flow = initialized(build_flow(config, (1, 8, 8), 17), x)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for step in range(60):
        optimizer.zero_grad()
        batch = x[torch.randint(len(x), (64,), generator=seeded(step))]
        flow.bits_per_dim(batch, seeded(step)).mean().backward()
        optimizer.step()
    assert flow.bits_per_dim(x, seeded()).mean() < 2.3
    return flow, x


@pytest.mark.parametrize(
    "shape, levels, token, options",
    [
        ((1, 2, 3), 3, 2, {}),
        ((2, 2, 1), 4, 2, {}),
        ((2, 1, 2), 4, 4, {}),
        ((1, 3, 2), 3, 1, {"attention": 1, "downsample": 1}),
        ((1, 3, 2), 3, 1, {"attention": 1, "pixels": True}),
        ((3, 1, 2), 3, 1, {"context": "grey", "scale": 0.5}),
        ((1, 2, 2), 4, 1, {"context": "downsample", "scale": 0.5}),
    ],
)
def test_the_probabilities_of_all_images_add_up_to_one(shape, levels, token, options):
    """Given each context, if the model has one."""
    flow = causal(shape, levels, token, **options)
    every = torch.tensor(list(itertools.product(range(levels), repeat=math.prod(shape))))
    x = every.reshape(-1, *shape).to(torch.uint8)
    contexts = flow.context_of(x)
    different = [] if contexts is None else contexts.unique(dim=0)[:3]
    given = [each.expand(len(x), *each.shape) for each in different] or [None]
    with torch.no_grad():
        found = [flow.log_prob(x, seeded(), context=context) for context in given]
    for log_prob in found:
        assert log_prob.std() > 0.1
        assert log_prob.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert contexts is None or (found[0] - found[1]).abs().max() > 0.05


@pytest.mark.parametrize("shape, levels, token, options", GEOMETRIES)
def test_a_geometry(shape, levels, token, options):
    """The likelihood depends on the integers alone, images come back, and entries are causal."""
    flow = causal(shape, levels, token, **options, window=2)
    x = images(9, shape, levels)
    draws = [torch.rand(x.shape, generator=seeded()), torch.zeros(x.shape)]
    draws.append(torch.full(x.shape, 1 - 2.0**-24))
    with torch.no_grad():
        first, *others = [flow(x, noise) for noise in draws]
    for other in others:
        assert (other.base != first.base).all()  # the latents do depend on it
        torch.testing.assert_close(other.total, first.total, rtol=1e-5, atol=1e-4)
    assert flow.exact
    for each in (x, flow.sample(20, generator=seeded())):
        assert each.shape[1:] == shape and int(each.max()) < levels
        assert torch.equal(flow.decode(flow.encode(each)), each)

    order = []  # the indices of entries, as they are sampled
    flow.bijection.in_order(lambda entry, i: order.append(i) or torch.tensor([0]), 1)
    assert sorted(order) == list(range(x[0].numel()))
    noise = torch.full(x.shape, 0.3)
    z = flow.double().to_latents(x, noise)[0]
    v = flow.dequantizer(x, noise.double())[0]  # in order as by one pass of the networks
    torch.testing.assert_close(flow.bijection.inverse(z)[0], v, rtol=0, atol=1e-9)
    for place, index in enumerate(order):
        other = x.clone()
        other.flatten(1)[:, index] = (x.flatten(1)[:, index].int() + levels // 2) % levels
        changed = (flow.to_latents(other, noise)[0] != z).any(dim=0)[order]
        assert not changed[:place].any() and changed[place]
        assert changed[place : place + 2].all()  # its neighbour in a row of an image, or a token


@pytest.mark.run  # takes long
def test_rounding_moves_no_level():
    """Latents at the edges of bins, where x + u rounds to the next level in float32."""
    flow = causal((1, 1, 1), 256)
    flow.bijection.conditioner.head.last.bias.data.chunk(3)[2].fill_(-8)  # most have one level
    z = torch.linspace(-4, 4, 300_001)[:, None]
    levels = []

    def next_level(entry, index):
        levels.append(entry.find(torch.special.ndtr(z[:, 0].double()))[0])
        return levels[-1]

    flow.bijection.in_order(next_level, len(z))
    assert torch.equal(flow.decode(z).flatten().long(), levels[0])


@pytest.mark.run  # takes long
def test_images_come_back_from_batches_of_another_size(trained):
    """Batches change the rounding of the networks, by far less than the range of any level."""
    flow, x = trained
    constant = [torch.full((4, 1, 8, 8), level, dtype=torch.uint8) for level in (0, 7, 16)]
    every = torch.cat([x[:20], images(20, (1, 8, 8), 17), *constant])
    for encoded, decoded in [(52, 52), (32, 1), (7, 20)]:
        z = torch.cat([flow.encode(part) for part in every.split(encoded)])
        back = torch.cat([flow.decode(part) for part in z.split(decoded)])
        assert torch.equal(back, every)


@pytest.mark.run  # takes long
def test_encode_computes_what_decode_computes(trained, monkeypatch):
    """One pass of the networks rounds differently, so it has no part in it."""
    flow, x = trained
    monkeypatch.setattr(type(flow.bijection.conditioner), "forward", None)
    z = flow.encode(x[:5])
    middles = torch.empty(z.shape, dtype=torch.float64)

    def next_level(entry, index):
        level = x[:5].flatten(1)[:, index].long()
        middles[:, index] = torch.stack(entry.range(level)).mean(dim=0)
        return level

    flow.bijection.in_order(next_level, 5)
    torch.testing.assert_close(torch.special.ndtr(z.double()), middles, rtol=0, atol=1e-7)


def test_one_entry_after_the_other_takes_one_thread():
    flow = causal((1, 4, 4), 17)
    torch.set_num_threads(2)
    seen = set()

    def next_level(entry, index):
        seen.add(torch.get_num_threads())
        return torch.tensor([0])

    flow.bijection.in_order(next_level, 1)
    assert seen == {1} and torch.get_num_threads() == 2


def test_a_training_step_has_the_likelihood_and_its_gradient_without_latents():
    shape = (2, 3, 5)
    flow = causal(shape, 8).double()
    x, noise = images(6, shape, 8), torch.rand(6, *shape, generator=seeded())
    executors = FUSED, executor_of("store", latents=False)
    totals = [flow(x, noise, executor=each).total for each in executors]
    torch.testing.assert_close(*totals, rtol=1e-12, atol=0)
    weights = torch.arange(1.0, 7, dtype=torch.float64)
    gradients = [torch.autograd.grad(each @ weights, list(flow.parameters())) for each in totals]
    torch.testing.assert_close(*gradients)
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("scale", [None, -1e30, -30.0, 1e30])
@pytest.mark.parametrize("offset", [-1e20, 0.0, 1e7])
@pytest.mark.run  # takes long
def test_narrow_and_far_mixtures_lose_no_probability(scale, offset):
    flow = causal((1, 1, 1), 256)
    _, offsets, scales = flow.bijection.conditioner.head.last.bias.data.chunk(3)
    offsets.fill_(offset)
    if scale is not None:
        scales.fill_(scale)
    every = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    log_prob = flow.log_prob(every, seeded())
    log_prob.sum().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters() if p.grad is not None)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)
    # No level costs more than the uniform part leaves it.
    assert log_prob.min() >= -math.log(256 * 2**10) - 1e-3
    z = torch.cat([torch.randn(50, 1, generator=seeded()), torch.full((1, 1), 1e4)])
    v, log_det = flow.bijection.inverse(z)
    assert v.isfinite().all() and log_det.isfinite().all()
    if scale is None and offset:
        torch.testing.assert_close(flow.bijection(v[:50])[1], -log_det[:50], rtol=0, atol=0.05)
        nearest = 0 if offset < 0 else 255
        assert flow.sample(50, generator=seeded()).eq(nearest).float().mean() > 0.9


def test_the_scale_of_an_entry_is_bounded_also_if_images_never_vary():
    flow = causal((1, 4, 4), 256)
    for scale in (-1e30, 1e30):
        flow.bijection.log_scale.data.fill_(scale)
        assert flow.log_prob(images(8, (1, 4, 4)), seeded()).isfinite().all()
        assert flow.sample(3, generator=seeded()).shape == (3, 1, 4, 4)
    x = torch.full((30, 1, 4, 4), 128, dtype=torch.uint8)
    flow = initialized(build_flow(a_config("causal"), (1, 4, 4), 256), x)
    assert flow.bits_per_dim(x, seeded()).max() < 2
    assert flow.bijection.bounded_log_scale().exp().min() > 0.99 / 255  # half a level
    assert flow.bits_per_dim(images(30, (1, 4, 4)), seeded()).isfinite().all()


def test_the_linear_prediction_is_that_of_least_squares(monkeypatch):
    generator = seeded()
    x = torch.randn(40, 2, 6, 7, generator=generator, dtype=torch.float64)
    for column in range(1, 7):  # neighbours and entries are correlated
        x[..., column] += 0.8 * x[..., column - 1]
    x[:, 1] += 0.7 * x[:, 0]
    window = Window(1, 1, ahead=0)
    prediction = LinearPrediction(2, (6, 7), window).double()
    deviation = prediction.fit(x, ridge=0)
    residual = x - prediction(x)
    rows = x.movedim(1, -1)
    ones = torch.ones(*rows.shape[:-1], 1, dtype=x.dtype)
    for entry in range(2):
        seen = torch.cat([window.seen(rows), rows[..., :entry], ones], dim=-1).flatten(0, 2)
        wanted = rows[..., entry].flatten()
        solved = torch.linalg.lstsq(seen, wanted).solution
        torch.testing.assert_close(residual[:, entry].flatten(), wanted - seen @ solved)
    torch.testing.assert_close(residual.std(dim=(0, 2, 3), correction=0), deviation)
    # A window that does not fit into memory is named.
    monkeypatch.setattr(capacity, "available", lambda device: 10_000)
    prediction = LinearPrediction(4, (3, 3), Window(3, 3, ahead=0))
    with pytest.raises(UserError, match="model.window: a linear prediction from 100 values needs"):
        prediction.fit(torch.zeros(2, 4, 3, 3))

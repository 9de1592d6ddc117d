"""Variational dequantization: q(u|x) is a density in the bin, and part of the bound."""

import itertools
import math

import pytest
import torch
from catalogue import VARIATIONAL
from helpers import images, perturb, seeded, tiny_flow
from torch import nn

from flowtrain.bijections.memory import executor_of
from flowtrain.flow.dequantize import EDGE, Dequantizer
from flowtrain.flow.variational import VariationalNoise
from flowtrain.nets.convolution import Conv2d, ZeroConv2d

pytestmark = pytest.mark.run  # many seconds in all

every_shape = pytest.mark.parametrize("shape", [(3, 4, 2), (3, 3, 3), (2, 1, 1)])
# Models of images with even and with odd sides: the noise works at other resolutions there.
both_sizes = pytest.mark.parametrize("model, shape", [("glow", (3, 8, 4)), ("nice", (3, 3, 3))])


def noise_model(shape, scale=0.2):
    torch.manual_seed(0)
    return perturb(VariationalNoise(shape, steps=4, width=6), scale)


def scaled(x, levels=256):
    return x / levels - 0.5


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
    own = jacobian[range(3), :, range(3)]
    assert log_q.abs().min() > 0.01
    torch.testing.assert_close(log_q, -torch.linalg.slogdet(own).logabsdet, rtol=1e-9, atol=1e-9)
    assert all(jacobian[a, :, b].abs().max() == 0 for a, b in itertools.permutations(range(3), 2))
    # It depends on the image and on neighbours.
    assert (model(noise, -x)[0] - u).abs().min() > 0
    if math.prod(shape[1:]) > 1:
        assert own[0].count_nonzero() > 2 * len(own[0])
    back, same = model.inverse(u, x)
    torch.testing.assert_close(back, noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(same, log_q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("push", [0.0, 1e3])
@pytest.mark.parametrize("size", [8, 7])
def test_noise_stays_between_the_edges(push, size):
    """There an image keeps its levels: see `test_dequantize.py`."""
    shape = (1, size, size)
    model = noise_model(shape)
    for layer in model.modules():
        if isinstance(layer, ZeroConv2d):
            nn.init.uniform_(layer.bias, -push, push)  # w so far out that Phi is exactly 0 or 1
    noise = torch.rand((9, *shape), generator=seeded())
    for row, extreme in enumerate((0.0, 2.0**-24, 1 - 2.0**-24)):
        noise[:, :, row] = extreme
    before = noise.clone()
    u, log_q = model(noise, scaled(images(9, shape)))
    assert u.dtype == log_q.dtype == torch.float32 and torch.equal(noise, before)
    assert torch.isfinite(log_q).all() and u.min() >= EDGE and u.max() <= 1 - EDGE
    if push:
        assert u.min() == EDGE and u.max() == 1 - EDGE


def test_the_density_goes_into_the_bound():
    flow = tiny_flow(noise=VARIATIONAL)
    x, noise = images(5, flow.shape), torch.rand(5, *flow.shape, generator=seeded(1))
    u, log_q = flow.dequantizer.noise_model(noise, scaled(x))
    z, log_det = flow.bijection((x + u) / 256 - 0.5)
    base = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
    expected = base + log_det - log_q - 16 * math.log(256)
    torch.testing.assert_close(flow(x, noise).total, expected, rtol=1e-5, atol=1e-3)
    assert log_q.abs().min() > 0.01


def gradients(flow, mode="store", bf16=False):
    x = images(4, flow.shape, flow.num_bins)
    noise = torch.rand(x.shape, generator=seeded(1))
    flow.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        total = flow(x, noise, executor=executor_of(mode)).total
        total.mean().backward()
    return total.detach(), {name: p.grad for name, p in flow.named_parameters()}


@both_sizes
def test_memory_modes_give_the_same_gradients_and_bf16_reaches_networks_only(model, shape):
    flow = tiny_flow(model, shape, scale=0.1, noise=VARIATIONAL).double()
    total, stored = gradients(flow)
    assert sum(name.startswith("dequantizer.noise_model.context.") for name in stored) == 4
    assert all(grad.count_nonzero() for grad in stored.values())
    for mode in ("checkpoint", "reversible"):
        same_total, recomputed = gradients(flow, mode)
        torch.testing.assert_close(same_total, total, rtol=0, atol=0)
        torch.testing.assert_close(recomputed, stored, rtol=1e-10, atol=1e-10)
    seen = {}

    def hook(module, inputs, output):
        results = output if type(output) is tuple else [output]
        seen.setdefault(type(module), set()).update(t.dtype for t in results)

    for module in flow.float().dequantizer.modules():
        module.register_forward_hook(hook)
    rounded, found = gradients(flow, "reversible", bf16=True)
    assert seen[Conv2d] == seen[ZeroConv2d] == {torch.bfloat16}
    assert seen[VariationalNoise] == seen[Dequantizer] == {torch.float32} == {rounded.dtype}
    assert (rounded - total).abs().max() < 0.02 * flow.dims
    names = [name for name in stored if "noise_model" in name]
    both = [torch.cat([g[name].flatten().double() for name in names]) for g in (found, stored)]
    assert torch.cosine_similarity(*both, dim=0) > 0.99

"""Codelengths that a formula knows: a flow as an exact map between images and bits."""

import math
import re
import sys

import numpy as np
import pytest
import torch
from coding_helpers import GREY, RGB, affine_flow, variational
from helpers import images, tiny_flow

from flowtrain.bijections import Bijection, Conv1x1, Flatten, Sequential
from flowtrain.errors import UserError
from flowtrain.flow.class_prior import ClassPrior
from flowtrain.flow.dequantize import Dequantizer, RealValued
from flowtrain.flow.flow import Flow
from flowtrain.flow.variational import VariationalNoise
from flowtrain.tools.archive.codec import Codec
from flowtrain.tools.archive.rules import rule
from flowtrain.tools.archive.stack import Stack, Uncodable, constriction, random_words

pytest.importorskip("constriction")


def coded(flow: Flow, x: torch.Tensor) -> float:
    """Bits per dimension on a stack of random bits. All images come back, and so does the stack."""
    codec, words = Codec(flow), random_words(4 * x.numel() + 8)
    stack = Stack(words)
    before, parts = stack.bits, x.split(16)
    for part in parts:
        codec.encode(part, stack)
    bits = (stack.bits - before) / x.numel()
    stack = Stack(stack.words(), again=True)
    back = [codec.decode(len(part), stack) for part in reversed(parts)]
    assert torch.equal(torch.cat(back[::-1]), x)
    assert np.array_equal(stack.first_words(), words)
    return bits


@pytest.mark.parametrize(
    "levels, noise", [(256, "uniform"), (17, "uniform"), (4, "uniform"), (256, "variational")]
)
@pytest.mark.run  # takes long
def test_a_closed_form_density_gives_the_closed_form_codelength(levels, noise):
    slope, shift = 3.0, 0.1
    flow = affine_flow(RGB, levels, slope, shift)
    if noise == "variational":  # as it starts: uniform
        flow.dequantizer.noise_model = VariationalNoise(RGB, 2, 4)
    x = images(256, RGB, levels)
    middle = slope * ((x.double() + 0.5) / levels - 0.5) + shift
    # of z, which is uniform in its bin
    squares = middle.square().mean() + (slope / levels) ** 2 / 12
    nats = (squares + math.log(2 * math.pi)) / 2 - math.log(slope) + math.log(levels)
    assert coded(flow, x) == pytest.approx(nats.item() / math.log(2), abs=0.005 + 0.03 / levels)


MODELS = {
    **{
        f"glow {name}": ("glow", {"coupling": name})
        for name in ("affine", "additive", "spline", "mixture")
    },
    "glow checkerboard": (
        "glow",
        {"split": "checkerboard", "permutation": "conv1x1", "prior": "spline"},
    ),
    "glow mixed": (
        "glow",
        {"split": "mixed", "permutation": "shuffle", "initialization": "whitening"},
    ),
    "glow reverse": (
        "glow",
        {"permutation": "reverse", "conditioner": "gated", "prior": "mixture"},
    ),
    "realnvp": ("realnvp", {}),
    "nice": ("nice", {}),
    "nice gaussian": ("nice", {"prior": "gaussian"}),
    "tarflow": ("tarflow", {}),
    "tarflow plain": ("tarflow", {"mixing": "none", "bounded": False, "patch": 1}),
    "jet": ("jet", {}),
    "jet plain": ("jet", {"mixing": "permutation", "bounded": False, "couplings": 10}),
}


@pytest.mark.run  # takes long
@pytest.mark.parametrize("name", MODELS)
def test_the_codelength_is_the_bound(name):
    model, options = MODELS[name]
    shape = RGB if [*MODELS].index(name) % 2 else GREY
    transform = "logit" if model == "realnvp" else "center"
    flow = tiny_flow(model, shape, 256, transform, scale=0.05, **options)
    # those that it is initialized on: far out, the code is shorter than the normal density says
    x = images(64, shape)
    bound = torch.stack(
        [flow.bits_per_dim(x, torch.Generator().manual_seed(i)).mean() for i in range(8)]
    )
    # Of this many images of this size the draws differ by about 0.01.
    assert coded(flow, x) == pytest.approx(bound.mean().item(), abs=0.005 + 4 * bound.std().item())


@pytest.mark.run  # takes long
@pytest.mark.parametrize(
    "shape, levels", [((1, 8, 8), 256), ((3, 5, 3), 256), ((1, 8, 8), 17), ((3, 4, 4), 2)]
)
def test_the_codelength_is_the_bound_with_learned_noise(shape, levels):
    flow = variational(affine_flow(shape, levels))
    x = images(96, shape, levels)
    bound = torch.stack(
        [flow.bits_per_dim(x, torch.Generator().manual_seed(i)).mean() for i in range(8)]
    )
    assert coded(flow, x) == pytest.approx(bound.mean().item(), abs=0.01 + 4 * bound.std().item())


@pytest.mark.parametrize("alpha", [0.05, 1e-5])
def test_constant_images_come_back(alpha):
    x = torch.cat(
        [torch.full((1, *RGB), value, dtype=torch.uint8) for value in (0, 1, 127, 254, 255)]
    )
    flow = variational(affine_flow(RGB, slope=1.0))
    flow.dequantizer.transform, flow.dequantizer.alpha = "logit", alpha
    coded(flow, x)
    coded(variational(affine_flow(RGB)), x)


def test_what_is_out_of_range_is_named():
    x = torch.full((3, *RGB), 128, dtype=torch.uint8)
    x[1] = 255
    with pytest.raises(Uncodable) as caught:
        Codec(affine_flow(RGB, slope=150.0)).encode(x, Stack(random_words(1000)))
    assert caught.value.images.tolist() == [False, True, False]


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_a_scale_that_whole_numbers_do_not_have_is_named(scale):
    mixing = Conv1x1(3).double()
    mixing.set_weight(scale * torch.eye(3))
    with pytest.raises(UserError, match=re.escape(f"scales a value by {scale:.3g}")):
        rule(mixing, 20)


def test_a_layer_without_a_rule_is_named():
    class Cubic(Bijection):
        pass

    flow = Flow(Sequential(Flatten(GREY), Cubic()), Dequantizer(256), GREY)
    with pytest.raises(UserError, match="Cubic"):
        Codec(flow)
    with pytest.raises(UserError, match="real-valued"):
        Codec(Flow(Sequential(Flatten(GREY)), RealValued(), GREY))
    with pytest.raises(UserError, match="model.classes is 3"):
        Codec(Flow(Sequential(Flatten(GREY)), Dequantizer(256), GREY, ClassPrior(3, (4,))))


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(
        UserError, match="needs the package constriction: .*pip install constriction"
    ):
        constriction()

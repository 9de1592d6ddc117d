"""Codelengths against formulas: a flow as an exact map between images and bits."""

import math
import re
import sys

import numpy as np
import pytest
import torch
from coding_helpers import GREY, RGB, affine_flow, causal_flow, smooth, variational
from helpers import images, seeded, tiny_flow

from flowtrain.bijections import Bijection, Conv1x1, Flatten, Sequential
from flowtrain.errors import UserError
from flowtrain.flow.class_prior import ClassPrior
from flowtrain.flow.dequantize import Dequantizer, RealValued
from flowtrain.flow.flow import Flow
from flowtrain.tools.archive.codec import DirectCodec, coder_of
from flowtrain.tools.archive.rules import rule
from flowtrain.tools.archive.stack import Stack, constriction, random_words

pytest.importorskip("constriction")


def coded(flow: Flow, x: torch.Tensor) -> float:
    """Bits, on a stack of random ones if it borrows. Images and stack come back."""
    codec = coder_of(flow)
    words = random_words(4 * x.numel() + 8 if codec.borrows else 0)
    stack, parts = Stack(words), x.split(codec.chunk)
    before = stack.bits
    for part in parts:
        codec.encode(part, stack)
    bits = stack.bits - before
    stack = Stack(stack.words(), again=True)
    back = [codec.decode(len(part), stack) for part in reversed(parts)]
    assert torch.equal(torch.cat(back[::-1]), x)
    assert np.array_equal(stack.first_words(), words)
    return bits


def model(name, shape, transform="center", **options):
    return lambda: tiny_flow(name, shape, 256, transform, scale=0.05, **options)


FLOWS = {
    "one affine map": lambda: affine_flow(RGB),
    "one affine map of 17 levels": lambda: affine_flow(RGB, 17),
    "affine": model("glow", GREY),
    "additive": model("glow", RGB, coupling="additive", permutation="reverse", conditioner="gated"),
    "spline": model("glow", GREY, coupling="spline", split="checkerboard", prior="spline"),
    "mixture": model("glow", RGB, coupling="mixture", split="mixed", permutation="shuffle"),
    "whitening": model("glow", GREY, initialization="whitening", prior="mixture"),
    "realnvp": model("realnvp", RGB, "logit"),
    "nice": model("nice", GREY),
    "tarflow": model("tarflow", RGB),
    "tarflow plain": model("tarflow", GREY, mixing="none", bounded=False, patch=1),
    "jet": model("jet", RGB, mixing="permutation", bounded=False, couplings=10),
    "noise": lambda: variational(affine_flow((3, 5, 3))),
    "noise of 17 levels": lambda: variational(affine_flow((1, 8, 8), 17)),
    "noise of 2 levels": lambda: variational(affine_flow(RGB, 2)),
}


@pytest.mark.run  # takes long
@pytest.mark.parametrize("name", FLOWS)
def test_the_codelength_is_the_bound(name):
    flow = FLOWS[name]()
    # those that it is initialized on: far out, the code is shorter than the normal density says
    x = images(64, flow.shape, flow.num_bins)
    bound = torch.stack([flow.bits_per_dim(x, seeded(i)).mean() for i in range(8)]).detach()
    # Of this many images of this size the draws differ by about 0.01.
    close = 0.005 + 4 * bound.std().item()
    assert coded(flow, x) / x.numel() == pytest.approx(bound.mean().item(), abs=close)


@pytest.mark.parametrize("alpha", [0.05, 1e-5])
def test_constant_images_come_back(alpha):
    values = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)
    x = values.view(-1, 1, 1, 1).repeat(1, *RGB)
    flow = variational(affine_flow(RGB, slope=1.0))
    flow.dequantizer.transform, flow.dequantizer.alpha = "logit", alpha
    coded(flow, x)
    coded(variational(affine_flow(RGB)), x)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_a_scale_that_whole_numbers_do_not_have_is_named(scale):
    mixing = Conv1x1(3).double()
    mixing.set_weight(scale * torch.eye(3))
    with pytest.raises(UserError, match=re.escape(f"scales a value by {scale:.3g}")):
        rule(mixing, 20)


EVERY_BLOCK = {"token": 1, "attention": 1, "downsample": 1, "dropout": 0.5}
EVERY_BLOCK |= {"pixels": True}


@pytest.mark.parametrize(
    "shape, levels, options",
    [(RGB, 256, {}), (GREY, 2, {}), ((1, 1, 1), 5, {}), ((1, 6, 5), 17, EVERY_BLOCK)],
)
def test_the_codelength_is_the_likelihood(shape, levels, options):
    flow = causal_flow(shape, levels, **options)
    assert isinstance(coder_of(flow), DirectCodec)
    x = torch.cat([images(40, shape, levels), torch.zeros(1, *shape, dtype=torch.uint8)])
    x[-1] = levels - 1
    bits = flow.log_prob(x).sum().item() / -math.log(2)
    # The coder's own precision costs 0.001 bits for each of two choices, and 24 at the beginning.
    assert coded(flow, x) == pytest.approx(bits, abs=0.005 * x.numel() + 24)


@pytest.mark.run  # takes long
def test_the_probe_depends_on_every_weight():
    flow = causal_flow(RGB, **EVERY_BLOCK)
    known = coder_of(flow).probe()
    for parameter in flow.parameters():
        before = parameter.clone()
        parameter += 1e-3
        assert coder_of(flow).probe() != known
        parameter.copy_(before)
    assert coder_of(flow).probe() == known


def test_weights_that_are_not_finite_are_named():
    flow = causal_flow(RGB)
    next(flow.bijection.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        coder_of(flow).encode(smooth(1, RGB), Stack(random_words(0)))


def test_a_model_without_a_code_is_named(monkeypatch):
    class Cubic(Bijection):
        pass

    def flow(dequantizer, *more, layers=()):
        return Flow(Sequential(Flatten(GREY), *layers), dequantizer, GREY, *more)

    causal = causal_flow(GREY)
    causal.class_prior = ClassPrior(3, GREY)
    for each, words in (
        (flow(Dequantizer(256), layers=[Cubic()]), "Cubic"),
        (flow(RealValued()), "real-valued"),
        (flow(Dequantizer(256), ClassPrior(3, (4,))), "model.classes is 3"),
        (causal, "model.classes is 3"),
    ):
        with pytest.raises(UserError, match=words):
            coder_of(each)
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UserError, match="package constriction .the extra compress.: .*"):
        constriction()

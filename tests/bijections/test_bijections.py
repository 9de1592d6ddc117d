"""The contract of bijections, for each layer and model, then the promises of single layers."""

import copy
import importlib
import math
import pkgutil
from typing import get_args

import pytest
import torch
from catalogue import TINY
from helpers import images, perturb, ready, seeded

import flowtrain.bijections
import flowtrain.models
from flowtrain.bijections import (
    ActNorm,
    AdditiveTransform,
    AffineTransform,
    Bijection,
    CheckerboardCoupling,
    CircularSplineTransform,
    Continuous,
    Conv1x1,
    Conv1x1LU,
    Coupling,
    DiagonalAffine,
    ExponentialTransform,
    Flatten,
    HalvePixels,
    Inverse,
    LogisticToNormal,
    MaskedAutoregressive,
    MixtureTransform,
    Multiscale,
    Permute,
    Planar,
    Reverse,
    Sequential,
    SigmoidTransform,
    SplineTransform,
    Squeeze,
    TokenAutoregressive,
)
from flowtrain.bijections.actnorm import LOG_SCALE_LIMIT
from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import DataDependentInit
from flowtrain.bijections.continuous import Dynamics
from flowtrain.bijections.conv1x1 import LinearChannels
from flowtrain.bijections.execution import FUSED, Container, LayerByLayer
from flowtrain.bijections.fused import FusedLinear, fuse
from flowtrain.bijections.inverses import inverse_by_iteration
from flowtrain.bijections.memory import Mode, executor_of
from flowtrain.nets.convolution import GlowNet, ZeroNet, relu_
from flowtrain.nets.dense import DenseNet
from flowtrain.nets.masked import MaskedDenseNet
from flowtrain.nets.residual import DepthwiseNet, GatedNet, ResidualNet
from flowtrain.nets.transformer import CausalTransformer, VisionTransformer
from flowtrain.system.capacity import peak
from flowtrain.tools.explore.accounts import ByPlace

MODES = get_args(Mode)


def model(name, shape, *about_data, **options):
    return importlib.import_module(f"flowtrain.models.{name}").build(
        shape, *about_data, **{**TINY[name], **options}
    )


def ordinal(shape, levels, token=2, **told):
    """A causal model, which is a layer."""
    return model("causal", shape, levels, token=token, **told)


def multiscale():
    """Two levels by hand, whose priors are conditioned on the context."""
    return Multiscale(
        [Sequential(Squeeze(), Conv1x1LU(8)), Sequential(ActNorm((4, 1, 1)))],
        [
            Coupling(4, ZeroNet(4, 8, 3), AffineTransform()),
            Coupling(2, GlowNet(2, 4, 5, 3), AffineTransform()),
        ],
        [(4, 2, 2), (4, 2, 2)],
    )


def autoregressive(dims, transform, width=7, hidden_layers=1, context=0):
    net = MaskedDenseNet(dims, transform.parameters_per_entry, width, hidden_layers, context)
    return MaskedAutoregressive(net, transform)


def over_tokens(entries, tokens, transform, width=6, layers=1, context=0):
    parameters = transform.parameters_per_entry
    net = CausalTransformer(entries, parameters, tokens, width, layers, context)
    return TokenAutoregressive(net, transform)


# These take points of a surface, so their Jacobians are not square. test_sphere.py tests them.
OF_SURFACES = {"SphereToAngles", "AnglesToNormal", "sphere"}

# For each name: how to build it, the shape of an example, and that of its context.
LAYERS = {
    "actnorm-1d": (lambda: ActNorm((5,)), (5,), None),
    "actnorm-3d": (lambda: ActNorm((3, 1, 1)), (3, 2, 4), None),
    "actnorm-one-channel": (lambda: ActNorm((1, 1, 1)), (1, 3, 3), None),
    "diagonal": (lambda: DiagonalAffine((5,)), (5,), None),
    "diagonal-channels": (lambda: DiagonalAffine((3, 1, 1)), (3, 2, 2), None),
    "logistic": (LogisticToNormal, (3, 2, 2), None),
    "logistic-vector": (LogisticToNormal, (7,), None),
    "conv1x1": (lambda: Conv1x1(4), (4, 2, 3), None),
    "conv1x1-whitening": (lambda: Conv1x1(3, "whitening"), (3, 2, 2), None),
    "conv1x1-lu": (lambda: Conv1x1LU(4), (4, 2, 3), None),
    "conv1x1-lu-odd": (lambda: Conv1x1LU(5), (5, 1, 2), None),
    "conv1x1-lu-whitening": (lambda: Conv1x1LU(4, "whitening"), (4, 2, 2), None),
    "squeeze": (Squeeze, (3, 4, 2), None),
    "squeeze-one-channel": (Squeeze, (1, 2, 6), None),
    "flatten": (lambda: Flatten((2, 3, 2)), (2, 3, 2), None),
    "permute": (lambda: Permute(torch.randperm(6)), (6, 2, 2), None),
    "permute-vector": (lambda: Permute(torch.randperm(9)), (9,), None),
    "coupling": (lambda: Coupling(2, GlowNet(2, 4, 5), AffineTransform()), (4, 3, 2), None),
    "coupling-additive": (
        lambda: Coupling(2, GlowNet(2, 2, 5), AdditiveTransform()),
        (4, 2, 2),
        None,
    ),
    "coupling-swap": (
        lambda: Coupling(2, GlowNet(2, 4, 5), AffineTransform(), swap=True),
        (4, 2, 2),
        None,
    ),
    "coupling-odd": (lambda: Coupling(2, GlowNet(2, 6, 5), AffineTransform()), (5, 2, 2), None),
    "coupling-odd-swap": (
        lambda: Coupling(3, ResidualNet(3, 4, 4, 1), AffineTransform(), swap=True),
        (5, 2, 2),
        None,
    ),
    "coupling-zeronet": (lambda: Coupling(1, ZeroNet(1, 4), AffineTransform(1.0)), (3, 2, 2), None),
    "coupling-dense": (
        lambda: Coupling(3, DenseNet(3, 4, 6, 2), AdditiveTransform(), swap=True),
        (7,),
        None,
    ),
    "coupling-context": (
        lambda: Coupling(2, GlowNet(2, 4, 5, 3), AffineTransform()),
        (4, 2, 2),
        (3, 2, 2),
    ),
    "coupling-larger-context": (
        lambda: Coupling(2, GlowNet(2, 4, 5, 12), AffineTransform()),
        (4, 2, 2),
        (3, 4, 4),
    ),
    "coupling-smaller-context": (
        lambda: Coupling(2, ZeroNet(2, 4, 3), AffineTransform()),
        (4, 4, 2),
        (3, 2, 1),
    ),
    "coupling-gated": (
        lambda: Coupling(2, GatedNet(2, 4, 5, 2), AffineTransform()),
        (4, 3, 2),
        None,
    ),
    "coupling-gated-context": (
        lambda: Coupling(2, GatedNet(2, 4, 5, 1, 3), AffineTransform()),
        (4, 2, 2),
        (3, 2, 2),
    ),
    "coupling-depthwise": (
        lambda: Coupling(2, DepthwiseNet(2, 4, 5, 2), AffineTransform()),
        (4, 3, 2),
        None,
    ),
    "coupling-depthwise-context": (
        lambda: Coupling(2, DepthwiseNet(2, 4, 5, 1, 3), AffineTransform()),
        (4, 2, 2),
        (3, 2, 2),
    ),
    "checkerboard-0": (
        lambda: CheckerboardCoupling((3, 4), ResidualNet(2, 4, 4, 1), AffineTransform()),
        (2, 3, 4),
        None,
    ),
    "checkerboard-1": (
        lambda: CheckerboardCoupling((3, 3), GlowNet(1, 2, 4), AffineTransform(), 1),
        (1, 3, 3),
        None,
    ),
    "checkerboard-additive": (
        lambda: CheckerboardCoupling((2, 4), GlowNet(2, 2, 4), AdditiveTransform()),
        (2, 2, 4),
        None,
    ),
    "checkerboard-context": (
        lambda: CheckerboardCoupling((2, 4), ResidualNet(2, 4, 4, 0, 1), AffineTransform(), 1),
        (2, 2, 4),
        (1, 2, 4),
    ),
    "coupling-spline": (lambda: Coupling(2, GlowNet(2, 46, 5), SplineTransform()), (4, 2, 2), None),
    "coupling-spline-odd": (
        lambda: Coupling(2, GlowNet(2, 15, 5), SplineTransform(2), swap=True),
        (5, 2, 2),
        None,
    ),
    "coupling-spline-context": (
        lambda: Coupling(2, GlowNet(2, 28, 5, 3), SplineTransform(5)),
        (4, 2, 2),
        (3, 2, 2),
    ),
    "coupling-spline-free-ends": (
        lambda: Coupling(2, GlowNet(2, 26, 5), SplineTransform(4, 2.0, free_ends=True)),
        (4, 2, 2),
        None,
    ),
    "coupling-circular": (
        lambda: Coupling(2, DenseNet(2, 26, 5, 1), CircularSplineTransform(4)),
        (4,),
        None,
    ),
    "coupling-circular-images": (
        lambda: Coupling(2, GlowNet(2, 30, 5), CircularSplineTransform(3), swap=True),
        (5, 2, 2),
        None,
    ),
    "checkerboard-spline": (
        lambda: CheckerboardCoupling((3, 4), ResidualNet(2, 22, 4, 1), SplineTransform(4)),
        (2, 3, 4),
        None,
    ),
    "coupling-mixture": (
        lambda: Coupling(2, GlowNet(2, 28, 5), MixtureTransform()),
        (4, 2, 2),
        None,
    ),
    "coupling-mixture-odd": (
        lambda: Coupling(2, GlowNet(2, 24, 5), MixtureTransform(2), swap=True),
        (5, 2, 2),
        None,
    ),
    "coupling-mixture-context": (
        lambda: Coupling(2, GlowNet(2, 22, 5, 3), MixtureTransform(3)),
        (4, 2, 2),
        (3, 2, 2),
    ),
    "checkerboard-mixture": (
        lambda: CheckerboardCoupling((3, 4), ResidualNet(2, 28, 4, 1), MixtureTransform(), 1),
        (2, 3, 4),
        None,
    ),
    "planar-layer": (lambda: Planar(5), (5,), None),
    "planar-layer-one-entry": (lambda: Planar(1), (1,), None),
    "autoregressive": (lambda: autoregressive(6, AffineTransform()), (6,), None),
    "autoregressive-deep": (
        lambda: autoregressive(5, AffineTransform(), hidden_layers=3),
        (5,),
        None,
    ),
    "autoregressive-narrow": (
        lambda: autoregressive(9, AffineTransform(), width=5, hidden_layers=2),
        (9,),
        None,
    ),
    "autoregressive-spline": (lambda: autoregressive(4, SplineTransform(3)), (4,), None),
    "autoregressive-mixture": (lambda: autoregressive(4, MixtureTransform(2)), (4,), None),
    "autoregressive-context": (
        lambda: autoregressive(4, AffineTransform(), 8, 2, context=12),
        (4,),
        (3, 2, 2),
    ),
    "inverse": (lambda: Inverse(autoregressive(6, AffineTransform(), hidden_layers=2)), (6,), None),
    "inverse-context": (
        lambda: Inverse(autoregressive(3, AffineTransform(), context=3)),
        (3,),
        (3, 1, 1),
    ),
    "reverse": (Reverse, (3, 2, 4), None),
    "halve-pixels": (lambda: HalvePixels(torch.eye(2) == 1), (4, 2, 2), None),
    "halve-pixels-stripes": (
        lambda: HalvePixels(torch.arange(6).view(3, 2) % 2 == 0),
        (2, 3, 2),
        None,
    ),
    "tokens": (lambda: over_tokens(2, 6, AffineTransform()), (2, 3, 2), None),
    "tokens-deep": (lambda: over_tokens(1, 4, AffineTransform(), layers=2), (1, 1, 4), None),
    "tokens-unbounded": (lambda: over_tokens(3, 4, ExponentialTransform()), (3, 2, 2), None),
    "tokens-mixture": (lambda: over_tokens(1, 4, MixtureTransform(2)), (1, 2, 2), None),
    "tokens-context": (lambda: over_tokens(2, 4, AffineTransform(), context=3), (2, 4, 1), (3,)),
    "coupling-transformer": (
        lambda: Coupling(2, VisionTransformer(2, 4, 6, 6, 2), SigmoidTransform()),
        (4, 3, 2),
        None,
    ),
    "coupling-transformer-context": (
        lambda: Coupling(2, VisionTransformer(2, 4, 4, 6, 1, 3), AffineTransform()),
        (4, 2, 2),
        (3,),
    ),
    "multiscale": (multiscale, (2, 4, 4), (3, 2, 2)),
    "sequential": (
        lambda: Sequential(
            ActNorm((4, 1, 1)),
            Conv1x1(4),
            Coupling(2, GlowNet(2, 4, 5, 3), AffineTransform()),
            Squeeze(),
        ),
        (4, 2, 2),
        (3, 2, 2),
    ),
    "sequential-empty": (Sequential, (4, 2, 2), None),
    "ordinal": (lambda: ordinal((1, 4, 6), 17), (1, 4, 6), None),
    "ordinal-rgb": (lambda: ordinal((3, 2, 4), 256), (3, 2, 4), None),
    "ordinal-pixels": (lambda: ordinal((2, 3, 3), 16, token=1), (2, 3, 3), None),
    "ordinal-padded": (lambda: ordinal((2, 3, 5), 8), (2, 3, 5), None),
    "ordinal-large-token": (lambda: ordinal((1, 4, 5), 17, token=4), (1, 4, 5), None),
    "ordinal-class": (lambda: ordinal((1, 3, 4), 17, classes=3), (1, 3, 4), (3,)),
    "ordinal-context": (
        lambda: ordinal((1, 4, 6), 17, context=(3, 8, 12)),
        (1, 4, 6),
        (3, 8, 12),
    ),
    "continuous": (lambda: Continuous(Dynamics(5, 6, 2), "dopri8", 1e-12, 1e-12), (5,), None),
}
# The layers of these models are tested above. These rows test what joins them.
MODELS = {
    "glow": (lambda: model("glow", (1, 4, 4)), (1, 4, 4), None),
    "glow-rgb": (
        lambda: model("glow", (3, 4, 2), levels=1, permutation="conv1x1"),
        (3, 4, 2),
        None,
    ),
    "glow-additive": (
        lambda: model("glow", (1, 4, 4), coupling="additive", permutation="shuffle"),
        (1, 4, 4),
        None,
    ),
    "glow-reverse": (lambda: model("glow", (1, 4, 8), permutation="reverse"), (1, 4, 8), None),
    "glow-whitening": (
        lambda: model("glow", (1, 4, 4), initialization="whitening"),
        (1, 4, 4),
        None,
    ),
    "glow-checkerboard": (
        lambda: model("glow", (3, 4, 2), levels=1, split="checkerboard"),
        (3, 4, 2),
        None,
    ),
    "glow-mixed": (
        lambda: model("glow", (1, 4, 4), steps=4, levels=1, split="mixed"),
        (1, 4, 4),
        None,
    ),
    "glow-spline": (lambda: model("glow", (1, 4, 4), coupling="spline", bins=4), (1, 4, 4), None),
    "glow-mixture": (
        lambda: model("glow", (1, 4, 4), coupling="mixture", components=2),
        (1, 4, 4),
        None,
    ),
    "glow-prior-mixture": (lambda: model("glow", (1, 4, 4), prior="mixture"), (1, 4, 4), None),
    "glow-prior-spline": (
        lambda: model("glow", (1, 4, 4), prior="spline", bins=4),
        (1, 4, 4),
        None,
    ),
    "glow-per-level": (
        lambda: model("glow", (1, 4, 4), levels=2, steps=[1, 2], width=[4, 3]),
        (1, 4, 4),
        None,
    ),
    "glow-gated": (
        lambda: model("glow", (1, 4, 4), conditioner="gated", blocks=2),
        (1, 4, 4),
        None,
    ),
    "glow-depthwise": (lambda: model("glow", (1, 4, 4), conditioner="depthwise"), (1, 4, 4), None),
    "realnvp": (lambda: model("realnvp", (1, 4, 4)), (1, 4, 4), None),
    "realnvp-rgb": (lambda: model("realnvp", (3, 2, 4)), (3, 2, 4), None),
    "realnvp-one-level": (lambda: model("realnvp", (2, 3, 3), levels=1), (2, 3, 3), None),
    "glow-context": (
        lambda: model("glow", (1, 4, 4), context=(1, 4, 4), prior="mixture"),
        (1, 4, 4),
        (1, 4, 4),
    ),
    "glow-smaller-context": (
        lambda: model("glow", (1, 4, 4), context=(1, 1, 1)),
        (1, 4, 4),
        (1, 1, 1),
    ),
    "realnvp-context": (
        lambda: model("realnvp", (1, 4, 4), context=(1, 2, 2)),
        (1, 4, 4),
        (1, 2, 2),
    ),
    "nice": (lambda: model("nice", (1, 4, 4)), (1, 4, 4), None),
    "nice-gaussian": (lambda: model("nice", (1, 2, 4), prior="gaussian"), (1, 2, 4), None),
    "nice-odd": (lambda: model("nice", (1, 3, 3), couplings=3), (1, 3, 3), None),
    "planar": (lambda: model("planar", (1, 2, 3)), (1, 2, 3), None),
    "planar-plane": (lambda: model("planar", (2, 1, 1), layers=6), (2, 1, 1), None),
    "maf": (lambda: model("maf", (1, 3, 3)), (1, 3, 3), None),
    "maf-random": (
        lambda: model("maf", (2, 2, 2), order="random", hidden_layers=2),
        (2, 2, 2),
        None,
    ),
    "maf-plane-spline": (lambda: model("maf", (2, 1, 1), transform="spline"), (2, 1, 1), None),
    "iaf": (lambda: model("iaf", (1, 2, 2)), (1, 2, 2), None),
    "cnf": (lambda: model("cnf", (1, 2, 2)), (1, 2, 2), None),
    "cnf-plane": (lambda: model("cnf", (2, 1, 1), blocks=1, hidden_layers=2), (2, 1, 1), None),
    "iaf-plane-random": (lambda: model("iaf", (2, 1, 1), order="random"), (2, 1, 1), None),
    "causal": (lambda: model("causal", (1, 4, 4), 17), (1, 4, 4), None),
    "causal-context": (
        lambda: model("causal", (1, 4, 4), 17, context=(1, 4, 4), attention=1),
        (1, 4, 4),
        (1, 4, 4),
    ),
    "causal-all-blocks": (
        lambda: model("causal", (1, 3, 4), 17, token=1, attention=1, downsample=1),
        (1, 3, 4),
        None,
    ),
    "tarflow": (lambda: model("tarflow", (1, 4, 4)), (1, 4, 4), None),
    "tarflow-plain": (
        lambda: model("tarflow", (3, 2, 4), patch=1, mixing="none", bounded=False),
        (3, 2, 4),
        None,
    ),
    "jet": (lambda: model("jet", (1, 4, 4)), (1, 4, 4), None),
    "jet-plain": (
        lambda: model("jet", (1, 4, 6), couplings=10, mixing="permutation", bounded=False),
        (1, 4, 6),
        None,
    ),
}
TABLE = LAYERS | MODELS
# `make quick` tests the layers.
ROWS = [*LAYERS, *(pytest.param(name, marks=pytest.mark.run) for name in MODELS)]
row = pytest.mark.parametrize("name", ROWS)
layer_row = pytest.mark.parametrize("name", LAYERS)
B = 3


def a_row(name, dtype=torch.float32, batch=B, seed=0):
    """The bijection of a row with all its parameters moved, an input and a context."""
    build, shape, context_shape = TABLE[name]
    torch.manual_seed(seed)
    bijection = ready(perturb(build(), seed=seed)).to(dtype)
    x = torch.randn((batch, *shape), generator=seeded(1), dtype=dtype)
    if bijection.is_discrete:  # the middle halves of the bins of random levels
        levels = images(batch, shape, bijection.levels)
        x = (levels + 0.25 + 0.5 * torch.rand(x.shape, generator=seeded(1))).to(dtype)
        x = x / bijection.levels - 0.5
    context = None
    if context_shape is not None:
        context = torch.randn((batch, *context_shape), generator=seeded(2), dtype=dtype)
    return bijection, x, context


def test_every_bijection_is_in_the_table():
    for info in pkgutil.iter_modules(flowtrain.bijections.__path__):
        importlib.import_module(f"flowtrain.bijections.{info.name}")

    def subclasses(cls):
        return {cls} | {below for child in cls.__subclasses__() for below in subclasses(child)}

    concrete = {
        cls
        for cls in subclasses(Bijection)
        if cls.__module__.startswith("flowtrain.bijections") and cls.__name__[0] != "_"
    }
    # Base classes, and the class that only `fuse` creates (tested below, and by rows with a chain).
    concrete -= {
        Bijection,
        Container,
        Autoregressive,
        DataDependentInit,
        LinearChannels,
        FusedLinear,
    }
    tested = {type(build()) for build, _, _ in LAYERS.values()}
    concrete = {cls for cls in concrete if cls.__name__ not in OF_SURFACES}
    assert concrete == tested
    assert {cls.__name__ for cls in concrete} <= set(flowtrain.bijections.__all__)


def test_every_model_is_in_the_table():
    for info in pkgutil.iter_modules(flowtrain.models.__path__):
        if hasattr(importlib.import_module(f"flowtrain.models.{info.name}"), "build"):
            assert info.name in {*MODELS, *OF_SURFACES}


# ---------------------------------------------------------------- the contract


def assert_round_trip(name, dtype, tolerance):
    bijection, x, context = a_row(name, dtype)
    with torch.no_grad():
        z, log_det = bijection(x, context)
        back, inverse_log_det = bijection.inverse(z, context)
        torch.testing.assert_close(back, x, rtol=0, atol=tolerance)
        torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=tolerance)
        # The same from latents that do not come from data.
        z = torch.randn(z.shape, generator=seeded(3), dtype=dtype)
        x, log_det = bijection.inverse(z, context)
        again, forward_log_det = bijection(x, context)
        torch.testing.assert_close(again, z, rtol=0, atol=tolerance)
        torch.testing.assert_close(forward_log_det, -log_det, rtol=0, atol=tolerance)


@row
def test_round_trip_both_ways(name):
    assert_round_trip(name, torch.float64, 1e-11)


@layer_row
def test_round_trip_in_float32(name):
    """Of models, tests/flow/test_flow.py asks that images come back."""
    assert_round_trip(name, torch.float32, 2e-3)


@row
def test_log_det_is_that_of_the_jacobian(name):
    """The way back of a model follows from its round trip; of a layer it is differentiated too."""
    bijection, x, context = a_row(name, torch.float64, batch=2)
    dims = x[0].numel()
    directions = [(bijection.forward, x)]
    if name in LAYERS:
        directions.append((bijection.inverse, bijection(x, context)[0].detach()))
    for function, point in directions:
        jacobian = torch.autograd.functional.jacobian(
            lambda v, f=function: f(v, context)[0],
            point,
            vectorize=not bijection.is_discrete,  # its gradient is computed in place
        )
        jacobian = jacobian.reshape(2, dims, 2, dims)
        # No example depends on another.
        assert jacobian[0, :, 1].count_nonzero() == jacobian[1, :, 0].count_nonzero() == 0
        expected = torch.stack(
            [torch.linalg.slogdet(jacobian[b, :, b]).logabsdet for b in range(2)]
        )
        torch.testing.assert_close(
            function(point, context)[1].detach(), expected, rtol=1e-9, atol=1e-9
        )


@layer_row
def test_log_det_does_not_see_batch_mates(name):
    # The Jacobian of z would not show a log-determinant that is a mean over the batch.
    bijection, x, context = a_row(name, torch.float64)
    with torch.no_grad():
        together = bijection(x, context)
        for i in range(B):
            alone = bijection(x[i : i + 1], None if context is None else context[i : i + 1])
            torch.testing.assert_close(alone[0][0], together[0][i], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(alone[1][0], together[1][i], rtol=1e-11, atol=1e-11)


@layer_row
def test_shapes_and_types(name):
    bijection, *inputs = a_row(name, batch=4)
    for batch in (1, 4):
        x, context = (None if t is None else t[:batch] for t in inputs)
        before = x.clone()
        z, log_det = bijection(x, context)
        back, inverse_log_det = bijection.inverse(z, context)
        assert z.shape[0] == batch and z[0].numel() == x[0].numel() and back.shape == x.shape
        assert log_det.shape == inverse_log_det.shape == (batch,)
        assert {t.dtype for t in (z, log_det, back, inverse_log_det)} == {torch.float32}
        assert torch.equal(x, before)


@layer_row
def test_every_parameter_gets_a_gradient(name):
    bijection, x, context = a_row(name, torch.float64)
    z, log_det = bijection(x, context)
    loss = (z * torch.randn(z.shape, generator=seeded(4), dtype=z.dtype)).sum() + log_det.sum()
    if loss.requires_grad:
        loss.backward()
    for parameter_name, parameter in bijection.named_parameters():
        assert parameter.grad is not None and parameter.grad.count_nonzero() > 0, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("name", [name for name, (_, _, context) in TABLE.items() if context])
def test_context_is_used_both_ways(name):
    bijection, x, context = a_row(name)
    other = context + 1
    with torch.no_grad():
        for function in (bijection.forward, bijection.inverse):
            point = x if function == bijection.forward else bijection(x, context)[0]
            assert not torch.allclose(function(point, context)[0], function(point, other)[0])
            assert not torch.allclose(function(point, context)[1], function(point, other)[1])


@layer_row
def test_state_survives_loading(name):
    bijection, x, context = a_row(name)
    build, _, _ = TABLE[name]
    torch.manual_seed(99)
    other = build()  # with other permutations and rotations, and not initialized
    other.load_state_dict(copy.deepcopy(bijection.state_dict()))
    with torch.no_grad():
        for function, same in (
            (bijection.forward, other.forward),
            (bijection.inverse, other.inverse),
        ):
            point = x if function == bijection.forward else bijection(x, context)[0]
            for here, there in zip(function(point, context), same(point, context), strict=True):
                assert torch.equal(here, there)


@layer_row
def test_tensors_are_parameters_or_buffers(name):
    for module in a_row(name)[0].modules():
        for key, value in vars(module).items():
            values = value if isinstance(value, (list, tuple)) else [value]
            assert not any(isinstance(v, torch.Tensor) for v in values), (
                f"{type(module).__name__}.{key}"
            )


@layer_row
def test_autocast_leaves_the_data_path_in_float32(name):
    bijection, x, context = a_row(name)
    with torch.no_grad():
        z, log_det = bijection(x, context)
        with torch.autocast("cpu", torch.bfloat16):
            low = (*bijection(x, context), *bijection.inverse(z, context))
    assert {t.dtype for t in low} == {torch.float32}
    assert (low[0] - z).abs().mean() < 0.1 * max(1, z.abs().mean())
    if isinstance(bijection, (Conv1x1, Conv1x1LU, ActNorm, DiagonalAffine)):
        for a, b in zip(low, (z, log_det, *bijection.inverse(z, context)), strict=True):
            assert torch.equal(a, b)


def gradients(bijection, x, context, executor):
    """Gradients of the parameters, the input and the context by one executor, and the result."""
    bijection.zero_grad()
    inputs = [t.clone().requires_grad_() for t in (x, context) if t is not None]
    z, log_det = bijection.run(executor, "forward", *inputs)
    (z.square().sum() + (log_det * torch.arange(1, len(x) + 1)).sum()).backward()
    grads = [p.grad for p in bijection.parameters()] + [t.grad for t in inputs]
    return grads, (z.detach(), log_det.detach())


@layer_row
def test_gradients_are_those_of_finite_differences(name):
    """Checks the slope along one random direction of parameters, input and context.

    (The test of log-determinants does not depend on gradients through a conditioner.)
    """
    bijection, x, context = a_row(name, torch.float64)
    grads, _ = gradients(bijection, x, context, FUSED)
    inputs = [t for t in (x, context) if t is not None]
    places = [*bijection.parameters(), *inputs]
    direction = [
        torch.randn(p.shape, generator=seeded(i), dtype=p.dtype) for i, p in enumerate(places)
    ]

    def objective(step):
        with torch.no_grad():
            for place, along in zip(places, direction, strict=True):
                place.add_(step * along)
            z, log_det = bijection(*inputs)
            value = z.square().sum() + (log_det * torch.arange(1, len(x) + 1)).sum()
            for place, along in zip(places, direction, strict=True):
                place.sub_(step * along)
        return value.item()

    slope = sum(
        (g * d).sum().item() for g, d in zip(grads, direction, strict=True) if g is not None
    )
    assert (objective(1e-6) - objective(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-5)


@row
def test_recomputing_gives_the_same_gradients(name):
    bijection, x, context = a_row(name, torch.float64)
    stored, results = gradients(bijection, x, context, FUSED)
    for mode, tolerance in (("checkpoint", 1e-12), ("reversible", 1e-10)):
        recomputed, same_results = gradients(bijection, x, context, executor_of(mode))
        for found, expected, close in (
            (same_results, results, 0),
            (recomputed, stored, tolerance),
        ):
            torch.testing.assert_close(
                found, expected, rtol=close, atol=close, msg=lambda text, m=mode: f"{m}: {text}"
            )


def test_recomputing_keeps_gradients_of_the_data_path_in_full_precision():
    """Gradients differ by rounding of float32 sums, not by that of products in bf16, 4e-3."""
    bijection = ready(perturb(model("glow", (3, 8, 8), levels=1, steps=2, width=8), 0.1))
    x = torch.rand(2, 3, 8, 8, generator=seeded()) - 0.5
    found = []
    for mode in ("store", "checkpoint"):
        bijection.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            z, log_det = bijection.run(executor_of(mode), "forward", x)
        (z.square().sum() - log_det.sum()).backward()
        found.append(torch.cat([p.grad.flatten() for p in bijection.parameters()]))
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()


@pytest.mark.parametrize("coupling", ["affine", "mixture"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.run
def test_reversible_gradients_at_paper_depth(coupling, bf16):
    """In bf16 they differ by about bf16's own error, because inputs that are off by an ulp round
    differently.
    """
    torch.manual_seed(0)
    bijection = model("glow", (3, 32, 32), levels=3, steps=32, width=16, coupling=coupling)
    bijection = ready(perturb(bijection, 0.02))
    x = torch.rand(2, 3, 32, 32, generator=seeded()) - 0.5

    def gradient(mode, bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return torch.cat(
                [g.flatten() for g in gradients(bijection, x, None, executor_of(mode))[0]]
            )

    stored = gradient("store", bf16)
    difference = (gradient("reversible", bf16) - stored).norm()
    bound = 3 * (stored - gradient("store", False)).norm() if bf16 else 1e-3 * stored.norm()
    assert difference < bound


@pytest.mark.parametrize("mode, times", [("store", 1), ("checkpoint", 2), ("reversible", 2)])
def test_layers_are_recomputed_when_asked_for(mode, times):
    """A conditioner is computed twice, not three times, although `reversible` also inverts."""
    bijection, x, _ = a_row("glow")
    calls = []
    bijection.levels[0].layers[-1].conditioner.register_forward_pre_hook(
        lambda *args: calls.append(mode)
    )
    z, log_det = bijection.run(executor_of(mode), "forward", x.requires_grad_())
    log_det.sum().backward(retain_graph=True)
    assert len(calls) == times
    with torch.no_grad():
        bijection.run(executor_of(mode), "forward", x)
    assert len(calls) == times + 1
    z.sum().backward()  # of the graph that was retained
    assert len(calls) == 2 * times
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


@pytest.mark.run  # takes long
@pytest.mark.parametrize("mode", MODES)
def test_memory_against_depth(mode):
    """The activations of a reversible chain do not grow with its length."""

    def activations(steps):
        flow = ready(model("glow", (3, 16, 16), levels=1, steps=steps, width=64))
        x = torch.rand(64, 3, 16, 16)
        taken = peak(lambda: gradients(flow, x, None, executor_of(mode)), torch.device("cpu"))
        return taken - sum(p.nbytes for p in flow.parameters())  # without the gradients

    growth = activations(24) / activations(4)
    assert growth < 1.05 if mode == "reversible" else growth > 2


@pytest.mark.run  # takes long
def test_iteration_is_another_way_to_the_inverse():
    tried = []
    for name in TABLE:
        bijection, x, context = a_row(name, torch.float64)
        if isinstance(bijection, Autoregressive):
            with torch.no_grad():
                z = bijection(x, context)[0]
                expected = bijection.inverse(z, context)
                found = inverse_by_iteration(bijection, z, context, lambda share: None)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            tried.append(name)
    assert len(tried) > 8 and {name.partition("-")[0] for name in tried} == {
        "autoregressive",
        "tokens",
    }


# ---------------------------------------------------------------- fused layers


def chain_of(layer):
    torch.manual_seed(0)
    layers = [Squeeze()]
    for _ in range(3):
        layers += [ActNorm((4, 1, 1)), layer(4), Coupling(2, GlowNet(2, 4, 5), AffineTransform())]
    return ready(perturb(Sequential(*layers))).double()


@pytest.mark.parametrize("layer", [Conv1x1, Conv1x1LU])
def test_fused_layers_are_the_layers_one_after_the_other(layer):
    chain = chain_of(layer)
    x = torch.randn(3, 1, 4, 6, generator=seeded(), dtype=torch.float64)
    assert sum(isinstance(part, FusedLinear) for part in fuse(chain.opened(), "forward")) == 3
    fused, (z, log_det) = gradients(chain, x, None, FUSED)
    apart, results = gradients(chain, x, None, LayerByLayer())
    back, _ = chain.run(LayerByLayer(), "inverse", z)
    torch.testing.assert_close((z, log_det), results, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused, apart, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(chain.inverse(z)[0], back, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [Conv1x1, Conv1x1LU])
def test_inverses_of_a_chain_are_computed_once_per_call(layer, monkeypatch):
    chain, calls = chain_of(layer), []
    before = layer.inverse_weights.__func__
    counted = classmethod(lambda cls, layers: calls.append(len(layers)) or before(cls, layers))
    monkeypatch.setattr(layer, "inverse_weights", counted)
    chain.inverse(torch.randn(2, 4, 2, 3, dtype=torch.float64))
    assert calls == [3]


def test_other_neighbours_are_not_fused():
    vector = Sequential(ActNorm((4,)), Flatten((4,)))
    apart = Sequential(ActNorm((4, 1, 1)), Squeeze(), Conv1x1(16), ActNorm((16, 1, 1)))
    for chain in (vector, apart):
        assert fuse(ready(chain).opened(), "forward") == list(chain.layers)


def test_fused_layers_raise_until_they_are_initialized():
    for direction in ("forward", "inverse"):
        with pytest.raises(RuntimeError, match="not initialized"):
            getattr(Sequential(ActNorm((4, 1, 1)), Conv1x1(4)), direction)(torch.zeros(1, 4, 2, 2))


# ---------------------------------------------------------------- conditioners


def test_integer_relu_is_relu():
    """For every bfloat16: also infinities, both zeros, NaN of either sign, and denormals."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    torch.testing.assert_close(relu_(x.clone()), torch.relu(x), rtol=0, atol=0, equal_nan=True)
    leaf = torch.randn(50, generator=seeded()).bfloat16().requires_grad_()
    (relu_(leaf * 1) * 3).sum().backward()
    assert torch.equal(leaf.grad, 3.0 * (leaf > 0).bfloat16())


# ---------------------------------------------------------------- ActNorm


@pytest.mark.parametrize(
    "shape, example", [((5,), (5,)), ((3, 1, 1), (3, 4, 2)), ((1, 1, 1), (1, 3, 3))]
)
def test_actnorm_normalizes_its_first_batch(shape, example):
    x = 3 * torch.randn(50, *example, generator=seeded()) + 7
    layer = ActNorm(shape)
    layer.initialize(x)
    z = layer(x)[0].detach().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(z.mean(0), torch.zeros(example[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(example[0]), rtol=1e-4, atol=0)


def test_actnorm_raises_until_it_is_initialized():
    layer, x = ActNorm((3, 1, 1)), torch.randn(4, 3, 2, 2)
    for direction in (layer.forward, layer.inverse):
        with pytest.raises(RuntimeError, match="not initialized"):
            direction(x)
    layer.initialize(x)
    layer(x), layer.inverse(x)
    # Loading a state that is not initialized undoes the initialization.
    layer.load_state_dict(ActNorm((3, 1, 1)).state_dict())
    for direction in (layer.forward, layer.inverse):
        with pytest.raises(RuntimeError, match="not initialized"):
            direction(x)


def test_actnorm_is_initialized_once():
    layer = ActNorm((3, 1, 1))
    layer.initialize(torch.randn(20, 3, 2, 2, generator=seeded()))
    state = copy.deepcopy(layer.state_dict())

    def unchanged(module):
        return all(torch.equal(value, state[key]) for key, value in module.state_dict().items())

    other_data = 5 + 9 * torch.randn(20, 3, 2, 2, generator=seeded(1))
    layer.initialize(other_data)
    assert unchanged(layer)
    loaded = ActNorm((3, 1, 1))
    loaded.load_state_dict(state)
    loaded.initialize(other_data)
    loaded(other_data), loaded.inverse(other_data)
    assert unchanged(loaded)
    assert unchanged(copy.deepcopy(loaded))


def test_actnorm_with_a_constant_channel():
    x = torch.randn(10, 3, 2, 2, generator=seeded())
    x[:, 1] = 0.25
    layer = ActNorm((3, 1, 1))
    layer.initialize(x)
    for values in (*layer(x), *layer.inverse(torch.randn(4, 3, 2, 2))):
        assert torch.isfinite(values).all()
    assert layer(x)[0].abs().max() < 10
    # With dequantization noise the constant channel is scaled to the size of the others.
    noisy = x.clone()
    noisy[:, 1] += torch.rand(10, 2, 2, generator=seeded()) / 256
    layer = ActNorm((3, 1, 1))
    layer.initialize(noisy)
    torch.testing.assert_close(
        layer(noisy)[0][:, 1].std(correction=0), torch.tensor(1.0), rtol=1e-3, atol=0
    )


# ---------------------------------------------------------------- 1x1 convolutions


@pytest.mark.parametrize("layer", [Conv1x1, Conv1x1LU])
def test_rotation_preserves_volume(layer):
    convolution = layer(6)
    x = torch.randn(2, 6, 3, 3)
    z, log_det = convolution(x)
    torch.testing.assert_close(z.square().sum(), x.square().sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(log_det, torch.zeros(2), rtol=0, atol=1e-4)
    assert not torch.allclose(z, x)


@pytest.mark.parametrize("layer", [Conv1x1, Conv1x1LU])
def test_whitening(layer):
    mixing = torch.randn(4, 4, generator=seeded())
    x = torch.einsum("ij,bjhw->bihw", mixing, torch.randn(200, 4, 3, 3, generator=seeded(1))) + 2
    convolution = layer(4, "whitening")
    convolution.initialize(x)
    pixels = convolution(x)[0].detach().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(torch.cov(pixels.T), torch.eye(4), rtol=0, atol=1e-3)
    weight = convolution.mixing_matrix().clone()
    convolution.initialize(3 * x.flip(1))  # has no effect the second time
    assert torch.equal(convolution.mixing_matrix(), weight)


@pytest.mark.parametrize("layer", [Conv1x1, Conv1x1LU])
@pytest.mark.parametrize("spoil", ["duplicated", "constant", "all constant", "tiny"])
def test_whitening_of_degenerate_channels_is_finite(layer, spoil):
    x = torch.randn(20, 3, 2, 2, generator=seeded())
    if spoil == "duplicated":
        x[:, 2] = x[:, 0]
    elif spoil == "tiny":
        x = 1e-20 * x
    else:
        x[:, 1 if spoil == "constant" else slice(None)] = 0.5
    convolution = layer(3, "whitening")
    convolution.initialize(x)
    z, log_det = convolution(x)
    back, _ = convolution.inverse(z)
    assert torch.isfinite(z).all() and torch.isfinite(log_det).all()
    torch.testing.assert_close(back, x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("pixels", [1, 5, 8, 16])
def test_whitening_from_few_pixels(pixels):
    """Directions without variance in the few pixels are not blown up, layer by layer, in others."""
    channels = 8
    mixing = torch.randn(channels, channels, generator=seeded())
    x = torch.einsum(
        "ij,bjhw->bihw", mixing, torch.randn(pixels + 100, channels, 1, 1, generator=seeded(1))
    )
    for _ in range(4):
        for layer in (ActNorm((channels, 1, 1)), Conv1x1LU(channels, "whitening")):
            layer.initialize(x[:pixels])
            x = layer(x)[0].detach()
    assert x[pixels:].std() < 30


@pytest.mark.parametrize(
    "layer", [lambda: Conv1x1(3, "whitening"), lambda: Conv1x1LU(3, "whitening")]
)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_whitening_before_initialization_raises(layer, direction):
    convolution = layer()
    with pytest.raises(RuntimeError, match="is not initialized"):
        getattr(convolution, direction)(torch.randn(2, 3, 1, 1))
    fused = Sequential(ready(ActNorm((3, 1, 1))), convolution)
    with pytest.raises(RuntimeError, match="Conv1x1.* is not initialized"):
        getattr(fused, direction)(torch.randn(2, 3, 1, 1))
    other = layer()
    other.load_state_dict(ready(convolution).state_dict())
    getattr(other, direction)(torch.randn(2, 3, 1, 1))


def test_rotations_are_not_whitened():
    convolution = Conv1x1LU(3)
    before = convolution.mixing_matrix().clone()
    convolution.initialize(torch.randn(20, 3, 2, 2))
    assert torch.equal(convolution.mixing_matrix(), before)


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize("raw", [-1e30, -50.0, 50.0, 1e30])
def test_affine_transform_is_bounded_both_ways(raw):
    transform = AffineTransform()
    x = torch.randn(2, 3, 2, 2)
    parameters = torch.cat([torch.randn(2, 3, 2, 2), torch.full((2, 3, 2, 2), raw)], dim=1)
    z, log_scale = transform(x, parameters)
    back, inverse_log_scale = transform.inverse(z, parameters)
    assert log_scale.abs().max() <= transform.limit and torch.equal(inverse_log_scale, -log_scale)
    assert z.abs().max() <= math.exp(transform.limit) * 10
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    far = transform.inverse(torch.full_like(z, 1e3), parameters)[0]
    assert far.abs().max() <= 1e3 * math.exp(transform.limit) + 10


def test_the_scales_of_the_papers():
    x, shift = torch.tensor([[3.0, -1.0]]), torch.tensor([[0.5, 0.25]])
    for raw in (-3.0, 0.0, 2.0):
        parameters = torch.cat([shift, torch.full((1, 2), raw)], dim=1)
        for transform, scale in (
            (ExponentialTransform(), math.exp(raw)),
            (SigmoidTransform(), 2 / (1 + math.exp(-raw))),
        ):
            z, log_scale = transform(x, parameters)
            torch.testing.assert_close(z, (x + shift) * scale)
            torch.testing.assert_close(log_scale, torch.full((1, 2), math.log(scale)))


@pytest.mark.parametrize("raw", [-1e30, -100.0, 100.0, 1e30])
@pytest.mark.parametrize(
    "build",
    [lambda: DiagonalAffine((3, 1, 1)), lambda: ready(ActNorm((3, 1, 1))), lambda: Conv1x1LU(3)],
)
def test_learned_log_scales_are_bounded_both_ways(build, raw):
    layer, x = build(), torch.randn(2, 3, 2, 2)
    with torch.no_grad():
        layer.log_scale.fill_(raw)
        z, log_det = layer(x)
        back, _ = layer.inverse(x)
    assert log_det.abs().max() <= 3 * 4 * LOG_SCALE_LIMIT + 1e-3
    # A 1x1 convolution also has triangular factors, so that the scale may act up to three times.
    limit = math.exp(LOG_SCALE_LIMIT) ** (3 if isinstance(layer, Conv1x1LU) else 1) * 10
    assert z.abs().max() < limit and back.abs().max() < limit


# ---------------------------------------------------------------- the logistic base


def test_logistic_to_normal_gives_the_logistic_density():
    x = torch.cat([torch.linspace(-300, 300, 1201), torch.linspace(-3, 3, 601)])[:, None]
    z, log_det = LogisticToNormal()(x)
    assert torch.isfinite(z).all() and (z[:1201].diff(dim=0) >= 0).all()
    density = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1) + log_det
    x = x[:, 0].double()
    expected = -x.abs() - 2 * torch.log1p((-x.abs()).exp())
    torch.testing.assert_close(density.double(), expected, rtol=1e-5, atol=1e-4)


def test_logistic_to_normal_makes_normal_numbers():
    u = torch.rand(50_000, 1, generator=seeded()).clamp(1e-6, 1 - 1e-6)
    z = LogisticToNormal()(torch.logit(u))[0]
    assert abs(z.mean().item()) < 0.02 and abs(z.std().item() - 1) < 0.01
    torch.testing.assert_close(torch.special.ndtr(z), u, rtol=1e-3, atol=1e-5)


def test_logistic_to_normal_is_harmless_far_out():
    z = torch.tensor([-1e3, -30.0, -12.0, 0.0, 12.0, 30.0, 1e3])[:, None]
    for x, log_det in (LogisticToNormal().inverse(z), LogisticToNormal()(1e3 * z)):
        assert torch.isfinite(x).all() and torch.isfinite(log_det).all()
    x = torch.tensor([[-1e4], [0.0], [1e4]], requires_grad=True)
    z, log_det = LogisticToNormal()(x)
    (z.sum() + log_det.sum()).backward()
    assert torch.isfinite(x.grad).all()


# ---------------------------------------------------------------- layouts


def test_reverse_reverses_the_raster_order():
    x = torch.arange(12.0).view(1, 2, 2, 3)
    assert torch.equal(Reverse()(x)[0].flatten(2), x.flatten(2).flip(2))


def test_halving_puts_pixels_into_halves_of_the_channels():
    first = torch.tensor([[True, False, False], [False, True, True]])
    pixels = torch.arange(6.0).view(2, 3)
    x = torch.stack([10 * pixels + channel for channel in range(4)])[None]
    z = HalvePixels(first)(x)[0]
    assert z.shape == (1, 4, 2, 3)
    kept, changed = ({int(v) // 10 for v in half.flatten()} for half in z.chunk(2, dim=1))
    assert kept == {0, 4, 5} and changed == {1, 2, 3}
    # A place has two of the four entries of one pixel.
    for place in z.chunk(2, dim=1)[0].flatten(2)[0].T:
        assert len({int(v) // 10 for v in place}) == 1


def test_squeeze_puts_the_colours_of_a_checkerboard_into_the_halves():
    rows, columns = torch.arange(4.0)[:, None], torch.arange(4.0)[None, :]
    x = torch.stack([(rows + columns) % 2, 2 + (rows + columns) % 2])[None]
    z = Squeeze()(x)[0]
    assert z.shape == (1, 8, 2, 2)
    assert set(z[:, :4].flatten().tolist()) == {0.0, 2.0}
    assert set(z[:, 4:].flatten().tolist()) == {1.0, 3.0}


@pytest.mark.parametrize("parity", [0, 1])
def test_checkerboard_keeps_one_colour(parity):
    coupling = perturb(CheckerboardCoupling((3, 4), GlowNet(2, 4, 4), AffineTransform(), parity))
    x = torch.randn(2, 2, 3, 4)
    z = coupling(x)[0]
    colour = (torch.arange(3)[:, None] + torch.arange(4)) % 2
    assert torch.equal(z[..., colour == parity], x[..., colour == parity])
    assert (z != x)[..., colour != parity].all()


@pytest.mark.parametrize("swap", [False, True])
def test_coupling_keeps_one_part(swap):
    coupling = perturb(Coupling(2, GlowNet(2, 6, 4), AffineTransform(), swap))
    x = torch.randn(2, 5, 2, 2)
    z = coupling(x)[0]
    assert torch.equal(z[:, -2:] if swap else z[:, :2], x[:, -2:] if swap else x[:, :2])
    assert (z != x)[:, :-2].all() if swap else (z != x)[:, 2:].all()


@row
def test_the_terms_of_places_sum_to_the_log_determinant(name):
    bijection, x, context = a_row(name)
    executor = ByPlace()
    z, log_det = bijection.run(executor, "forward", x, context)
    expected, expected_log_det = bijection(x, context)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(log_det, expected_log_det)
    of_places = sum(each.sum(dim=(1, 2)) for each in executor.places.values())
    if name.startswith(("glow", "realnvp", "ordinal", "checkerboard", "conv1x1", "multiscale")):
        assert not executor.without
    if not executor.without:
        torch.testing.assert_close(of_places + torch.zeros(B), expected_log_det)


def test_split_latents_are_the_levels():
    bijection, x, context = a_row("multiscale")
    z = bijection(x, context)[0]
    parts = bijection.split_latents(z)
    assert [tuple(part.shape) for part in parts] == [(B, 4, 2, 2), (B, 4, 2, 2)]
    assert torch.equal(torch.cat([part.flatten(1) for part in parts], dim=1), z)
    # The first level's latent leaves before the second level, and so does not depend on it.
    with torch.no_grad():
        bijection.levels[1].layers[0].shift += 1
    changed = bijection.split_latents(bijection(x, context)[0])
    assert torch.equal(changed[0], parts[0]) and not torch.allclose(changed[1], parts[1])


def test_a_singular_plain_convolution_gives_nan():
    """It does not raise: evaluation counts values that are not finite, and decoding names them."""
    layer = flowtrain.bijections.Conv1x1(3)
    with torch.no_grad():
        layer.matrix.zero_()
    x = torch.randn(2, 3, 2, 2)
    assert torch.isneginf(layer(x)[1]).all()
    assert torch.isnan(layer.inverse(x)[0]).all()

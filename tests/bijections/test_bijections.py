"""The contract of bijections, for each layer and model, then the promises of single layers."""

import copy
import importlib
import inspect
import math
import pkgutil
from functools import partial

import pytest
import torch
from catalogue import TINY
from helpers import images, perturb, ready, seeded

from flowtrain import bijections as b
from flowtrain.bijections.actnorm import LOG_SCALE_LIMIT
from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.base import DataDependentInit
from flowtrain.bijections.context import Guided
from flowtrain.bijections.continuous import Dynamics
from flowtrain.bijections.conv1x1 import LinearChannels
from flowtrain.bijections.execution import FUSED, Container
from flowtrain.bijections.fused import FusedLinear
from flowtrain.bijections.inverses import inverse_by_iteration
from flowtrain.bijections.memory import executor_of
from flowtrain.evaluation.places import ByPlace
from flowtrain.nets.convolution import GlowNet, PreactivatedNet, ZeroNet
from flowtrain.nets.dense import DenseNet
from flowtrain.nets.masked import MaskedDenseNet
from flowtrain.nets.residual import GatedNet, ResidualNet
from flowtrain.nets.transformer import CausalTransformer, VisionTransformer

B = 3


def model(name, shape, **options):
    build = importlib.import_module(f"flowtrain.models.{name}").build
    if "num_bins" in inspect.signature(build).parameters:
        options = {"num_bins": 17, **options}
    return build(shape, **{**TINY[name], **options})


def ordinal(shape, levels, **options):
    """A causal model, which is a layer."""
    return model("causal", shape, num_bins=levels, token=2, **options)


def couple(channels, net, *sizes, by=None, swap=False):
    """A coupling that keeps half of the channels. `sizes` are arguments of the conditioner."""
    kept, transform = channels // 2, by or b.AffineTransform()
    parameters = transform.parameters_per_entry * (channels - kept)
    return b.Coupling(kept, net(kept, parameters, *sizes), transform, swap)


def checkered(size, channels, net, *sizes, by=None, parity=0):
    transform = by or b.AffineTransform()
    conditioner = net(channels, transform.parameters_per_entry * channels, *sizes)
    return b.CheckerboardCoupling(size, conditioner, transform, parity)


def autoregressive(dims, *sizes, by=None):
    transform = by or b.AffineTransform()
    net = MaskedDenseNet(dims, transform.parameters_per_entry, *sizes)
    return b.MaskedAutoregressive(net, transform)


def over_tokens(entries, tokens, layers=1, context=0, by=None):
    transform = by or b.AffineTransform()
    parameters = transform.parameters_per_entry
    net = CausalTransformer(entries, parameters, tokens, 8, layers, context)
    return b.TokenAutoregressive(net, transform)


def sequential():
    pair = b.ActNorm((4, 1, 1)), b.Conv1x1(4)
    return b.Sequential(*pair, couple(4, GlowNet, 5, 3), b.Squeeze())


def multiscale():
    """Two levels by hand, whose priors are conditioned on the context."""
    return b.Multiscale(
        [b.Sequential(b.Squeeze(), b.Conv1x1LU(8)), b.Sequential(b.ActNorm((4, 1, 1)))],
        [couple(8, ZeroNet, 3), couple(4, GlowNet, 5, 3)],
        [(4, 2, 2), (4, 2, 2)],
    )


def standardized():
    layer = b.Standardize((3, 1, 1))
    layer.initialize(3 + 2 * torch.randn(9, 3, 1, 1, generator=seeded()))
    return layer


# How to build a layer, the shape of an example, and of its context.
LAYERS = {
    "actnorm": (lambda: b.ActNorm((3, 1, 1)), (3, 2, 4)),
    "actnorm-vector": (lambda: b.ActNorm((5,)), (5,)),
    "standardize": (standardized, (3, 1, 1)),
    "diagonal": (lambda: b.DiagonalAffine((3, 1, 1)), (3, 2, 2)),
    "logistic": (b.LogisticToNormal, (3, 2, 2)),
    "conv1x1": (lambda: b.Conv1x1(4), (4, 2, 3)),
    "conv1x1-lu": (lambda: b.Conv1x1LU(5), (5, 1, 2)),
    "squeeze": (b.Squeeze, (3, 4, 2)),
    "flatten-angles": (lambda: b.FlattenAngles((3, 1, 1)), (3, 1, 1)),
    "circles": (b.CirclesToNormal, (3,)),
    "flatten": (lambda: b.Flatten((2, 3, 2)), (2, 3, 2)),
    "permute": (lambda: b.Permute(torch.randperm(6)), (6, 2, 2)),
    "reverse": (b.Reverse, (3, 2, 4)),
    "halve-pixels": (lambda: b.HalvePixels(torch.arange(6).view(3, 2) % 2 == 0), (2, 3, 2)),
    "coupling": (lambda: couple(4, GlowNet, 5), (4, 3, 2)),
    "coupling-residual": (lambda: couple(5, ResidualNet, 4, 1, swap=True), (5, 2, 2)),
    "coupling-zero": (lambda: couple(3, ZeroNet, by=b.AffineTransform(1.0)), (3, 2, 2)),
    "additive": (lambda: couple(7, DenseNet, 6, 2, by=b.AdditiveTransform(), swap=True), (7,)),
    "coupling-preactivated": (
        lambda: couple(4, PreactivatedNet, 5, 3, 1.0, by=b.TanhTransform(2)),
        (4, 3, 2),
        (3, 3, 2),
    ),
    "coupling-context": (lambda: couple(4, GlowNet, 5, 3), (4, 2, 2), (3, 2, 2)),
    "coupling-larger-context": (lambda: couple(4, GlowNet, 5, 12), (4, 2, 2), (3, 4, 4)),
    "coupling-smaller-context": (lambda: couple(4, ZeroNet, 3), (4, 4, 2), (3, 2, 1)),
    "coupling-gated": (lambda: couple(4, GatedNet, 5, 2, 3), (4, 3, 2), (3, 3, 2)),
    "spline": (lambda: couple(5, GlowNet, 5, by=b.SplineTransform(3), swap=True), (5, 2, 2)),
    "spline-ends": (lambda: couple(4, GlowNet, 5, by=b.SplineTransform(4, 2.0, True)), (4, 2, 2)),
    "circular": (lambda: couple(5, GlowNet, 5, by=b.CircularSplineTransform(3)), (5, 2, 2)),
    "mixture": (lambda: couple(5, GlowNet, 5, by=b.MixtureTransform(3), swap=True), (5, 2, 2)),
    "transformer": (
        lambda: couple(4, VisionTransformer, 4, 6, 2, 3, by=b.SigmoidTransform()),
        (4, 2, 2),
        (3,),
    ),
    "checkerboard": (lambda: checkered((3, 4), 2, ResidualNet, 4, 1), (2, 3, 4)),
    "checkerboard-1": (lambda: checkered((3, 3), 1, GlowNet, 4, parity=1), (1, 3, 3)),
    "checkered-context": (lambda: checkered((2, 4), 2, ResidualNet, 4, 0, 1), (2, 2, 4), (1, 2, 4)),
    "planar": (lambda: b.Planar(5), (5,)),
    "planar-one-entry": (lambda: b.Planar(1), (1,)),
    "autoregressive": (lambda: autoregressive(5, 7, 3), (5,)),
    "autoregressive-narrow": (lambda: autoregressive(9, 5, 2), (9,)),
    "autoregressive-spline": (lambda: autoregressive(4, 7, 1, by=b.SplineTransform(3)), (4,)),
    "autoregressive-mixture": (lambda: autoregressive(4, 7, 1, by=b.MixtureTransform(2)), (4,)),
    "autoregressive-context": (lambda: autoregressive(4, 8, 2, 12), (4,), (3, 2, 2)),
    "inverse": (lambda: b.Inverse(autoregressive(6, 7, 2, 3)), (6,), (3, 1, 1)),
    "inverse-spline": (lambda: b.Inverse(autoregressive(4, 7, 1, by=b.SplineTransform(3))), (4,)),
    "inverse-mixture": (lambda: b.Inverse(autoregressive(4, 7, 1, by=b.MixtureTransform(2))), (4,)),
    "tokens": (lambda: over_tokens(2, 6, layers=2), (2, 3, 2)),
    "tokens-unbounded": (lambda: over_tokens(3, 4, by=b.ExponentialTransform()), (3, 2, 2)),
    "tokens-mixture": (lambda: over_tokens(1, 4, by=b.MixtureTransform(2)), (1, 2, 2)),
    "tokens-context": (lambda: over_tokens(2, 4, context=3), (2, 4, 1), (3,)),
    "multiscale": (multiscale, (2, 4, 4), (3, 2, 2)),
    "sequential": (sequential, (4, 2, 2), (3, 2, 2)),
    "sequential-empty": (b.Sequential, (4, 2, 2)),
    "ordinal": (lambda: ordinal((3, 2, 4), 256), (3, 2, 4)),
    "ordinal-padded": (lambda: ordinal((2, 3, 5), 8), (2, 3, 5)),
    "ordinal-class": (lambda: ordinal((1, 3, 4), 17, classes=3), (1, 3, 4), (3,)),
    "ordinal-context": (lambda: ordinal((1, 4, 6), 17, context=(3, 8, 12)), (1, 4, 6), (3, 8, 12)),
    "continuous": (lambda: b.Continuous(Dynamics(3, 6, 2), "dopri8", 1e-12, 1e-12), (3,)),
}
# Shape and options of models: of each tiny one, and of others that join layers otherwise.
MODELS = dict.fromkeys(TINY, ((1, 4, 4), {})) | {
    "cnf": ((1, 2, 2), {"blocks": 1}),
    "nice": ((1, 3, 3), {"couplings": 3}),
    "maf-one-entry": ((1, 1, 1), {}),
    "cnf-one-entry": ((1, 1, 1), {"blocks": 1}),
    "realnvp-vectors": ((2, 1, 1), {"levels": 1, "blocks": 0}),
    "glow-rgb": ((3, 4, 2), {"levels": 1, "permutation": "conv1x1", "split": "checkerboard"}),
    "glow-mixed": ((1, 4, 4), {"steps": 2, "levels": 1, "split": "mixed", "coupling": "spline"}),
    "glow-imported": ((1, 4, 4), {"coupling": "sigmoid", "prior": "exp", "top_prior": "entry"}),
    "glow-context": ((1, 4, 4), {"context": (1, 1, 1), "prior": "mixture", "padding": "ones"}),
    "realnvp-context": ((1, 4, 4), {"context": (1, 2, 2)}),
    "iaf-random": ((2, 2, 2), {"order": "random", "hidden_layers": 2, "transform": "spline"}),
    "causal-all-blocks": ((1, 5, 4), {"token": 1, "attention": 1, "downsample": 1}),
    "tarflow-plain": ((3, 2, 4), {"patch": 1, "mixing": "none", "bounded": False}),
    "jet-plain": ((1, 4, 6), {"couplings": 10, "mixing": "permutation", "bounded": False}),
}


# `make quick` tests most layers.
LONG = ["continuous", *(f"model {name}" for name in MODELS)]
ROWS = [name for name in LAYERS if name not in LONG]
ROWS += [pytest.param(name, marks=pytest.mark.run) for name in LONG]


def a_row(name, dtype=torch.float64):
    """A bijection with all its parameters moved, an input and a context; and how to build it."""
    if name in LAYERS:
        build, shape, *rest = LAYERS[name]
        context_shape = rest[0] if rest else None
    else:
        name = name.removeprefix("model ")
        shape, options = MODELS[name]
        context_shape = options.get("context")

        def build():
            return model(name.partition("-")[0], shape, **options)

    torch.manual_seed(0)
    bijection = ready(perturb(build())).to(dtype)
    x = torch.randn((B, *shape), generator=seeded(1), dtype=dtype)
    if bijection.is_discrete:  # the middle halves of the bins of random levels
        levels = images(B, shape, bijection.num_bins)
        x = (levels + 0.25 + 0.5 * torch.rand(x.shape, generator=seeded(1))).to(dtype)
        x = x / bijection.num_bins - 0.5
    context = None
    if context_shape is not None:
        context = torch.randn((B, *context_shape), generator=seeded(2), dtype=dtype)
    return bijection, x, context, build


def near(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_round_trips(bijection, x, context, tolerance):
    """From data, and from latents that do not come from data."""
    z, log_det = bijection(x, context)
    near(bijection.inverse(z, context), (x, -log_det), tolerance)
    z = torch.randn(z.shape, generator=seeded(3), dtype=z.dtype)
    x, log_det = bijection.inverse(z, context)
    near(bijection(x, context), (z, -log_det), tolerance)


def assert_log_det(function, point, context, vectorize):
    """It belongs to the Jacobian by autograd, and no example depends on another."""
    batch, dims = len(point), point[0].numel()
    jacobian = torch.autograd.functional.jacobian(
        lambda v: function(v, context)[0], point, vectorize=vectorize
    ).reshape(batch, dims, batch, dims)
    own = torch.stack([jacobian[i, :, i] for i in range(batch)])
    assert jacobian.count_nonzero() == own.count_nonzero()
    log_det = function(point, context)[1].detach()
    near(log_det, torch.linalg.slogdet(own).logabsdet, 1e-9)
    for i in range(batch):  # the Jacobian would not show a mean of log-determinants
        part = slice(i, i + 1)
        alone = function(point[part], None if context is None else context[part])[1].detach()
        near(alone, log_det[part], 1e-10)


def gradients(bijection, x, context, executor):
    """Gradients of the parameters, the input and the context by one executor, and the result."""
    bijection.zero_grad()
    inputs = [t.clone().requires_grad_() for t in (x, context) if t is not None]
    z, log_det = bijection.run(executor, "forward", *inputs)
    (z.square().sum() + (log_det * torch.arange(1, len(x) + 1)).sum()).backward()
    grads = [p.grad for p in bijection.parameters()] + [t.grad for t in inputs]
    return grads, (z.detach(), log_det.detach())


def assert_gradients(bijection, x, context):
    """Those of finite differences along a random direction of everything, also recomputed."""
    grads, results = gradients(bijection, x, context, FUSED)
    inputs = [t for t in (x, context) if t is not None]
    places = [*bijection.parameters(), *inputs]
    along = [torch.randn(p.shape, generator=seeded(i), dtype=p.dtype) for i, p in enumerate(places)]

    @torch.no_grad()
    def objective(step):
        for place, direction in zip(places, along, strict=True):
            place.add_(step * direction)
        z, log_det = bijection(*inputs)
        value = z.square().sum() + (log_det * torch.arange(1, len(x) + 1)).sum()
        for place, direction in zip(places, along, strict=True):
            place.sub_(step * direction)
        return value.item()

    slope = sum((g * d).sum().item() for g, d in zip(grads, along, strict=True) if g is not None)
    assert (objective(1e-6) - objective(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-5)
    for mode, tolerance in (("checkpoint", 1e-12), ("reversible", 1e-10)):
        recomputed, same_results = gradients(bijection, x, context, executor_of(mode))
        near(same_results, results, 0)
        near(recomputed, grads, tolerance)


@torch.no_grad()
def assert_state(bijection, x, context, build):
    """A saved state has all tensors: loaded into other weights, it gives the same results."""
    torch.manual_seed(99)
    other = build().to(x.dtype)  # with other permutations and rotations, and not initialized
    z = bijection(x, context)[0]
    if not all(m.initialized for m in other.modules() if isinstance(m, DataDependentInit)):
        for direction, given in ((other, x), (other.inverse, z)):
            with pytest.raises(RuntimeError, match="is not initialized"):
                direction(given, context)
    other.load_state_dict(copy.deepcopy(bijection.state_dict()))
    near(other(x, context), bijection(x, context), 0)
    near(other.inverse(z, context), bijection.inverse(z, context), 0)
    for module in bijection.modules():
        for key, value in vars(module).items():
            values = value if isinstance(value, (list, tuple)) else [value]
            assert not any(isinstance(v, torch.Tensor) for v in values), f"{module}.{key}"


@torch.no_grad()
def assert_types(bijection, x, context):
    """Shapes and types, also under autocast, and an input that stays as it is."""
    for count in (1, B):
        inputs = [None if t is None else t[:count] for t in (x, context)]
        before = x.clone()
        z, log_det = bijection(*inputs)
        back, inverse_log_det = bijection.inverse(z, inputs[1])
        assert len(z) == count and z[0].numel() == x[0].numel() and back.shape == inputs[0].shape
        assert log_det.shape == inverse_log_det.shape == (count,) and torch.equal(x, before)
    plain = z, log_det, back, inverse_log_det
    with torch.autocast("cpu", torch.bfloat16):
        low = *bijection(x, context), *bijection.inverse(z, context)
    assert {t.dtype for t in (*plain, *low)} == {torch.float32}
    assert (low[0] - z).abs().mean() < 0.1 * max(1, z.abs().mean())
    if isinstance(bijection, (LinearChannels, b.DiagonalAffine)):
        near(low, plain, 0)
    if bijection.inverse_is_sequential:
        near(low[2:], plain[2:], 0)


@torch.no_grad()
def assert_sums_and_ways(bijection, x, context):
    """The terms of places sum to the log-determinant, and iteration is another way back."""
    by_place = ByPlace()
    z, log_det = bijection.run(by_place, "forward", x, context)
    near((z, log_det), bijection(x, context), 1e-12)
    if not by_place.without:
        of_places = sum(each.sum(dim=(1, 2)) for each in by_place.places.values())
        near(of_places + torch.zeros_like(log_det), log_det, 1e-6)
    if isinstance(bijection, Autoregressive):
        found = inverse_by_iteration(bijection, z, context, lambda share: None)
        near(found, bijection.inverse(z, context), 1e-10)
    if context is not None:
        for function, point in ((bijection, x), (bijection.inverse, z)):
            pairs = zip(function(point, context), function(point, context + 1), strict=True)
            assert not any(torch.allclose(here, there) for here, there in pairs)


@torch.no_grad()
def assert_guidance(bijection, x, given):
    """Parameters in two contexts are extrapolated, by weights from the context itself."""
    without = torch.randn(given.shape, generator=seeded(7), dtype=given.dtype)
    z = bijection(x, given)[0]
    for weight, context in ((0.0, given), (-1.0, without)):
        guided = Guided(given, without, weight)
        near(bijection(x, guided), bijection(x, context), 1e-10)
        near(bijection.inverse(z, guided), bijection.inverse(z, context), 1e-10)
    guided = Guided(given, without, 2.0)
    guided_z, log_det = bijection(x, guided)
    assert (guided_z - z).abs().max() > 0.01
    near(bijection.inverse(guided_z, guided), (x, -log_det), 1e-9)
    alone = Guided(given[2:], without[2:], 2.0)  # an example has its own contexts
    near(bijection.inverse(guided_z[2:], alone)[0], x[2:], 1e-9)
    if isinstance(bijection, Autoregressive):
        found = inverse_by_iteration(bijection, guided_z, guided, lambda share: None)
        near(found, (x, -log_det), 1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_contract(name):
    bijection, x, context, build = a_row(name)
    with torch.no_grad():
        # Rounding of 1e-16, times condition numbers of up to 5e5 (glow-context) at values of 229.
        assert_round_trips(bijection, x, context, 1e-10)
        z = bijection(x, context)[0]
    for function, point in ((bijection, x[:2]), (bijection.inverse, z[:2])):
        own = None if context is None else context[:2]
        # The gradient of a discrete layer is computed in place.
        assert_log_det(function, point, own, vectorize=not bijection.is_discrete)
    assert_gradients(bijection, x, context)
    assert_state(bijection, x, context, build)
    assert_sums_and_ways(bijection, x, context)
    if context is not None:
        assert_guidance(bijection, x, context)
    if name in LAYERS:  # tests/flow/test_flow.py has models in float32
        for parameter_name, parameter in bijection.named_parameters():
            assert parameter.grad.any(), parameter_name
        bijection, x, context, _ = a_row(name, torch.float32)
        with torch.no_grad():
            assert_round_trips(bijection, x, context, 2e-3)
        assert_types(bijection, x, context)


def test_every_bijection_is_in_the_table():
    """Except on surfaces, whose Jacobians are not square: test_sphere.py has them."""
    for info in pkgutil.iter_modules(b.__path__):
        importlib.import_module(f"flowtrain.bijections.{info.name}")

    def subclasses(cls):
        return {cls} | {below for child in cls.__subclasses__() for below in subclasses(child)}

    base_classes = {b.Bijection, Container, Autoregressive, DataDependentInit, LinearChannels}
    concrete = {
        cls
        for cls in subclasses(b.Bijection) - base_classes - {FusedLinear}
        if cls.__module__.startswith("flowtrain.bijections") and cls.__name__[0] != "_"
    }
    names = {cls.__name__ for cls in concrete} - {"SphereToAngles", "AnglesToNormal"}
    assert names == {type(build()).__name__ for build, *_ in LAYERS.values()}
    assert all(hasattr(b, name) for name in names)


def test_recomputing_keeps_gradients_of_the_data_path_in_full_precision():
    """Gradients differ by rounding of float32 sums, not of products in bf16, 4e-3."""
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


@pytest.mark.run
@pytest.mark.parametrize("coupling, bf16", [("affine", False), ("affine", True), ("mixture", True)])
def test_reversible_gradients_at_paper_depth(coupling, bf16):
    """In bf16 they differ by its own error: inputs that are off by an ulp round differently."""
    torch.manual_seed(0)
    bijection = model("glow", (3, 32, 32), levels=3, steps=32, width=16, coupling=coupling)
    bijection = ready(perturb(bijection, 0.02))
    x = torch.rand(2, 3, 32, 32, generator=seeded()) - 0.5

    def gradient(mode, bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found, _ = gradients(bijection, x, None, executor_of(mode))
        return torch.cat([g.flatten() for g in found])

    stored = gradient("store", bf16)
    difference = (gradient("reversible", bf16) - stored).norm()
    bound = 3 * (stored - gradient("store", False)).norm() if bf16 else 1e-3 * stored.norm()
    assert difference < bound


@pytest.mark.parametrize("mode, times", [("store", 1), ("checkpoint", 2), ("reversible", 2)])
def test_layers_are_recomputed_when_asked_for(mode, times):
    """A conditioner is computed twice, not three times, although `reversible` also inverts."""
    bijection, x, _, _ = a_row("model glow")
    calls = []
    conditioner = bijection.levels[0].layers[-1].conditioner
    conditioner.register_forward_pre_hook(lambda *args: calls.append(mode))
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


INITIALIZED = [partial(each, 3, "whitening") for each in (b.Conv1x1, b.Conv1x1LU)]


@pytest.mark.parametrize("build", [partial(b.ActNorm, (3, 1, 1)), *INITIALIZED])
def test_a_layer_is_initialized_once(build):
    layer, x = build(), torch.randn(20, 3, 2, 2, generator=seeded())
    layer.initialize(x)
    state = copy.deepcopy(layer.state_dict())
    loaded = build()
    loaded.load_state_dict(state)
    for each in (layer, loaded, copy.deepcopy(loaded)):
        each.initialize(5 + 9 * torch.randn(20, 3, 2, 2, generator=seeded(1)))
        each(x), each.inverse(x)
        assert all(torch.equal(value, state[key]) for key, value in each.state_dict().items())
    layer.load_state_dict(build().state_dict())  # undoes the initialization
    norm = ready(b.ActNorm((3, 1, 1)))
    fused = b.Sequential(*((layer, b.Conv1x1(3)) if type(layer) is b.ActNorm else (norm, layer)))
    for direction in (layer.forward, layer.inverse, fused.forward, fused.inverse):
        with pytest.raises(RuntimeError, match=f"{type(layer).__name__} is not initialized"):
            direction(x)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1)])
def test_actnorm_normalizes_its_first_batch(shape):
    """Also a channel that varies by its dequantization noise alone."""
    x = 3 * torch.randn(50, 3, *[2] * len(shape[1:]), generator=seeded()) + 7
    x[:, 1] = 0.25 + torch.rand(x[:, 1].shape, generator=seeded()) / 256
    layer = b.ActNorm(shape)
    layer.initialize(x)
    z = layer(x)[0].detach().movedim(1, -1).flatten(0, -2)
    near(z.mean(0), torch.zeros(3), 1e-4)
    near(z.std(0, correction=0), torch.ones(3), 1e-3)


both_convolutions = pytest.mark.parametrize("layer", [b.Conv1x1, b.Conv1x1LU])


@both_convolutions
def test_a_rotation_preserves_volume_and_is_not_whitened(layer):
    convolution, x = layer(6), torch.randn(2, 6, 3, 3)
    z, log_det = convolution(x)
    near(z.square().sum(), x.square().sum(), 1e-4)
    near(log_det, torch.zeros(2), 1e-4)
    assert not torch.allclose(z, x)
    weight = convolution.mixing_matrix().clone()
    convolution.initialize(torch.randn(20, 6, 3, 3))
    assert torch.equal(convolution.mixing_matrix(), weight)


@both_convolutions
@pytest.mark.parametrize("spoil", ["nothing", "duplicated", "constant", "all constant", "tiny"])
def test_whitening_also_of_degenerate_channels(layer, spoil):
    mixing = torch.randn(4, 4, generator=seeded())
    x = torch.einsum("ij,bjhw->bihw", mixing, torch.randn(200, 4, 3, 3, generator=seeded(1))) + 2
    if spoil == "duplicated":
        x[:, 2] = x[:, 0]
    elif spoil == "tiny":
        x = 1e-20 * x
    elif spoil != "nothing":
        x[:, 1 if spoil == "constant" else slice(None)] = 0.5
    convolution = layer(4, "whitening")
    convolution.initialize(x)
    z, log_det = convolution(x)
    assert torch.isfinite(z).all() and torch.isfinite(log_det).all()
    torch.testing.assert_close(convolution.inverse(z)[0], x, rtol=0, atol=2e-3)
    if spoil == "nothing":
        pixels = z.detach().movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(torch.cov(pixels.T), torch.eye(4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("pixels", [1, 5, 8, 16])
def test_whitening_from_few_pixels(pixels):
    """Directions without variance in the few pixels are not blown up, layer by layer, in others."""
    mixing = torch.randn(8, 8, generator=seeded())
    x = torch.einsum("ij,bjhw->bihw", mixing, torch.randn(pixels + 100, 8, 1, 1))
    for _ in range(4):
        for layer in (b.ActNorm((8, 1, 1)), b.Conv1x1LU(8, "whitening")):
            layer.initialize(x[:pixels])
            x = layer(x)[0].detach()
    assert x[pixels:].std() < 30


def test_a_singular_plain_convolution_gives_nan():
    """It does not raise: evaluation counts values that are not finite, and decoding names them."""
    layer, x = b.Conv1x1(3), torch.randn(2, 3, 2, 2)
    with torch.no_grad():
        layer.matrix.zero_()
    assert torch.isneginf(layer(x)[1]).all()
    assert torch.isnan(layer.inverse(x)[0]).all()


@pytest.mark.parametrize("raw", [-1e30, -100.0, 100.0, 1e30])
@pytest.mark.parametrize("build", [lambda: b.DiagonalAffine((3, 1, 1)), lambda: b.Conv1x1LU(3)])
def test_learned_log_scales_are_bounded_both_ways(build, raw):
    layer, x = build(), torch.randn(2, 3, 2, 2)
    with torch.no_grad():
        layer.log_scale.fill_(raw)
        z, log_det = layer(x)
        back, _ = layer.inverse(x)
    assert log_det.abs().max() <= 3 * 4 * LOG_SCALE_LIMIT + 1e-3
    # A 1x1 convolution also has triangular factors, so that the scale may act up to three times.
    limit = math.exp(LOG_SCALE_LIMIT) ** (3 if isinstance(layer, b.Conv1x1LU) else 1) * 10
    assert z.abs().max() < limit and back.abs().max() < limit


def test_logistic_to_normal_gives_the_logistic_density():
    x = torch.cat([torch.linspace(-300, 300, 1201), torch.linspace(-3, 3, 601)])[:, None]
    z, log_det = b.LogisticToNormal()(x)
    assert torch.isfinite(z).all() and (z[:1201].diff(dim=0) >= 0).all()
    density = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1) + log_det
    x = x[:, 0].double()
    expected = -x.abs() - 2 * torch.log1p((-x.abs()).exp())
    torch.testing.assert_close(density.double(), expected, rtol=1e-5, atol=1e-4)
    near_zero = x.abs() < 14  # not where the normal distribution function rounds to 1
    near(torch.special.ndtr(z[near_zero, 0]), torch.sigmoid(x[near_zero]).float(), 1e-5)
    # Far out it is harmless.
    z = torch.tensor([-1e3, -30.0, -12.0, 0.0, 12.0, 30.0, 1e3])[:, None]
    for x, log_det in (b.LogisticToNormal().inverse(z), b.LogisticToNormal()(1e3 * z)):
        assert torch.isfinite(x).all() and torch.isfinite(log_det).all()
    x = torch.tensor([[-1e4], [-800.0], [-81.0], [79.0], [90.0]])
    near(b.LogisticToNormal().inverse(b.LogisticToNormal()(x)[0])[0], x, 1e-5)
    x = torch.tensor([[-1e4], [0.0], [1e4]], requires_grad=True)
    z, log_det = b.LogisticToNormal()(x)
    (z.sum() + log_det.sum()).backward()
    assert torch.isfinite(x.grad).all()


def test_reversing_halving_and_squeezing():
    x = torch.arange(12.0).view(1, 2, 2, 3)
    assert torch.equal(b.Reverse()(x)[0].flatten(2), x.flatten(2).flip(2))
    # Pixels go into halves of the channels.
    first = torch.tensor([[True, False, False], [False, True, True]])
    pixels = torch.arange(6.0).view(2, 3)
    x = torch.stack([10 * pixels + channel for channel in range(4)])[None]
    z = b.HalvePixels(first)(x)[0]
    assert z.shape == (1, 4, 2, 3)
    kept, changed = ({int(v) // 10 for v in half.flatten()} for half in z.chunk(2, dim=1))
    assert kept == {0, 4, 5} and changed == {1, 2, 3}
    # A place has two of the four entries of one pixel.
    for place in z.chunk(2, dim=1)[0].flatten(2)[0].T:
        assert len({int(v) // 10 for v in place}) == 1
    # The colours of a checkerboard go into the halves.
    colour = (torch.arange(4.0)[:, None] + torch.arange(4.0)) % 2
    z = b.Squeeze()(torch.stack([colour, 2 + colour])[None])[0]
    assert z.shape == (1, 8, 2, 2)
    assert set(z[:, :4].flatten().tolist()) == {0.0, 2.0}
    assert set(z[:, 4:].flatten().tolist()) == {1.0, 3.0}


def test_split_latents_are_the_levels():
    bijection, x, context, _ = a_row("multiscale")
    z = bijection(x, context)[0]
    parts = bijection.split_latents(z)
    assert [tuple(part.shape) for part in parts] == [(B, 4, 2, 2), (B, 4, 2, 2)]
    assert torch.equal(torch.cat([part.flatten(1) for part in parts], dim=1), z)
    behind = b.Sequential(b.Flatten((2, 4, 4)), bijection)
    assert all(map(torch.equal, behind.split_latents(z), parts))
    # The first level's latent leaves before the second level, and so does not depend on it.
    with torch.no_grad():
        bijection.levels[1].layers[0].shift += 1
    changed = bijection.split_latents(bijection(x, context)[0])
    assert torch.equal(changed[0], parts[0]) and not torch.allclose(changed[1], parts[1])


@pytest.mark.parametrize("build", [b.Standardize, b.ActNorm])
def test_a_constant_of_the_first_batch_keeps_its_scale(build):
    """Rare values of vectors are often missing there."""
    layer = build((2, 1, 1))
    layer.initialize(torch.ones(4, 2, 1, 1))
    z, log_det = layer(torch.full((1, 2, 1, 1), 3.0))
    assert z.flatten().tolist() == [2, 2] and log_det.tolist() == [0]

"""`flowtrain doctor`: models that are sound, and models that are damaged in one known place."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue import SHORT, TINY, TINY_RUN, sets
from cli_helpers import FOLDER, copy_of, quick
from helpers import REPOSITORY, a_config, images, npz, perturb, seeded
from torch import nn

from flowtrain import config as configuration
from flowtrain.bijections import (
    ActNorm,
    Bijection,
    CheckerboardCoupling,
    Conv1x1,
    Conv1x1LU,
    Coupling,
    Sequential,
)
from flowtrain.bijections.execution import call
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import LoadedModel, load_model
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.evaluation.layers import Watching, layers_of, log_scale_ranges
from flowtrain.flow.dequantize import draw_noise
from flowtrain.flow.flow import initialize
from flowtrain.flow.variational import VariationalNoise
from flowtrain.system.random import Stream, uniform
from flowtrain.tools.doctor import examine as examining
from flowtrain.tools.doctor import log_dets
from flowtrain.tools.doctor.examine import examine
from flowtrain.tools.doctor.findings import BOUNDS, IMAGES, NOISE, SAMPLES, judge, overall, worst
from flowtrain.tools.doctor.log_dets import diagonal_log_det, jacobian_log_det, reduced

pytestmark = pytest.mark.run  # many seconds in all

BOTH = ("inverse of forward", "forward of inverse")
FIRST = "levels.0.layers.1"  # Glow's first ActNorm; then the 1x1 convolution and the coupling


def a_model(
    tmp_path, name="glow", shape=(1, 8, 8), scale=0.05, dequantization=None, data=None, **options
):
    """A tiny model with all parameters moved, and the data set on which it is initialized."""
    data = data or npz(tmp_path / "a.npz", shape=(*shape[1:], shape[0]))
    options = {"name": name, **TINY[name], **options}
    config = a_config(options, data=data, dequantization=dequantization or {})
    data_set = DataSet(config.data)
    flow = perturb(build_flow(config, data_set.shape, data_set.levels), scale)
    x = data_set.split("train").take(slice(None))
    initialize(flow, x, draw_noise(x.shape, seeded(), x.device))
    described = Checkpoint(Path("model.safetensors"), {}, {})
    return LoadedModel(flow.eval().requires_grad_(False), config, "raw", described), data_set


def examined(model, data, **options):
    """The findings as `{(check, layer, inputs): finding}`."""
    findings = examine(model, data, **options)
    found = {(f.check, f.layer, f.inputs): f for f in findings}
    assert len(found) == len(findings)
    return found


def bad(found):
    """The `{(check, layer)}` of the bad findings."""
    return {key[:2] for key, f in found.items() if f.verdict == "bad"}


def layer_of(model, name):
    return layers_of(model.flow)[name]


# ---------------------------------------------------------------- sound models

SOUND = [
    *[(name, {}) for name in TINY],
    ("glow", {"shape": (3, 8, 8), "permutation": "conv1x1", "split": "mixed"}),
    (
        "glow",
        {"coupling": "spline", "prior": "spline", "permutation": "shuffle", "conditioner": "gated"},
    ),
    (
        "glow",
        {
            "coupling": "mixture",
            "prior": "mixture",
            "split": "checkerboard",
            "conditioner": "gated",
        },
    ),
    (
        "glow",
        {
            "coupling": "additive",
            "shape": (3, 8, 8),
            "dequantization": {"name": "variational", "width": 4},
        },
    ),
    ("realnvp", {"shape": (3, 8, 8), "dequantization": {"transform": "logit"}}),
    (
        "nice",
        {"shape": (3, 5, 5), "dequantization": {"name": "variational", "width": 4, "steps": 2}},
    ),
    (
        "nice",
        {"shape": (3, 1, 1), "dequantization": {"name": "variational", "width": 4, "steps": 2}},
    ),
    ("realnvp", {"data": {"name": "two_moons"}}),
]


def test_every_model_is_examined():
    # The model of the sphere is refused (test_sphere.py).
    names = configuration.component_names(configuration.Model)
    assert set(names) - {"sphere"} == {name for name, _ in SOUND}


@pytest.mark.run  # takes long
@pytest.mark.parametrize("name, options", SOUND, ids=str)
def test_a_sound_model(name, options, tmp_path):
    """Nothing is bad, and no check is missing."""
    model, data = a_model(tmp_path, name, **options)
    steps = []
    found = examined(
        model, data, num_images=3, progress=lambda done, total: steps.append((done, total))
    )
    # On random images, no model is better than a uniform coder.
    assert bad(found) <= {("likelihood", "")}
    assert [f for f in found.values() if f.value is None] == []
    layers = layers_of(model.flow)
    in_noise = [layer for layer in layers if layer.startswith("dequantizer.")]
    named = {*layers, *(["dequantizer.noise_model"] if in_noise else [])}
    for check in BOTH:
        for inputs in (IMAGES, NOISE, SAMPLES):
            seen = {layer for c, layer, i in found if (c, i) == (check, inputs)}
            assert seen == named
    assert {layer for check, layer, _ in found if check == "log-det"} == {*named, ""}
    linear = {name for name, layer in layers.items() if isinstance(layer, Conv1x1 | Conv1x1LU)}
    assert {layer for check, layer, _ in found if check == "condition number"} == linear
    for check in BOUNDS:
        if "round trip" in check:
            assert {inputs for c, _, inputs in found if c == check} == {IMAGES, NOISE, SAMPLES}
    exact = [found.get(("images that come back exactly", "", inputs)) for inputs in (IMAGES, NOISE)]
    assert exact == [None, None] if data.levels is None else [f.value for f in exact] == [1, 1]
    last = 11 if in_noise else 8
    assert steps == [(i, last) for i in range(1, last + 1)]


def test_layers_are_named_once_and_without_those_of_conditioners(tmp_path):
    model, _ = a_model(tmp_path, "realnvp")
    layers = layers_of(model.flow)
    assert (
        sum(
            "conditioner" in name
            for name, m in model.flow.named_modules()
            if isinstance(m, ActNorm)
        )
        > 0
    )
    assert [name for name in layers if "conditioner" in name] == []
    assert all(
        dict(model.flow.bijection.named_modules())[name] is layer for name, layer in layers.items()
    )
    assert {type(layer) for layer in layers.values()}.isdisjoint(
        {Sequential, type(model.flow.bijection)}
    )

    class OfTwoNets(Bijection):  # its list of networks is not a list of layers
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(
                [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), ActNorm((2,)))]
            )

    model.flow.bijection = OfTwoNets()
    assert list(layers_of(model.flow)) == ["bijection"]


def test_each_call_of_a_layer_goes_through(tmp_path):
    model, _ = a_model(tmp_path, "iaf", dequantization={"name": "variational", "width": 4})
    seen = []

    def around(name, layer, direction, x, context):
        seen.append((name, direction, context is not None))
        return call(layer, direction, x, context)

    x = images(2, model.flow.shape)
    plain = model.flow.encode(x)
    watching = Watching(model.flow, around)
    model.flow.to_latents(x, torch.full(x.shape, 0.5), watching)
    half = len(seen)
    model.flow.bijection.run(watching, "inverse", plain)
    names = list(layers_of(model.flow))
    noise = sum(name.startswith("dequantizer.") for name in names)
    assert [
        name for name, _, _ in seen[:half] if name != "dequantizer.noise_model.squeeze"
    ] == names[1:]
    assert [name for name, _, _ in seen[half : half + len(names) - noise]] == names[noise:][::-1]
    # In Inverse(MaskedAutoregressive) the layer inside runs in the other direction.
    inside = {direction for name, direction, _ in seen[:half] if name.endswith(".bijection")}
    assert inside == {"inverse"}
    assert {context for name, _, context in seen if ".flow.layers" in name} == {True}


# ---------------------------------------------------------------- the numbers


def test_log_scales_are_those_of_the_layers(tmp_path):
    model, data = a_model(tmp_path)
    found = examined(model, data, num_images=4, seed=3)
    x = data.split("test").take(slice(0, 4))
    ranges = log_scale_ranges(model.flow, x, uniform(x.shape, 3, Stream.EVALUATION))
    assert len(ranges) > 5
    for name, (low, high) in ranges.items():
        coupling = name.endswith(".transform")
        key = (name.removesuffix(".transform"), IMAGES if coupling else "")
        assert found["lowest log-scale", *key].value == pytest.approx(low, abs=1e-5)
        assert found["highest log-scale", *key].value == pytest.approx(high, abs=1e-5)


def test_a_checkerboard_counts_what_it_transforms(tmp_path):
    model, data = a_model(tmp_path, split="checkerboard", levels=1, steps=1, width=2)
    layer = layer_of(model, "levels.0.layers.3")

    class Conditioner(nn.Module):
        def forward(self, x, context=None):
            raw = torch.where(layer.keep, 9.0, 0.25).expand_as(x)
            return torch.cat([torch.zeros_like(x), raw], dim=1)

    layer.conditioner = Conditioner()
    assert isinstance(layer, CheckerboardCoupling)
    value = examined(model, data, num_images=2)[
        "highest log-scale", "levels.0.layers.3", IMAGES
    ].value
    assert value == pytest.approx(2 * math.tanh(0.125), rel=1e-4)
    x = data.split("test").take(slice(0, 2))
    ranges = log_scale_ranges(model.flow, x, torch.full(x.shape, 0.5))
    assert ranges["levels.0.layers.3.transform"] == pytest.approx((value, value), rel=1e-4)


@pytest.mark.parametrize("kind", [Conv1x1, Conv1x1LU])
def test_condition_number(kind, tmp_path):
    model, data = a_model(tmp_path, permutation="conv1x1" if kind is Conv1x1 else "conv1x1_lu")
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=seeded()))[0]
    layer_of(model, "levels.0.layers.2").set_weight(
        rotation @ torch.diag(torch.tensor([10.0, 1, 1, 0.02]))
    )
    finding = examined(model, data, num_images=1)["condition number", "levels.0.layers.2", ""]
    assert finding.value == pytest.approx(500, rel=1e-3) and finding.verdict == "watch"


def test_jacobian_of_any_map():
    weight = torch.randn(40, 40, generator=seeded(), dtype=torch.float64)

    def function(x):
        return (x.flatten(1) @ weight).tanh().view_as(x), x

    x = 0.1 * torch.randn(1, 4, 10, generator=seeded(1), dtype=torch.float64)
    exact = torch.autograd.functional.jacobian(lambda v: function(v)[0], x).reshape(40, 40)
    torch.testing.assert_close(jacobian_log_det(function, x), torch.linalg.slogdet(exact).logabsdet)


def test_a_diagonal_jacobian():
    scale = torch.randn(40, generator=seeded(), dtype=torch.float64)
    weight = torch.diag(scale)
    x = torch.randn(1, 4, 10, generator=seeded(1), dtype=torch.float64)

    def function(x):
        return (x.flatten(1) @ weight).tanh().view_as(x), x

    torch.testing.assert_close(diagonal_log_det(function, x), jacobian_log_det(function, x))
    weight[3, 7] = 1e-3
    assert diagonal_log_det(function, x).isnan()


def test_latents_of_levels_beyond_float32_are_harmless(tmp_path):
    """u is what is left of x + u: near 0 and 1 it has few digits, which change no level."""
    x = np.zeros((24, 4, 4, 1), "u1")
    np.savez(tmp_path / "a.npz", x_train=x[:20], x_test=x[20:])
    data = {"name": "npz", "path": str(tmp_path / "a.npz")}
    model, data = a_model(tmp_path, "causal", scale=0, data=data)
    model.flow.bijection.conditioner.head.last.bias.data.chunk(3)[2].fill_(-4)  # one level
    model.flow.draw_latents = lambda n, generator: torch.full((n, 16), -4.5)
    found = examined(model, data, num_images=3)
    assert found["latent round trip, float32", "", SAMPLES].verdict == "watch"
    assert found["forward of inverse", "bijection", SAMPLES].verdict == "watch"
    assert found["data round trip, float32", "", SAMPLES].verdict == "ok"
    assert bad(found) == set()


def test_a_reduced_copy_has_the_weights(tmp_path):
    model, _ = a_model(tmp_path, "realnvp", shape=(3, 16, 24), levels=3)
    small = reduced(model)
    assert small.shape == (3, 4, 4)
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, model.flow.get_parameter(name))
    assert small.bijection.levels[0].layers[0].keep.shape == (4, 4)
    initialized = [m.initialized.item() for m in small.modules() if isinstance(m, ActNorm)]
    assert initialized and all(initialized)
    small.log_prob(images(2, (3, 4, 4)))


def test_what_is_not_convolutional_is_not_reduced(tmp_path, monkeypatch):
    model, data = a_model(tmp_path, "nice")
    assert reduced(model).shape == (1, 8, 8)
    monkeypatch.setattr(log_dets, "LARGEST_JACOBIAN", 63)
    assert reduced(model) is None
    assert not any(check == "log-det" for check, _, _ in examined(model, data, num_images=1))


def test_verdicts():
    def of(check, value, inputs=IMAGES):
        return judge(check, value, "", inputs).verdict

    round_trip = "data round trip, float32"
    found = [of(round_trip, v) for v in (0.05, 0.06, 0.5, 0.51, math.nan)]
    assert found == ["ok", "watch", "watch", "bad", "bad"]
    exact = "images that come back exactly"
    assert [of(exact, v) for v in (1, 0.9995, 0.99)] == ["ok", "watch", "bad"]
    # For noise a finite value is at most "watch". Counts of values that are not finite are not
    # exempt.
    assert [of(round_trip, v, NOISE) for v in (0.05, 1e30, math.inf)] == ["ok", "watch", "bad"]
    assert [of(exact, v, NOISE) for v in (1, 0)] == ["ok", "watch"]
    assert [of("forward pass", v, NOISE) for v in (0, 1)] == ["ok", "bad"]
    assert judge(round_trip, math.inf).value is None
    for check, (watch, worse) in BOUNDS.items():
        assert of(check, watch) == "ok" and (watch == worse or of(check, worse) == "watch")


def test_the_worst_come_first():
    weights, small, large = (
        judge("parameters", 1),
        judge("log-det", 0.1, "a"),
        judge("log-det", 0.2, "b"),
    )
    fine, lost = judge("log-det", 0, "c"), judge("log-det", math.nan, "d")
    assert worst([small, fine, large, lost, weights]) == [weights, lost, large, small]
    lists = [fine], [fine, judge("log-det", 5e-4)], [fine, small]
    assert [overall(findings) for findings in lists] == ["ok", "watch", "bad"]


def test_the_worst_of_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(examining, "BATCH_SIZE", 2)
    model, data = a_model(tmp_path, data=npz(tmp_path / "b.npz", test=5), levels=1, steps=1)
    key = ("highest log-scale", "levels.0.layers.3", IMAGES)
    one, two, whole = (examined(model, data, num_images=n) for n in (2, 4, 5))
    assert (
        one[key].value <= two[key].value <= whole[key].value and one[key].value < whole[key].value
    )
    assert whole["images that come back exactly", "", IMAGES].value == 1
    assert examined(model, data, num_images=2, seed=1) != one == examined(model, data, num_images=2)


# ---------------------------------------------------------------- damage


@torch.no_grad()
def damage(model, name, how):
    layer = layer_of(model, name)
    if how == "a scale of zero":
        layer.log_scale[0] = -1e3
    elif how == "NaN in a conditioner":
        layer.conditioner.layers[0].weight[1, 2] = math.nan
    elif how == "NaN in an ActNorm":
        layer.shift[1] = math.nan
    elif how == "overflow in a conditioner":
        layer.conditioner.layers[0].weight.fill_(1e38)
        layer.conditioner.layers[2].weight.fill_(1e38)
    elif how == "not initialized":
        layer.initialized.fill_(False)
        layer._known_initialized = False
    elif how == "two equal rows":
        layer.matrix[1] = layer.matrix[0]
    elif how == "a row of zeros":
        layer.matrix[1] = 0


@pytest.mark.parametrize(
    "name, how, checks",
    [
        ("levels.1.layers.1", "a scale of zero", {"lowest log-scale"}),
        ("levels.1.layers.2", "a scale of zero", {"condition number"}),  # of the LU factors
        (
            "levels.0.layers.6",
            "NaN in a conditioner",
            {"parameters", "forward pass", "inverse pass", *BOTH},
        ),
        (
            "levels.0.layers.4",
            "NaN in an ActNorm",
            {"parameters", "forward pass", "inverse pass", *BOTH},
        ),
        ("levels.1.layers.3", "overflow in a conditioner", {"forward pass", "inverse pass", *BOTH}),
        ("levels.0.layers.4", "not initialized", {"forward pass", "inverse pass"}),
    ],
)
def test_damage_is_found_and_the_layer_named(name, how, checks, tmp_path):
    model, data = a_model(tmp_path)
    damage(model, name, how)
    found = examined(model, data, num_images=2)
    assert {layer for _, layer in bad(found)} <= {name, ""}  # none of the layers around it
    assert {check for check, layer in bad(found) if layer == name} - {"log-det"} >= checks
    assert worst(list(found.values()))[0].layer == name
    assert overall(list(found.values())) == "bad"


@pytest.mark.parametrize("how", ["two equal rows", "a row of zeros"])
def test_a_singular_convolution(how, tmp_path):
    model, data = a_model(tmp_path, permutation="conv1x1")
    damage(model, "levels.0.layers.5", how)
    found = examined(model, data, num_images=2)
    assert found["condition number", "levels.0.layers.5", ""].verdict == "bad"
    assert ("inverse of forward", "levels.0.layers.5") in bad(found)
    assert worst(list(found.values()))[0].layer == "levels.0.layers.5"


@torch.no_grad()
def test_damage_in_the_prior_of_a_class(tmp_path):
    model, data = a_model(tmp_path, classes=3)
    assert ("lowest log-scale", "class_prior") not in bad(examined(model, data, num_images=2))
    model.flow.class_prior.log_scale[1, 2] = -1e3
    assert ("lowest log-scale", "class_prior") in bad(examined(model, data, num_images=2))


def test_damage_in_the_learned_noise(tmp_path):
    model, data = a_model(tmp_path, dequantization={"name": "variational", "width": 4})
    weight = model.flow.dequantizer.noise_model.context[0].weight
    weight[0, 0] = math.nan
    found = examined(model, data, num_images=2)
    assert ("parameters", "dequantizer.noise_model.context.0") in bad(found)
    # Samples of the model do not need the learned noise.
    on_samples = {layer for (_, layer, i), f in found.items() if i == SAMPLES and f.value is None}
    assert on_samples and all(layer.startswith("dequantizer.") for layer in on_samples)


@pytest.mark.parametrize("fault", ["too far", "its inverse", "its log-det"])
def test_a_broken_noise_is_named_like_any_layer(fault, tmp_path, monkeypatch):
    model, data = a_model(tmp_path, dequantization={"name": "variational", "width": 4})
    name, layer = next(
        (name, layer)
        for name, layer in layers_of(model.flow).items()
        if name.startswith("dequantizer.") and isinstance(layer, Coupling)
    )
    checks, named = {*BOTH}, name
    if fault == "too far":  # all layers are sound, and u is at the edges of its bin
        with torch.no_grad():
            for parameter in layer.conditioner.parameters():
                parameter *= 5
        checks, named = {"inverse of forward", "log-det"}, "dequantizer.noise_model"
    elif fault == "its inverse":
        inverse = layer.inverse
        layer.inverse = lambda *args: (inverse(*args)[0] + 1e-3, inverse(*args)[1])
    else:
        forward = VariationalNoise.forward
        off = lambda *args: (forward(*args)[0], forward(*args)[1] + 1)  # noqa: E731
        monkeypatch.setattr(VariationalNoise, "forward", off)
        checks, named = {"log-det"}, "dequantizer.noise_model"
    found = examined(model, data, num_images=8)
    assert {layer for _, layer in bad(found)} - {"", "dequantizer.noise_model"} <= {name}
    assert {check for check, layer in bad(found) if layer == named} >= checks


def test_a_model_that_is_worse_than_a_uniform_coder(tmp_path):
    model, data = a_model(tmp_path)
    finding = examined(model, data, num_images=4)["likelihood", "", IMAGES]
    x = data.split("test").take(slice(0, 4))
    noise = uniform(x.shape, 0, Stream.EVALUATION)
    bits = -model.flow(x, noise).total.mean().item() / (64 * math.log(2))
    assert finding.value == pytest.approx(bits / 8, rel=1e-4)
    assert finding.verdict == "bad"  # random images are not what any model knows
    assert judge("likelihood", 1.0).verdict == "ok" and judge("likelihood", 1.01).verdict == "bad"


class Faulty(Bijection):
    """The identity, but for one fault.

    Its parameter keeps doctor from building a smaller copy of the model without this layer.
    """

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.mark = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x, context=None):
        log_det = x.new_zeros(len(x))
        if self.fault == "log-det" or self.fault == "float32" and x.dtype == torch.float32:
            log_det = log_det + 0.1
        elif self.fault == "bright":
            log_det = torch.where(x.flatten(1).mean(1) > 0, torch.inf, log_det)
        elif self.fault == "lost":
            x = x * torch.nan
        elif self.fault == "bright, and lost":
            x = torch.where((x.flatten(1).mean(1) > 0)[:, None, None, None], torch.nan, x)
        elif self.fault == "forward raises":
            raise KeyError("no such thing")
        elif self.fault == "constant":
            x = torch.ones_like(x)
        return x, log_det

    def inverse(self, z, context=None):
        if self.fault == "inverse raises":
            raise NotImplementedError("never written")
        if self.fault == "proportional":
            z = 1.01 * z
        if self.fault == "bias":
            z = z + 0.6 / 256
        if self.fault == "sometimes":
            z = z + torch.where(z.flatten(1).sum(1) > 0, 0.6 / 256, 0.0)[:, None, None, None]
        return z, z.new_zeros(len(z))


def faulty(tmp_path, fault):
    """A model with a `Faulty` layer in front of the flow, where its inputs are pixels."""
    model, data = a_model(tmp_path)
    model.flow.bijection = Sequential(Faulty(fault), model.flow.bijection)
    return model, data


WHOLE = [
    f"{what} round trip, {precision}"
    for what in ("data", "latent")
    for precision in ("float32", "float64")
]


@pytest.mark.parametrize(
    "fault, checks, whole",
    [
        ("log-det", {"log-det"}, {"log-det"}),
        ("float32", {"log-det"}, {"log-det", "float32 likelihood"}),
        ("bias", {*BOTH}, {*WHOLE[:2], "images that come back exactly"}),
        ("inverse raises", {*BOTH, "inverse pass"}, {*WHOLE, "images that come back exactly"}),
        ("forward raises", {*BOTH, "forward pass", "log-det"}, {*WHOLE, "float32 likelihood"}),
        ("constant", {*BOTH, "log-det"}, {*WHOLE[:2], "images that come back exactly"}),
    ],
)
def test_a_faulty_layer_is_named(fault, checks, whole, tmp_path, caplog):
    model, data = faulty(tmp_path, fault)
    found = examined(model, data, num_images=4)
    layers = {layer for _, layer in bad(found)}
    assert layers == {"layers.0", ""}
    assert {check for check, layer in bad(found) if layer} == checks
    assert {check for check, layer in bad(found) if not layer} >= whole
    if "raises" in fault:
        forward = fault == "forward raises"
        check, inputs = ("forward pass", IMAGES) if forward else ("inverse pass", SAMPLES)
        assert found[check, "layers.0", inputs].value is None
        reasons = [record.message for record in caplog.records]
        assert (
            len(reasons) == 1
            and "layers.0" in reasons[0]
            and ("no such thing" in reasons[0] or "never" in reasons[0])
        )


def test_the_values_of_a_known_fault(tmp_path):
    model, data = faulty(tmp_path, "log-det")
    found = examined(model, data, num_images=2)
    for layer in ("layers.0", ""):
        assert found["log-det", layer, IMAGES].value == pytest.approx(
            0.1 / 64 / math.log(2), rel=1e-3
        )
    model, data = faulty(tmp_path, "float32")
    assert examined(model, data)["float32 likelihood", "", IMAGES].value == pytest.approx(
        0.1 / 64 / math.log(2), rel=0.01
    )
    model, data = faulty(tmp_path, "bias")
    found = examined(model, data)
    for precision in ("float32", "float64"):
        assert found[f"data round trip, {precision}", "", IMAGES].value == pytest.approx(
            0.6, rel=1e-3
        )
    x = data.split("test").take(slice(None))
    v = model.flow.dequantizer(x, uniform(x.shape, 0, Stream.EVALUATION))[0]
    size = v.abs().clamp_min(v.square().mean().sqrt())
    assert found["inverse of forward", "layers.0", IMAGES].value == pytest.approx(
        0.6 / 256 / size.min().item(), rel=1e-3
    )


def test_the_fraction_of_images_that_come_back(tmp_path):
    model, data = faulty(tmp_path, "sometimes")
    v = model.flow.dequantizer.middle(data.split("test").take(slice(None)))
    lost = (v.flatten(1).sum(1) > 0).float().mean().item()
    assert 0 < lost < 1
    assert examined(model, data)["images that come back exactly", "", IMAGES].value == 1 - lost


def test_errors_are_relative_to_large_entries(tmp_path):
    model, data = faulty(tmp_path, "proportional")
    found = examined(model, data, num_images=2)
    assert [found[check, "layers.0", IMAGES].value for check in BOTH] == pytest.approx(
        [0.01, 0.01], rel=1e-3
    )


@pytest.mark.parametrize("fault", ["bright", "bright, and lost"])
def test_images_that_are_not_finite_are_counted(fault, tmp_path):
    model, data = faulty(tmp_path, fault)
    x = data.split("test").take(slice(None))
    v = model.flow.dequantizer(x, uniform(x.shape, 0, Stream.EVALUATION))[0]
    bright = int((v.flatten(1).mean(1) > 0).sum())
    assert 0 < bright < len(x)
    found = examined(model, data)
    finding = found["forward pass", "layers.0", IMAGES]
    assert (finding.value, finding.verdict) == (bright, "bad")
    # The layers after it are judged by the other images.
    assert {layer for _, layer in bad(found)} <= {"layers.0", ""}
    assert found["inverse of forward", f"layers.1.{FIRST}", IMAGES].verdict == "ok"


def test_the_first_layer_that_is_not_finite(tmp_path):
    model, data = faulty(tmp_path, "lost")
    model.flow.bijection = Sequential(Faulty("bright, and lost"), model.flow.bijection)
    found = examined(model, data)
    assert [
        layer for check, layer, inputs in found if (check, inputs) == ("forward pass", IMAGES)
    ] == ["layers.0"]
    assert ("inverse of forward", "layers.1.layers.0") in bad(found)


def test_memory_that_runs_out_is_no_finding(tmp_path, monkeypatch):
    model, data = faulty(tmp_path, "")

    def greedy(self, x, context=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Faulty, "forward", greedy)
    with pytest.raises(torch.OutOfMemoryError):
        examine(model, data)


def test_other_data_are_refused(tmp_path):
    model, _ = a_model(tmp_path)
    other = DataSet(a_config(data=npz(tmp_path / "b.npz", shape=(8, 8, 3))).data)
    with pytest.raises(UserError, match="shape"):
        examine(model, other)


# ---------------------------------------------------------------- as a user does


@pytest.fixture(scope="module")
def trained():
    folder = FOLDER / "doctor"
    folder.mkdir(exist_ok=True)
    # 20 steps have to be better than a uniform coder.
    fast = sets(train__lr=2e-2, train__ema=0.5, train__warmup_steps=0)
    quick("train", *TINY_RUN, *fast, "--run-dir", "run", cwd=folder).ok()
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return copy_of(trained, tmp_path / "runs" / "glow_digits")


def values_of(result, check):
    return {f["layer"]: f["value"] for f in result["findings"] if f["check"] == check}


def test_the_command(run, tmp_path):
    done = quick("doctor", "--num-images", 5, "--seed", 1, cwd=tmp_path).ok()
    values = json.loads((run / "doctor.json").read_text())
    assert "wrote runs/glow_digits/doctor.json" in done.out
    assert done.out.splitlines()[-1].startswith(
        f"verdict: {values['verdict']} ({values['counts']['ok']} ok"
    )
    assert values["verdict"] == "ok" and sum(values["counts"].values()) == len(values["findings"])
    about = ("step", "dataset", "num_images", "seed", "weights")
    assert [values[key] for key in about] == [20, "digits", 5, 1, "ema"]
    assert values["checkpoint"] == "runs/glow_digits/checkpoints/best.safetensors"
    model = load_model(str(run), torch.device("cpu"))
    found = examined(model, DataSet(model.config.data), num_images=5, seed=1)
    for row in values["findings"]:
        finding = found.pop((row["check"], row["layer"], row["inputs"]))
        assert row["value"] == pytest.approx(finding.value, rel=0.5, abs=1e-5)
        expected = finding.watch, finding.bad, finding.verdict
        assert (row["watch"], row["bad"], row["verdict"]) == expected
        assert row["check"] in done.out
    assert not found
    # One row per check and kind of input, not per layer.
    assert done.out.count("\n") < 60 < len(values["findings"])
    assert "condition number (watch above 473, bad above 1.89e+03)" in done.out
    assert "images that come back exactly (watch below 1, bad below 0.999)" in done.out
    number = values_of(values, "condition number")
    worst_one = max(number, key=number.get)
    assert f"{number[worst_one]:.3g} {worst_one} (of 2 ok)" in " ".join(done.out.split())


def test_its_json_alone_on_standard_output(run, tmp_path):
    done = quick(
        "doctor", run, "--num-images", 2, "--weights", "raw", "--json", "-", cwd=tmp_path
    ).ok()
    values = json.loads(done.out)
    assert values["weights"] == "raw" and "verdict: ok" in done.err
    quick("doctor", run, "--num-images", 2, "--json", "deep/er/a.json", cwd=tmp_path).ok()
    assert json.loads((tmp_path / "deep/er/a.json").read_text())["weights"] == "ema"
    assert not (run / "doctor.json").exists()


@pytest.mark.parametrize("target", ["-", "a.json"])
def test_a_damaged_model_exits_with_1_after_writing(target, run, tmp_path):
    saved = checkpoint_format.read(run / "checkpoints" / "best.safetensors")
    saved.tensors["ema.bijection.levels.1.layers.1.log_scale"].flatten()[0] = -1e3
    saved.tensors["ema.bijection.levels.0.layers.3.conditioner.layers.0.weight"].flatten()[0] = (
        math.nan
    )
    checkpoint_format.write(tmp_path / "nan.safetensors", saved.meta, saved.tensors)
    done = quick("doctor", "nan.safetensors", "--num-images", 2, "--json", target, cwd=tmp_path)
    done.failed(
        1,
        "findings are bad, the worst first: levels.0.layers.3, levels.1.layers.1, the whole model",
    )
    values = json.loads(done.out if target == "-" else (tmp_path / target).read_text())
    assert values["verdict"] == "bad"
    assert {f["layer"] for f in values["findings"] if f["verdict"] == "bad"} == {
        "levels.0.layers.3",
        "levels.1.layers.1",
        "",
    }
    said = done.err if target == "-" else done.out
    assert "verdict: bad" in said and "not finite" in said


OWN_MODEL = """
from flowtrain.bijections import Bijection, Flatten, Sequential, DiagonalAffine

class Mute(Bijection):
    def forward(self, x, context=None):
        return x, x.new_zeros(len(x))

def build(shape, *, steps: int = 1):
    return Sequential(Flatten(shape), DiagonalAffine((64,)), *(Mute() for _ in range(steps)))
"""


def test_a_layer_of_ones_own_without_an_inverse(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mute.py").write_text(OWN_MODEL)
    options = [
        *sets(model__name="own.mute", model__steps=7),
        *SHORT,
        *sets(train__sample_every=1000),
    ]
    quick("train", *options, "--run-dir", "a", cwd=tmp_path)
    quick("doctor", "a", cwd=tmp_path).failed(2, "own.mute", "--trust-code")
    done = quick("doctor", "a", "--trust-code", "--num-images", 2, cwd=tmp_path)
    done.failed(1, "NotImplementedError", "layers.2, layers.3", " and 3 more")


def test_help(tmp_path):
    out = quick("doctor", "--help", cwd=tmp_path).ok().out
    assert "Example: flowtrain doctor" in out
    for option in (
        "--num-images",
        "--seed",
        "--weights",
        "--json",
        "--set",
        "--trust-code",
        "--device",
    ):
        assert option in out


def test_every_check_is_documented():
    text = (REPOSITORY / "docs" / "doctor.md").read_text()
    for check, (watch, worse) in BOUNDS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {check} |"))
        for bound in {watch, worse}:
            assert f" {bound:.3g} " in row, (check, bound)

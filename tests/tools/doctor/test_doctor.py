"""`flowtrain doctor`: models that are sound, and models that are damaged in one known place."""

import json
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from catalogue import TINY
from cli_helpers import quick
from coding_helpers import loaded
from helpers import REPOSITORY, a_config, images, initialized, npz, perturb, seeded
from torch import nn

from flowtrain.bijections import ActNorm, Bijection, Conv1x1, Conv1x1LU, Sequential
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.load import load_model
from flowtrain.data.splits import DataSet
from flowtrain.errors import RunError, UserError
from flowtrain.evaluation.layers import layers_of, log_scale_ranges
from flowtrain.flow.variational import VariationalNoise
from flowtrain.system.random import Stream, uniform
from flowtrain.tools.doctor import examine as examining
from flowtrain.tools.doctor import findings as finding
from flowtrain.tools.doctor import log_dets
from flowtrain.tools.doctor.examine import examine
from flowtrain.tools.doctor.findings import BOUNDS, EXTREME, IMAGES, NOISE, SAMPLES, judge, worst
from flowtrain.tools.doctor.log_dets import diagonal_log_det, jacobian_log_det, reduced

pytestmark = pytest.mark.run  # many seconds in all

BOTH = ("inverse of forward", "forward of inverse")
PASSES = ("forward pass", "inverse pass")
FIRST = "levels.0.layers.1"  # Glow's first ActNorm; then the 1x1 convolution and the coupling
NOISE_MODEL = "dequantizer.noise_model"
EXACT = "images that come back exactly"
VARIATIONAL = {"name": "variational", "width": 4}


def a_model(
    tmp_path, name="glow", shape=(1, 8, 8), scale=0.05, dequantization=None, data=None, **options
):
    """A tiny model with all parameters moved, and the data set on which it is initialized."""
    data = data or npz(tmp_path / "a.npz", shape=(*shape[1:], shape[0]))
    options = {"name": name, **TINY.get(name, {}), **options}
    config = a_config(options, data=data, dequantization=dequantization or {})
    data_set = DataSet(config.data)
    flow = perturb(build_flow(config, data_set.shape, data_set.num_bins), scale)
    initialized(flow, data_set.split("train").take(slice(None)))
    return loaded(flow, config), data_set


def examined(model, data, **options):
    """The findings as `{(check, layer, inputs): finding}`."""
    findings = examine(model, data, **options)
    found = {(f.check, f.layer, f.inputs): f for f in findings}
    assert len(found) == len(findings)
    return found


def bad(found):
    """The `{(check, layer)}` of the bad findings."""
    return {key[:2] for key, f in found.items() if f.verdict == "bad"}


# ---------------------------------------------------------------- sound models

SPLINES = {"coupling": "spline", "prior": "spline", "conditioner": "gated"}
MIXTURES = {"coupling": "mixture", "prior": "mixture"}
LOGIT = {**VARIATIONAL, "transform": "logit"}
SOUND = [
    *[(name, {}) for name in TINY],
    ("glow", {"shape": (3, 8, 8), "permutation": "conv1x1", "split": "mixed", **SPLINES}),
    ("glow", {"permutation": "shuffle", "split": "checkerboard", **MIXTURES}),
    ("glow", {"shape": (3, 8, 8), "coupling": "additive", "dequantization": LOGIT}),
    ("nice", {"shape": (3, 1, 1), "dequantization": {**VARIATIONAL, "steps": 2}}),
    ("realnvp", {"data": {"name": "two_moons"}}),
    ("torus", {"data": {"name": "torus"}}),
    ("sphere", {"data": {"name": "sphere"}}),
]


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
    modules = dict(model.flow.named_modules()) | dict(model.flow.bijection.named_modules())
    assert all(modules[layer] is module for layer, module in layers.items() if layer in modules)
    in_noise = any(layer.startswith("dequantizer.") for layer in layers)
    named = {*layers, *([NOISE_MODEL] if in_noise else [])}
    likely = {IMAGES, SAMPLES, NOISE}
    kinds = likely if data.num_bins is None else {*likely, EXTREME}
    for check in BOTH:
        for inputs in kinds:
            assert {layer for c, layer, i in found if (c, i) == (check, inputs)} == named
    assert {layer for check, layer, _ in found if check == "log-det"} == {*named, ""}
    linear = {name for name, layer in layers.items() if isinstance(layer, Conv1x1 | Conv1x1LU)}
    assert {layer for check, layer, _ in found if check == "condition number"} == linear
    for check in BOUNDS:
        if "round trip" in check:
            assert {inputs for c, _, inputs in found if c == check} == kinds
    exact = {inputs: f.value for (check, _, inputs), f in found.items() if check == EXACT}
    assert exact == ({} if data.num_bins is None else dict.fromkeys(kinds - {SAMPLES}, 1))
    last = 8 if data.num_bins is None else 16 if in_noise else 12
    assert steps == [(i, last) for i in range(1, last + 1)]


def test_layers_are_those_outside_of_conditioners(tmp_path):
    model, _ = a_model(tmp_path, "realnvp")
    inside = [n for n, m in model.flow.named_modules() if isinstance(m, ActNorm)]
    layers = layers_of(model.flow)
    assert any("conditioner" in n for n in inside) and not any("conditioner" in n for n in layers)
    containers = {Sequential, type(model.flow.bijection)}
    assert {type(layer) for layer in layers.values()}.isdisjoint(containers)
    own = Bijection()  # its list of networks is not a list of layers
    own.nets = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(ActNorm((2,)))])
    model.flow.bijection = own
    assert list(layers_of(model.flow)) == ["bijection"]


def test_log_scales_and_the_likelihood_are_those_of_the_model(tmp_path):
    """No model knows random images, so it is worse than a uniform coder."""
    model, data = a_model(tmp_path, classes=3)
    found = examined(model, data, num_images=4, seed=3)
    x = data.split("test").take(slice(0, 4))
    noise = uniform(x.shape, 3, Stream.EVALUATION)
    bits = -model.flow(x, noise).total.mean().item() / (64 * math.log(2))
    assert found["likelihood", "", IMAGES].value == pytest.approx(bits / 8, rel=1e-4)
    assert bad(found) == {("likelihood", "")}
    ranges = log_scale_ranges(model.flow, x, noise)
    assert len(ranges) > 5
    for name, (low, high) in ranges.items():
        coupling = name.endswith(".transform")
        key = (name.removesuffix(".transform"), IMAGES if coupling else "")
        assert found["lowest log-scale", *key].value == pytest.approx(low, abs=1e-5)
        assert found["highest log-scale", *key].value == pytest.approx(high, abs=1e-5)


def test_a_checkerboard_counts_the_half_that_it_transforms(tmp_path):
    model, data = a_model(tmp_path, split="checkerboard", levels=1, steps=1, width=2)
    layer = layers_of(model.flow)["levels.0.layers.3"]

    class Conditioner(nn.Module):
        def forward(self, x, context=None):
            raw = torch.where(layer.keep, 9.0, 0.25).expand_as(x)
            return torch.cat([torch.zeros_like(x), raw], dim=1)

    layer.conditioner = Conditioner()
    found = examined(model, data, num_images=2)
    value = found["highest log-scale", "levels.0.layers.3", IMAGES].value
    assert value == pytest.approx(2 * math.tanh(0.125), rel=1e-4)
    x = data.split("test").take(slice(0, 2))
    ranges = log_scale_ranges(model.flow, x, torch.full(x.shape, 0.5))
    assert ranges["levels.0.layers.3.transform"] == pytest.approx((value, value), rel=1e-4)


@pytest.mark.parametrize("permutation", ["conv1x1", "conv1x1_lu"])
def test_condition_number(permutation, tmp_path):
    model, data = a_model(tmp_path, permutation=permutation)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=seeded()))[0]
    layer = layers_of(model.flow)["levels.0.layers.2"]
    layer.set_weight(rotation @ torch.diag(torch.tensor([10.0, 1, 1, 0.02])))
    value = examined(model, data, num_images=1)["condition number", "levels.0.layers.2", ""]
    assert value.value == pytest.approx(500, rel=1e-3) and value.verdict == "watch"


def test_jacobians():
    """Of any map, by torch's `jacobian`. `diagonal_log_det` is NaN for one off the diagonal."""
    weight = torch.randn(40, 40, generator=seeded(), dtype=torch.float64)
    x = 0.1 * torch.randn(1, 4, 10, generator=seeded(1), dtype=torch.float64)

    def function(x):
        return (x.flatten(1) @ weight).tanh().view_as(x), x

    exact = torch.autograd.functional.jacobian(lambda v: function(v)[0], x).reshape(40, 40)
    torch.testing.assert_close(jacobian_log_det(function, x), torch.linalg.slogdet(exact).logabsdet)
    weight = torch.diag(weight[0])
    torch.testing.assert_close(diagonal_log_det(function, x), jacobian_log_det(function, x))
    weight[3, 7] = 1e-3
    assert diagonal_log_det(function, x).isnan()


def test_latents_of_levels_beyond_float32_are_harmless(tmp_path):
    """u is the rest of x + u: near 0 and 1 it has few digits, which change no level."""
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
    for path, meta in (("the flow", {}), ("own.py:flow", model.checkpoint.meta)):
        described = checkpoint_format.Checkpoint(Path(path), meta, {})
        assert reduced(replace(model, checkpoint=described)).shape == (3, 16, 24)


def test_a_model_that_is_not_convolutional_is_not_reduced(tmp_path, monkeypatch):
    model, data = a_model(tmp_path, "nice")
    assert reduced(model).shape == (1, 8, 8)
    monkeypatch.setattr(log_dets, "LARGEST_JACOBIAN", 63)
    assert reduced(model) is None
    assert not any(check == "log-det" for check, _, _ in examined(model, data, num_images=1))


def test_verdicts():
    def of(check, value, inputs=IMAGES):
        return judge(check, value, "", inputs).verdict

    trip = "data round trip, float32"
    found = [of(trip, v) for v in (0.05, 0.06, 0.5, 0.51, math.nan)]
    assert found == ["ok", "watch", "watch", "bad", "bad"]
    assert [of(EXACT, v) for v in (1, 0.9995, 0.99)] == ["ok", "watch", "bad"]
    # For noise a finite value is at most "watch". Counts of values that are not finite are not
    # exempt.
    assert [of(trip, v, NOISE) for v in (0.05, 1e30, math.inf)] == ["ok", "watch", "bad"]
    assert [of(EXACT, v, NOISE) for v in (1, 0)] == ["ok", "watch"]
    assert [of("forward pass", v, NOISE) for v in (0, 1)] == ["ok", "bad"]
    assert judge(trip, math.inf).value is None
    for check, (watch, worse) in BOUNDS.items():
        assert of(check, watch) == "ok" and (watch == worse or of(check, worse) == "watch")


def test_the_worst_come_first():
    small, fine = judge("log-det", 0.1, "a"), judge("log-det", 0, "c")
    findings = [judge(EXACT, 0.5, "e"), small, fine, judge("log-det", 0.2, "b")]
    findings += [judge(EXACT, 0.25, "f"), judge("log-det", math.nan, "d"), judge("parameters", 1)]
    assert [f.layer for f in worst(findings)] == ["", "d", "b", "a", "f", "e"]
    lists = [fine], [fine, judge("log-det", 5e-4)], [fine, small]
    assert [finding.overall(findings) for findings in lists] == ["ok", "watch", "bad"]
    finding.require_none_bad(lists[1])
    with pytest.raises(RunError, match="6 of 7 .* first: the whole model, d, b, a, f and 1 more$"):
        finding.require_none_bad(findings)


def test_the_worst_of_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(examining, "BATCH_SIZE", 2)
    model, data = a_model(tmp_path, data=npz(tmp_path / "b.npz", test=5), levels=1, steps=1)
    key = ("highest log-scale", "levels.0.layers.3", IMAGES)
    one, two, whole = (examined(model, data, num_images=n) for n in (2, 4, 5))
    values = [found[key].value for found in (one, two, whole)]
    assert values == sorted(values) and values[0] < values[2]
    assert whole[EXACT, "", IMAGES].value == 1
    assert examined(model, data, num_images=2, seed=1) != one == examined(model, data, num_images=2)


class Faulty(Bijection):
    """The identity, but for one of the functions in `FAULTY`."""

    def __init__(self, forward=lambda x: (x, 0), inverse=lambda z: z):
        super().__init__()
        self.functions = forward, inverse
        # with which doctor cannot build a smaller copy of the model without this layer
        self.mark = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x, context=None):
        z, log_det = self.functions[0](x)
        return z, x.new_zeros(len(x)) + log_det

    def inverse(self, z, context=None):
        return self.functions[1](z), z.new_zeros(len(z))


def bright(x):
    """Which images are, `(B, 1, 1, 1)`."""
    return x.mean((1, 2, 3), keepdim=True) > 0


FAULTY = {
    "log-det": {"forward": lambda x: (x, -0.1)},
    "float32": {"forward": lambda x: (x, -0.1 * (x.dtype == torch.float32))},
    "bright": {"forward": lambda x: (x, torch.where(bright(x), math.inf, 0.0).flatten())},
    "lost": {"forward": lambda x: (x * math.nan, 0)},
    "bright, and lost": {"forward": lambda x: (torch.where(bright(x), math.nan, x), 0)},
    "constant": {"forward": lambda x: (torch.ones_like(x), 0)},
    "forward raises": {"forward": lambda x: {}["no such thing"]},
    "inverse raises": {"inverse": lambda z: {}["never written"]},
    "proportional": {"inverse": lambda z: 1.01 * z},
    "bias": {"inverse": lambda z: z + 0.6 / 256},
    "sometimes": {"inverse": lambda z: z + 0.6 / 256 * bright(z)},
}


def faulty(tmp_path, fault):
    """A model with a `Faulty` layer in front of the flow, where its inputs are pixels."""
    model, data = a_model(tmp_path)
    model.flow.bijection = Sequential(Faulty(**FAULTY[fault]), model.flow.bijection)
    return model, data


def entry(name, index, value):
    """Damage to an entry of a parameter of the module."""
    return lambda module, monkeypatch: module.get_parameter(name).__setitem__(index, value)


def forget(layer, monkeypatch):
    layer.initialized.fill_(False)
    layer._known_initialized = False


def equal_rows(layer, monkeypatch):
    layer.matrix[1] = layer.matrix[0]


def too_far(noise, monkeypatch):
    """All layers are sound, and u is at the edges of its bin."""
    for parameter in noise.flow.layers[1].conditioner.parameters():
        parameter *= 5


def shifted_inverse(layer, monkeypatch):
    inverse = layer.inverse
    layer.inverse = lambda *args: (inverse(*args)[0] + 1e-3, inverse(*args)[1])


def wrong_log_det(noise, monkeypatch):
    forward = VariationalNoise.forward
    off = lambda *args: (forward(*args)[0], forward(*args)[1] + 1)  # noqa: E731
    monkeypatch.setattr(VariationalNoise, "forward", off)


ALL, NAN = slice(None), math.nan
WEIGHT = "conditioner.layers.0.weight"
LOW, LINEAR = {"lowest log-scale"}, "condition number"
LOST = {"parameters", *PASSES, *BOTH}
LEARNED, CONTEXT = {"dequantization": VARIATIONAL}, f"{NOISE_MODEL}.context.0"
TRIPS = {
    of: {f"{of} round trip, {precision}" for precision in ("float32", "float64")}
    for of in ("data", "latent")
}
GONE = {*TRIPS["data"], EXACT}
# The options of the model, the damaged module, the damage, and checks of the module that are bad.
DAMAGE = {
    "scale of zero": ({}, "levels.1.layers.1", entry("log_scale", 0, -1e3), LOW),
    "LU of zero": ({}, "levels.1.layers.2", entry("log_scale", 0, -1e3), {LINEAR}),
    "NaN in a network": ({}, "levels.0.layers.6", entry(WEIGHT, (1, 2), NAN), LOST),
    "overflow": ({}, "levels.1.layers.3", entry(WEIGHT, ALL, 3e38), {*PASSES, *BOTH}),
    "not initialized": ({}, "levels.0.layers.4", forget, {*PASSES}),
    "equal rows": ({"permutation": "conv1x1"}, "levels.0.layers.5", equal_rows, {LINEAR, BOTH[0]}),
    "prior of a class": ({"classes": 3}, "class_prior", entry("log_scale", (1, 2), -1e3), LOW),
    "NaN in the noise": (LEARNED, CONTEXT, entry("weight", (0, 0), NAN), {"parameters"}),
    "noise too far": (LEARNED, NOISE_MODEL, too_far, {BOTH[0], "log-det"}),
    "inverse of noise": (LEARNED, f"{NOISE_MODEL}.flow.layers.1", shifted_inverse, {*BOTH}),
    "log-det of noise": (LEARNED, NOISE_MODEL, wrong_log_det, {"log-det"}),
}
# The checks that are bad for the faulty layer, all of them, and for the whole model.
FAULTS = {
    "log-det": ({"log-det"}, {"log-det"}),
    "float32": ({"log-det"}, {"log-det", "float32 likelihood"}),
    "bias": ({*BOTH}, GONE),
    "constant": ({*BOTH, "log-det"}, GONE),
    "inverse raises": ({*BOTH, "inverse pass"}, {*GONE, *TRIPS["latent"]}),
    "forward raises": (
        {*BOTH, "forward pass", "log-det"},
        {*TRIPS["data"], *TRIPS["latent"], "float32 likelihood"},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", [*DAMAGE, *FAULTS])
def test_damage_is_found_and_its_module_named(name, tmp_path, monkeypatch, caplog):
    if name in FAULTS:
        model, data = faulty(tmp_path, name)
        module, (checks, whole) = "layers.0", FAULTS[name]
    else:
        options, module, damage, checks = DAMAGE[name]
        model, data = a_model(tmp_path, **options)
        named = dict(model.flow.named_modules()) | dict(model.flow.bijection.named_modules())
        damage(named[module], monkeypatch)
        whole = set()
    found = examined(model, data, num_images=8 if "noise" in name else 4)
    of_module = {check for check, layer in bad(found) if layer == module}
    assert of_module == checks if whole else of_module >= checks
    assert {check for check, layer in bad(found) if not layer} >= whole
    findings = list(found.values())
    assert finding.overall(findings) == "bad" and (whole or worst(findings)[0].layer == module)
    others = {layer for _, layer in bad(found)} - {module, ""}
    if name == "NaN in the noise":
        lost = {layer for (_, layer, i), f in found.items() if i == SAMPLES and f.value is None}
        assert lost and all(layer.startswith("dequantizer.") for layer in {*lost, *others})
    elif "noise" in name:
        assert others <= {NOISE_MODEL, f"{NOISE_MODEL}.flow.layers.1"}
    else:
        assert not others
    if "raises" in name:
        forward = name == "forward raises"
        check, inputs = ("forward pass", IMAGES) if forward else ("inverse pass", SAMPLES)
        assert found[check, module, inputs].value is None
        (reason,) = [record.message for record in caplog.records]
        assert module in reason and ("no such thing" if forward else "never written") in reason


@torch.no_grad()
def test_narrow_noise_is_sound(tmp_path):
    """It maps values far from those that it draws to one number."""
    model, data = a_model(tmp_path, **LEARNED)
    last = dict(model.flow.named_modules())[f"{NOISE_MODEL}.flow.layers.1"].conditioner.layers[-1]
    last.weight.zero_()
    shift, raw = last.bias.chunk(2)
    shift.fill_(-10), raw.fill_(-2)  # w = 0.22 (eps - 10), so u is 0.014 +- 0.008
    assert bad(examined(model, data, num_images=8)) == {("likelihood", "")}  # it is not trained


def test_the_values_of_a_known_fault(tmp_path):
    nats = 0.1 / 64 / math.log(2)
    found = examined(*faulty(tmp_path, "log-det"), num_images=2)
    for layer in ("layers.0", ""):
        assert found["log-det", layer, IMAGES].value == pytest.approx(nats, rel=1e-3)
    found = examined(*faulty(tmp_path, "float32"))
    assert found["float32 likelihood", "", IMAGES].value == pytest.approx(nats, rel=0.01)
    model, data = faulty(tmp_path, "bias")
    found = examined(model, data)
    for trip in TRIPS["data"]:
        assert found[trip, "", IMAGES].value == pytest.approx(0.6, rel=1e-3)
    x = data.split("test").take(slice(None))
    v = model.flow.dequantizer(x, uniform(x.shape, 0, Stream.EVALUATION))[0]
    size = v.abs().clamp_min(v.square().mean().sqrt()).min().item()
    error = found["inverse of forward", "layers.0", IMAGES].value
    assert error == pytest.approx(0.6 / 256 / size, rel=1e-3)
    # Relative to large entries.
    found = examined(*faulty(tmp_path, "proportional"), num_images=2)
    values = [found[check, "layers.0", IMAGES].value for check in BOTH]
    assert values == pytest.approx([0.01, 0.01], rel=1e-3)


def test_images_are_counted(tmp_path):
    """Those that come back exactly, and those whose result of a layer is not finite."""
    model, data = faulty(tmp_path, "sometimes")
    x = data.split("test").take(slice(None))
    lost = bright(model.flow.dequantizer.middle(x)).float().mean().item()
    assert 0 < lost < 1
    assert examined(model, data)[EXACT, "", IMAGES].value == 1 - lost
    v = model.flow.dequantizer(x, uniform(x.shape, 0, Stream.EVALUATION))[0]
    count = int(bright(v).sum())
    assert 0 < count < len(x)
    for fault in ("bright", "bright, and lost"):
        model, data = faulty(tmp_path, fault)
        found = examined(model, data)
        forward = found["forward pass", "layers.0", IMAGES]
        assert (forward.value, forward.verdict) == (count, "bad")
        # The layers after it are judged by the other images.
        assert {layer for _, layer in bad(found)} <= {"layers.0", ""}
        assert found["inverse of forward", f"layers.1.{FIRST}", IMAGES].verdict == "ok"
    # Of two such layers, the first is named.
    both = (Faulty(**FAULTY[fault]) for fault in ("bright, and lost", "lost"))
    model.flow.bijection = Sequential(*both, model.flow.bijection)
    found = examined(model, data)
    passes = [layer for check, layer, inputs in found if (check, inputs) == (PASSES[0], IMAGES)]
    assert passes == ["layers.0"]
    assert ("inverse of forward", "layers.1") in bad(found)


def test_memory_that_runs_out_and_other_data_are_no_findings(tmp_path, monkeypatch):
    model, data = faulty(tmp_path, "bias")
    greedy = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(Faulty, "forward", greedy)
    with pytest.raises(torch.OutOfMemoryError):
        examine(model, data)
    other = DataSet(a_config(data=npz(tmp_path / "b.npz", shape=(8, 8, 3))).data)
    with pytest.raises(UserError, match="shape"):
        examine(model, other)


def test_the_command(run, tmp_path):
    done = quick("doctor", "--num-images", 5, "--seed", 1, "--weights", "raw", cwd=tmp_path)
    done.failed(
        1, "1 of", "the worst first: the whole model"
    )  # worse than a uniform coder after 20 steps
    values = json.loads((run / "doctor.json").read_text())
    findings = values["findings"]
    assert "wrote runs/glow_digits/doctor.json" in done.out
    last = f"verdict: bad ({values['counts']['ok']} ok"
    assert done.out.splitlines()[-1].startswith(last)
    assert values["verdict"] == "bad" and sum(values["counts"].values()) == len(findings)
    about = ("step", "dataset", "num_images", "seed", "weights", "checkpoint")
    expected = [20, "digits", 5, 1, "raw", "runs/glow_digits/checkpoints/best.safetensors"]
    assert [values[key] for key in about] == expected
    model = load_model(str(run), torch.device("cpu"), "raw")
    found = examined(model, DataSet(model.config.data), num_images=5, seed=1)
    for row in findings:
        own = found.pop((row["check"], row["layer"], row["inputs"]))
        assert row["value"] == pytest.approx(own.value, rel=0.5, abs=1e-5)
        assert (row["watch"], row["bad"], row["verdict"]) == (own.watch, own.bad, own.verdict)
        assert row["check"] in done.out
    assert not found
    # One row per check and kind of input, not per layer.
    assert done.out.count("\n") < 60 < len(findings)
    assert "condition number (watch above 473, bad above 1.89e+03)" in done.out
    assert "images that come back exactly (watch below 1, bad below 0.999)" in done.out
    numbers = {f["value"]: f["layer"] for f in findings if f["check"] == "condition number"}
    largest = f"{max(numbers):.3g} {numbers[max(numbers)]} (of {len(numbers)} ok)"
    assert largest in " ".join(done.out.split())
    done = quick("doctor", "two_moons", "--num-images", 2, "--json", "-", cwd=tmp_path).ok()
    assert json.loads(done.out)["verdict"] == "ok" and "verdict: ok" in done.err


def test_a_damaged_model_exits_with_1_after_writing(run, tmp_path):
    saved = checkpoint_format.read(run / "checkpoints" / "best.safetensors")
    saved.tensors["ema.bijection.levels.1.layers.1.log_scale"].flatten()[0] = -1e3
    saved.tensors[f"ema.bijection.levels.0.layers.3.{WEIGHT}"].flatten()[0] = math.nan
    checkpoint_format.write(tmp_path / "nan.safetensors", saved.meta, saved.tensors)
    words = ("--num-images", 2, "--json", "deep/er/a.json")
    done = quick("doctor", "nan.safetensors", *words, cwd=tmp_path)
    names = ["levels.0.layers.3", "levels.1.layers.1", "the whole model"]
    done.failed(1, f"findings are bad, the worst first: {', '.join(names)}")
    values = json.loads((tmp_path / "deep/er/a.json").read_text())
    assert values["verdict"] == "bad" and values["weights"] == "ema"
    wrong = {f["layer"] for f in values["findings"] if f["verdict"] == "bad"}
    assert wrong == {*names[:2], ""}
    assert "verdict: bad" in done.out and "not finite" in done.out
    assert not (tmp_path / "doctor.json").exists()


def test_every_check_is_documented():
    text = (REPOSITORY / "docs" / "doctor.md").read_text()
    for check, (watch, worse) in BOUNDS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {check} |"))
        for bound in {watch, worse}:
            assert f" {bound:.3g} " in row, (check, bound)

"""Exported graphs: each family of models, wrong files that are refused, and the command."""

import json

import numpy as np
import pytest
import torch
from catalogue import TINY
from cli_helpers import quick, trained, tree
from helpers import a_config, perturb, seeded

from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.errors import RunError, UserError
from flowtrain.flow.flow import initialize
from flowtrain.system import packages
from flowtrain.tools.export import export as exporting
from flowtrain.tools.export import formats

pytestmark = pytest.mark.run
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

ALL, NO_DECODE, SCORE = {"log_prob", "encode", "decode"}, {"log_prob", "encode"}, {"log_prob"}
# Options of a tiny model, other dequantization, and the graphs.
FAMILIES = {
    "nice": ({}, {}, ALL),
    "realnvp": ({"classes": 3}, {}, ALL),
    "glow": ({"permutation": "conv1x1"}, {"transform": "logit"}, ALL),
    "glow additive": ({"coupling": "additive", "permutation": "shuffle"}, {}, ALL),
    "glow spline": ({"coupling": "spline", "bins": 4, "prior": "spline"}, {}, ALL),
    "glow mixture": ({"coupling": "mixture", "split": "mixed", "conditioner": "gated"}, {}, ALL),
    "glow variational": ({}, {"name": "variational", "steps": 1, "width": 4}, ALL),
    "maf": ({"transform": "spline"}, {}, NO_DECODE),
    "causal": ({"classes": 3, "attention": 1, "pixels": True, "downsample": 1}, {}, SCORE),
    "jet": ({}, {}, ALL),
    "tarflow": ({"classes": 3, "label_dropout": 0.1}, {"name": "gaussian"}, NO_DECODE),
}


def a_model(folder, family, points=False):
    """A tiny model of random images of 3x8x8 pixels, or of points, every parameter moved."""
    name = family.split()[0]
    options, dequantization, _ = FAMILIES[family]
    shape, levels = ((2, 1, 1), None) if points else ((3, 8, 8), 256)
    config = a_config({"name": name, **TINY[name], **options}, dequantization=dequantization)
    flow = perturb(build_flow(config, shape, levels), 0.1)
    x = flow.kind.random((64, *shape), seeded())
    initialize(flow, x, torch.rand(x.shape, generator=seeded()))
    meta = {"config": config.resolved(), "step": 0, "versions": {}}
    checkpoint = Checkpoint(folder / "tiny.safetensors", meta, {})
    return LoadedModel(flow.eval().requires_grad_(False), config, "raw", checkpoint)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_onnxruntime(family, tmp_path):
    """`export` compares likelihoods and latents with torch. Other images agree, too."""
    model, said = a_model(tmp_path, family), []
    files = exporting.export(model, "onnx", note=said.append)
    names = FAMILIES[family][2]
    assert files.keys() == {"model.json", *(f"{name}.onnx" for name in names)}
    assert sum("there is no" in str(each) for each in said) == len(ALL - names)
    x = model.flow.kind.random((3, 3, 8, 8), seeded(1))
    noise = torch.rand(x.shape, generator=seeded(2))
    given = {"x": x.numpy()} | ({} if model.flow.exact else {"noise": noise.numpy()})
    log_prob, *bits = formats.runner(files["log_prob.onnx"], "onnx")(given)
    expected = model.flow(x, noise).total
    # float32: 192 entries of about 8 bits, each rounded to 2**-24, and conditioned by the layers
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)
    assert len(bits) == (family != "tarflow")
    if bits:
        np.testing.assert_allclose(bits[0], log_prob / (-192 * np.log(2)), rtol=1e-6)


def test_points_and_the_format_of_torch(tmp_path):
    model = a_model(tmp_path, "realnvp", points=True)
    files = exporting.export(model, "torch")
    assert files.keys() == {"model.json", "log_prob.pt2", "encode.pt2", "decode.pt2"}
    x = torch.randn(5, 2, 1, 1, generator=seeded())
    (log_prob,) = formats.runner(files["log_prob.pt2"], "torch")({"x": x.numpy()})
    np.testing.assert_allclose(log_prob, model.flow.log_prob(x), rtol=1e-5)


def test_facts_in_the_file(tmp_path):
    model = a_model(tmp_path, "nice")
    files = exporting.export(model, "onnx", opset=20)
    graph = onnx.load_from_string(files["log_prob.onnx"])
    facts = {each.key: each.value for each in graph.metadata_props}
    assert facts["graph"] == "log_prob" and facts["likelihood"] == "a bound, from one draw of noise"
    assert (facts["shape"], facts["levels"], facts["unit"]) == ("[3, 8, 8]", "256", "bits/dim")
    assert [each.version for each in graph.opset_import if not each.domain] == [20]
    shapes = [
        [d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim]
        for each in graph.graph.input
    ]
    assert shapes == [["batch", 3, 8, 8]] * 2
    beside = json.loads(files["model.json"])
    assert beside["shape"] == [3, 8, 8] and beside["levels"] == 256


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda name, found: found * (1 + 1e-4 * (name == "log_prob")), "log_prob of samples"),
        (lambda name, found: found + 1e-3 * (name == "encode"), "encode of samples"),
        (lambda name, found: found ^ (name == "decode") if name == "decode" else found, "decode"),
        (lambda name, found: found * np.nan if name == "log_prob" else found, "nan bits/dim"),
    ],
)
def test_a_wrong_file_is_refused(wrong, said, tmp_path, monkeypatch):
    """Each error is larger than rounding, and smaller than a picture shows."""
    model = a_model(tmp_path, "nice")
    functions = {}
    right = formats.runner

    def runner(content, to):
        name = ["log_prob", "encode", "decode"][len(functions)]
        functions[name] = run = right(content, to)
        return lambda inputs: [wrong(name, each) for each in run(inputs)]

    monkeypatch.setattr(exporting, "runner", runner)
    with pytest.raises(RunError, match=said):
        exporting.export(model, "torch")


def test_the_normal_quantile():
    """To 4 roundings of float32, and to more of p where p is close to 1."""
    p = torch.cat([torch.logspace(-37, -1, 2000), torch.linspace(0.05, 0.95, 2001)])
    torch.testing.assert_close(
        formats.normal_quantile(p), torch.special.ndtri(p.double()).float(), rtol=5e-7, atol=1e-7
    )
    upper = 1 - 2.0 ** -torch.arange(2.0, 24)
    torch.testing.assert_close(formats.normal_quantile(upper), -formats.normal_quantile(1 - upper))


@pytest.mark.parametrize("name", ["iaf", "cnf"])
def test_a_likelihood_that_is_no_graph(name, tmp_path, monkeypatch):
    if name == "cnf":
        pytest.importorskip("torchdiffeq")
    monkeypatch.setitem(FAMILIES, name, ({}, {}, set()))
    with pytest.raises(UserError, match="tiny.safetensors: its likelihood"):
        exporting.export(a_model(tmp_path, name, points=True))


def test_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"--to onnx needs the packages onnx and .* \(the extra onnx\)"
    ):
        exporting.export(a_model(tmp_path, "nice"))


def test_the_command(tmp_path):
    """On test images of the data, in a new folder; a second time nothing is replaced."""
    run = trained()["glow"]
    done = quick("export", run, "--to", "torch", "--out", "new", cwd=tmp_path).ok()
    assert "log_prob of test images" in done.out and "decode(encode(x)) of test images" in done.out
    before = tree(tmp_path)
    assert len(before) == 5
    again = quick("export", run, "--to", "torch", "--out", "new", cwd=tmp_path)
    again.failed(2, "--out new: 'model.json' is there already")
    gone = ["--set", "data.name=npz", "--set", "data.path=gone.npz"]
    quick("export", run, *gone, "--out", "x", cwd=tmp_path).failed(2, "gone.npz")
    assert tree(tmp_path) == before

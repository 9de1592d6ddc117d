"""Exported graphs: each family of models, wrong files, the command, and the page in a browser."""

import functools
import json
import shutil
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from catalogue import TINY
from cli_helpers import quick, trained, tree
from coding_helpers import loaded
from fake_hub import serving
from helpers import REPOSITORY, a_config, initialized, perturb, seeded
from PIL import Image

from flowtrain.checkpoints.build import build_flow
from flowtrain.errors import RunError, UserError
from flowtrain.system import packages
from flowtrain.tools.export import export as exporting
from flowtrain.tools.export import formats
from flowtrain.tools.export.graphs import Graph

pytestmark = pytest.mark.run
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

ALL, NO_DECODE, SCORE = {"log_prob", "encode", "decode"}, {"log_prob", "encode"}, {"log_prob"}
GLOW = {"levels": 1, "steps": 1, "width": 4}
PIXELS = {"attention": 1, "pixels": True}
VARIATIONAL = {"name": "variational", "steps": 1, "width": 4}
# Options of a tiny model, other dequantization, and the graphs.
FAMILIES = {
    "nice": ({"couplings": 2}, {}, ALL),
    "realnvp": ({"classes": 2}, {}, ALL),
    "glow": ({"permutation": "conv1x1"}, {"transform": "logit"}, ALL),
    "glow additive": ({**GLOW, "coupling": "additive", "permutation": "shuffle"}, {}, ALL),
    "glow spline": ({**GLOW, "coupling": "spline", "bins": 4, "prior": "spline"}, {}, ALL),
    "glow mixture": ({**GLOW, "coupling": "mixture"}, {}, ALL),
    "glow variational": ({**GLOW, "conditioner": "gated"}, VARIATIONAL, ALL),
    "maf": ({"transform": "spline"}, {}, NO_DECODE),
    "causal": (PIXELS, {}, SCORE),
    "causal classes": ({**PIXELS, "classes": 2, "token": 1, "downsample": 1}, {}, SCORE),
    "jet": ({}, {}, ALL),
    "tarflow": ({"classes": 2, "label_dropout": 0.1}, {"name": "gaussian"}, NO_DECODE),
}
# torch translates 50 operations in a second. These have a loop, a matrix that is inverted before,
# and a function with a gradient of its own.
FAST = ["nice", "glow mixture", "causal"]


def a_model(family, points=False, **more):
    """A tiny model of random images of 3x4x4 pixels, or of points, every parameter moved."""
    name = family.split()[0]
    options, noise, _ = FAMILIES.get(family, ({}, {}, set()))
    shape, levels = ((2, 1, 1), None) if points else ((3, 4, 4), 256)
    config = a_config({"name": name, **TINY[name], **options, **more}, dequantization=noise)
    flow = perturb(build_flow(config, shape, levels), 0.1)
    initialized(flow, flow.kind.random((64, *shape), seeded()))
    return loaded(flow, config, "tiny.safetensors")


@functools.cache
def exported(family):
    """A model, its files, and what is printed."""
    model, said = a_model(family), []
    return model, exporting.export(model, "onnx", opset=20, note=said.append), said


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in FAST]


@pytest.mark.parametrize("family", [*FAST, *SLOW])
def test_a_family_in_onnxruntime(family):
    """`export` compares likelihoods and latents with torch. Other images agree, too."""
    (model, files, said), names = exported(family), FAMILIES[family][2]
    assert files.keys() == {"model.json", *(f"{name}.onnx" for name in names)}
    assert sum("there is no" in str(each) for each in said) == len(ALL - names)
    x = model.flow.kind.random((3, 3, 4, 4), seeded(1))
    noise = torch.rand(x.shape, generator=seeded(2))
    given = {"x": x.numpy()} | ({} if model.flow.exact else {"noise": noise.numpy()})
    log_prob, *bits = formats.runner(files["log_prob.onnx"], "onnx")(given)
    # float32: 48 entries of about 8 bits, each rounded to 2**-24, and conditioned by the layers
    np.testing.assert_allclose(log_prob, model.flow(x, noise).total, rtol=1e-5)
    assert len(bits) == (family != "tarflow")
    if bits:
        np.testing.assert_allclose(bits[0], log_prob / (-48 * np.log(2)), rtol=1e-6)


def test_facts_in_the_file():
    _, files, _ = exported("nice")
    graph = onnx.load_from_string(files["log_prob.onnx"])
    facts = {each.key: each.value for each in graph.metadata_props}
    assert facts["graph"] == "log_prob" and facts["likelihood"] == "a bound, from one draw of noise"
    assert (facts["shape"], facts["levels"], facts["unit"]) == ("[3, 4, 4]", "256", "bits/dim")
    assert [each.version for each in graph.opset_import if not each.domain] == [20]
    shapes = [
        [d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim]
        for each in graph.graph.input
    ]
    assert shapes == [["batch", 3, 4, 4]] * 2
    assert str(REPOSITORY).encode() not in files["log_prob.onnx"]
    beside = json.loads(files["model.json"])
    assert beside["shape"] == [3, 4, 4] and beside["levels"] == 256


def test_points_and_the_format_of_torch():
    """A damaged model is refused."""
    model = a_model("nice", points=True)
    files = exporting.export(model, "torch")
    assert files.keys() == {"model.json", "log_prob.pt2", "encode.pt2", "decode.pt2"}
    x = torch.randn(5, 2, 1, 1, generator=seeded())
    (log_prob,) = formats.runner(files["log_prob.pt2"], "torch")({"x": x.numpy()})
    np.testing.assert_allclose(log_prob, model.flow.log_prob(x), rtol=1e-5)
    damaged = a_model("maf", points=True)
    next(p for p in damaged.flow.parameters() if p.ndim == 2).view(-1)[0] = torch.nan
    with pytest.raises(RunError, match="log_prob of test images: the largest difference is nan"):
        exporting.export(damaged, "torch", x)


@pytest.mark.parametrize(
    "graph, wrong, said",
    [
        ("log_prob", lambda found: found * (1 + 1e-4), "log_prob of samples"),
        ("log_prob", lambda found: found * np.nan, "nan bits/dim"),
        ("encode", lambda found: found + 1e-3, "encode of samples"),
        ("decode", lambda found: found ^ (found == found.max()), "difference is 1 levels, .* 0,"),
    ],
)
def test_a_wrong_file_is_refused(graph, wrong, said, monkeypatch):
    """Each error is larger than rounding, and smaller than a picture shows."""

    def runner(traced, to):
        def run(inputs):
            found = [each.numpy() for each in traced.function(*map(torch.tensor, inputs.values()))]
            return list(map(wrong, found)) if traced.name == graph else found

        return run

    monkeypatch.setattr(exporting, "encoded", lambda traced, *rest: traced)
    monkeypatch.setattr(exporting, "runner", runner)
    with pytest.raises(RunError, match=said):
        exporting.export(a_model("nice"), "torch")


def test_the_normal_quantile_and_the_sigmoid_in_onnxruntime():
    """To 4 roundings of float32, and to more of p where p is close to 1."""

    class Both(torch.nn.Module):
        def forward(self, x):
            return torch.special.ndtri(x), torch.sigmoid(x)

    graph = Graph("both", Both(), {"x": torch.rand(2, generator=seeded())}, ("normal", "sigmoid"))
    run = formats.runner(formats.encoded(graph, "onnx", {}, 18), "onnx")
    p = torch.cat([torch.logspace(-37, -1, 2000), torch.linspace(0.05, 0.95, 2001)])
    normal = torch.special.ndtri(p.double()).float()
    np.testing.assert_allclose(run({"x": p.numpy()})[0], normal, rtol=5e-7, atol=1e-7)
    upper = 1 - 2.0 ** -torch.arange(2.0, 24)
    ends = [run({"x": each.numpy()})[0] for each in (upper, 1 - upper)]
    np.testing.assert_allclose(ends[0], -ends[1], rtol=2e-6)
    x = torch.linspace(-80, 20, 1000)
    np.testing.assert_allclose(run({"x": x.numpy()})[1], x.double().sigmoid(), rtol=5e-7)


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("iaf", {}, "its likelihood"),
        ("cnf", {}, "its likelihood"),
        ("glow", {"context": "grey"}, ".* given the grey image"),
    ],
)
def test_a_likelihood_that_is_no_graph(name, options, said):
    if name == "cnf":
        pytest.importorskip("torchdiffeq")
    with pytest.raises(UserError, match=f"tiny.safetensors: {said}"):
        exporting.export(a_model(name, points=name != "glow", **options))


def test_a_flow_of_other_code():
    model = loaded(a_model("nice").flow, path="own.py:flow")
    with pytest.raises(UserError, match="own.py:flow: a flow of other code"):
        exporting.export(model, "torch")


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_a_layer_that_torch_cannot_translate(to):
    class Branch(torch.nn.Module):
        def forward(self, x):
            return x.exp() if x.sum() > 0 else x

    graph = Graph("encode", Branch(), {"x": torch.ones(2)}, ("z",))
    with pytest.raises(UserError, match="encode: torch .* cannot translate this model: "):
        formats.encoded(graph, to, {}, 18)


def test_a_graph_that_onnxruntime_refuses():
    newer = [onnx.helper.make_opsetid("", 999)]
    graph = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []), opset_imports=newer)
    with pytest.raises(UserError, match=r"onnxruntime \d.* refuses the graph: .*999"):
        formats.runner(graph.SerializeToString(), "onnx")


def test_a_missing_package(monkeypatch):
    model = a_model("nice")
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--to onnx needs the packages onnx and .*extra onnx\)"):
        exporting.export(model)


def test_the_command(tmp_path):
    """On test images of the data, in a new folder; a second time nothing is replaced."""
    run = trained()["nice"]
    done = quick("export", run, "--to", "torch", "--out", "new", cwd=tmp_path).ok()
    assert "log_prob of test images" in done.out and "decode(encode(x)) of test images" in done.out
    before = tree(tmp_path)
    assert len(before) == 5
    again = quick("export", run, "--to", "torch", "--out", "new", cwd=tmp_path)
    again.failed(2, "--out new: 'model.json' already exists")
    gone = ["data.name=npz", "data.path=gone.npz", "--out", "x"]
    quick("export", run, *gone, cwd=tmp_path).failed(2, "gone.npz")
    quick("export", *gone, cwd=tmp_path).failed(2, "no MODEL given")
    assert tree(tmp_path) == before


def test_the_page_in_a_browser(tmp_path):
    """An image is scored, encoded and decoded without Python."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    packages = REPOSITORY / "node_modules"
    if not chromium or not (packages / "onnxruntime-web").is_dir():
        pytest.skip("no Chromium, or no onnxruntime-web: npm install --no-save onnxruntime-web")
    model, files, _ = exported("nice")
    shutil.copy(REPOSITORY / "docs" / "howto" / "browser.html", tmp_path / "index.html")
    (tmp_path / "node_modules").symlink_to(packages)
    (tmp_path / "model").mkdir()
    for name, content in files.items():
        (tmp_path / "model" / name).write_bytes(content)
    x = model.flow.kind.random((1, 3, 4, 4), seeded(3))
    picture = tmp_path / "x.png"
    Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(picture)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with serving(server), playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)  # ms; a busy machine is no failure
        page.add_init_script("Math.random = () => 0.25")
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_function("document.body.innerText.includes('ready')")
        page.set_input_files("#file", picture)
        page.wait_for_function("document.body.innerText.includes('bits/dim')")
        bits, rest = page.inner_text("#said").split(" ", 1)
        expected = model.flow.loss(model.flow(x, torch.full(x.shape, 0.25)).total).item()
        assert rest == "bits/dim; 0 of 48 decoded values differ"
        assert abs(float(bits) - expected) < 6e-5  # four decimals
        mode = model.flow.decode(torch.zeros(1, 48))[0].permute(1, 2, 0)
        page.evaluate("scale.value = 0; scale.dispatchEvent(new Event('input'))")
        opaque = torch.cat([mode, torch.full((4, 4, 1), 255)], dim=2).flatten().tolist()
        shown = """mode => `${decoded.getContext("2d").getImageData(0, 0, 4, 4).data}` == mode"""
        page.wait_for_function(shown, arg=",".join(map(str, opaque)))
        browser.close()

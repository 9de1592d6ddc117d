"""`flowtrain report`: the page is read back with an HTML parser, its pictures pixel by pixel."""

import base64
import io
import json
import math
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from catalogue import SMALL, sets
from cli_helpers import copy_of, quick, trained
from helpers import images, npz, tiny_flow
from PIL import Image

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.load import load_model
from flowtrain.data.splits import DataSet
from flowtrain.evaluation.heat import HeatMaps
from flowtrain.evaluation.heat import picture as heat_picture
from flowtrain.pictures import grid as pictures
from flowtrain.pictures.sample import sample
from flowtrain.tools.doctor.examine import examine
from flowtrain.tools.doctor.findings import Finding
from flowtrain.tools.report import report

SECTIONS = ["evaluation", "curves", "samples", "paths", "reconstructions", "places"]
SECTIONS += ["nearest", "health"]
EMPTY = {"meta", "img", "path", "use", "link", "br", "hr"}
OF_RUN = "run <i>&amp;"  # a name that has to be escaped


class Page(HTMLParser):
    """A page as its text, elements and pictures. Every tag is to be closed, in order."""

    def __init__(self, file):
        super().__init__()
        self.html = file.read_text(encoding="utf-8")
        self.words, self.elements, self.open, self.tables = [], [], [], []
        self.feed(self.html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]

    def picture(self, alt):
        """The pixels of the only image with this text, uint8 (3, H, W)."""
        (source,) = [image["src"] for image in self.all("img") if image["alt"] == alt]
        data = base64.b64decode(source.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(np.array(image)).movedim(-1, 0)


def page_of(run, *options, cwd, out="new/page.html"):
    done = quick("report", run, *options, "--out", out, cwd=cwd).ok()
    assert f"wrote {out}" in done.out
    return Page(cwd / out), done


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run with its test figure, its model, and the page about it."""
    folder = tmp_path_factory.mktemp("report")
    run = copy_of(trained()["glow"], folder / OF_RUN)
    quick("evaluate", OF_RUN, cwd=folder).ok()
    done = quick("report", OF_RUN, "--num-images", 10, "--seed", 3, cwd=folder).ok()
    assert done.out.splitlines()[-1].startswith(f"wrote {OF_RUN}/report.html")
    assert "not in it" not in done.out
    return run, load_model(str(run), torch.device("cpu")), Page(run / "report.html")


pytestmark = pytest.mark.run


def test_the_page_is_whole_and_needs_nothing_else(digits):
    page = digits[2]
    links = {key: [a[key] for _, a in page.elements if key in a] for key in ("src", "href", "id")}
    sources = links["src"] + links["href"]
    assert len(sources) > 40 and all(s.startswith(("data:image/", "#")) for s in sources)
    assert not page.all("script", "link", "iframe", "object", "base")
    assert "@import" not in page.html and "url(http" not in page.html
    (policy,) = [m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy["content"]
    assert len(set(links["id"])) == len(links["id"])
    assert [attributes["id"] for attributes in page.all("h2")] == [*SECTIONS, "configuration"]
    assert {a["href"][1:] for a in page.all("a")} == {*SECTIONS, "configuration"}
    assert {use.get("xlink:href", "")[1:] for use in page.all("use")} <= set(links["id"])
    assert all(image["alt"] for image in page.all("img"))
    curves = [figure["aria-label"] for figure in page.all("figure") if figure.get("role") == "img"]
    assert len(page.all("svg")) == len(curves) == 5
    assert "Curve: Loss, bits/dim, against time" in curves and "currentColor" in page.html
    assert not page.all("i", "b") and f"{OF_RUN} A glow flow on digits" in page.text
    assert "run &lt;i&gt;&amp;amp;/checkpoints" in page.html


def test_the_page_has_the_models_figures(digits):
    run, model, page = digits
    summary = json.loads((run / "summary.json").read_text())
    best = f"{summary['best_validation_bits_per_dim']:.4f}, step {summary['best_step']}"
    parameters = f"Parameters {sum(p.numel() for p in model.flow.parameters()):,}"
    for text in (parameters, "1 x 8 x 8, 17 levels", f"Best validation, bits/dim {best}"):
        assert text in page.text
    (found,) = [word for word in page.words if word.startswith("seed:")]
    assert found == model.config.yaml()
    result = json.loads((run / "evaluate-test.json").read_text())
    figure = f"{result['bits_per_dim']:.4f} ± {result['bits_per_dim_stderr']:.4f}"
    row = ["test", "digits", figure, f"{result['nats_per_image']:.2f}", "elbo", "1", "180", "ema"]
    assert page.tables[0][1:] == [[*row, str(result["step"])]]


def test_the_pictures_are_those_of_the_seed(digits):
    _, model, page = digits
    flow = model.flow
    for temperature in (0.5, 0.7, 0.85, 1.0):
        expected = pictures.grid(sample(flow, 16, [temperature], 3), 17, 4)
        assert torch.equal(page.picture(f"Samples at temperature {temperature}"), expected)
    x = DataSet(model.config.data).split("test").sample(10, 3).take(slice(None))
    assert torch.equal(flow.decode(flow.encode(x)), x)
    assert "10 of 10 test images come back exactly" in page.text
    texts = ("test images", "the same images, encoded and decoded", "their differences, amplified")
    for text, shown in zip(texts, (x, x, torch.zeros_like(x)), strict=True):
        assert torch.equal(page.picture(f"8 {text}"), pictures.grid(shown[:8], 17, 8))


def test_the_most_unusual_places_come_first(digits):
    _, model, page = digits
    data, counts = DataSet(model.config.data), {"train": 256, "test": 10}
    training, x = (data.split(k).sample(n, 3).take(slice(None)) for k, n in counts.items())
    heat = HeatMaps(model.flow, training.numpy(), 3)(x.numpy())
    worst = np.argsort(-heat.max(axis=(1, 2)))[:8]
    expected = heat_picture(x[worst], heat[worst], 17, 8)
    assert torch.equal(page.picture("Test images above their heat maps"), expected)


def test_the_nearest_training_images_are_nearest(digits):
    _, model, page = digits
    data = DataSet(model.config.data)
    train, drawn = data.split("train").take(slice(None)), sample(model.flow, 8, [1.0], 3)
    assert torch.equal(page.picture("Sample 2"), pictures.grid(drawn[1:2], 17, 1))
    distance = (drawn[1] / 16 - train / 16).flatten(1).norm(dim=1)
    best = distance.argsort(stable=True)[:3].tolist()
    alts = [image["alt"] for image in page.all("img")]
    shown = [alt for alt in alts if alt.startswith(("Training image", "Sample "))]
    assert shown[4:8] == ["Sample 2", *(f"Training image {position}" for position in best)]
    assert "sample " + " ".join(f"{distance[each]:.2f}" for each in best) in page.text
    test = data.split("test").sample(16, 3).take(slice(None))
    own = [(one / 16 - train / 16).flatten(1).norm(dim=1).min().item() for one in test]
    assert f"are at {sorted(own)[7]:.2f} from their nearest training image" in page.text


def test_the_health_table_is_the_doctors(digits):
    _, model, page = digits
    findings = examine(model, DataSet(model.config.data), num_images=10, seed=3)
    worst, *checks = page.tables[1:]
    rows = [row for table in checks for row in table[1:]]
    expected = sorted((f.check, f.layer or "whole model") for f in findings)
    assert sorted((row[1], row[5]) for row in rows) == expected
    assert worst[1:] == [table[1] for table in checks]
    assert {row[0] for row in rows} == {f.verdict for f in findings}
    assert "1.798e+308" not in page.text


def test_the_same_command_makes_the_same_page(digits, tmp_path):
    words = ("--num-images", 10, "--seed", 3)
    run, out = digits[0], str(tmp_path / "again.html")
    assert page_of(run.name, *words, cwd=run.parent, out=out)[0].html == digits[2].html


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A run on images in a file that was renamed."""
    folder = tmp_path_factory.mktemp("moved")
    npz(folder / "data.npz", train=30, test=5)
    words = sets(data__name="npz", data__path="data.npz", data__validation=0)
    words += sets(train__num_steps=2, train__log_every=5)
    quick("train", *SMALL, *words, "--run-dir", "run", cwd=folder).ok()
    (folder / "data.npz").rename(folder / "elsewhere.npz")
    return folder


def test_without_its_data_a_page_has_the_rest(moved, tmp_path):
    page, done = page_of("run", cwd=moved)
    missing = {line.split(": ")[1] for line in done.out.splitlines() if "not in it: " in line}
    parts = {"evaluations", "reconstructions", "unusual places", "nearest training images"}
    assert missing >= {*parts, "health"}
    assert page.text.count("data.npz") >= 3 and "--set data.KEY=VALUE" in page.text
    assert "flowtrain evaluate run" in page.text
    assert "none: nothing is held out" in page.text
    assert len([image for image in page.all("img") if image["alt"].startswith("Samples")]) == 4
    assert len(page.all("svg")) == 5
    page, _ = page_of("run", *sets(data__path="elsewhere.npz"), cwd=moved)
    assert "5 of 5 test images come back exactly" in page.text and "(the median of 5)" in page.text
    # A checkpoint alone.
    shutil.copy(moved / "run" / "checkpoints" / "last.safetensors", tmp_path / "model.safetensors")
    quick("report", "model.safetensors", "--weights", "raw", cwd=tmp_path).ok()
    page = Page(tmp_path / "report.html")
    assert "metrics.jsonl: cannot be read" in page.text and "with its raw weights" in page.text
    assert "flowtrain evaluate model.safetensors does it" in page.text
    # Broken files.
    run = copy_of(moved / "run", tmp_path / "run\udcff")  # whose name is no UTF-8
    (run / "metrics.jsonl").write_text("")
    (run / "evaluate-test.json").write_text("{")
    page, _ = page_of(run.name, cwd=tmp_path)
    assert "metrics.jsonl: it has no line yet" in page.text
    assert "evaluate-test.json: broken" in page.text


def test_a_figure_of_another_model_and_a_film_of_samples(digits, tmp_path):
    run = copy_of(digits[0], tmp_path / "run")
    values = json.loads((run / "evaluate-test.json").read_text())
    other = {**values, "dataset": "my photos", "split": "all"}
    (run / "evaluate-photos-all.json").write_text(json.dumps(other))
    page, done = page_of("run", "--weights", "raw", "--num-images", 1, cwd=tmp_path)
    assert "evaluate-test.json was not measured on the weights of this report" in page.text
    command = "flowtrain evaluate run/checkpoints/best.safetensors --split test --weights raw"
    assert command in page.text
    assert "best.safetensors --data 'my photos' --weights raw measures" in page.text
    assert "not in it: paths" not in done.out
    assert page.picture("Paths between test images").shape[2] >= 800
    heat = page.picture("Test images above their heat maps")
    assert heat.shape[1] > heat.shape[2]  # of a single image
    (moving,) = (image for image in page.all("img") if image["src"].startswith("data:image/gif"))
    film = Image.open(io.BytesIO(base64.b64decode(moving["src"].partition(",")[2])))
    files = sorted((run / "samples").glob("*.png"))
    assert film.width == 400 and film.n_frames >= len(files) > 1

    (run / "evaluate-photos-all.json").unlink()
    values |= {"loss": None, "loss_stderr": None, "nats_per_image": None}
    (run / "evaluate-test.json").write_text(json.dumps(values))
    files[0].write_bytes(b"no picture")
    page, done = page_of("run", "--num-images", 1, cwd=tmp_path)
    assert page.tables[0][1][2:4] == ["not finite", "not finite"]
    assert "was not measured on" not in page.text
    assert f"not in it: samples over training: run/samples/{files[0].name} cannot" in done.out


def test_a_film_of_narrow_pictures_has_a_largest_height(tmp_path):
    """A stranger's picture of a few bytes may be very tall."""
    (tmp_path / "samples").mkdir()
    for shade in (0, 255):
        Image.new("L", (1, 100), shade).save(tmp_path / "samples" / f"{shade}.png")
    film = Image.open(io.BytesIO(report._over_training(tmp_path)))
    assert film.size == (400, 4000)


def test_a_damaged_model_has_a_page(digits, tmp_path):
    run = copy_of(digits[0], tmp_path / "run")
    for file in sorted((run / "samples").glob("*.png"))[1:]:
        file.unlink()
    best = checkpoint_format.read(run / "checkpoints" / "best.safetensors")
    for name, tensor in best.tensors.items():
        if tensor.is_floating_point():
            best.tensors[name] = torch.full_like(tensor, math.nan)
    meta = {**best.meta, "versions": {"flowtrain": "0.1"}}
    checkpoint_format.write(run / "checkpoints" / "best.safetensors", meta, best.tensors)
    page, done = page_of("run", "--num-images", 2, cwd=tmp_path)
    assert "not in it: samples at 0.5: " in done.out and "not in it: reconstructions: " in done.out
    assert "not in it: samples over training: run/samples has fewer than two" in done.out
    assert page.tables[1][1][0] == "bad" and "not finite" in page.text
    assert page.text.endswith("the checkpoint was written by flowtrain 0.1.")


def test_points_have_a_page(tmp_path):
    """Of a trained model, whose checkpoint has no progress of training."""
    quick("evaluate", "two_moons", "--num-images", 20, cwd=tmp_path).ok()
    page, _ = page_of("two_moons", "--num-images", 2, cwd=tmp_path)
    result = json.loads((tmp_path / "runs/zoo/two_moons/evaluate-test.json").read_text())
    figure = f"{result['nats_per_image']:.4f} ± {result['nats_per_image_stderr']:.4f}"
    assert [row[2] for row in page.tables[0]] == ["Nats", figure]
    assert "2 x 1 x 1, real values" in page.text and "Best validation" not in page.text
    shown = [image["alt"] for image in page.all("img")]
    assert shown == ["Samples at temperature 1.0", "Paths between test images"]
    assert page.text.count("real-valued data are not images") == 3


def test_differences_are_counted_sorted_and_amplified(monkeypatch):
    flow, x = tiny_flow(), images(5, (1, 4, 4))
    x[3, 0, 0, 0], x[1, 0, 2, 1] = 100, 200

    def decode(z, context):
        back = x[z].clone()
        back[z == 3, 0, 0, 0] += 1
        back[z == 1, 0, 2, 1] -= 50
        return back

    monkeypatch.setattr(report, "fitting_batch_size", lambda flow: 2)
    numbered = iter(torch.arange(5).split(2))
    fake = SimpleNamespace(kind=flow.kind, encode=lambda part: next(numbered), decode=decode)
    fake.context_of = lambda part: None
    found = report.reconstruct(fake, x)
    assert (found.exact, found.largest, found.amplification) == (3, 50, 64)
    assert torch.equal(found.x, x[[1, 3, 0, 2, 4]])
    assert int(found.back[0, 0, 2, 1]) == 150 and int(found.back[1, 0, 0, 0]) == 101
    assert int(found.difference[0, 0, 2, 1]) == 255 and int(found.difference[1, 0, 0, 0]) == 64
    assert int(found.difference.int().sum()) == 255 + 64


def test_the_worst_finding_of_a_check_comes_first():
    def finding(check, value, verdict, watch=1.0, bad=2.0):
        return Finding(check, f"at {value}", "", value, watch, bad, verdict)

    findings = [
        finding("fine", 0.5, "ok", bad=sys.float_info.max),
        finding("fine", 0.75, "ok"),
        finding("high", 1.5, "watch"),
        finding("high", 3.0, "bad"),
        finding("high", None, "bad"),
        finding("low", 1.0, "ok", 0.75, 0.5),
        finding("low", 0.625, "watch", 0.75, 0.5),
    ]
    found = [[f.value for f in table] for table in report.by_check(findings)]
    assert found == [[None, 3.0, 1.5], [0.625, 1.0], [0.75, 0.5]]

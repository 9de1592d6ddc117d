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

import flowtrain
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.load import load_model
from flowtrain.data.splits import DataSet
from flowtrain.pictures import grid as pictures
from flowtrain.pictures.sample import sample
from flowtrain.tools.doctor.examine import examine
from flowtrain.tools.doctor.findings import Finding
from flowtrain.tools.report import report

SECTIONS = [
    "evaluation",
    "curves",
    "samples",
    "paths",
    "reconstructions",
    "nearest",
    "health",
    "configuration",
]
EMPTY = {"meta", "img", "path", "use", "link", "br", "hr"}


class Page(HTMLParser):
    """A page as its text, elements and pictures. Every tag is to be closed, in order."""

    def __init__(self, html):
        super().__init__()
        self.html, self.words, self.elements, self.open, self.tables = html, [], [], [], []
        self.feed(html)
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

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

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
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(np.array(image)).movedim(-1, 0)


def page_of(run, *options, cwd, out="new/page.html"):
    done = quick("report", run, *options, "--out", out, cwd=cwd).ok()
    assert f"wrote {out}" in done.out
    return Page((cwd / out).read_text(encoding="utf-8")), done


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run with its test figure, the flow, and the page about it."""
    folder = tmp_path_factory.mktemp("report")
    copy_of(trained()["glow"], folder / "run <i>&amp;")
    quick("evaluate", "run <i>&amp;", cwd=folder).ok()
    done = quick("report", "run <i>&amp;", "--num-images", 10, "--seed", 3, cwd=folder).ok()
    run = folder / "run <i>&amp;"
    assert done.out.splitlines()[-1].startswith("wrote run <i>&amp;/report.html")
    assert "not in it" not in done.out
    return run, flowtrain.load(str(run)), Page((run / "report.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(digits):
    page = digits[2]
    sources = [
        value
        for _, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "srcset")
    ]
    assert (
        all(
            value.startswith(("data:image/", "#")) and "http" not in value[:40] for value in sources
        )
        and len(sources) > 40
    )
    assert not page.all("script", "link", "iframe", "object", "base")
    assert "@import" not in page.html and "url(http" not in page.html
    (policy,) = [
        meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy["content"]


def test_the_page_is_whole(digits):
    page = digits[2]
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(names)) == len(names)
    assert [attributes["id"] for attributes in page.all("h2")] == SECTIONS
    links = {a["href"][1:] for a in page.all("a")}
    assert links == set(SECTIONS)
    used = {attributes.get("xlink:href", "")[1:] for attributes in page.all("use")}
    assert used <= set(names)
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["aria-label"] for svg in page.all("figure") if svg.get("role") == "img")


def test_what_files_say_is_escaped(digits):
    page = digits[2]
    assert not page.all("i", "b") and "run <i>&amp; A glow flow on digits" in page.text
    assert "run &lt;i&gt;&amp;amp;/checkpoints" in page.html


def test_the_page_says_what_the_model_is(digits):
    run, flow, page = digits
    summary = json.loads((run / "summary.json").read_text())
    parameters = sum(p.numel() for p in flow.parameters())
    for text in (
        f"Parameters {parameters:,}",
        "1 x 8 x 8, 17 levels",
        f"{summary['best_validation_bits_per_dim']:.4f}, step {summary['best_step']}",
    ):
        assert text in page.text
    config = load_model(str(run), torch.device("cpu")).config
    (found,) = [word for word in page.words if word.startswith("seed:")]
    assert found == config.yaml()


def test_the_page_has_the_evaluation(digits):
    run, _, page = digits
    result = json.loads((run / "evaluate-test.json").read_text())
    figure = f"{result['bits_per_dim']:.4f} ± {result['bits_per_dim_stderr']:.4f}"
    row = [
        "test",
        "digits",
        figure,
        f"{result['nats_per_image']:.2f}",
        "elbo",
        "1",
        "180",
        "ema",
        str(result["step"]),
    ]
    assert page.tables[0][1:] == [row]


def test_the_samples_are_those_of_the_seed(digits):
    _, flow, page = digits
    for temperature in (0.5, 0.7, 0.85, 1.0):
        expected = pictures.grid(sample(flow, 16, [temperature], 3), 17, 4)
        assert torch.equal(page.picture(f"Samples at temperature {temperature}"), expected)


def test_the_curves_are_there(digits):
    page = digits[2]
    titles = [figure["aria-label"] for figure in page.all("figure") if figure.get("role") == "img"]
    assert (
        len(page.all("svg")) == len(titles) == 5 and "Curve: Loss, bits/dim, against time" in titles
    )
    assert "currentColor" in page.html and "bits/dim" in page.text


def test_reconstructions_are_counted_and_shown(digits):
    run, flow, page = digits
    x = (
        DataSet(load_model(str(run), torch.device("cpu")).config.data)
        .split("test")
        .sample(10, 3)
        .take(slice(None))
    )
    assert torch.equal(flow.decode(flow.encode(x)), x)
    assert "10 of 10 test images come back exactly" in page.text
    assert torch.equal(page.picture("8 test images"), pictures.grid(x[:8], 17, 8))
    assert torch.equal(
        page.picture("8 the same images, encoded and decoded"), pictures.grid(x[:8], 17, 8)
    )
    assert torch.equal(
        page.picture("8 their differences, amplified"),
        pictures.grid(torch.zeros_like(x[:8]), 17, 8),
    )


def test_the_nearest_training_images_are_nearest(digits):
    run, flow, page = digits
    data = DataSet(load_model(str(run), torch.device("cpu")).config.data)
    train, drawn = data.split("train").take(slice(None)), sample(flow, 8, [1.0], 3)
    assert torch.equal(page.picture("Sample 2"), pictures.grid(drawn[1:2], 17, 1))
    distance = (drawn[1] / 16 - train / 16).flatten(1).norm(dim=1)
    best = distance.argsort(stable=True)[:3].tolist()
    shown = [
        image["alt"]
        for image in page.all("img")
        if image["alt"].startswith(("Training image", "Sample "))
    ]
    assert shown[4:8] == ["Sample 2", *(f"Training image {position}" for position in best)]
    assert (
        f"sample {distance[best[0]]:.2f} {distance[best[1]]:.2f} {distance[best[2]]:.2f}"
        in page.text
    )
    test = data.split("test").sample(16, 3).take(slice(None))
    own = [(one / 16 - train / 16).flatten(1).norm(dim=1).min().item() for one in test]
    assert f"are at {sorted(own)[7]:.2f} from their nearest training image" in page.text


def test_the_health_table_is_the_doctors(digits):
    run, _, page = digits
    model = load_model(str(run), torch.device("cpu"))
    findings = examine(model, DataSet(model.config.data), num_images=10, seed=3)
    worst, *checks = page.tables[1:]
    rows = [row for table in checks for row in table[1:]]
    assert sorted((row[1], row[5]) for row in rows) == sorted(
        (f.check, f.layer or "whole model") for f in findings
    )
    assert [row[1] for row in worst[1:]] == [table[1][1] for table in checks]
    assert {row[0] for row in rows} == {f.verdict for f in findings}
    assert "1.798e+308" not in page.text


def test_the_same_command_makes_the_same_page(digits, tmp_path):
    run, _, page = digits
    again, _ = page_of(
        run.name, "--num-images", 10, "--seed", 3, cwd=run.parent, out=str(tmp_path / "again.html")
    )
    assert again.html == page.html


# --- what may be missing --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A run on images in a file, and the file."""
    folder = tmp_path_factory.mktemp("moved")
    npz(folder / "data.npz", train=30, test=5)
    options = [
        *SMALL,
        *sets(data__name="npz", data__path="data.npz", data__validation=0, train__num_steps=2),
    ]
    quick("train", *options, *sets(train__log_every=5), "--run-dir", "run", cwd=folder).ok()
    (folder / "data.npz").rename(folder / "elsewhere.npz")
    return folder


def test_without_its_data_a_page_has_the_rest(moved):
    page, done = page_of("run", cwd=moved)
    for part in ("evaluations", "reconstructions", "nearest training images", "health"):
        assert f"not in it: {part}: " in done.out
    assert page.text.count("data.npz") >= 3 and "--set data.KEY=VALUE" in page.text
    assert "flowtrain evaluate run" in page.text
    assert "none: nothing is held out" in page.text
    assert len([image for image in page.all("img") if image["alt"].startswith("Samples")]) == 4
    assert len(page.all("svg")) == 5


def test_data_that_were_moved_are_found(moved):
    page, _ = page_of("run", *sets(data__path="elsewhere.npz"), cwd=moved)
    assert "5 of 5 test images come back exactly" in page.text and "(the median of 5)" in page.text


def test_a_checkpoint_alone_has_a_page(moved, tmp_path):
    shutil.copy(moved / "run" / "checkpoints" / "last.safetensors", tmp_path / "model.safetensors")
    quick("report", "model.safetensors", "--weights", "raw", cwd=tmp_path).ok()
    page = Page((tmp_path / "report.html").read_text())
    assert "metrics.jsonl: cannot be read" in page.text and "with its raw weights" in page.text


def test_a_broken_file_of_the_run_is_said(moved, tmp_path):
    run = copy_of(moved / "run", tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    (run / "evaluate-test.json").write_text("{")
    page, _ = page_of("run", cwd=tmp_path)
    assert (
        "metrics.jsonl: it has no line yet" in page.text
        and "evaluate-test.json: broken" in page.text
    )


def test_a_figure_of_another_model_is_said(digits, tmp_path):
    run = copy_of(digits[0], tmp_path / "run")
    page, _ = page_of("run", "--weights", "raw", "--num-images", 1, cwd=tmp_path)
    assert "evaluate-test.json was not measured on the weights of this report" in page.text
    assert (
        "flowtrain evaluate run/checkpoints/best.safetensors --split test --weights raw"
        in page.text
    )
    values = json.loads((run / "evaluate-test.json").read_text())
    unknown = {**values, "loss": None, "loss_stderr": None, "nats_per_image": None}
    (run / "evaluate-test.json").write_text(json.dumps(unknown))
    page, _ = page_of("run", "--num-images", 1, cwd=tmp_path)
    assert page.tables[0][1][2:4] == ["not finite", "not finite"]
    assert "was not measured on" not in page.text


def test_paths_and_samples_over_the_training_are_shown(digits, tmp_path):
    run = copy_of(digits[0], tmp_path / "run")
    page, done = page_of("run", "--num-images", 2, cwd=tmp_path)
    assert "not in it: paths" not in done.out
    (path,) = (image for image in page.all("img") if image["alt"] == "Paths between test images")
    data = base64.b64decode(path["src"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).width >= 800
    (moving,) = (image for image in page.all("img") if image["src"].startswith("data:image/gif"))
    film = Image.open(io.BytesIO(base64.b64decode(moving["src"].partition(",")[2])))
    pictures = sorted((run / "samples").glob("*.png"))
    assert film.width == 400 and film.n_frames >= len(pictures) > 1

    pictures[0].write_bytes(b"no picture")
    _, done = page_of("run", "--num-images", 2, cwd=tmp_path)
    assert f"not in it: samples over training: run/samples/{pictures[0].name} cannot" in done.out
    pictures[0].unlink()
    for file in pictures[2:]:
        file.unlink()
    _, done = page_of("run", "--num-images", 2, cwd=tmp_path)
    assert "not in it: samples over training: run/samples has fewer than two" in done.out


def test_a_damaged_model_has_a_page(digits, tmp_path):
    run = copy_of(digits[0], tmp_path / "run")
    best = checkpoint_format.read(run / "checkpoints" / "best.safetensors")
    for name, tensor in best.tensors.items():
        if tensor.is_floating_point():
            best.tensors[name] = torch.full_like(tensor, math.nan)
    checkpoint_format.write(run / "checkpoints" / "best.safetensors", best.meta, best.tensors)
    page, done = page_of("run", "--num-images", 2, cwd=tmp_path)
    assert "not in it: samples at 0.5: " in done.out and "not in it: reconstructions: " in done.out
    assert page.tables[1][1][0] == "bad" and "not finite" in page.text


def test_points_have_a_page(tmp_path):
    options = sets(
        train__num_steps=5, train__log_every=5, model__width=8, model__blocks=1, data__count=200
    )
    quick(
        "train", "--config", "realnvp_two_moons.yaml", *options, "--run-dir", "run", cwd=tmp_path
    ).ok()
    quick("evaluate", "run", "--num-images", 20, cwd=tmp_path).ok()
    page, _ = page_of("run", cwd=tmp_path)
    result = json.loads((tmp_path / "run" / "evaluate-test.json").read_text())
    assert (
        page.tables[0][1][2]
        == f"{result['nats_per_image']:.4f} ± {result['nats_per_image_stderr']:.4f}"
    )
    assert "2 x 1 x 1, real values" in page.text and "Best validation, nats" in page.text
    shown = [image["alt"] for image in page.all("img")]
    assert shown == ["Samples at temperature 1.0", "Paths between test images"]
    assert page.text.count("real-valued data are no images") == 2


# --- measurements ---------------------------------------------------------------------------------


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
    fake = SimpleNamespace(
        kind=flow.kind,
        encode=lambda part: next(numbered),
        decode=decode,
        context_of=lambda part: None,
    )
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
    tables = report.by_check(findings)
    assert [[f.value for f in found] for _, found in tables] == [
        [None, 3.0, 1.5],
        [0.625, 1.0],
        [0.75, 0.5],
    ]
    assert all(worst is found[0] for worst, found in tables)

"""The commands with a model of images given a part of them."""

import json

import numpy as np
import pytest
from catalogue import TINY_RUN, sets
from cli_helpers import FOLDER, metrics, quick
from coding_helpers import picture
from helpers import npz
from PIL import Image

pytestmark = pytest.mark.run

GIVEN = "given the image at 4x4 pixels"
OPTIONS = [*TINY_RUN, *sets(data__name="npz", data__path="colour.npz", data__flip=True)]
OPTIONS += sets(model__context="downsample", train__num_steps=10)


@pytest.fixture(scope="module")
def folder():
    """A run, and the images that it was trained on."""
    folder = FOLDER / "conditional"
    folder.mkdir()
    npz(folder / "colour.npz", train=80, test=10, shape=(8, 8, 3))
    done = quick("train", *OPTIONS, "--run-dir", "run", cwd=folder).ok()
    assert f"glow of images {GIVEN.removesuffix(' pixels')}" in done.out
    assert f"bits/dim, {GIVEN}, on the validation images" in done.out
    return folder


def test_evaluate_names_the_context(folder):
    done = quick("evaluate", "run", "--json", "e.json", cwd=folder).ok()
    result = json.loads((folder / "e.json").read_text())
    assert result["given"] == "the image at 4x4 pixels"
    assert result["max_reconstruction_error"] < 0.5
    assert f"bits/dim, {GIVEN} (10 test images)" in done.out
    assert "conditional on" in done.out and "not comparable with figures of whole" in done.out
    other = quick("evaluate", "run", "--data", "colour.npz", "--json", "-", cwd=folder).ok()
    assert json.loads(other.out)["bits_per_dim"] == result["bits_per_dim"]
    picture(folder / "photos" / "x.png", mode="RGB")
    done = quick("evaluate", "run", "--data", "photos", "--json", "-", cwd=folder).ok()
    assert json.loads(done.out)["split"] == "all" and json.loads(done.out)["num_images"] == 1


def test_going_on_gives_the_same_run(folder):
    (half,) = (folder / "run" / "checkpoints").glob("step-*5.safetensors")
    quick("train", *OPTIONS, "--resume", half, "--run-dir", "again", cwd=folder).ok()
    later = [row for row in metrics(folder / "run", timeless=True) if row["step"] > 5]
    assert metrics(folder / "again", timeless=True) == later


def test_samples_are_shown_beside_what_is_given(folder, tmp_path):
    done = quick("sample", "run", "--num-images", 3, cwd=folder).ok()
    assert "24 samples" in done.out
    # Eight rows of a context and three samples, in frames.
    width, height = Image.open(folder / "run" / "sample.png").size
    assert width > 800 and height == 2 * width - 2
    x = np.load(folder / "colour.npz")["x_test"][0]
    Image.fromarray(x).save(folder / "x.png")
    words = ["--image", "x.png", "--num-images", 3]
    done = quick("sample", "run", *words, "--out", "s.npz", cwd=folder).ok()
    assert "context: x.png at 8x8, reduced to 4x4" in done.out
    arrays = np.load(folder / "s.npz")
    assert arrays["images"].shape == (3, 8, 8, 3) and arrays["context"].shape == (3, 4, 4, 3)
    # Other test images give other contexts.
    npz(tmp_path / "moved.npz", train=80, test=9, shape=(8, 8, 3), seed=1)
    words = ["--num-images", 1, *sets(data__path=tmp_path / "moved.npz"), "--out", "moved.npz"]
    quick("sample", "run", *words, cwd=folder).ok()
    quick("sample", "run", "--num-images", 1, "--out", "own.npz", cwd=folder).ok()
    moved, own = (np.load(folder / name)["context"] for name in ("moved.npz", "own.npz"))
    assert moved.shape == own.shape and not np.array_equal(moved, own)


def test_other_commands_name_it(folder):
    assert f"glow, {GIVEN}" in quick("info", "run", cwd=folder).ok().out
    said = "run: its losses are of images given downsample by 2 (model.context)"
    assert said in quick("compare", "run", cwd=folder).ok().out
    quick("doctor", "run", "--num-images", 4, cwd=folder)
    findings = json.loads((folder / "run" / "doctor.json").read_text())["findings"]
    # These images are noise, and a uniform coder has the better likelihood.
    assert {each["check"] for each in findings if each["verdict"] != "ok"} <= {"likelihood"}
    quick("ood", "run", "--data", "noise", "--num-images", 4, cwd=folder).ok()
    done = quick("report", "run", "--num-images", 4, cwd=folder).ok()
    missing = {line.split(": ")[1] for line in done.out.splitlines() if "not in it: " in line}
    assert missing == {"evaluations", "paths", "samples over training"}
    page = (folder / "run" / "report.html").read_text()
    assert f"of images {GIVEN}: all its figures are conditional on that" in page

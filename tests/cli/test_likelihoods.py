"""The commands with models whose figures are no plain bits/dim: of images given a part of them, of
the mixture of an image and its mirror image, and of noisy images, which have no bits/dim at all.
"""

import json
import re

import numpy as np
import pytest
from catalogue import CAUSAL, SHORT, TINY, TINY_RUN, sets
from cli_helpers import FOLDER, events, metrics, quick, summary, tree
from helpers import CPU, npz
from PIL import Image

import flowtrain
from flowtrain.checkpoints.load import load_model
from flowtrain.data.splits import DataSet

pytestmark = pytest.mark.run

GIVEN = "given the image at 4x4 pixels"
OPTIONS = [*TINY_RUN, *sets(data__name="npz", data__path="colour.npz", data__flip=True)]
OPTIONS += sets(model__context="downsample", train__num_steps=10)


@pytest.fixture(scope="module")
def conditional():
    folder = FOLDER / "conditional"
    folder.mkdir()
    npz(folder / "colour.npz", train=80, test=10, shape=(8, 8, 3))
    done = quick("train", *OPTIONS, "--run-dir", "run", cwd=folder).ok()
    assert f"glow of images {GIVEN.removesuffix(' pixels')}" in done.out
    assert f"bits/dim, {GIVEN}, on the validation images" in done.out
    return folder


def test_evaluate_names_the_context(conditional):
    done = quick("evaluate", "run", "--json", "e.json", cwd=conditional).ok()
    result = json.loads((conditional / "e.json").read_text())
    assert result["given"] == "the image at 4x4 pixels"
    assert result["max_reconstruction_error"] < 0.5
    assert f"bits/dim, {GIVEN} (10 test images)" in done.out
    assert "conditional on" in done.out and "not comparable with figures of whole" in done.out


def test_a_figure_of_other_data_is_named_by_them(conditional):
    """Moved data are the run's own: they have the fingerprint in its checkpoint."""
    (conditional / "moved.npz").write_bytes((conditional / "colour.npz").read_bytes())
    npz(conditional / "other.npz", train=20, test=10, shape=(8, 8, 3), seed=1)
    for name, file, more in (
        ("moved", r"evaluate-test", []),
        ("other", r"evaluate-other-\w{8}-test", sets(data__validation=3)),
    ):
        out = quick("evaluate", "run", f"data.path={name}.npz", *more, cwd=conditional).ok().out
        path = conditional / re.search(rf"wrote (run/{file}\.json)", out)[1]
        dataset = {"moved": "npz"}.get(name, str(conditional / "other.npz"))
        assert json.loads(path.read_text())["dataset"] == dataset
        path.unlink()  # the report of another test has none


def test_samples_are_shown_beside_what_is_given(conditional):
    done = quick("sample", "run", "--num-images", 3, cwd=conditional).ok()
    assert "24 samples" in done.out
    x = np.load(conditional / "colour.npz")["x_test"][0]
    Image.fromarray(x).save(conditional / "x.png")
    words = ["--image", "x.png", "--num-images", 3]
    done = quick("sample", "run", *words, "--out", "s.npz", cwd=conditional).ok()
    assert "context: x.png at 8x8, reduced to 4x4" in done.out
    arrays = np.load(conditional / "s.npz")
    assert arrays["images"].shape == (3, 8, 8, 3) and arrays["context"].shape == (3, 4, 4, 3)


def test_other_commands_name_it(conditional):
    assert f"glow, {GIVEN}" in quick("info", "run", cwd=conditional).ok().out
    said = "run: its losses are of images given downsample by 2 (model.context)"
    assert said in quick("compare", "run", cwd=conditional).ok().out
    quick("doctor", "run", "--num-images", 4, cwd=conditional)
    findings = json.loads((conditional / "run" / "doctor.json").read_text())["findings"]
    # These images are noise, and a uniform coder has the better likelihood.
    assert {each["check"] for each in findings if each["verdict"] != "ok"} <= {"likelihood"}
    quick("ood", "run", "--data", "noise", "--num-images", 4, cwd=conditional).ok()
    done = quick("report", "run", "--num-images", 4, cwd=conditional).ok()
    missing = {line.split(": ")[1] for line in done.out.splitlines() if "not in it: " in line}
    assert missing == {"evaluations", "paths", "samples over training"}
    page = (conditional / "run" / "report.html").read_text()
    assert f"of images {GIVEN}: all its figures are conditional on that" in page


MIXTURE = "the mean over the image and its mirror image"


@pytest.fixture(scope="module")
def mirror():
    """A run with flips, evaluated without and with the mixture."""
    folder = FOLDER / "mirror"
    folder.mkdir()
    quick("train", *CAUSAL, *SHORT, *sets(data__flip=True), "--run-dir", "r", cwd=folder).ok()
    assert MIXTURE not in quick("evaluate", "r", cwd=folder).ok().out
    done = quick("evaluate", "r", "--mirror", cwd=folder).ok()
    assert MIXTURE in " ".join(done.out.split())
    return folder


def test_evaluate_writes_a_file_of_its_own(mirror):
    files = [mirror / "r" / f"evaluate-{name}.json" for name in ("test", "mirror-test")]
    plain, both = (json.loads(file.read_text()) for file in files)
    assert "sides" not in plain and both["sides"] == 2 and both["model"] == plain["model"]
    flow = flowtrain.load(mirror / "r", "cpu", mirror=True)
    data = DataSet(load_model(str(mirror / "r"), CPU).config.data)
    expected = flow.bits_per_dim(data.split("test").take(slice(None))).mean().item()
    assert both["bits_per_dim"] == pytest.approx(expected, abs=1e-5) != plain["bits_per_dim"]


def test_other_commands_have_it(mirror):
    out = quick("info", "r", cwd=mirror).ok().out
    assert "digits, test, mirror" in out and f"exact, {MIXTURE})" in out
    quick("report", "r", "--num-images", 4, cwd=mirror).ok()
    assert (mirror / "r" / "report.html").read_text().count(f"<td>exact, {MIXTURE}</td>") == 1
    out = quick("ood", "r", "--data", "noise", "--num-images", 9, "--mirror", cwd=mirror).ok().out
    assert f"p(x) is {MIXTURE}" in out and json.loads((mirror / "r/ood.json").read_text())["sides"]
    for words in ([], ["--mirror"]):
        quick("sample", "r", *words, "--out", f"{len(words)}.npz", cwd=mirror).ok()
    plain, both = (dict(np.load(mirror / f"{i}.npz")) for i in (0, 1))
    assert both.pop("sides") == 2 and both.keys() == plain.keys()
    assert not np.array_equal(both["images"], plain["images"])


def test_archives_come_back(mirror):
    pytest.importorskip("constriction")
    words = ["--split", "test", "--num-images", 40]
    done = quick("compress", "r", *words, "--out", "a.fta", "--mirror", cwd=mirror).ok()
    assert "each in its likeliest of 2 orientations" in done.out
    quick("decompress", "a.fta", "--out", "a", cwd=mirror).ok()
    assert len(tree(mirror / "a")) == 40  # or their checksums would not match


NOISY = [*sets(model__name="tarflow", **{f"model__{k}": v for k, v in TINY["tarflow"].items()})]
NOISY += [*SHORT, *sets(dequantization__name="gaussian", dequantization__sigma=0.1)]
NOISY += sets(model__classes=10, model__label_dropout=0.4)
SAID = "no bits/dim"


@pytest.fixture(scope="module")
def noisy():
    """What training a model with Gaussian noise has printed, and the run."""
    out = quick("train", *NOISY, "--run-dir", "noisy", cwd=FOLDER).ok().out
    return out, FOLDER / "noisy"


def has_no_bits(text):
    assert not re.search(r"[\d)] bits/dim", text), text
    return text


def test_training_reports_densities(noisy):
    out, run = noisy
    assert SAID in has_no_bits(out) and "losses are in nats/dim" in out
    assert re.search(r"validation -?\d+\.\d+ nats/dim", out)
    rows = metrics(run)
    assert all(row["bits_per_dim"] is None and row["loss"] is not None for row in rows)
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < losses[0]
    best = min(row["loss"] for row in rows if row["split"] == "validation")
    assert summary(run)["best_validation_loss"] == best
    assert summary(run)["best_validation_bits_per_dim"] is None
    scalars = events(run).Tags()["scalars"]
    assert {"train/loss", "validation/loss"} <= set(scalars)
    assert not [tag for tag in scalars if "bits" in tag]


def test_evaluation_is_of_noisy_images(noisy, tmp_path):
    run = noisy[1]
    done = quick("evaluate", run, "--json", "one.json", "--scores", "s.csv", cwd=tmp_path).ok()
    out = has_no_bits(done.out)
    assert "minus the mean log-density of noisy images (sigma 0.1)" in out and SAID in out
    assert re.search(r"-?\d+\.\d+ .* nats/dim \(180 test images\)", out)
    one = json.loads((tmp_path / "one.json").read_text())
    assert (one["bound"], one["draws"], one["sigma"]) == ("density", 1, 0.1)
    assert "unknown: the mean over 10 equally likely classes" in out and one["classes"] == 10
    assert one["loss_given_class"] < one["loss"] + np.log(10) / 64
    assert one["bits_per_dim"] is None and one["bits_per_dim_stderr"] is None
    assert one["loss"] == pytest.approx(one["nats_per_image"] / 64)
    first, *lines = [line.split(",") for line in (tmp_path / "s.csv").read_text().splitlines()]
    assert first[:3] == ["index", "bits_per_dim", "log_prob"] and lines[0][:2] == ["0", ""]
    log_probs = [float(line[2]) for line in lines]
    assert np.mean(log_probs) == pytest.approx(-one["nats_per_image"], rel=1e-6)
    quick("evaluate", run, "--json", "k.json", "--draws", 3, cwd=tmp_path).ok()
    several = json.loads((tmp_path / "k.json").read_text())
    assert (several["bound"], several["draws"]) == ("density", 3)
    # Their mean: an importance-weighted bound of this broad noise would be far away.
    assert abs(several["loss"] - one["loss"]) < 0.05
    assert several["loss_stderr_draws"] > 0


def test_other_commands_name_the_density(noisy, tmp_path):
    run, few = noisy[1], ["--num-images", 4]

    def printed(*words):
        return has_no_bits(quick(*words, cwd=tmp_path).ok().out)

    told = printed("info", run)
    assert "a density of noisy images" in told and "sigma 0.1" in told and "nats/dim" in told
    assert f"noisy has {SAID}" in printed("compare", run, run, "--json", "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["runs"][0]["unit"] == "nats/dim"
    assert f"no check of {SAID[3:]}" in printed("doctor", run, "--json", "d.json", *few)
    checks = {f["check"] for f in json.loads((tmp_path / "d.json").read_text())["findings"]}
    assert "likelihood" not in checks and {"log-det", "float32 likelihood"} <= checks
    printed("report", run, "--out", "r.html", *few)
    html = (tmp_path / "r.html").read_text()
    assert "No bits/dim: a model trained with Gaussian noise" in html
    assert "Best validation, nats/dim" in html and "Loss, nats/dim" in html
    options = ["--data", "noise", "--num-images", 40, "--scores", "s.csv", "--json", "o.json"]
    told = printed("ood", run, *options, "--out", "o.png")
    assert "No bits/dim" in told and "nats/dim, the mean of" in told
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["unit"] == "nats/dim" and found["in"]["bits_per_dim"] is None
    assert (tmp_path / "s.csv").read_text().startswith("dataset,index,loss,log_prob,typ")
    done = quick("compress", run, "--split", "test", "--out", "a.fta", cwd=tmp_path)
    done.failed(2, "compress: a model trained with Gaussian noise", "no bits per dimension")


def test_samples_are_noisy_unless_denoised(noisy, tmp_path):
    run = noisy[1]
    said = quick("sample", run, "--num-images", 9, "--out", "a.npz", cwd=tmp_path).ok().out
    assert "noisy images, as in training (sigma 0.1)" in said
    said = quick("sample", run, "--num-images", 9, "--denoise", "--out", "b.npz", cwd=tmp_path)
    assert "denoised: one step" in said.ok().out
    one, other = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    assert other["denoised"] and "denoised" not in one
    assert not np.array_equal(one["images"], other["images"])
    quick("sample", run, "--num-images", 4, "--denoise", "--out", "c.npz", cwd=tmp_path).ok()
    few = np.load(tmp_path / "c.npz")["images"].astype(int)
    assert abs(few - other["images"][:4]).max() <= 1  # up to rounding, however many there are
    quick("sample", run, "--num-images", 4, "--denoise", "--guidance", 1, cwd=tmp_path).ok()
    with Image.open(run / "sample.png") as picture:
        assert picture.width > 100


def test_guidance_0_is_the_model_given_the_class(noisy, tmp_path):
    run, images = noisy[1], {}
    # The classes are hardly learned: only a large weight moves most pixels by a level or more.
    given = {"no": [], "0": ["--guidance", 0], "1000": ["--guidance", 1000]}
    for name, options in given.items():
        options = [*options, "--classes", "3,7", "--num-images", 4, "--out", f"{name}.npz"]
        said = quick("sample", run, *options, cwd=tmp_path).ok().out
        assert ("guidance 1000: " in said) == (name == "1000")
        images[name] = np.load(tmp_path / f"{name}.npz")
    assert images["1000"]["guidance"] == 1000 and "guidance" not in images["no"]
    assert np.array_equal(images["no"]["images"], images["0"]["images"])
    assert not np.array_equal(images["no"]["images"], images["1000"]["images"])
    assert images["1000"]["classes"].tolist() == [3] * 4 + [7] * 4

"""Models for pictures through the commands: Gaussian noise, for which no command prints bits/dim,
denoising, label dropping and guidance.
"""

import json
import re

import numpy as np
import pytest
from catalogue import SHORT, TINY, sets
from cli_helpers import FOLDER, begin, events, last, metrics, quick, summary
from PIL import Image

from flowtrain.checkpoints import format as checkpoint_format

pytestmark = pytest.mark.run

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
    """No figure in bits/dim."""
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
    assert "any: the mean over 10 equally likely classes" in out and one["classes"] == 10
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
    assert found["out"][0]["auroc"]["likelihood"] > 0.9  # noise is unlikely
    assert found["out"][0]["loss"] > found["in"]["loss"]
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


def test_a_run_resumes_bit_for_bit_with_its_noise_and_the_labels_it_drops(noisy, tmp_path):
    middle = noisy[1] / "checkpoints" / "step-00000015.safetensors"
    quick("train", *NOISY, "--run-dir", "r", "--resume", middle, cwd=tmp_path).ok()
    one, other = (checkpoint_format.read(last(run)) for run in (noisy[1], tmp_path / "r"))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(tensor.equal(other.tensors[name]) for name, tensor in one.tensors.items())


def test_two_processes_see_the_same_noise_and_drop_the_same_labels(tmp_path):
    words = ["train", *NOISY, *sets(train__num_steps=4, train__log_every=1, train__sample_every=99)]
    double = {"cwd": tmp_path, "first": "import torch; torch.set_default_dtype(torch.float64)"}
    quick(*words, "--run-dir", "1", **double).ok()
    begun = begin(2, *words, *sets(train__batch_size=16), "--run-dir", "2", **double)
    assert all(each.result().ok() for each in begun)
    one, two = ([row["loss"] for row in metrics(tmp_path / name)] for name in "12")
    assert one == pytest.approx(two, abs=1e-9)


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

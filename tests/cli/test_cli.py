"""The commands, from the outside: what they print, what they write, how they end (design, section
5).
"""

import csv
import inspect
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from catalogue import SHORT, SMALL, TINY_RUN, WORDS, sets
from cli_helpers import (
    FOLDER,
    SESSION,
    copy_of,
    events,
    flowtrain,
    last,
    metrics,
    quick,
    result,
    start,
    summary,
    trained,
    tree,
)
from helpers import SHARED, shared
from PIL import Image

import flowtrain as package
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.build import build_flow
from flowtrain.cli.configs import find_config
from flowtrain.config import load_config, load_yaml, parse
from flowtrain.data.splits import DataSet
from flowtrain.models import glow

KEYS = {
    *(
        "bits_per_dim",
        "bits_per_dim_stderr",
        "bound",
        "draws",
        "nats_per_image",
        "num_images",
        "dims",
        "levels",
    ),
    *("split", "dataset", "weights", "step", "non_finite_images", "max_reconstruction_error"),
}
SHIPPED_STEPS = load_yaml(find_config("glow_digits.yaml"))["model"]["steps"]
DIGITS = 180, 162, 1455  # images to test, to validate, to train on


@pytest.fixture
def run(tmp_path):
    """A copy of a finished run, in `runs/` of the current folder."""
    return copy_of(trained()["glow"], tmp_path / "runs" / "glow_digits")


def digits(split="test"):
    return DataSet(parse({"train": {"num_steps": 1}}).data).split(split).take(slice(None))


def evaluated(*args, cwd, code=0):
    """`evaluate --json -`: standard output is the JSON and nothing else."""
    done = quick("evaluate", *args, "--json", "-", cwd=cwd)
    assert done.code == code, done
    return json.loads(done.out)


def cells(picture, rows, columns, shape=(8, 8), channels=1):
    """The images in a grid, (rows, columns, H, W[, 3]) with values 0..255, enlarged as they are in
    the picture.
    """
    pixels = np.asarray(picture.convert("RGB"))
    factor = max(-(-32 // min(shape)), -(-800 // (columns * shape[1])))
    assert pixels.shape[1] >= 800
    height, width = shape[0] * factor, shape[1] * factor
    assert pixels.shape == (rows * (height + 2) + 2, columns * (width + 2) + 2, 3)
    cut = [
        [
            pixels[2 + r * (height + 2) :, 2 + c * (width + 2) :][:height:factor, :width:factor]
            for c in range(columns)
        ]
        for r in range(rows)
    ]
    cut = np.array(cut)
    return cut[..., 0] if channels == 1 else cut


def shown(images, levels=17):
    """uint8 (N, 1, H, W) as they look in a picture, (N, H, W)."""
    return (images[:, 0].numpy().astype(int) * 255 // (levels - 1)).astype(np.uint8)


# --- help, version, names -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "flowtrain"], [Path(sys.executable).with_name("flowtrain")]]
)
def test_version(command, tmp_path):
    if not Path(command[0]).exists():
        pytest.skip("flowtrain is not installed as a script here")
    done = result(start("--version", cwd=tmp_path, command=command)).ok()
    assert done.out.split() == ["flowtrain", package.__version__]


def test_help_names_every_command_and_is_instant(tmp_path):
    out = flowtrain("--help", cwd=tmp_path).ok().out
    assert all(command in out for command in ("train", "evaluate", "sample", "interpolate"))
    code = (
        "import os, sys, runpy\nsys.argv = ['flowtrain', '--help']\n"
        "os.environ.pop('PYTORCH_ENABLE_MPS_FALLBACK', None)\n"
        "try: runpy.run_module('flowtrain', run_name='__main__')\n"
        "except SystemExit: assert 'torch' not in sys.modules\n"
        "assert os.environ['PYTORCH_ENABLE_MPS_FALLBACK'] == '1'  # in time for torch, which "
        "reads it when imported\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize(
    "command, options",
    [
        ("train", "--config --set --run-dir --resume --init-from --dry-run --device"),
        (
            "evaluate",
            "--split --num-images --draws --seed --batch-size --weights --json --scores --device",
        ),
        ("sample", "--num-images --temperature --seed --weights --out --device"),
        ("interpolate", "--pairs --steps --images --seed --out --device"),
    ],
)
def test_help_of_a_command(command, options, tmp_path):
    out = quick(command, "--help", cwd=tmp_path).ok().out
    assert re.search(f"Examples?: flowtrain {command}", out)
    assert [option for option in options.split() if option not in out] == []


def test_train_help_lists_the_configurations_with_a_line_each(tmp_path):
    out = " ".join(quick("train", "--help", cwd=tmp_path).ok().out.split())
    shipped = sorted(
        (Path(package.__file__).parents[1] / "configs").rglob("*.yaml")
    ) or pytest.skip("not a checkout")
    for path in shipped:
        headline = path.read_text().splitlines()[0].lstrip("# ")
        assert path.stem in out and headline.split("[")[0] in out, path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_config_names(shell, tmp_path):
    words = "flowtrain train --config glow_"
    env = {
        "COMP_WORDS": words,
        "COMP_CWORD": "3",
        "_TYPER_COMPLETE_ARGS": words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = quick(cwd=tmp_path, _FLOWTRAIN_COMPLETE=f"complete_{shell}", **env)
    assert "glow_digits" in done.out and "glow_mnist_small" in done.out
    assert "nice_digits" not in done.out


@pytest.mark.parametrize(
    "words, found, other",
    [
        ("train train.l", "train.lr=", "train.log_every=x"),
        ("train --set data.si", "data.size=", "data.path="),
        ("evaluate runs/a", "runs/a", "runs/b"),
    ],
)
def test_the_shell_completes_keys_and_runs(words, found, other, tmp_path):
    for run in ("a", "b"):
        (tmp_path / "runs" / run / "checkpoints").mkdir(parents=True)
    env = {"_TYPER_COMPLETE_ARGS": f"flowtrain {words}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = quick(cwd=tmp_path, _FLOWTRAIN_COMPLETE="complete_fish", **env)
    assert found in done.out and other not in done.out


def test_the_python_module_imports_instantly():
    code = (
        "import sys, flowtrain; flowtrain.__version__; assert 'torch' not in sys.modules and "
        "flowtrain.load"
    )
    subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=True)


# --- train ----------------------------------------------------------------------------------------


def test_a_run_ends_with_its_result_and_what_comes_next(tmp_path):
    done = quick("train", *TINY_RUN, "--run-dir", "r", cwd=tmp_path).ok()
    values = summary(tmp_path / "r")
    *_, result, evaluate, sample, report = done.out.splitlines()
    best = values["best_validation_bits_per_dim"]
    assert result.startswith(f"finished: {best:.3f} bits/dim on the validation images")
    assert "20 steps in 0:0" in result and result.endswith(", r")
    words = [line.split()[:3] for line in (evaluate, sample, report)]
    assert words == [["flowtrain", name, "r"] for name in ("evaluate", "sample", "report")]


@pytest.mark.parametrize("name", WORDS)
def test_files_of_a_run(name):
    run = trained()[name]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        *[
            "best.safetensors",
            "last.safetensors",
            "step-00000015.safetensors",
            "step-00000020.safetensors",
        ]
    ]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "step-00000010.png",
        "step-00000020.png",
    ]
    others = {p.name for p in run.iterdir() if not p.name.startswith("events.out.tfevents.")}
    assert others == {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "samples",
        ".lock",
    }


@pytest.mark.parametrize("name", WORDS)
def test_metrics(name):
    rows = metrics(trained()[name])
    common = ["step", "images", "seconds", "split", "loss", "bits_per_dim"]
    keys = {
        "train": [*common, "grad_norm", "lr", "images_per_second"],
        "validation": common,
    }
    assert [(r["split"], r["step"]) for r in rows] == [
        *[("train", 5), ("train", 10), ("validation", 10)],
        *[("train", 15), ("train", 20), ("validation", 20)],
    ]
    for row in rows:
        assert list(row) == keys[row["split"]]
        assert row["images"] == 32 * row["step"]
        assert 3 < row["bits_per_dim"] < 7
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_resolved_configuration(monkeypatch):
    """Every key: what the command sets, over the file, over the defaults."""
    values = yaml.safe_load((trained()["glow"] / "config.yaml").read_text())
    file = load_yaml(find_config("glow_digits.yaml"))
    monkeypatch.chdir(SESSION)  # where it was trained: data.root is below
    assert (
        values
        == load_config(find_config("glow_digits.yaml"), TINY_RUN[1::2]).resolved()
        == parse(values).resolved()
    )
    assert set(values) == {"seed", "data", "model", "dequantization", "train"}
    defaults = {
        p.name: p.default
        for p in inspect.signature(glow.build).parameters.values()
        if p.name not in ("shape", "context")
    }
    assert values["model"] == {
        **defaults,
        **file["model"],
        "steps": 1,
        "width": 8,
        "classes": 0,
        "label_dropout": 0.0,
        "context": "none",
        "context_factor": 2,
    }
    expected = {
        **file["train"],
        "num_steps": 20,
        "budget": None,
        "batch_size": 32,
        "lr": 2e-3,
        "log_every": 5,
    }
    expected |= {
        "validate_every": 10,
        "checkpoint_every": 5,
        "sample_every": 10,
        "keep_checkpoints": 2,
    }
    assert {key: values["train"][key] for key in expected} == expected
    assert Path(values["data"]["root"]).is_absolute()


def test_summary():
    run = trained()["glow"]
    values, rows = summary(run), metrics(run)
    best = min((r["bits_per_dim"], r["step"]) for r in rows if r["split"] == "validation")
    assert (values["best_validation_bits_per_dim"], values["best_step"]) == best
    assert (values["step"], values["images"], values["finished"]) == (20, 640, True)
    assert values["seconds"] >= rows[-1]["seconds"]
    assert values["device"] == "cpu"
    assert (
        values["versions"]["torch"] == torch.__version__
        and values["versions"]["flowtrain"] == package.__version__
    )
    flow = package.load(str(run))
    assert values["parameters"] == sum(p.numel() for p in flow.parameters())
    saved = checkpoint_format.read(run / "checkpoints" / "best.safetensors")
    assert saved.meta["step"] == values["best_step"]


def test_tensorboard():
    run = trained()["glow"]
    seen = events(run)
    for split, key in [
        *[
            ("train", "bits_per_dim"),
            ("train", "lr"),
            ("train", "grad_norm"),
            ("train", "images_per_second"),
        ],
        ("validation", "bits_per_dim"),
    ]:
        logged = [(r["step"], r[key]) for r in metrics(run) if r["split"] == split]
        scalars = seen.Scalars(f"{split}/{key}")
        assert [s.step for s in scalars] == [step for step, _ in logged]
        assert [s.value for s in scalars] == pytest.approx([value for _, value in logged])
    pictures = seen.Images("samples")
    assert [p.step for p in pictures] == [10, 20]
    drawn = Image.open(run / "samples" / "step-00000020.png")
    assert np.array_equal(
        np.asarray(drawn), np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)))
    )
    assert cells(drawn, 8, 8).shape == (8, 8, 8, 8)
    text = [
        seen.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in seen.Tags()["tensors"]
    ]
    assert any((run / "config.yaml").read_text() in t for t in text)
    assert any(tag.startswith("validation_log_scale_min/") for tag in seen.Tags()["scalars"])


def test_what_train_prints(tmp_path):
    done = quick("train", *TINY_RUN, cwd=tmp_path).ok()
    assert done.err == ""
    lines = done.out.splitlines()
    assert any("run directory: runs/glow_digits" in line for line in lines)  # runs/<config name>
    assert any(
        "1,455 images to train on, 162 to validate, 1x8x8, 17 levels" in line for line in lines
    )
    assert [line.split(":")[0] for line in lines if line.startswith("step 20")] == [
        "step 20/20",
        "step 20",
    ]
    (finished,) = (line for line in lines if line.startswith("finished"))
    assert finished.endswith(", runs/glow_digits")
    again = quick("train", *TINY_RUN, cwd=tmp_path).ok()
    assert "runs/glow_digits is finished (step 20)" in again.out
    assert metrics(tmp_path / "runs" / "glow_digits", timeless=True) == metrics(
        trained()["glow"], timeless=True
    )


def test_a_step_of_more_images_than_there_are(tmp_path):
    """It is legal, and said."""
    few = sets(data__validation=1600, train__num_steps=1)  # 17 images
    done = quick("train", *TINY_RUN, *few, "--run-dir", "r", cwd=tmp_path).ok()
    said = "a step takes 32 images, so each of the 17 to train on 1.9 times on average"
    assert said in done.out
    assert "a step takes" not in quick("train", *TINY_RUN, *few[2:], cwd=tmp_path).ok().out


def test_the_configuration_is_found(tmp_path):
    """As given, then in configs/, then among those that come with flowtrain."""
    own = "train: {num_steps: 7}\n"
    (tmp_path / "configs").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.yaml").write_text(
        f"# as given\nmodel: {{steps: 1, levels: 1, width: 8}}\n{own}"
    )
    (tmp_path / "configs" / "mine.yaml").write_text(
        f"# in configs\nmodel: {{steps: 2, levels: 1, width: 8}}\n{own}"
    )
    for name, steps in [
        ("other/mine.yaml", 1),
        ("mine.yaml", 2),
        ("glow_digits.yaml", SHIPPED_STEPS),
    ]:
        options = sets(train__num_steps=1, model__width=4) if name == "glow_digits.yaml" else []
        quick("train", "--config", name, *options, "--run-dir", f"run{steps}", cwd=tmp_path).ok()
        assert (
            yaml.safe_load((tmp_path / f"run{steps}" / "config.yaml").read_text())["model"]["steps"]
            == steps
        )
    (tmp_path / "configs" / "glow_digits.yaml").write_text(
        (tmp_path / "configs" / "mine.yaml").read_text()
    )
    quick("train", cwd=tmp_path).ok()
    assert summary(tmp_path / "runs" / "glow_digits")["step"] == 7


def test_another_kind_drops_the_options_of_the_old_one(tmp_path):
    np.savez(tmp_path / "own.npz", x_train=np.zeros((20, 8, 8), np.uint8))
    options = [
        *sets(model__name="nice", model__width=4, data__name="npz", data__path="own.npz"),
        *SHORT,
    ]
    quick("train", *options, "--run-dir", "a", cwd=tmp_path).ok()
    values = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert (
        values["model"]
        == parse({"model": {"name": "nice", "width": 4}, "train": {"num_steps": 1}}).resolved()[
            "model"
        ]
    )
    assert "steps" not in values["model"]
    # absolute: found again from any folder
    assert values["data"]["path"] == str(tmp_path / "own.npz")


def test_periods_longer_than_the_run_are_legal(tmp_path):
    periods = sets(
        **{f"train__{name}_every": 10_000 for name in ("log", "validate", "checkpoint", "sample")}
    )
    quick("train", *TINY_RUN, *periods, "--run-dir", "a", cwd=tmp_path).ok()
    assert [(r["split"], r["step"]) for r in metrics(tmp_path / "a")] == [
        ("train", 20),
        ("validation", 20),
    ]
    assert (tmp_path / "a" / "samples" / "step-00000020.png").exists()
    assert (
        checkpoint_format.read(tmp_path / "a" / "checkpoints" / "best.safetensors").meta["step"]
        == 20
    )


def test_init_from(run, tmp_path):
    """The weights are those of the other model; step, optimizer and run are new."""
    options = [*TINY_RUN, *sets(train__num_steps=1, train__lr=1e-30, train__ema=0, seed=5)]
    quick("train", *options, "--run-dir", "tuned", "--init-from", run, cwd=tmp_path).ok()
    tuned, source = (
        checkpoint_format.read(last(tmp_path / "tuned")),
        checkpoint_format.read(run / "checkpoints" / "best.safetensors"),
    )
    assert tuned.meta["step"] == 1
    for name, weights in source.part("ema").items():
        torch.testing.assert_close(tuned.part("model")[name], weights, rtol=0, atol=0)
    other = quick(
        "train", *options, *sets(model__width=9), "--run-dir", "b", "--init-from", run, cwd=tmp_path
    )
    other.failed(2, "does not fit this model", str(run), "bijection.")


@pytest.mark.parametrize("name", ["cifar10", "mnist", "digits"])
def test_dry_run(name, tmp_path):
    """Exact parameters; nothing is read, downloaded or written."""
    shape = {"cifar10": (3, 32, 32), "mnist": (1, 28, 28), "digits": (1, 8, 8)}[name]
    options = [*SMALL, *sets(data__name=name, data__root="nowhere")]
    out = quick("train", *options, "--dry-run", cwd=tmp_path).ok().out
    config = load_config(find_config("glow_digits.yaml"), SMALL[1::2])
    expected = sum(p.numel() for p in build_flow(config, shape, 256).parameters())
    assert [line for line in out.splitlines() if "parameters" in line][0].split() == [
        "parameters:",
        str(expected),
    ]
    words = ("GFLOP per training step", "memory", "(chosen)", "images/s", "estimated time")
    assert all(word in " ".join(out.split()) for word in words)
    assert tree(tmp_path) == []


def test_dry_run_of_what_does_not_fit(tmp_path):
    small = "import flowtrain.training.dry_run as dry; dry.left = lambda device: 3 * 2**20"
    options = [*SMALL, *sets(train__batch_size=4096)]
    out = quick("train", *options, "--dry-run", cwd=tmp_path, first=small).ok().out
    assert "with 3 MiB available" in " ".join(out.split()) and "speed: not measured" in out


def test_dry_run_of_a_budget(tmp_path):
    assert (
        "estimated steps"
        in quick("train", *SMALL, *sets(train__budget="1h"), "--dry-run", cwd=tmp_path).ok().out
    )


# --- evaluate -------------------------------------------------------------------------------------


def test_evaluate_prints_a_table_and_writes_json(run, tmp_path):
    done = quick("evaluate", cwd=tmp_path).ok()
    written = json.loads((run / "evaluate-test.json").read_text())
    assert set(written) >= KEYS
    assert "runs/glow_digits/evaluate-test.json" in done.out
    value, error = written["bits_per_dim"], written["bits_per_dim_stderr"]
    lines = done.out.splitlines()
    headline = f"{value:.3f} +- {error:.3f} bits/dim ({DIGITS[0]} test images)"
    assert headline in lines and lines.index(headline) < lines.index(
        next(line for line in lines if "likelihood" in line)
    )
    assert done.out.count(f"{value:.3f}") == 1 and "None" not in done.out
    expected = {
        "bound": "elbo",
        "samples": 1,
        "num_images": DIGITS[0],
        "dims": 64,
        "levels": 17,
        "split": "test",
    }
    expected |= {
        "dataset": "digits",
        "weights": "ema",
        "non_finite_images": 0,
        "step": summary(run)["best_step"],
    }
    assert {key: written[key] for key in expected} == expected
    assert written["bits_per_dim"] == pytest.approx(written["nats_per_image"] / (64 * math.log(2)))
    assert 3 < written["bits_per_dim"] < 5 and 0 < written["bits_per_dim_stderr"] < 0.1
    assert 0 < written["max_reconstruction_error"] < 0.01


def test_info_says_what_a_run_is(run, tmp_path):
    quick("evaluate", cwd=tmp_path).ok()
    out = " ".join(quick("info", cwd=tmp_path).ok().out.split())
    values = summary(run)
    for words in (
        "digits: 1x8x8, 17 levels",
        f"glow, {values['parameters']:,} parameters, sampling: one pass",
        f"step {values['best_step']:,}",
        "digits, test",
        f"({DIGITS[0]} images",
        "flowtrain " + package.__version__,
    ):
        assert words in out, words


def test_info_says_what_a_configuration_is(tmp_path):
    out = " ".join(quick("info", "causal_cifar_small.yaml", cwd=tmp_path).ok().out.split())
    assert "cifar10: 3x32x32, 256 levels" in out and "sampling: sequential" in out
    assert "30:00, muon, batches of 32" in out


def test_list_names_what_comes_with_flowtrain(tmp_path):
    out = quick("list", cwd=tmp_path).ok().out
    for words in ("  glow_cifar_small ", "  mnist ", "MNIST handwritten digits", "  glow "):
        assert words in out, words
    assert "None" not in out


def test_json_on_standard_output_is_alone(run, tmp_path):
    before = tree(tmp_path)
    done = flowtrain("evaluate", run, "--json", "-", cwd=tmp_path).ok()  # as a user does
    assert set(json.loads(done.out)) >= KEYS
    assert "evaluating" in done.err and "bits/dim" in done.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "split, count", [("test", DIGITS[0]), ("validation", DIGITS[1]), ("train", DIGITS[2])]
)
def test_splits(split, count, run, tmp_path):
    values = evaluated("--split", split, cwd=tmp_path)
    assert (values["split"], values["num_images"]) == (split, count)
    if split == "validation":  # what training saw, with the same noise
        assert values["bits_per_dim"] == pytest.approx(
            summary(run)["best_validation_bits_per_dim"], abs=1e-12
        )


def test_options_of_evaluate(run, tmp_path):
    all_images = evaluated(cwd=tmp_path)
    few = evaluated("--num-images", 10, cwd=tmp_path)
    assert few["num_images"] == 10 and few["bits_per_dim"] != all_images["bits_per_dim"]
    assert evaluated("--num-images", 10_000, cwd=tmp_path) == all_images
    assert evaluated("--batch-size", 7, cwd=tmp_path)["bits_per_dim"] == pytest.approx(
        all_images["bits_per_dim"], abs=1e-7
    )
    assert evaluated("--seed", 1, cwd=tmp_path)["bits_per_dim"] != all_images["bits_per_dim"]
    raw = evaluated("--weights", "raw", cwd=tmp_path)
    assert raw["weights"] == "raw" and raw["bits_per_dim"] != all_images["bits_per_dim"]
    tighter = evaluated("--draws", 8, cwd=tmp_path)
    assert (tighter["bound"], tighter["samples"]) == ("iwbo", 8)
    assert tighter["bits_per_dim"] < all_images["bits_per_dim"]
    assert evaluated("runs/glow_digits/checkpoints/last.safetensors", cwd=tmp_path)["step"] == 20


def test_scores(run, tmp_path):
    values = evaluated(
        "--scores", "new/folder/scores.csv", "--num-images", 9, "--draws", 2, cwd=tmp_path
    )
    rows = list(csv.DictReader((tmp_path / "new" / "folder" / "scores.csv").open()))
    assert list(rows[0]) == ["index", "bits_per_dim", "log_prob", "log_prob_base", "log_det"]
    places = [int(r["index"]) for r in rows]  # a sample, as data may be sorted by class
    assert len(places) == 9 and places == sorted(set(places)) != list(range(9))
    assert np.mean([float(r["bits_per_dim"]) for r in rows]) == pytest.approx(
        values["bits_per_dim"], abs=1e-12
    )
    for r in rows:
        assert float(r["bits_per_dim"]) == pytest.approx(-float(r["log_prob"]) / (64 * math.log(2)))
    quick("evaluate", "--scores", "one.csv", cwd=tmp_path).ok()
    # one draw: the bound is the sum of its parts
    for r in csv.DictReader((tmp_path / "one.csv").open()):
        assert float(r["log_prob"]) == pytest.approx(
            float(r["log_prob_base"]) + float(r["log_det"]), abs=1e-9
        )


def test_json_into_a_missing_folder(run, tmp_path):
    done = quick("evaluate", "--json", "deep/er/a.json", "--num-images", 5, cwd=tmp_path).ok()
    assert "deep/er/a.json" in done.out
    assert json.loads((tmp_path / "deep" / "er" / "a.json").read_text())["num_images"] == 5


@pytest.mark.parametrize("target", ["-", "a.json"])
def test_non_finite_images_fail_after_the_json_is_written(target, run, tmp_path):
    saved = checkpoint_format.read(run / "checkpoints" / "best.safetensors")
    saved.tensors["ema.bijection.levels.0.layers.1.log_scale"].flatten()[0] = math.nan
    checkpoint_format.write(tmp_path / "nan.safetensors", saved.meta, saved.tensors)
    done = quick("evaluate", "nan.safetensors", "--num-images", 10, "--json", target, cwd=tmp_path)
    done.failed(1, "10 of 10 images", "not finite")
    values = json.loads(done.out if target == "-" else (tmp_path / target).read_text())
    assert values["non_finite_images"] == 10 and values["bits_per_dim"] is None
    assert quick("sample", "nan.safetensors", cwd=tmp_path).failed(1, "not finite")


OWN_MODEL = """
import os
import torch
from flowtrain.bijections import DiagonalAffine, Flatten, Sequential
from flowtrain.bijections.base import Bijection

class Fragile(Bijection):
    def forward(self, x, context=None):
        bright = x.flatten(1).mean(1) > float(os.environ.get("BRIGHT", "inf"))
        return x, torch.where(bright, torch.inf, 0.0)

    def inverse(self, z, context=None):
        return z, z.new_zeros(len(z))

def build(shape, *, scale: float = 1.0):
    return Sequential(Fragile(), Flatten(shape), DiagonalAffine((64,)))
"""


def test_some_non_finite_images_and_a_model_of_ones_own(tmp_path):
    """Such images are counted, and not dropped from the mean. A checkpoint that names a module
    needs --trust-code.
    """
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "fragile.py").write_text(OWN_MODEL)
    options = [*sets(model__name="own.fragile", model__scale=2), *SHORT]
    quick("train", *options, "--run-dir", "a", cwd=tmp_path).ok()
    quick("evaluate", "a", cwd=tmp_path).failed(2, "model.name", "own.fragile", "--trust-code")
    assert evaluated("a", "--trust-code", cwd=tmp_path)["non_finite_images"] == 0
    images = digits().float()
    bright = int((((images + 0.5) / 17 - 0.5).flatten(1).mean(1) > -0.15).sum())
    done = quick("evaluate", "a", "--trust-code", "--json", "a.json", cwd=tmp_path, BRIGHT="-0.15")
    done.failed(1, "of 180 images have a likelihood that is not finite: those at ")
    values = json.loads((tmp_path / "a.json").read_text())
    # noise moves some over the edge
    assert abs(values["non_finite_images"] - bright) <= 4 and 0 < bright < 180
    assert (values["num_images"], values["bits_per_dim"], values["nats_per_image"]) == (
        180,
        None,
        None,
    )


def test_set_moves_the_data(run, tmp_path):
    assert evaluated(*sets(data__root="elsewhere"), cwd=tmp_path)["num_images"] == DIGITS[0]


def test_the_newest_run_is_the_default(run, tmp_path):
    other = copy_of(trained()["nice"], tmp_path / "runs" / "a_later_one")
    last(other).touch()
    assert json.loads(quick("evaluate", "--json", "-", cwd=tmp_path).ok().out)[
        "checkpoint"
    ].startswith("runs/a_later_one/")
    last(run).touch()
    assert evaluated(cwd=tmp_path)["checkpoint"] == "runs/glow_digits/checkpoints/best.safetensors"
    (run / "checkpoints" / "best.safetensors").unlink()
    assert evaluated(cwd=tmp_path)["checkpoint"] == "runs/glow_digits/checkpoints/last.safetensors"


# --- sample ---------------------------------------------------------------------------------------


def drawn(*args, cwd):
    quick("sample", *args, "--out", "s.npz", cwd=cwd).ok()
    with np.load(cwd / "s.npz") as file:
        return dict(file)


def test_sample_writes_a_grid(run, tmp_path):
    done = quick("sample", cwd=tmp_path).ok()
    assert "runs/glow_digits/sample.png" in done.out
    assert cells(Image.open(run / "sample.png"), 8, 8).shape == (8, 8, 8, 8)


def test_samples_in_an_npz(run, tmp_path):
    values = drawn(
        "--num-images", 5, "--temperature", 0.5, "--temperature", 1, "--seed", 3, cwd=tmp_path
    )
    assert values["images"].shape == (10, 8, 8, 1) and values["images"].dtype == np.uint8
    assert values["images"].max() < 17
    assert values["temperature"].tolist() == [0.5] * 5 + [1.0] * 5
    assert values["seed"] == 3


def test_samples_depend_on_the_seed_alone(run, tmp_path):
    many = drawn("--num-images", 70, cwd=tmp_path)["images"]  # more than one batch
    assert np.array_equal(drawn("--num-images", 70, cwd=tmp_path)["images"], many)
    assert np.array_equal(drawn("--num-images", 3, cwd=tmp_path)["images"], many[:3])
    assert not np.array_equal(
        drawn("--num-images", 3, "--seed", 1, cwd=tmp_path)["images"], many[:3]
    )
    assert not np.array_equal(
        drawn("--num-images", 70, "--weights", "raw", cwd=tmp_path)["images"], many
    )
    assert len(np.unique(many.reshape(70, -1), axis=0)) == 70


@pytest.mark.parametrize(
    "args, rows, columns",
    [
        (["--num-images", 7], 3, 3),
        (["--num-images", 2], 2, 1),
        (["--num-images", 3, "--temperature", 0, "--temperature", 0.7], 2, 3),
    ],
)
def test_grids_of_any_number(args, rows, columns, run, tmp_path):
    quick("sample", *args, "--out", "new/grid.png", cwd=tmp_path).ok()
    images = cells(Image.open(tmp_path / "new" / "grid.png"), rows, columns)
    if "--temperature" in args:  # a row each; the first is the mode of the base, three times
        assert (images[0] == images[0, 0]).all() and (images[1] != images[1, 0]).any()


def test_one_sample_is_a_picture_without_a_frame(run, tmp_path):
    quick("sample", "--num-images", 1, "--out", "one.png", cwd=tmp_path).ok()
    assert Image.open(tmp_path / "one.png").size == (32, 32)


# --- interpolate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORDS)
def test_the_ends_are_test_images_exactly(name, tmp_path):
    options = ["--pairs", 3, "--seed", 4]
    for steps in (2, 5):
        quick(
            "interpolate",
            trained()[name],
            *options,
            "--steps",
            steps,
            "--out",
            f"{steps}.png",
            cwd=tmp_path,
        ).ok()
    short, long = (
        cells(Image.open(tmp_path / "2.png"), 3, 2),
        cells(Image.open(tmp_path / "5.png"), 3, 5),
    )
    assert np.array_equal(short, long[:, [0, -1]])
    known = {image.tobytes() for image in shown(digits())}
    ends = [image.tobytes() for image in short.reshape(6, 8, 8)]
    assert len(set(ends)) == 6 and set(ends) <= known
    assert known.isdisjoint(image.tobytes() for image in long[:, 1:-1].reshape(9, 8, 8))
    quick(
        "interpolate",
        trained()[name],
        "--pairs",
        3,
        "--steps",
        2,
        "--out",
        "other.png",
        cwd=tmp_path,
    ).ok()
    assert not np.array_equal(cells(Image.open(tmp_path / "other.png"), 3, 2), short)


def test_interpolate_by_default(run, tmp_path):
    done = quick("interpolate", cwd=tmp_path).ok()
    assert "runs/glow_digits/interpolate.png" in done.out
    assert cells(Image.open(run / "interpolate.png"), 4, 8).shape == (4, 8, 8, 8)


def test_gif(run, tmp_path):
    quick("interpolate", "--pairs", 2, "--steps", 5, "--out", "a.gif", cwd=tmp_path).ok()
    quick("interpolate", "--pairs", 2, "--steps", 2, "--out", "a.png", cwd=tmp_path).ok()
    animation, ends = Image.open(tmp_path / "a.gif"), cells(Image.open(tmp_path / "a.png"), 2, 2)
    assert animation.n_frames == 8  # there and back: 1 2 3 4 5 4 3 2
    frames = []
    for number in range(animation.n_frames):
        animation.seek(number)
        frames.append(cells(animation, 1, 2)[0])
    assert np.array_equal(frames[0], ends[:, 0]) and np.array_equal(frames[4], ends[:, 1])
    assert np.array_equal(frames[1], frames[7]) and not np.array_equal(frames[1], frames[2])


OWN_FILES = {
    "exact.png": Image.fromarray((np.arange(64).reshape(8, 8) % 17 * 15).astype(np.uint8)),
    "wide.jpg": Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    ),
    "clear.png": Image.new("RGBA", (30, 30), (10, 200, 30, 90)),
    "palette.gif": Image.new("P", (9, 5), 3),
    "deep.png": Image.fromarray(np.full((20, 20), 40_000, np.uint16)),
}


@pytest.mark.parametrize("name", OWN_FILES)
def test_own_image_files(name, tmp_path):
    """Other sizes and modes; the far end is always exact.png, whose pixels are known."""
    OWN_FILES["exact.png"].save(tmp_path / "exact.png")
    OWN_FILES[name].save(tmp_path / name)
    args = ["--images", name, "exact.png", "--steps", 3, "--out", "a.png"]
    quick("interpolate", trained()["glow"], *args, cwd=tmp_path).ok()
    first, _, end = cells(Image.open(tmp_path / "a.png"), 1, 3)[0]
    values = np.round(np.asarray(OWN_FILES["exact.png"]) / 255 * 16).astype(int)
    assert np.array_equal(end, values * 255 // 16)
    if name == "deep.png":
        assert (first == round(40_000 / 257 / 255 * 16) * 255 // 16).all()


# --- from Python ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORDS)
def test_a_flow_from_python(name):
    flow = package.load(str(trained()[name]))
    x = torch.cat([digits("test"), digits("train")])
    assert torch.equal(flow.decode(flow.encode(x)), x)  # exactly, for every image
    noise = [torch.Generator().manual_seed(0) for _ in range(3)]
    log_prob = flow.log_prob(x[:7], generator=noise[0])
    assert log_prob.shape == (7,) and not log_prob.requires_grad
    torch.testing.assert_close(flow.log_prob(x[:3], generator=noise[1]), log_prob[:3])
    torch.testing.assert_close(
        flow.bits_per_dim(x[:7], generator=noise[2]), -log_prob / (64 * math.log(2))
    )
    seeded = [flow.sample(n, 0.8, torch.Generator().manual_seed(1)) for n in (5, 2)]
    assert seeded[0].shape == (5, 1, 8, 8) and seeded[0].dtype == torch.uint8
    assert torch.equal(seeded[0][:2], seeded[1])


def test_load_takes_a_file_and_says_which_weights():
    run = trained()["glow"]
    flows = [package.load(str(last(run)), weights=weights) for weights in (None, "ema", "raw")]
    parameters = [torch.cat([p.flatten() for p in flow.parameters()]) for flow in flows]
    assert torch.equal(parameters[0], parameters[1]) and not torch.equal(
        parameters[1], parameters[2]
    )
    with pytest.raises(package.errors.UserError, match="no such checkpoint"):
        package.load("not there")


# --- real images ----------------------------------------------------------------------------------


@shared
def test_mnist(tmp_path):
    """The official files, found through a link that is gone when the model is evaluated."""
    (tmp_path / "data").symlink_to(SHARED)
    options = [*SMALL, *sets(train__num_steps=3, data__root="data", data__validation=100)]
    quick(
        "train", "--config", "glow_mnist_small.yaml", *options, "--run-dir", "m", cwd=tmp_path
    ).ok()
    (tmp_path / "data").unlink()
    quick("evaluate", "m", cwd=tmp_path).failed(
        2, "data.root: MNIST is not in", "could not be downloaded"
    )
    values = evaluated("m", "--num-images", 100, *sets(data__root=SHARED), cwd=tmp_path)
    assert (values["dataset"], values["num_images"], values["dims"], values["levels"]) == (
        "mnist",
        100,
        784,
        256,
    )
    assert 0 < values["bits_per_dim"] < 8 and values["max_reconstruction_error"] < 0.25


@shared
def test_cifar10(tmp_path):
    data = sets(data__name="npz", data__path=SHARED / "cifar10.npz", data__validation=100)
    options = [*SMALL, *data, *sets(train__num_steps=3)]
    quick(
        "train", "--config", "glow_cifar_small.yaml", *options, "--run-dir", "c", cwd=tmp_path
    ).ok()
    values = evaluated("c", "--num-images", 100, cwd=tmp_path)
    assert (values["dataset"], values["num_images"], values["dims"], values["levels"]) == (
        "npz",
        100,
        3072,
        256,
    )
    assert 4 < values["bits_per_dim"] < 9 and values["max_reconstruction_error"] < 0.25
    quick("interpolate", "c", "--pairs", 1, "--steps", 2, "--out", "i.png", cwd=tmp_path).ok()
    ends = cells(Image.open(tmp_path / "i.png"), 1, 2, (32, 32), channels=3)[0]
    with np.load(SHARED / "cifar10.npz") as file:
        test = {image.tobytes() for image in file["x_test"]}
    assert {end.tobytes() for end in ends} <= test
    shutil.rmtree(tmp_path / "c")

"""The commands of the core, from the outside: what they print, what they write, how they end."""

import csv
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from catalogue import SHORT, SMALL, TINY_RUN, WORDS, sets
from cli_helpers import events, flowtrain, last, metrics, quick, summary, trained, tree
from helpers import SHARED, npz, seeded, shared
from PIL import Image
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import flowtrain as package
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.load import load_model
from flowtrain.cli.configs import find_config
from flowtrain.cli.interpolate import interpolate
from flowtrain.config import load_config, parse
from flowtrain.data.splits import DataSet
from flowtrain.evaluation.evaluate import evaluate
from flowtrain.pictures import grid
from flowtrain.system import capacity

pytestmark = pytest.mark.run

DIGITS = {"test": 180, "validation": 162, "train": 1455}  # images


def digits():
    return DataSet(parse({"train": {"num_steps": 1}}).data)


def evaluated(*args, cwd):
    """`evaluate --json -`: standard output is the JSON and nothing else. No file is written."""
    before = tree(cwd)
    done = quick("evaluate", *args, "--json", "-", cwd=cwd).ok()
    assert "evaluating" in done.err and "bits/dim" in done.err and tree(cwd) == before
    return json.loads(done.out)


def cells(picture, rows, columns, shape=(8, 8), channels=1):
    """The images in a grid, (rows, columns, H, W[, 3]) with values 0..255, not enlarged."""
    pixels = np.asarray(picture.convert("RGB"))
    factor = max(-(-32 // min(shape)), -(-800 // (columns * shape[1])))
    height, width = shape[0] * factor, shape[1] * factor
    assert pixels.shape == (rows * (height + 2) + 2, columns * (width + 2) + 2, 3)
    cut = pixels[2:, 2:].reshape(rows, height + 2, columns, width + 2, 3).swapaxes(1, 2)
    cut = cut[:, :, :height:factor, :width:factor]
    return cut[..., 0] if channels == 1 else cut


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "flowtrain"], [Path(sys.executable).with_name("flowtrain")]]
)
def test_version(command, tmp_path):
    if not Path(command[0]).exists():
        pytest.skip("flowtrain is not installed as a script here")
    done = flowtrain("--version", cwd=tmp_path, command=command).ok()
    assert done.out.split() == ["flowtrain", package.__version__]


def test_train_help_lists_the_configurations_with_a_line_each(tmp_path):
    out = " ".join(quick("train", "--help", cwd=tmp_path).ok().out.split())
    assert "Example: flowtrain train" in out
    shipped = (Path(package.__file__).parents[1] / "configs").rglob("*.yaml")
    for path in list(shipped) or pytest.skip("not a checkout"):
        headline = path.read_text().splitlines()[0].lstrip("# ")
        assert path.stem in out and headline.split("[")[0] in out, path


@pytest.mark.parametrize(
    "shell, words, found, other",
    [
        ("bash", "train --config glow_", "glow_digits", "nice_digits"),
        ("zsh", "train --config glow_", "glow_mnist_small", "nice_digits"),
        ("fish", "train train.l", "train.lr=", "train.log_every=x"),
        ("fish", "train --set data.si", "data.size=", "data.path="),
        ("fish", "evaluate runs/a", "runs/a", "runs/b"),
    ],
)
def test_the_shell_completes_names(shell, words, found, other, tmp_path):
    for run in ("a", "b"):
        (tmp_path / "runs" / run / "checkpoints").mkdir(parents=True)
    env = {"_TYPER_COMPLETE_ARGS": f"flowtrain {words}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    env |= {"COMP_WORDS": f"flowtrain {words}", "COMP_CWORD": "3"}
    done = quick(cwd=tmp_path, _FLOWTRAIN_COMPLETE=f"complete_{shell}", **env)
    assert found in done.out and other not in done.out


def test_what_train_prints(tmp_path):
    run = tmp_path / "runs" / "glow_digits"  # runs/<config name>
    done = quick("train", *TINY_RUN, cwd=tmp_path).ok()
    best = summary(run)["best_validation_bits_per_dim"]
    for words in (
        *("run directory: runs/glow_digits", "\nstep 20/20: ", "flowtrain report runs/glow_digits"),
        "1,455 images to train on, 162 to validate, 1x8x8, 17 levels",
        f"finished: {best:.3f} bits/dim on the validation images",
    ):
        assert words in done.out, words
    assert done.err == ""
    assert metrics(run, timeless=True) == metrics(trained()["glow"], timeless=True)


@pytest.mark.parametrize("name", WORDS)
def test_files_of_a_run(name):
    run = trained()[name]
    checkpoints = ["best", "last", "step-00000015", "step-00000020"]
    assert sorted(p.stem for p in (run / "checkpoints").iterdir()) == checkpoints
    samples = ["step-00000010.png", "step-00000020.png"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == samples
    files = {p.name for p in run.iterdir() if not p.name.startswith("events.out.tfevents.")}
    written = {"config.yaml", "metrics.jsonl", "summary.json"}
    assert files == {*written, "checkpoints", "samples", ".lock"}
    rows = metrics(run)
    assert [(r["split"], r["step"]) for r in rows] == [
        *[("train", 5), ("train", 10), ("validation", 10)],
        *[("train", 15), ("train", 20), ("validation", 20)],
    ]
    assert all(r["images"] == 32 * r["step"] and 3 < r["bits_per_dim"] < 7 for r in rows)
    seconds = [r["seconds"] for r in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0
    values = summary(run)
    best = min((r["bits_per_dim"], r["step"]) for r in rows if r["split"] == "validation")
    assert (values["best_validation_bits_per_dim"], values["best_step"]) == best
    assert (values["step"], values["images"], values["finished"]) == (20, 640, True)
    assert values["seconds"] >= seconds[-1] and values["device"] == "cpu"
    assert values["versions"]["torch"] == torch.__version__
    flow = package.load(str(run))
    assert values["parameters"] == sum(p.numel() for p in flow.parameters())
    saved = checkpoint_format.read(run / "checkpoints" / "best.safetensors")
    assert saved.meta["step"] == values["best_step"]


def test_tensorboard():
    """`test_loggers.py` compares its scalars with the metrics."""
    run = trained()["glow"]
    seen = events(run)
    pictures = seen.Images("samples")
    assert [p.step for p in pictures] == [10, 20]
    drawn = Image.open(run / "samples" / "step-00000020.png")
    logged = Image.open(io.BytesIO(pictures[-1].encoded_image_string))
    assert np.array_equal(np.asarray(drawn), np.asarray(logged))
    tensors = [seen.Tensors(tag)[-1].tensor_proto for tag in seen.Tags()["tensors"]]
    config = (run / "config.yaml").read_text()
    assert any(config in each.string_val[0].decode() for each in tensors)
    first, *others = dict.fromkeys(tag.split("/")[0] for tag in sorted(seen.Tags()["scalars"]))
    assert [first, *others] == ["train", "validation", "z_log_scale_max", "z_log_scale_min"]
    content = seen.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    session = HParamsPluginData.FromString(content).session_start_info
    hparams = {key: value.number_value for key, value in session.hparams.items()}
    assert hparams["train.num_steps"] == 20 and "data.name" in hparams and "train" not in hparams
    content = seen.summary_metadata["_hparams_/experiment"].plugin_data.content
    metric, _ = HParamsPluginData.FromString(content).experiment.metric_infos
    assert seen.Scalars(metric.name.tag)[-1].value == pytest.approx(metrics(run)[-1]["loss"])


def test_a_run_with_one_step_of_more_images_than_there_are(tmp_path):
    """Periods may be longer than the run. The configuration holds absolute paths."""
    npz(tmp_path / "own.npz")
    data = sets(data__name="npz", data__path="own.npz", data__validation=3, train__num_steps=1)
    periods = {f"train__{name}_every": 99 for name in ("log", "validate", "checkpoint", "sample")}
    done = quick("train", *TINY_RUN, *data, *sets(**periods), "--run-dir", "a", cwd=tmp_path).ok()
    told = "a step takes 32 images, so each of the 17 to train on 1.9 times on average"
    assert told in done.out
    run = tmp_path / "a"
    assert [(r["split"], r["step"]) for r in metrics(run)] == [("train", 1), ("validation", 1)]
    assert (run / "samples" / "step-00000001.png").exists()
    assert checkpoint_format.read(run / "checkpoints" / "best.safetensors").meta["step"] == 1
    values = yaml.safe_load((run / "config.yaml").read_text())
    assert values["data"]["path"] == str(tmp_path / "own.npz")


def test_init_from(run, tmp_path):
    """With the weights of the other model; step, optimizer and run are new."""
    options = [*TINY_RUN, *sets(train__num_steps=1, train__lr=1e-30, train__ema=0, seed=5)]
    done = quick("train", *options, "--run-dir", "tuned", "--init-from", run, cwd=tmp_path).ok()
    best = run / "checkpoints" / "best.safetensors"
    step = summary(run)["best_step"]
    assert f"--init-from: starts from the ema weights of {best}, step {step}\n" in done.out
    tuned = checkpoint_format.read(last(tmp_path / "tuned"))
    source = checkpoint_format.read(best)
    assert tuned.meta["step"] == 1
    for name, weights in source.part("ema").items():
        torch.testing.assert_close(tuned.part("model")[name], weights, rtol=0, atol=0)
    for words in (["--extend"], ["--resume", str(best)]):
        again = quick("train", *options, *words, "--init-from", run, cwd=tmp_path)
        again.failed(2, "--init-from: starts a run")


def test_dry_run(tmp_path):
    """Exact parameters; nothing is read, downloaded or written."""
    options = [*SMALL, *sets(data__name="cifar10", data__root="nowhere")]
    out = quick("train", *options, "--dry-run", cwd=tmp_path).ok().out
    config = load_config(find_config("glow_digits.yaml"), SMALL[1::2])
    expected = sum(p.numel() for p in build_flow(config, (3, 32, 32), 256).parameters())
    assert f"parameters: {expected}\n" in out
    words = ("GFLOP per training step", "memory", "(chosen)", "images/s", "estimated time")
    assert all(word in " ".join(out.split()) for word in words)
    assert tree(tmp_path) == []
    little = "import flowtrain.training.dry_run as dry; dry.left = lambda device: 3 * 2**20"
    many = [*SMALL, *sets(train__batch_size=4096)]
    out = quick("train", *many, "--dry-run", cwd=tmp_path, first=little).ok().out
    assert "with 3 MiB available" in " ".join(out.split()) and "speed: not measured" in out
    budget = [*SMALL, *sets(train__budget="1h"), "--dry-run"]
    assert "estimated steps" in quick("train", *budget, cwd=tmp_path).ok().out
    graph = [*SMALL, *sets(train__cuda_graph=True, train__compile="step"), "--dry-run"]
    out = " ".join(quick("train", *graph, "--device", "cpu", cwd=tmp_path).ok().out.split())
    assert "GFLOP per training step" in out and "(chosen)" in out
    assert "speed: not measured, because train.cuda_graph needs a CUDA device" in out


def test_evaluate_prints_a_table_and_writes_json(run, tmp_path):
    done = quick("evaluate", "--scores", "new/scores.csv", cwd=tmp_path).ok()
    written = json.loads((run / "evaluate-test.json").read_text())
    assert "runs/glow_digits/evaluate-test.json" in done.out
    value, error = written["bits_per_dim"], written["bits_per_dim_stderr"]
    headline, *table = done.out[done.out.index(f"{value:.3f}") :].splitlines()
    assert headline == f"{value:.3f} +- {error:.3f} bits/dim (180 test images)"
    assert "likelihood" in "".join(table) and "None" not in done.out
    assert (written["weights"], written["step"]) == ("ema", summary(run)["best_step"])
    assert value > 3 and 0 < written["max_reconstruction_error"] < 0.01
    rows = list(csv.DictReader((tmp_path / "new" / "scores.csv").open()))
    assert np.mean([float(row["bits_per_dim"]) for row in rows]) == pytest.approx(value, abs=1e-12)
    done = quick("evaluate", "--draws", 2, cwd=tmp_path).ok()
    assert "wrote runs/glow_digits/evaluate-2-draws-test.json" in done.out
    assert json.loads((run / "evaluate-test.json").read_text()) == written
    out = " ".join(quick("info", cwd=tmp_path).ok().out.split())
    parameters = f"glow, {summary(run)['parameters']:,} parameters, sampling: one pass"
    version = f"flowtrain {package.__version__}"
    figures = ("digits, test │", "digits, test, 2 draws │", "(180 images")
    for words in ("digits: 1x8x8, 17 levels", parameters, *figures, version):
        assert words in out, words


def test_options_of_evaluate(run, tmp_path):
    """Each reaches the function."""
    model = load_model(str(run), torch.device("cpu"), "raw")
    options = {"num_images": 10, "draws": 2, "seed": 1, "batch_size": 7}
    expected, _ = evaluate(model, digits(), "train", **options)
    words = ["--num-images", 10, "--draws", 2, "--seed", 1, "--batch-size", 7, "--weights", "raw"]
    found = evaluated(*words, "--split", "train", cwd=tmp_path)
    best = "runs/glow_digits/checkpoints/best.safetensors"
    assert found == {**expected.content(), "checkpoint": best}
    assert (found["bound"], found["draws"], found["num_images"]) == ("iwbo", 2, 10)
    # The images and the noise that training saw, and data that have moved.
    validation = evaluated("--split", "validation", *sets(data__root="elsewhere"), cwd=tmp_path)
    best = summary(run)["best_validation_bits_per_dim"]
    assert validation["bits_per_dim"] == pytest.approx(best, abs=1e-12)
    assert validation["num_images"] == DIGITS["validation"]


def test_info_about_a_configuration_and_list(tmp_path):
    out = " ".join(quick("info", "causal_cifar_small.yaml", cwd=tmp_path).ok().out.split())
    assert "cifar10: 3x32x32, 256 levels" in out and "sampling: sequential" in out
    assert "30:00, muon, batches of 32" in out
    assert "two_moons, test" in quick("info", "two_moons", cwd=tmp_path).ok().out
    out = quick("list", cwd=tmp_path).ok().out
    for words in ("  glow_cifar_small ", "  mnist ", "MNIST handwritten digits", "  glow "):
        assert words in out, words
    assert "None" not in out


@pytest.mark.parametrize("target", ["-", "a.json"])
def test_non_finite_images_fail_after_the_json_is_written(target, run, tmp_path):
    saved = checkpoint_format.read(run / "checkpoints" / "best.safetensors")
    saved.tensors["ema.bijection.levels.0.layers.1.log_scale"].flatten()[0] = math.nan
    checkpoint_format.write(tmp_path / "nan.safetensors", saved.meta, saved.tensors)
    done = quick("evaluate", "nan.safetensors", "--num-images", 10, "--json", target, cwd=tmp_path)
    values = json.loads(done.out if target == "-" else (tmp_path / target).read_text())
    where = ", ".join(map(str, values["non_finite_indices"]))
    done.failed(1, "10 of 10 images", f"non-finite likelihood: indices {where}")
    assert values["non_finite_images"] == 10 and values["bits_per_dim"] is None
    quick("sample", "nan.safetensors", cwd=tmp_path).failed(1, "not finite")


OWN_MODEL = """
from flowtrain.bijections import DiagonalAffine, Flatten, Sequential

def build(shape, *, scale: float = 1.0):
    return Sequential(Flatten(shape), DiagonalAffine((64,)))
"""


def test_a_model_of_ones_own(tmp_path):
    """A checkpoint that names a module needs --trust-code. A sweep trusts its own."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "affine.py").write_text(OWN_MODEL)
    options = [*sets(model__name="own.affine", model__scale=2), *SHORT, "--run-dir", "a"]
    quick("train", *options, cwd=tmp_path).ok()
    quick("evaluate", "a", cwd=tmp_path).failed(2, "model.name", "own.affine", "--trust-code")
    assert evaluated("a", "--trust-code", cwd=tmp_path)["num_images"] == DIGITS["test"]
    row = ["--try", "model.name=own.affine", "--images", 640, "--out", "s", "--workers", 1]
    assert " finished |" in quick("sweep", *row, cwd=tmp_path).ok().out


OWN_LAYER = """
from flowtrain.bijections import ActNorm, Flatten, Sequential

class Own(Flatten):
    def forward(self, x, context=None):
        return {}

def build(shape):
    return Sequential(ActNorm(shape), Own(shape))
"""
LOSES_AN_ENTRY = OWN_LAYER.format("x.flatten(1)[:, 1:], x.new_zeros(len(x))")
BROADCAST = OWN_LAYER.format("x.flatten(1), x.new_zeros(len(x), 1)")


@pytest.mark.parametrize(
    "code, said, text",
    [
        (2, "model.name: cannot import 'own.wrong': SyntaxError: invalid syntax", "def f(:"),
        (2, "NameError: name 'gone' is not defined ({file}, line 2)", "\ngone"),
        (2, "model.name: module 'own.wrong' has no function `build`", "build = 3"),
        (2, "of own.wrong: NameError: name 'Gone'", "def build(shape, *, n: 'Gone' = 1): pass"),
        (2, "`build` of own.wrong returned a NoneType", "def build(shape): pass"),
        (2, "a Flatten, expected", "from flowtrain.bijections import Flatten as build"),
        (2, ", 63), not (", LOSES_AN_ENTRY),
        (2, "Own: its log-determinants have shape (2, 1), expected (2,)", BROADCAST),
        (1, "KeyError: 'gone' ({file}, line 2)", "def build(shape):\n    raise KeyError('gone')"),
    ],
)
def test_a_mistake_in_a_model_of_ones_own(code, said, text, tmp_path):
    file = tmp_path / "own" / "wrong.py"
    file.parent.mkdir()
    file.write_text(text)
    done = quick("train", *sets(model__name="own.wrong"), *SHORT, "--run-dir", "a", cwd=tmp_path)
    done.failed(code, said.format(file=file))


def drawn(*args, cwd):
    quick("sample", *args, "--out", "s.npz", cwd=cwd).ok()
    with np.load(cwd / "s.npz") as file:
        return dict(file)


def test_samples_depend_on_the_seed_alone(run, tmp_path):
    many = drawn("--num-images", 70, cwd=tmp_path)["images"]  # more than one batch
    assert many.shape == (70, 8, 8, 1) and many.dtype == np.uint8 and many.max() < 17
    assert len(np.unique(many.reshape(70, -1), axis=0)) == 70
    assert np.array_equal(drawn("--num-images", 70, cwd=tmp_path)["images"], many)
    for words in (["--seed", 1], ["--weights", "raw"]):
        other = drawn("--num-images", 3, *words, cwd=tmp_path)["images"]
        assert not np.array_equal(other, many[:3])
    two = ["--num-images", 3, "--temperature", 0.5, "--temperature", 1]
    values = drawn(*two, cwd=tmp_path)
    assert np.array_equal(values["images"][3:], many[:3]) and values["seed"] == 0
    assert values["temperature"].tolist() == [0.5] * 3 + [1.0] * 3
    quick("sample", *two, "--out", "two.png", cwd=tmp_path).ok()
    assert Image.open(tmp_path / "two.png").size == (824, 2 * (grid.LINE + 276))  # with titles
    quick("sample", "--num-images", 1, "--out", "new/one.png", cwd=tmp_path).ok()
    assert Image.open(tmp_path / "new" / "one.png").size == (32, 32)  # without a frame


@pytest.mark.parametrize("args, rows, columns", [([], 8, 8), (["--num-images", 7], 3, 3)])
def test_grids_of_any_number(args, rows, columns, run, tmp_path):
    assert "runs/glow_digits/sample.png" in quick("sample", *args, cwd=tmp_path).ok().out
    cells(Image.open(run / "sample.png"), rows, columns)


def test_stages_are_a_row_for_each_image_and_each_sample(run, tmp_path):
    done = quick("sample", "--stages", "--num-images", 3, cwd=tmp_path).ok()
    assert "stages.png: 3 test images become noise" in done.out
    images = cells(Image.open(run / "stages.png"), 6, 9)
    samples = drawn("--num-images", 3, cwd=tmp_path)["images"][..., 0].astype(int)
    assert np.array_equal(images[3:, 8], samples * 255 // 16)


@pytest.mark.parametrize("name", WORDS)
def test_the_ends_are_test_images_exactly(name, tmp_path):
    def drawn(steps, *words):
        words = [trained()[name], "--pairs", 3, "--steps", steps, *words, "--out", "i.png"]
        quick("interpolate", *words, cwd=tmp_path).ok()
        return cells(Image.open(tmp_path / "i.png"), 3, steps)

    short, long = drawn(2, "--seed", 4), drawn(5, "--seed", 4)
    assert np.array_equal(short, long[:, [0, -1]])
    test = digits().split("test").take(slice(None))[:, 0].numpy().astype(int)
    known = {image.tobytes() for image in (test * 255 // 16).astype(np.uint8)}
    ends = [image.tobytes() for image in short.reshape(6, 8, 8)]
    assert len(set(ends)) == 6 and set(ends) <= known
    assert known.isdisjoint(image.tobytes() for image in long[:, 1:-1].reshape(9, 8, 8))
    assert not np.array_equal(drawn(2), short)


def test_a_grid_in_the_run_and_an_animation(run, tmp_path):
    done = quick("interpolate", cwd=tmp_path).ok()
    assert "runs/glow_digits/interpolate.png" in done.out
    rows = cells(Image.open(run / "interpolate.png"), 4, 8)
    quick("interpolate", "--out", "a.gif", cwd=tmp_path).ok()
    animation = Image.open(tmp_path / "a.gif")
    assert animation.n_frames == 14  # there and back: 1 2 3 4 5 6 7 8 7 6 5 4 3 2
    frames = []
    for number in range(animation.n_frames):
        animation.seek(number)
        frames.append(cells(animation, 1, 4)[0])
    assert np.array_equal(frames[:8], rows.swapaxes(0, 1))
    assert all(map(np.array_equal, frames[8:], frames[6:0:-1]))


def test_an_animation_without_room_is_refused(tmp_path, monkeypatch, capsys):
    """Its frames of four images are enlarged 25 times, and a row of a hundred 4 times."""
    monkeypatch.setattr(capacity, "available", lambda device: 4 * 100 * 64 * 24**2 * 4)
    with pytest.raises(typer.Exit):
        interpolate(model="glow_digits", steps=100, out=tmp_path / "a.gif")
    said = capsys.readouterr().err
    assert "--steps 100: a picture of 4 paths of 100 images needs at least" in said


def test_own_image_files(tmp_path):
    """One of another size with 16 bits, and one of known pixels."""
    exact = (np.arange(64).reshape(8, 8) % 17 * 15).astype(np.uint8)
    Image.fromarray(exact).save(tmp_path / "exact.png")
    Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(tmp_path / "deep.png")
    args = ["--images", "deep.png", "exact.png", "--steps", 3, "--out", "a.png"]
    quick("interpolate", trained()["glow"], *args, cwd=tmp_path).ok()
    first, _, end = cells(Image.open(tmp_path / "a.png"), 1, 3)[0]
    assert np.array_equal(end, np.round(exact / 255 * 16).astype(int) * 255 // 16)
    assert (first == round(40_000 / 257 / 255 * 16) * 255 // 16).all()


@pytest.mark.parametrize("name", WORDS)
def test_a_flow_from_python(name):
    flow = package.load(str(trained()[name]))
    x = torch.cat([digits().split(each).take(slice(None)) for each in ("test", "train")])
    assert torch.equal(flow.decode(flow.encode(x)), x)  # exactly, for every image
    log_prob = flow.log_prob(x[:7], generator=seeded())
    assert log_prob.shape == (7,) and not log_prob.requires_grad
    torch.testing.assert_close(flow.log_prob(x[:3], generator=seeded()), log_prob[:3])
    five, two = (flow.sample(count, 0.8, seeded(1)) for count in (5, 2))
    assert five.shape == (5, 1, 8, 8) and five.dtype == torch.uint8
    assert torch.equal(five[:2], two)


def test_load_takes_weights():
    run = str(trained()["glow"])
    averaged, raw = (package.load(run, weights=each).parameters() for each in (None, "raw"))
    assert not all(map(torch.equal, averaged, raw))


DESCRIBED = ("dataset", "num_images", "dims", "levels")


@shared
def test_mnist(tmp_path):
    """The official files, found through a link that is gone when the model is evaluated."""
    (tmp_path / "data").symlink_to(SHARED)
    options = [*SMALL, *sets(train__num_steps=3, data__root="data", data__validation=100)]
    words = ["--config", "glow_mnist_small.yaml", *options, "--run-dir", "m"]
    quick("train", *words, cwd=tmp_path).ok()
    (tmp_path / "data").unlink()
    done = quick("evaluate", "m", cwd=tmp_path)
    done.failed(2, "data.root: MNIST is not in", "could not be downloaded")
    values = evaluated("m", "--num-images", 100, *sets(data__root=SHARED), cwd=tmp_path)
    assert [values[key] for key in DESCRIBED] == ["mnist", 100, 784, 256]
    assert 0 < values["bits_per_dim"] < 8 and values["max_reconstruction_error"] < 0.25


@shared
def test_cifar10(tmp_path):
    data = sets(data__name="npz", data__path=SHARED / "cifar10.npz", data__validation=100)
    options = [*SMALL, *data, *sets(train__num_steps=3)]
    words = ["--config", "glow_cifar_small.yaml", *options, "--run-dir", "c"]
    quick("train", *words, cwd=tmp_path).ok()
    values = evaluated("c", "--num-images", 100, cwd=tmp_path)
    assert [values[key] for key in DESCRIBED] == ["npz", 100, 3072, 256]
    assert 4 < values["bits_per_dim"] < 9 and values["max_reconstruction_error"] < 0.25
    quick("interpolate", "c", "--pairs", 1, "--steps", 2, "--out", "i.png", cwd=tmp_path).ok()
    ends = cells(Image.open(tmp_path / "i.png"), 1, 2, (32, 32), channels=3)[0]
    with np.load(SHARED / "cifar10.npz") as file:
        test = {image.tobytes() for image in file["x_test"]}
    assert {end.tobytes() for end in ends} <= test

"""`flowtrain verify-record`: a sound run has a row, and a changed one is refused."""

import contextlib
import dataclasses
import json
import os

import numpy as np
import pytest
from catalogue import TINY_RUN, sets
from cli_helpers import copy_of, metrics, quick, summary, trained
from helpers import CPU, SHARED, npz
from tensorboard.summary.writer.record_writer import RecordWriter

from flowtrain.checkpoints.format import write
from flowtrain.checkpoints.load import load_model
from flowtrain.config import parse
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.flow.dequantize import GaussianDequantizer
from flowtrain.tools.leaderboard import verify as verifying
from flowtrain.tools.leaderboard.verify import Benchmark, identity, verify

pytestmark = pytest.mark.run


def dataset(section):
    return DataSet(parse({"data": section}).data)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run on a small benchmark, with its evaluation, and the benchmark."""
    folder = tmp_path_factory.mktemp("record")
    section = npz(folder / "data.npz", train=200, test=40, flip=True, validation=50)
    words = sets(data__name="npz", data__path=section["path"], data__validation=50, data__flip=True)
    run = folder / "run"
    quick("train", *TINY_RUN, *words, "--run-dir", run, cwd=folder).ok()
    quick("evaluate", run, cwd=folder).ok()
    data = dataset(section)
    whole = Benchmark(
        "noise", identity(data, "train", "validation"), identity(data, "test"), (9, 1)
    )
    return run, whole


@pytest.fixture
def run(original, tmp_path, monkeypatch):
    """A copy, to be changed, with its own data beside it."""
    path, benchmark = original
    monkeypatch.setattr(verifying, "BENCHMARKS", (benchmark,))
    return copy_of(path, tmp_path / "run")


def verified(run, model=None, **data):
    """The verified run, with its model as it stands or as a test has changed it."""
    model = model or load_model(str(run), CPU)
    section = {**model.checkpoint.meta["config"]["data"], **data}
    return verify(model, dataset(section))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_sound_run(run, monkeypatch):
    found, mirrored = verified(run), verified(run, load_model(str(run), CPU, mirror=True))
    evaluated = json.loads((run / "evaluate-test.json").read_text())
    assert found.test.loss == evaluated["loss"] != mirrored.test.loss
    assert found.reached[1] is None and 0 < found.reached[9] < found.seconds
    assert found.row.startswith(f"| `run` | glow | noise | {found.test.loss:.3f} +- ")
    assert "elbo, mirrored" in mirrored.row and " thread" in found.row
    two = dataclasses.replace(found, machine="A processor |\n| `best`")
    assert two.row.endswith(" | A processor \\| \\| `best` |")
    monkeypatch.chdir(run)
    assert verified(".").row == found.row
    edit(run / "summary.json", machine="A processor", parameters=1)
    edited = verified(run)
    assert "A processor, " in edited.row and edited.parameters == found.parameters > 1
    model = load_model(str(run), CPU)
    model.checkpoint.meta["threads"] = None
    assert verified(run, model).machine == "A processor"
    for changes, message in (
        ({"clock": "processor"}, "no wall-clock time"),
        ({"logger": ["wandb"]}, "no log of TensorBoard .train.logger is .'wandb'"),
    ):
        train = model.config.train.model_copy(update=changes)
        changed = model.config.model_copy(update={"train": train})
        with pytest.raises(UserError, match=f"run: {message}"):
            verified(run, dataclasses.replace(model, config=changed))
    model.flow.dequantizer = GaussianDequantizer(256, 0.05)
    with pytest.raises(UserError, match="run: no bits/dim of whole images"):
        verified(run, model)


@contextlib.contextmanager
def changing(run):
    """The rows of the metrics, which are written with their changes."""
    rows = metrics(run)
    yield rows
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def in_the_last_row(run, **changes):
    with changing(run) as rows:
        rows[-1] |= changes


def earlier(run):
    """Another figure of the first validation, which is not the best."""
    with changing(run) as rows:
        next(row for row in rows if row["split"] == "validation")["loss"] += 1e-4


def earlier_weights(run):
    """The best checkpoint is another one, of which the files have no figure."""
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000015.safetensors").replace(checkpoints / "best.safetensors")


def faster(run):
    """All times are half of the true ones, but in the checkpoints."""
    with changing(run) as rows:
        for row in rows:
            row["seconds"] /= 2
    edit(run / "summary.json", seconds=summary(run)["seconds"] / 2)


def a_model_alone(run):
    last = run / "checkpoints" / "last.safetensors"
    write(last, *load_model(str(last), CPU).alone())


def no_events(run):
    """A record of a sound checksum, whose content is no event."""
    with (run / "events.out.tfevents.9999999999").open("wb") as file:
        RecordWriter(file).write(b"\xff")


CHANGES = {
    "its files disagree on the losses in the log": no_events,
    "its files disagree on the last checkpoint": faster,
    "its files disagree on the last check": a_model_alone,
    "its files disagree on the best validation figure": lambda run: edit(
        run / "summary.json", best_validation_loss=1.0
    ),
    "its files disagree on the best validation": lambda run: edit(
        run / "summary.json", best_validation_bits_per_dim=1.0
    ),
    "its files disagree on the times": lambda run: in_the_last_row(run, seconds=0.0),
    "its files disagree on the last step": lambda run: in_the_last_row(run, step=100),
    "its files disagree on the losses in the log of TensorBoard": earlier,
    "not a finished run": lambda run: edit(run / "summary.json", finished=False),
    "its best validation figure is .*, but its best checkpoint has": earlier_weights,
    "its test figure is 1.0, but its best checkpoint has": lambda run: edit(
        run / "evaluate-test.json", loss=1.0
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_changed_files(message, run):
    CHANGES[message](run)
    with pytest.raises(UserError, match=f"run: {message}"):
        verified(run)


def test_a_pipe_among_the_events(run):
    os.mkfifo(run / "events.out.tfevents.9")
    with pytest.raises(OSError, match="not a regular file"):
        verified(run)


def test_other_data(run, tmp_path, monkeypatch):
    arrays = dict(np.load(load_model(str(run), CPU).config.data.path))

    def moved(name, **changes):
        np.savez(tmp_path / name, **{**arrays, **changes})
        return str(tmp_path / name)

    half = moved("half.npz", x_test=arrays["x_test"][:20])
    with pytest.raises(UserError, match="not evaluated on the test split of noise"):
        verified(run, path=half)
    both = np.concatenate([arrays["x_train"][40:], arrays["x_test"]])
    cheating = moved("cheating.npz", x_train=both)
    with pytest.raises(UserError, match="not trained on the training split of noise, but on other"):
        verified(run, path=cheating)
    # The same images, divided in another way: the fingerprint in the checkpoint differs.
    with pytest.raises(UserError, match="the checkpoint was trained on other images"):
        verified(run, split_seed=1)
    # A benchmark whose test images are among those of training cannot be won.
    overlapping = moved("overlap.npz", x_test=arrays["x_train"][:40])
    data = dataset({"name": "npz", "path": overlapping, "validation": 50, "flip": True})
    parts = identity(data, "train", "validation"), identity(data, "test")
    monkeypatch.setattr(verifying, "BENCHMARKS", (Benchmark("noise", *parts, (9,)),))
    with pytest.raises(UserError, match="test images are equal to a training image"):
        verified(run, path=overlapping)


def test_the_command(tmp_path):
    """Only runs of the benchmarks have a row."""
    run = trained()["glow"]
    message = "not evaluated on the test split of CIFAR-10 or MNIST with 256 levels"
    quick("verify-record", run, cwd=tmp_path).failed(2, f"{run}: {message}")
    quick("verify-record", "glow_digits", cwd=tmp_path).failed(2, "no such run directory")


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_the_benchmarks(name):
    if not SHARED.is_dir():
        pytest.skip(f"no real data in {SHARED}")
    npz_of = {"name": "npz", "path": str(SHARED / "cifar10.npz")}
    data = dataset(npz_of if name == "cifar10" else {"name": "mnist", "root": str(SHARED)})
    found = next(each for each in verifying.BENCHMARKS if each.test == identity(data, "test"))
    assert found.train == identity(data, "train", "validation")

"""Runs that are stopped, killed and resumed: nothing differs from an uninterrupted run."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import cli_helpers
import numpy as np
import pytest
import torch
from catalogue import CAUSAL, JET, SMALL, TARFLOW, TINY, TINY_RUN, WORDS
from cli_helpers import events, last, left_overs, metrics, put_back, quick, summary
from helpers import CPU, a_config, npz, tiny_flow

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.format import Checkpoint
from flowtrain.config import load_config
from flowtrain.errors import Interrupted, UserError
from flowtrain.training import loop, resume
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory
from flowtrain.training.state import State

pytestmark = pytest.mark.run

# All that has a memory: the metrics' window, the average, warm-up and decay, two-part steps, the
# order of the images.
EVERYTHING = """train.accumulate=2 train.ema=0.9 train.clip_norm=0.2 train.warmup_steps=4
    train.schedule=cosine train.log_every=3 train.validate_every=4 train.sample_every=7
    train.batch_size=50 data.shift=1 train.num_steps=20 train.checkpoint_every=10
    train.keep_checkpoints=5 train.weight_decay=1e-2"""
STEPS = 80
LONG = f"""train.log_every=1 train.validate_every=25 train.checkpoint_every=10
    train.sample_every=1000 train.num_steps={STEPS} train.keep_checkpoints=0""".split()
LONG = [*SMALL, *LONG]


def rewritten(path, ema=None, **progress):
    """A checkpoint with another `train.ema` or other progress."""
    saved = checkpoint_format.read(path)
    saved.meta["progress"] |= progress
    saved.meta["config"]["train"] |= {} if ema is None else {"ema": ema}
    path.unlink()  # it may be one of two names for the same bytes
    checkpoint_format.write(path, saved.meta, saved.tensors)


def steps_of(run):
    return [row["step"] for row in metrics(run) if row["split"] == "train"]


@pytest.fixture(scope="module")
def uninterrupted():
    run = cli_helpers.FOLDER / "uninterrupted"
    quick("train", *LONG, "--run-dir", run, cwd=cli_helpers.FOLDER).ok()
    assert not list((run / "checkpoints").glob("step-*"))  # train.keep_checkpoints=0
    return run


# Each model, precision, noise and way to keep activations, and the optimizers, are in one of them.
VARIANTS = {
    "glow": [*WORDS["glow"], "train.optimizer=adam", "model.conditioner=gated"]
    + ["model.context=downsample", "model.permutation=conv1x1"],
    "realnvp": [*WORDS["realnvp"], "train.precision=bf16", "train.optimizer=adamw"],
    "nice": [*WORDS["nice"], "train.optimizer=adamax", "train.memory=checkpoint", "train.ema=0"],
    "causal": [*CAUSAL, "train.precision=bf16", "train.clip_norm=1", "model.classes=10"]
    + ["train.optimizer=muon", "model.dropout=0.2"],
    "tarflow": [*TARFLOW, "data.max_in_memory=0", "data.workers=1", "train.memory=checkpoint"]
    + ["model.classes=10", "model.label_dropout=0.4"]
    + ["dequantization.name=gaussian", "dequantization.transform=center"],
    "jet": [*JET, "train.memory=reversible", "model.mixing=permutation"],
}


def test_a_run_without_what_windows_lacks(tmp_path):
    """It is the same, bit for bit, and its lock and left over files are seen."""
    program = (sys.executable, Path(__file__).parents[1] / "like_windows.py")
    run, command = tmp_path / "like_windows", ["train", *TINY_RUN, "--run-dir"]
    with RunDirectory(run).locked():
        refused = cli_helpers.flowtrain(*command, run, cwd=tmp_path, command=program)
        refused.failed(2, f"in use by another process (pid {os.getpid()})")
    cli_helpers.flowtrain(*command, run, cwd=tmp_path, command=program).ok()
    put_back(run, 15)
    (run / "checkpoints" / ".last.safetensors.abc.tmp").write_text("half a checkpoint")
    done = cli_helpers.flowtrain(*command, run, cwd=tmp_path, command=program).ok()
    assert "at step 15" in done.out and left_overs(run) == []
    quick(*command, "here", cwd=tmp_path).ok()
    cli_helpers.assert_same_run(run, tmp_path / "here")


@pytest.mark.parametrize("name", VARIANTS)
def test_20_steps_are_10_and_10(name, tmp_path):
    command = ["train", *EVERYTHING.split(), *VARIANTS[name]]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    quick(*command, "--run-dir", whole, cwd=tmp_path).ok()
    cli_helpers.copy_of(whole, halves)
    put_back(halves, 10)
    (halves / "checkpoints" / ".last.safetensors.abc.tmp").write_text("half a checkpoint")
    with (halves / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "split": "tr')  # cut by the kill
    done = quick(*command, "--run-dir", halves, cwd=tmp_path).ok()
    assert "continued from" in done.out and "at step 10" in done.out
    assert ("streamed" in done.out) == (name == "tarflow")
    cli_helpers.assert_same_run(whole, halves)
    assert left_overs(halves) == []
    steps = [scalar.step for scalar in events(halves).Scalars("train/lr")]
    assert steps == [3, 6, 9, 12, 15, 18, 20]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_by_a_signal_and_resumed(signum, uninterrupted, tmp_path):
    run = tmp_path / "runs" / "glow_digits"
    process = cli_helpers.Forked(["train", *LONG], cwd=tmp_path)
    cli_helpers.wait_for_step(run, 3)
    os.kill(process.process.pid, signum)
    stopped = process.result()
    assert stopped.code == 128 + signum and stopped.err == "", stopped
    step = summary(run)["step"]
    assert 3 <= step < STEPS and not summary(run)["finished"]
    assert f"{signum.name}: finishing the step" in stopped.out
    assert f"at step {step}; saved" in stopped.out
    done = quick("train", *LONG, cwd=tmp_path).ok()
    assert f"continued from {last(Path('runs/glow_digits'))} at step {step}" in done.out
    cli_helpers.assert_same_run(run, uninterrupted)  # each step once, also in the charts
    points = events(run).Scalars("train/bits_per_dim")
    assert [point.step for point in points] == steps_of(run) == list(range(1, STEPS + 1))
    seconds = [row["seconds"] for row in metrics(run)]
    assert seconds == sorted(seconds) and left_overs(run) == []


def interrupted(monkeypatch, config, run, step):
    real = loop.optimizer_step

    def optimizer_step(state, grad_norm):
        real(state, grad_norm)
        if state.progress.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "optimizer_step", optimizer_step)
        fit(config, RunDirectory(run), CPU)


@pytest.mark.parametrize("period", ["validate_every", "sample_every"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "during"])
def test_a_run_is_saved_on_a_signal_before_a_validation_ends(before, period, tmp_path, monkeypatch):
    periods = {"checkpoint_every": 5, "log_every": 5, "validate_every": 99, "sample_every": 99}
    config = a_config(train={**periods, period: 10, "num_steps": 99})
    saved = []

    def takes_long(note):
        if not before:
            os.kill(os.getpid(), signal.SIGTERM)
            note()
        there = checkpoint_format.read(last(tmp_path)).meta["progress"]
        saved.append((there["step"], there["window_steps"]))

    def mean_loss(flow, split, seed, progress):
        takes_long(progress)
        return 3.0

    def decode(flow, latents, note, *others, **options):
        takes_long(note)
        raise UserError("no picture")

    monkeypatch.setattr(loop.reporting, "mean_loss", mean_loss)
    monkeypatch.setattr(loop.reporting, "decode", decode)
    if before:
        interrupted(monkeypatch, config, tmp_path, 10)
    else:
        with pytest.raises(Interrupted):
            fit(config, RunDirectory(tmp_path), CPU)
    assert saved == [(10, 0)]  # the row of this step is written
    assert summary(tmp_path)["best_step"] == (10 if period == "validate_every" else None)


STOPPED_BEFORE_THE_FIRST_STEP = """
import os, signal, time
from flowtrain.cli import main
from flowtrain.training import loop
start = loop.start
def signalled(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return start(*args)
def signalled_in_a_library(*args):
    try:
        signalled(*args)
    except BaseException:
        time.sleep(60)
loop.start, main.GRACE_SECONDS = {start}, 0.1
"""


@pytest.mark.parametrize("how", ["signalled", "signalled_in_a_library"])
def test_a_signal_before_the_first_step_ends_the_process(tmp_path, how):
    first = STOPPED_BEFORE_THE_FIRST_STEP.format(start=how)
    stopped = quick("train", *LONG, cwd=tmp_path, first=first)
    assert stopped.code == 143 and "Traceback" not in stopped.err
    assert not last(tmp_path / "runs" / "glow_digits").exists()


def refused(run, words, message, how="auto", directory=None):
    """The words of the run's command, with these on top, do not fit its checkpoint."""
    config = load_config(run / "config.yaml", words)
    with pytest.raises(UserError, match=message):
        resume.checkpoint_to_resume(config, RunDirectory(directory or run), how)


def test_a_finished_run_is_left_alone(run, tmp_path):
    """Also by a command with other ways to read the data or to compute a step."""

    def times():
        files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    for free in ([], ["data.root=moved", "data.workers=7", "train.compile=layers"]):
        done = quick("train", *TINY_RUN, *free, cwd=tmp_path).ok()
        assert "runs/glow_digits is finished (step 20): nothing to do" in done.out
        assert times() == before
    refused(run, [], "--resume never: .*glow_digits holds a run; .*--run-dir", "never")
    saved = checkpoint_format.read(last(run))
    del saved.meta["data"], saved.meta["processes"]  # which a stranger's file may lack
    last(run).unlink()
    checkpoint_format.write(last(run), saved.meta, saved.tensors)
    halves = ["train.batch_size=16", "train.accumulate=2"]  # as many images for one process
    assert "nothing to do" in quick("train", *TINY_RUN, *halves, cwd=tmp_path).ok().out
    last(run).unlink()
    refused(run, [], "--resume never", "never")
    refused(run, [], "last.safetensors: it is missing\nsound checkpoints of this run: .*step 20")
    refused(run, [], "it is missing\n.*\n.*add --resume .* in place of --extend", resume.EXTEND)


def test_changed_keys_are_named(run):
    advice = "\nto continue this run, give its values%s; to start anew, choose another --run-dir$"
    extend = advice % ", or add --extend for those of this command"
    changed = """model.width=9 train.lr=1e-4 seed=1 model.coupling=additive train.ema=0
        train.batch_size=16 train.accumulate=2 data.split_seed=3 data.name=two_moons"""
    for word in changed.split():
        key = word.partition("=")[0]
        both = rf"last.safetensors was trained with {key}=\S+, and this command has {key}=\S+"
        refused(run, [word], both + (extend if key.startswith("train.") else advice % ""))
    other = "train.budget=12345.678s train.lr=0.0001" + extend
    there = "train.num_steps=20 train.lr=0.002, and this command has "
    refused(run, ["train.lr=1e-4", "train.budget=12345.678s"], there + other)
    refused(run, ["train.optimizer=adamax", "train.lr=1e-4"], "adamax" + advice % "")


def test_a_finished_run_is_extended(run, tmp_path):
    before = metrics(run)
    longer = [*TINY_RUN, "train.num_steps=30", "train.lr=1e-3"]
    rewritten(last(run), non_finite=2, lr_scale=0.25)
    done = quick("train", *longer, "--extend", cwd=tmp_path).ok()
    changed = "changed from train.num_steps=20 train.lr=0.002 to train.num_steps=30 train.lr=0.001"
    lower = "after 2 rollbacks, the learning rate is multiplied by 0.25"
    assert f"at step 20\n{changed}\n{lower}" in done.out
    assert metrics(run)[: len(before)] == before
    assert steps_of(run) == [5, 10, 15, 20, 25, 30] and summary(run)["finished"]
    for words, message in (
        (["train.num_steps=30"], "--extend: .* is at step 30: give a larger train.num_steps"),
        (["train.budget=1e-3s"], "--extend: .* has used .*: give a larger train.budget"),
        (["train.num_steps=40", "model.width=9"], "has model.width=9\n"),
        (["train.num_steps=40", "train.optimizer=adamax"], "has train.optimizer=adamax\n"),
        (["train.num_steps=40", "train.clock=processor"], "has train.clock=processor\n"),
        (["train.num_steps=40", "train.ema=0"], "train.ema: .* was trained with 0.999"),
    ):
        refused(run, words, message, resume.EXTEND)
    refused(run, [], "new holds no run to continue$", resume.EXTEND, tmp_path / "new")
    config = load_config(run / "config.yaml", ["train.budget=1h"])
    assert resume.checkpoint_to_resume(config, RunDirectory(run), resume.EXTEND) is not None
    rewritten(last(run), seconds=3600.0)
    refused(run, ["train.budget=1h"], "has used 1:00:00: give a larger", resume.EXTEND)
    quick("train", *longer, "--extend", "--resume", "never", cwd=tmp_path).failed(2, "--extend")
    rewritten(last(run), ema=0)
    refused(run, ["train.num_steps=40"], "train.ema: .* was trained with 0", resume.EXTEND)
    rewritten(last(run), ema=0.999, seconds=0.0)
    brief = load_config(run / "config.yaml", ["train.budget=1e-3s"])
    fit(brief, RunDirectory(run), CPU, resume.EXTEND)
    assert summary(run)["finished"] and summary(run)["step"] > 30


def test_resume_a_checkpoint_in_a_new_folder(run, tmp_path):
    source = run / "checkpoints" / "step-00000015.safetensors"
    more = [*TINY_RUN, "train.num_steps=30", "train.lr=1e-4"]
    (tmp_path / "new").mkdir()  # by a command that was killed before its first checkpoint
    (tmp_path / "new" / "config.yaml").write_text("")
    done = quick("train", *more, "--resume", source, "--run-dir", "new", cwd=tmp_path).ok()
    assert f"continued from {source} at step 15" in done.out
    assert steps_of(tmp_path / "new") == [20, 25, 30]
    assert summary(tmp_path / "new")["step"] == 30 and summary(run)["step"] == 20
    message = "--resume .*new holds another run; .*leave --resume out"
    refused(run, [], message, str(source), tmp_path / "new")
    for word in ("model.width=9", "train.optimizer=adamax", "data.flip=true"):
        key = word.partition("=")[0]
        refused(run, [word], f"{source} was trained with {key}=", str(source), tmp_path / "newer")


def test_resume_an_earlier_checkpoint_of_the_same_run(run, tmp_path):
    """The curve after it goes. The best checkpoint is of the new curve, although it is worse."""
    worse = "from flowtrain.training import reporting; reporting.mean_loss = lambda *a, **o: 99.0"
    source = run / "checkpoints" / "step-00000015.safetensors"
    options = [*TINY_RUN, "train.lr=1e-4", "train.num_steps=17", "train.checkpoint_every=1"]
    quick("train", *options, "--resume", source, cwd=tmp_path, first=worse).ok()
    assert steps_of(run) == [5, 10, 15, 17]
    best = checkpoint_format.read(run / "checkpoints" / "best.safetensors")
    assert best.meta["step"] == summary(run)["best_step"] == 17
    assert [scalar.step for scalar in events(run).Scalars("train/lr")] == [5, 10, 15, 17]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"step-00000016.safetensors", "step-00000017.safetensors"} <= names


@pytest.mark.parametrize("folder", [[], ["--run-dir", "new"]], ids=["same folder", "new folder"])
def test_the_checkpoint_resumed_from_is_the_last_good_state(folder, run, tmp_path):
    """The first step is not finite, and rolls back to it, not to a later one in the folder."""
    source = run / "checkpoints" / "step-00000015.safetensors"
    options = ["train.lr=1e39", "train.checkpoint_every=1", "train.max_non_finite=0"]
    done = quick("train", *TINY_RUN, *options, "--resume", source, *folder, cwd=tmp_path)
    done.failed(1, "stopped at step 16")
    assert checkpoint_format.read(last(tmp_path / "new" if folder else run)).meta["step"] == 15


@pytest.mark.parametrize("array, key", [("x_train", "content"), ("y_train", "labels")])
def test_changed_images_or_labels_are_noticed(array, key, tmp_path):
    data, model = npz(tmp_path / "own.npz"), {"name": "glow", "classes": 4, **TINY["glow"]}
    arrays = {**np.load(data["path"]), "y_train": np.arange(20) % 3}
    np.savez(data["path"], **arrays)
    fit(a_config(model, data), RunDirectory(tmp_path / "r"), CPU)
    arrays[array] += 1
    np.savez(data["path"], **arrays)
    longer = a_config(model, data, {"num_steps": 9})
    with pytest.raises(UserError, match=f"^data: not the images that .*last.safetensors.* {key}"):
        fit(longer, RunDirectory(tmp_path / "r"), CPU, resume.EXTEND)


@pytest.mark.parametrize("key, value", [("cuda_graph", True), ("compile", "layers")])
def test_a_step_is_averaged_in_the_same_way_everywhere(key, value, monkeypatch):
    def gathered(own):
        return [own, {**own, "train": {**own["train"], key: value}}]

    monkeypatch.setattr(resume.distributed, "all_gather_object", gathered)
    refused = pytest.raises(UserError, match="^train.cuda_graph: process 0 has False, process 1 Tr")
    with refused if key == "cuda_graph" else contextlib.nullcontext():
        resume.require_same_everywhere(a_config(), {})


@pytest.mark.parametrize("processes, kept", [(1, [3]), (2, [])])
def test_as_many_processes_have_as_many_threads_as_before(run, processes, kept, monkeypatch):
    """The tensors of the checkpoint then take no memory."""
    asked = []
    monkeypatch.setattr(resume, "as_before", asked.append)
    saved = checkpoint_format.read(last(run))
    saved.meta |= {"processes": processes, "threads": 3}
    config = load_config(run / "config.yaml")
    flow = build_flow(config, saved.meta["shape"], saved.meta["levels"])
    resume.start(config, flow, saved.meta["data"], saved, None, None)
    assert asked == kept and saved.tensors == {}


def test_a_run_that_pauses(tmp_path):
    command = ["train", *TINY_RUN, "train.validate_every=1000", "--run-dir"]
    for share, step in ((0.26, 6), (0.2, 6), (0.5, 10), (1, 20)):
        done = quick(*command, "paused", "--until", share, cwd=tmp_path).ok()
        found, rows = summary(tmp_path / "paused"), metrics(tmp_path / "paused")
        assert (found["step"], found["finished"]) == (step, step == 20)
        assert rows[-1]["split"] == "validation" and rows[-1]["step"] == step
        assert step == 20 or f"paused at step {step}: --until {share}" in done.out
    quick(*command, "whole", cwd=tmp_path).ok()
    one, other = (checkpoint_format.read(last(tmp_path / n)).tensors for n in ("paused", "whole"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_share_of_a_budget_of_time():
    config = a_config(train={"num_steps": None, "budget": "1h"})
    state = State(config, tiny_flow("glow"), [], None, {})
    ends = [state.reached_end(seconds, 0.25) for seconds in (899.0, 900.0)]
    assert ends == [False, True] and not state.reached_end(900.0)


@pytest.mark.parametrize("used", [3599.9, 3601.0])
def test_a_budget_includes_the_time_that_was_used(used, tmp_path, monkeypatch):
    """Even if it ran out in a validation before a kill: a step follows, and the end of the run."""
    config = a_config(train={"num_steps": None, "budget": "1h", "schedule": "linear"})
    interrupted(monkeypatch, config, tmp_path, 3)
    rewritten(last(tmp_path), seconds=used)
    fit(config, RunDirectory(tmp_path), CPU)
    after, rows = summary(tmp_path), metrics(tmp_path)
    assert after["finished"] and after["seconds"] >= 3600 and rows[-1]["split"] == "validation"
    assert after["step"] == 4 if used > 3600 else after["step"] >= 4
    assert rows[-2]["lr"] < 1e-4 * config.train.lr  # it decays with the time


@pytest.mark.parametrize(
    "model, changes", [("glow", "rounding only"), ("cnf", "results within the tolerances")]
)
def test_the_effect_of_another_division_of_the_same_images(model, changes):
    """Images of a batch share the steps of a solver, so there it is more than rounding."""
    for length, counts, follows in (
        ({"num_steps": 9}, "", "the 9 steps left take 72 images, not 36"),
        ({"num_steps": None, "budget": 9}, "train.budget counts seconds", "the clock of train.bud"),
    ):
        train = {"memory": "store", **length}
        before, now = (a_config(train={**train, "batch_size": size}) for size in (4, 8))
        state = State(now, tiny_flow(model), [], None, {})
        meta = {"config": before.resolved(), "processes": 2}
        (line,) = resume._new_division(state, Checkpoint(Path("last"), meta, {}))
        assert "a step takes 8 images as before" in line and f"which changes {changes}" in line
        assert counts in line
        meta["processes"] = 1
        first, second = resume._new_division(state, Checkpoint(Path("last"), meta, {}))
        assert "a step takes 8 images, not 4: another run from here on" in first
        assert follows in second

"""Runs that are stopped, killed and continued: nothing differs from a run that was left alone
(design, section 6).
"""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from catalogue import CAUSAL, JET, SMALL, TARFLOW, TINY_RUN, WORDS, sets
from cli_helpers import (
    FOLDER,
    Forked,
    assert_same_run,
    copy_of,
    events,
    last,
    left_overs,
    metrics,
    quick,
    result,
    start,
    summary,
    trained,
    wait_for_step,
    within,
)
from helpers import a_config, tiny_flow

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.format import Checkpoint
from flowtrain.training import resume
from flowtrain.training.state import State

# All that has a memory: the metrics' window, the average, warm-up and decay, two-part steps, the
# order of the images.
EVERYTHING = sets(
    train__accumulate=2,
    train__ema=0.9,
    train__clip_norm=0.2,
    train__warmup_steps=4,
    train__schedule="cosine",
)
EVERYTHING += sets(
    train__log_every=3,
    train__validate_every=4,
    train__sample_every=7,
    train__batch_size=50,
    data__shift=1,
)
EVERYTHING += sets(
    train__num_steps=20,
    train__checkpoint_every=10,
    train__keep_checkpoints=5,
    train__weight_decay=1e-2,
)

LONG = [
    *SMALL,
    *sets(
        train__log_every=1,
        train__validate_every=25,
        train__checkpoint_every=10,
        train__sample_every=1000,
    ),
]
STEPS = 80
LONG += sets(train__num_steps=STEPS, train__keep_checkpoints=0)


def put_back(run, step):
    """The run as a kill just after `step` would have left it: its last checkpoint is that one, its
    logs are longer.
    """
    last(run).unlink()
    last(run).hardlink_to(run / "checkpoints" / f"step-{step:08d}.safetensors")


def assert_curve_without_gaps(run, num_steps):
    """Each step once, in metrics.jsonl and in what TensorBoard shows."""
    wanted = list(range(1, num_steps + 1))
    assert [row["step"] for row in metrics(run) if row["split"] == "train"] == wanted
    assert [scalar.step for scalar in events(run).Scalars("train/bits_per_dim")] == wanted
    seconds = [row["seconds"] for row in metrics(run)]
    assert seconds == sorted(seconds)
    assert left_overs(run) == []


@pytest.fixture(scope="module")
def uninterrupted():
    """The long run that nobody stopped."""
    run = FOLDER / "uninterrupted"
    quick("train", *LONG, "--run-dir", run, cwd=FOLDER).ok()
    return run


# --- 10 + 10 = 20 ---------------------------------------------------------------------------------


STREAMED = sets(data__max_in_memory=0, data__workers=1)


# Each model, optimizer, precision and way to keep activations is in one of them.
@pytest.mark.parametrize(
    "variant",
    [
        sets(train__precision="fp32", train__optimizer="adam", model__conditioner="gated"),
        [*WORDS["realnvp"], *sets(train__precision="bf16", train__optimizer="adamw")],
        [*WORDS["nice"], *sets(train__optimizer="adamax", train__memory="checkpoint")]
        + sets(train__ema=0),
        [*CAUSAL, *sets(train__precision="bf16", train__optimizer="muon", train__clip_norm=1)]
        + sets(model__classes=10, model__dropout=0.2),
        [*TARFLOW, *STREAMED, *sets(train__memory="checkpoint", model__classes=10)],
        [*JET, *sets(train__memory="reversible", model__mixing="permutation")],
    ],
    ids=[
        "glow-fp32-adam-gated",
        "realnvp-bf16-adamw",
        "nice-recomputed-adamax-no-ema",
        "causal-bf16-muon-with-classes-and-dropout",
        "tarflow-streamed-recomputed-with-classes",
        "jet-reversible",
    ],
)
def test_20_steps_are_10_and_10(variant, tmp_path):
    command = ["train", *([] if "--config" in variant else WORDS["glow"]), *EVERYTHING, *variant]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    quick(*command, "--run-dir", whole, cwd=tmp_path).ok()
    copy_of(whole, halves)
    put_back(halves, 10)
    (halves / "checkpoints" / ".last.safetensors.abc.tmp").write_text("half a checkpoint")
    with (halves / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "split": "tr')  # cut by the kill
    done = quick(*command, "--run-dir", halves, cwd=tmp_path).ok()
    assert "going on from" in done.out and "at step 10" in done.out
    assert_same_run(whole, halves)
    assert left_overs(halves) == []
    steps = [scalar.step for scalar in events(halves).Scalars("train/bits_per_dim")]
    assert steps == [3, 6, 9, 12, 15, 18, 20]


def test_the_test_above_would_notice(tmp_path):
    """The same run but for one thing that only later steps see is not the same run."""
    command = ["train", *WORDS["glow"], *EVERYTHING, "--run-dir"]
    quick(*command, tmp_path / "a", cwd=tmp_path).ok()
    copy_of(tmp_path / "a", tmp_path / "b")
    put_back(tmp_path / "b", 10)
    path = last(tmp_path / "b")
    saved = checkpoint_format.read(path)
    name = next(name for name in sorted(saved.tensors) if name.startswith("optimizer.exp_avg."))
    saved.tensors[name] *= 1.001
    path.unlink()
    checkpoint_format.write(
        path,
        {k: v for k, v in saved.meta.items() if k not in ("format", "versions")},
        saved.tensors,
    )
    quick(*command, tmp_path / "b", cwd=tmp_path).ok()
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "a", tmp_path / "b")


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_stopped_by_a_signal_and_continued(signum, code, uninterrupted, tmp_path):
    run = tmp_path / "runs" / "glow_digits"
    if signum == signal.SIGTERM:  # as a user does
        process = start("train", *LONG, cwd=tmp_path)
        wait_for_step(run, 3)
        process.send_signal(signum)
        stopped = result(process)
    else:
        forked = Forked(["train", *LONG], cwd=tmp_path)
        wait_for_step(run, 3)
        os.kill(forked.process.pid, signum)
        stopped = forked.result()
    assert stopped.code == code and stopped.err == "", stopped
    step = summary(run)["step"]
    assert 3 <= step < STEPS and not summary(run)["finished"]
    # the step was finished, and saved
    assert checkpoint_format.read(last(run)).meta["step"] == step
    assert (
        f"{signum.name}: finishing the step" in stopped.out
        and f"at step {step}; saved" in stopped.out
    )
    done = quick("train", *LONG, cwd=tmp_path).ok()
    assert f"going on from runs/glow_digits/checkpoints/last.safetensors at step {step}" in done.out
    assert_same_run(run, uninterrupted)
    assert_curve_without_gaps(run, STEPS)


STOPPED_BEFORE_VALIDATION = """
import os, signal
from flowtrain.checkpoints import format as checkpoint
from flowtrain.training import loop
step = loop.optimizer_step
def optimizer_step(state, grad_norm):
    step(state, grad_norm)
    if state.progress.step == 9:  # it will be 10
        os.kill(os.getpid(), signal.SIGTERM)
def validate(state, run, validation):
    print("validating", state.progress.step, "saved", checkpoint.read(run.last).meta["step"])
loop.optimizer_step, loop.validate = optimizer_step, validate
"""


def test_what_a_signal_stops_is_saved_before_it_is_validated(tmp_path):
    command = [
        "train",
        *LONG,
        *sets(train__validate_every=10, train__checkpoint_every=5),
        "--run-dir",
        "r",
    ]
    stopped = quick(*command, cwd=tmp_path, first=STOPPED_BEFORE_VALIDATION)
    assert stopped.code == 143 and "validating 10 saved 10" in stopped.out


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


def test_kill_9_at_any_moment(uninterrupted, tmp_path):
    """Also while a checkpoint is written, which here is most of the time; each kill loses two steps
    at most: one while its checkpoint is written, and one that was trained meanwhile.
    """
    random.seed(0)
    command = [
        "train",
        *LONG,
        *sets(train__checkpoint_every=1, train__keep_checkpoints=2),
        "--run-dir",
        "r",
    ]
    run, reached, mid_write = tmp_path / "r", 0, 0
    for attempt in range(6):
        process = Forked(command, cwd=tmp_path)
        wait_for_step(run, reached + 3)
        if attempt % 2:
            time.sleep(random.random() / 20)
        else:
            with within(60, "a checkpoint that is being written") as expired:
                while (
                    not list((run / "checkpoints").glob(".last.*.tmp"))
                    and process.process.is_alive()
                ):
                    expired()
        os.kill(process.process.pid, signal.SIGKILL)
        assert process.result().code == -signal.SIGKILL
        mid_write += left_overs(run) != []
        step = checkpoint_format.read(last(run)).meta["step"]  # whole, whatever happened
        logged = [row["step"] for row in metrics(run) if row["split"] == "train"]
        assert reached < step < STEPS and logged[-1] - step in (0, 1, 2)
        reached = step
    assert mid_write > 0
    done = Forked(command, cwd=tmp_path).result().ok()
    assert f"at step {reached}" in done.out
    assert_curve_without_gaps(run, STEPS)
    assert [p.name for p in sorted((run / "checkpoints").glob("step*"))] == [
        f"step-{step:08d}.safetensors" for step in (STEPS - 1, STEPS)
    ]
    a, b = checkpoint_format.read(last(run)), checkpoint_format.read(last(uninterrupted))
    assert (
        all((a.tensors[name] == b.tensors[name]).all() for name in b.tensors)
        and a.tensors.keys() == b.tensors.keys()
    )
    assert metrics(run, timeless=True) == metrics(uninterrupted, timeless=True)


def test_a_killed_run_leaves_no_lock_behind(tmp_path):
    streamed = sets(
        data__max_in_memory=0, data__workers=2, train__num_steps=5000, train__log_every=100
    )
    command = ["train", *SMALL, *streamed, *sets(train__checkpoint_every=5), "--run-dir", "r"]
    first = Forked(command, cwd=tmp_path)
    with within(60, "a checkpoint") as expired:
        while not list((tmp_path / "r" / "checkpoints").glob("step-*")):
            expired()
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.join()
    second = Forked(command, cwd=tmp_path)
    with within(60, "the second start") as expired:
        while "going on from" not in second.out and second.process.is_alive():
            expired()
    second.process.terminate()
    assert second.result().code == 143 and "streamed" in second.out, second.result()


# --- the same command, or nearly ------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    return copy_of(trained()["glow"], tmp_path / "runs" / "glow_digits")


def test_a_finished_run_says_so_and_changes_nothing(run, tmp_path):
    before = {
        path: path.stat().st_mtime_ns
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    done = quick("train", *TINY_RUN, cwd=tmp_path).ok()
    assert "runs/glow_digits is finished (step 20): nothing to do" in done.out
    after = {
        path: path.stat().st_mtime_ns
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert before == after


def test_never_refuses_a_folder_that_holds_a_run(run, tmp_path):
    quick("train", *TINY_RUN, "--resume", "never", cwd=tmp_path).failed(
        2, "--resume never", "runs/glow_digits", "--run-dir"
    )
    quick("train", *TINY_RUN, "--resume", "never", "--run-dir", "new", cwd=tmp_path).ok()


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.width", 9),
        ("train.lr", 1e-4),
        ("train.num_steps", 21),
        ("data.validation", 50),
        ("seed", 1),
    ]
    + [
        ("model.coupling", "additive"),
        ("train.ema", 0),
        ("data.split_seed", 3),
        ("train.budget", "1h"),
    ],
)
def test_a_changed_key_is_named(key, value, run, tmp_path):
    done = quick("train", *TINY_RUN, "--set", f"{key}={value}", cwd=tmp_path)
    named = "train.num_steps" if key == "train.budget" else key
    done.failed(2, f"{named}:", "last.safetensors has", "--run-dir")
    assert checkpoint_format.read(last(run)).meta["step"] == 20 and len(metrics(run)) == 6


def test_where_the_data_lie_may_change(run, tmp_path):
    moved = sets(data__root="moved", data__workers=7)
    assert "nothing to do" in quick("train", *TINY_RUN, *moved, cwd=tmp_path).ok().out


def test_how_a_step_is_computed_may_change(run, tmp_path):
    compiled = sets(train__compile="layers")
    assert "nothing to do" in quick("train", *TINY_RUN, *compiled, cwd=tmp_path).ok().out


def test_a_finished_run_is_extended(run, tmp_path):
    before = metrics(run)
    longer = [*TINY_RUN, *sets(train__num_steps=30)]
    quick("train", *longer, cwd=tmp_path).failed(2, "train.num_steps:", "add --extend")
    done = quick("train", *longer, "--extend", cwd=tmp_path).ok()
    assert "going on from runs/glow_digits/checkpoints/last.safetensors at step 20" in done.out
    assert metrics(run)[: len(before)] == before
    steps = [row["step"] for row in metrics(run) if row["split"] == "train"]
    assert steps == [5, 10, 15, 20, 25, 30] and summary(run)["finished"]
    assert "nothing to do" in quick("train", *longer, cwd=tmp_path).ok().out
    quick("train", *longer, "--extend", cwd=tmp_path).failed(
        2, "--extend", "is at step 30: give a larger train.num_steps"
    )
    timed = [*TINY_RUN, *sets(train__budget="1e-3s")]
    quick("train", *timed, "--extend", cwd=tmp_path).failed(2, "give a larger train.budget")
    quick("train", *longer, "--extend", "--run-dir", "new", cwd=tmp_path).failed(
        2, "--extend: new holds no run"
    )
    quick("train", *longer, "--extend", "--resume", "never", cwd=tmp_path).failed(2, "--extend")
    other = quick(
        "train", *longer, *sets(model__width=9, train__num_steps=40), "--extend", cwd=tmp_path
    )
    other.failed(2, "model.width:")


def test_resume_a_checkpoint_in_a_new_folder(run, tmp_path):
    """From there on with another schedule; the old run stays as it is."""
    source = run / "checkpoints" / "step-00000015.safetensors"
    more = [
        *TINY_RUN,
        *sets(train__num_steps=30, train__lr=1e-4),
        "--resume",
        source,
        "--run-dir",
        "new",
    ]
    done = quick("train", *more, cwd=tmp_path).ok()
    assert f"going on from {source} at step 15" in done.out
    assert [row["step"] for row in metrics(tmp_path / "new") if row["split"] == "train"] == [
        20,
        25,
        30,
    ]
    assert summary(tmp_path / "new")["step"] == 30 and summary(run)["step"] == 20
    assert (
        "nothing to do" in quick("train", *more[:-4], "--run-dir", "new", cwd=tmp_path).ok().out
    )  # it is a run like any
    quick("train", *more, cwd=tmp_path).failed(
        2, "--resume", "new holds another run", "leave --resume out"
    )
    for key, value in [("model.width", 9), ("train.optimizer", "adamax"), ("data.flip", "true")]:
        other = quick("train", *more, "--set", f"{key}={value}", "--run-dir", "newer", cwd=tmp_path)
        other.failed(2, f"{key}: {source} has")


def test_resume_an_earlier_checkpoint_of_the_same_run(run, tmp_path):
    """The curve after it is forgotten; new checkpoints are not taken for older than the abandoned
    ones.
    """
    source = run / "checkpoints" / "step-00000015.safetensors"
    options = [*TINY_RUN, *sets(train__lr=1e-4, train__num_steps=17, train__checkpoint_every=1)]
    quick("train", *options, "--resume", source, cwd=tmp_path).ok()
    assert [row["step"] for row in metrics(run) if row["split"] == "train"] == [5, 10, 15, 17]
    assert [scalar.step for scalar in events(run).Scalars("train/lr")] == [5, 10, 15, 17]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"step-00000016.safetensors", "step-00000017.safetensors"} <= names


@pytest.mark.parametrize("folder", [[], ["--run-dir", "new"]], ids=["same folder", "new folder"])
def test_the_checkpoint_resumed_from_is_the_last_good_state(folder, run, tmp_path):
    """Not a later one that lies in the folder, nor none: the first step is not finite, and goes
    back to it.
    """
    source = run / "checkpoints" / "step-00000015.safetensors"
    options = [*TINY_RUN, *sets(train__lr=1e39, train__checkpoint_every=1, train__max_non_finite=0)]
    quick("train", *options, "--resume", source, *folder, cwd=tmp_path).failed(
        1, "stopped at step 16"
    )
    assert checkpoint_format.read(last(tmp_path / "new" if folder else run)).meta["step"] == 15


def test_changed_images_are_noticed(tmp_path):
    def write(seed):
        images = np.random.default_rng(seed).integers(0, 256, (40, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "own.npz", x_train=images, x_test=images[:5])

    command = [
        "train",
        *SMALL,
        *sets(data__name="npz", data__path="own.npz", train__log_every=1),
        "--run-dir",
        "r",
    ]
    write(seed=0)
    process = Forked([*command, *sets(train__num_steps=100_000)], cwd=tmp_path)
    wait_for_step(tmp_path / "r", 2)
    process.process.terminate()
    assert process.result().code == 143
    write(seed=1)
    quick(*command, *sets(train__num_steps=100_000), cwd=tmp_path).failed(
        2, "data:", "content", "last.safetensors"
    )


def test_one_process_at_a_time(tmp_path):
    first = Forked(
        ["train", *LONG, *sets(train__num_steps=100_000), "--run-dir", "r"], cwd=tmp_path
    )
    wait_for_step(tmp_path / "r", 1)
    second = quick("train", *LONG, *sets(train__num_steps=100_000), "--run-dir", "r", cwd=tmp_path)
    second.failed(2, "--run-dir r", "in use by another process", f"pid {first.process.pid}")
    first.process.terminate()
    assert first.result().code == 143
    steps = [row["step"] for row in metrics(tmp_path / "r") if row["split"] == "train"]
    assert steps == list(range(1, len(steps) + 1))


def test_a_budget_that_runs_out_beside_the_steps_is_seen_to(tmp_path):
    """Used up by a validation, say, and then killed: the next start takes a step and sees to the
    end.
    """
    budget = sets(train__budget="1h", train__validate_every=10, train__checkpoint_every=5)
    stopped = Forked(["train", *SMALL, *budget, "--run-dir", "r"], cwd=tmp_path)
    with within(60, "a checkpoint") as expired:
        while (
            not last(tmp_path / "r").exists()
            or checkpoint_format.read(last(tmp_path / "r")).meta["step"] == 0
        ):
            expired()
    stopped.process.kill()
    stopped.result()
    saved = checkpoint_format.read(last(tmp_path / "r"))
    progress = {**saved.meta["progress"], "seconds": 3601.0}
    meta = {k: v for k, v in saved.meta.items() if k not in ("format", "versions")}
    checkpoint_format.write(last(tmp_path / "r"), {**meta, "progress": progress}, saved.tensors)
    quick("train", *SMALL, *budget, "--run-dir", "r", cwd=tmp_path).ok()
    after = summary(tmp_path / "r")
    assert after["finished"] and after["step"] == saved.meta["step"] + 1
    assert metrics(tmp_path / "r")[-1]["split"] == "validation"


def test_a_budget_knows_the_time_that_was_used(tmp_path):
    command = [
        "train",
        *LONG,
        *sets(train__budget="3s", train__schedule="linear"),
        "--run-dir",
        "r",
    ]
    first = Forked(command, cwd=tmp_path)
    with within(60, "a second of training") as expired:
        while not any(row["seconds"] > 1 for row in (metrics_so_far(tmp_path / "r"))):
            expired()
    first.process.terminate()
    assert first.result().code == 143
    used = summary(tmp_path / "r")["seconds"]
    assert 1 < used < 3
    quick(*command, cwd=tmp_path).ok()
    rows = [row for row in metrics(tmp_path / "r") if row["split"] == "train"]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and summary(tmp_path / "r")["finished"]
    assert 3 <= summary(tmp_path / "r")["seconds"] < 6
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    lr = 2e-3
    # decays with the time
    assert rows[-1]["lr"] < 0.2 * lr and rows[-1]["lr"] < max(row["lr"] for row in rows) / 3
    assert "nothing to do" in quick(*command, cwd=tmp_path).ok().out


def metrics_so_far(run):
    """While the run writes: the last line may be half there."""
    if not (run / "metrics.jsonl").exists():
        return []
    whole = (run / "metrics.jsonl").read_text().rpartition("\n")[0]
    return [yaml.safe_load(line) for line in whole.splitlines()[-1:]]


@pytest.mark.parametrize(
    "model, changes", [("glow", "rounding only"), ("cnf", "results within the tolerances")]
)
def test_what_another_division_of_the_same_images_changes(model, changes):
    """Images of a batch share the steps of a solver, so there it is more than rounding."""
    before, now = (
        a_config(train={"batch_size": size, "num_steps": 9, "memory": "store"}) for size in (4, 8)
    )
    state = State(now, tiny_flow(model), [], None, {})
    meta = {"config": before.resolved(), "processes": 2}
    (line,) = resume._new_division(state, Checkpoint(Path("last"), meta, {}))
    assert "a step takes 8 images as before" in line and f"which changes {changes}" in line
    meta["processes"] = 1
    first, second = resume._new_division(state, Checkpoint(Path("last"), meta, {}))
    assert "a step takes 8 images, not 4: another run from here on" in first
    assert "the 9 steps left take 72 images, not 36" in second

"""The content of a run directory after kills, damage and deletion."""

import errno
import json
import os
import resource
import shutil
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import cli_helpers
import pytest
import torch
from catalogue import SMALL, TINY_RUN
from cli_helpers import last, left_overs, metrics, quick, summary, trained, tree
from dataset_helpers import pipe
from helpers import CPU, a_config

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.background import THREAD
from flowtrain.config import load_config
from flowtrain.errors import Interrupted, RunError, UserError
from flowtrain.results import Row
from flowtrain.training import reporting, run_directory
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory

ENDLESS = ["train", *SMALL, "train.num_steps=100_000", "train.log_every=1", "--run-dir", "r"]


def cut(run):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + text[:40])


KILLS = {
    "no summary": lambda run: (run / "summary.json").unlink(),
    "damaged summary": lambda run: (run / "summary.json").write_text("[" * 100_000),
    "old summary": lambda run: (run / "summary.json").write_text(
        json.dumps({**summary(run), "finished": False, "step": 15})
    ),
    "pipe for summary": lambda run: pipe(run / "summary.json"),
    "metrics": cut,
    "numbered": lambda run: shutil.copy(last(run), run / "checkpoints/step-00000010.safetensors"),
    "half": lambda run: (run / "checkpoints" / ".last.safetensors.x.tmp").write_text("half"),
    "half 2": lambda run: (run / ".summary.json.x.tmp").write_text("half"),
}


@pytest.mark.run
@pytest.mark.parametrize("kill", KILLS)
def test_a_finished_run_is_brought_up_to_date(kill, run, tmp_path):
    KILLS[kill](run)
    done = quick("train", *TINY_RUN, cwd=tmp_path).ok()
    assert "nothing to do" in done.out and "damaged" not in done.out
    whole = trained()["glow"]
    assert summary(run) == summary(whole)
    cli_helpers.assert_same_run(run, whole)
    assert tree(run) == tree(whole) and left_overs(run) == []


@pytest.mark.run
def test_a_stopped_run_is_brought_up_to_date(run, tmp_path, monkeypatch):
    """At its start, and not only at the next checkpoint."""

    def loop(*args):
        raise RunError(summary(run))

    cli_helpers.put_back(run, 15)
    (run / "summary.json").unlink()
    monkeypatch.setattr("flowtrain.training.loop._loop", loop)
    with pytest.raises(RunError) as raised:
        fit(load_config(run / "config.yaml"), RunDirectory(run), CPU)
    assert raised.value.args[0]["step"] == 15 and not raised.value.args[0]["finished"]


@pytest.fixture
def meanwhile(monkeypatch):
    """Calls a function in the thread that writes a checkpoint, before a last one is whole."""

    def call(function):
        def fsync(handle):
            file = Path(f"/proc/self/fd/{handle}").readlink().name
            if threading.current_thread().name.startswith(THREAD) and ".last." in file:
                function()
            real(handle)

        real = os.fsync
        monkeypatch.setattr(os, "fsync", fsync)

    return call


def train(folder, **keys):
    often = {"checkpoint_every": 5, "validate_every": 5, "log_every": 1, "keep_checkpoints": 9}
    config = a_config(train={"batch_size": 8, **often, **keys})
    fit(config, RunDirectory(folder), CPU)


@pytest.mark.run
def test_training_continues_while_a_checkpoint_is_written(tmp_path, meanwhile):
    train(tmp_path / "plain", num_steps=20)

    def lines():  # the last one may be half written
        return (tmp_path / "r" / "metrics.jsonl").read_bytes().count(b"\n")

    def two_steps():
        wanted = lines() + 2
        with cli_helpers.within(30, "two steps") as expired:
            while lines() < wanted:
                expired()

    meanwhile(two_steps)
    train(tmp_path / "r", num_steps=20)
    cli_helpers.assert_same_run(tmp_path / "r", tmp_path / "plain")
    names = [name for name in tree(tmp_path / "r") if name.endswith(".safetensors")]
    assert len(names) == 6  # of 4 steps, the last, and the best
    for name in names:
        one, other = (checkpoint_format.read(tmp_path / run / name) for run in ("r", "plain"))
        assert one.meta["step"] == other.meta["step"]
        assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
    # The best one was written once, with the others of its step.
    best = tmp_path / "r" / "checkpoints" / "best.safetensors"
    step = summary(tmp_path / "r")["best_step"]
    assert best.samefile(best.with_name(f"step-{step:08d}.safetensors"))


@pytest.mark.run
def test_the_loop_raises_the_error_of_the_thread(tmp_path, meanwhile):
    """Soon, and not only when the next checkpoint is due."""

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    meanwhile(full)
    with pytest.raises(RunError, match="last.safetensors: cannot be written: No space.*; what was"):
        train(tmp_path, num_steps=1000, checkpoint_every=100, validate_every=1000)
    assert checkpoint_format.read(last(tmp_path)).meta["step"] == summary(tmp_path)["step"] == 0
    assert left_overs(tmp_path) == [] and 100 <= metrics(tmp_path)[-1]["step"] < 200


@pytest.mark.run
def test_the_best_checkpoint_is_the_last_one(tmp_path, monkeypatch):
    """Also between two periods of checkpoints: after a kill, training continues from it."""
    losses = iter([3.0, 2.0])

    def mean_loss(*args, **options):
        for loss in losses:
            return loss
        raise RunError("killed")

    monkeypatch.setattr(reporting, "mean_loss", mean_loss)
    with pytest.raises(RunError, match="killed"):
        train(tmp_path, num_steps=20, checkpoint_every=100, validate_every=4)
    run = RunDirectory(tmp_path)
    assert summary(tmp_path)["step"] == summary(tmp_path)["best_step"] == 8
    assert checkpoint_format.read(run.last).meta["step"] == run.best_step() == 8


@pytest.mark.run
def test_a_signal_waits_for_the_thread(tmp_path, meanwhile):
    meanwhile(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.3)))
    with pytest.raises(Interrupted):
        train(tmp_path, num_steps=100_000)
    steps = [row["step"] for row in metrics(tmp_path) if row["split"] == "train"]
    saved = checkpoint_format.read(last(tmp_path)).meta["step"]
    assert saved == summary(tmp_path)["step"] == steps[-1] and left_overs(tmp_path) == []
    assert (tmp_path / "checkpoints" / "step-00000005.safetensors").exists()


def test_the_lock_is_held_until_the_thread_has_written(tmp_path, monkeypatch):
    """Also if another error ends the run."""
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(0.05), fsync(handle)))
    run = RunDirectory(tmp_path / "r")
    with pytest.raises(RunError, match="another error"), run.locked():
        run.checkpoints.mkdir()
        how = {"keep": 0, "numbered": False, "best": True, "wait": False}
        run.save_last({"step": 1}, {"model.w": torch.ones(3)}, {}, **how)
        raise RunError("another error")
    assert run.best.samefile(run.last) and left_overs(run.path) == []


DAMAGE = {
    "bit": lambda line: line[:3] + bytes([line[3] ^ 1]) + line[4:],  # "step" is "suep"
    "bytes": lambda line: b"\xff\xfe" + line,
    "keys": lambda line: b'{"step": 10, "split": "train"}',
    "deep": lambda line: b"[" * 100_000,
}


@pytest.mark.run
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_lines_of_metrics_are_moved(kind, run, capsys):
    path, moved = run / "metrics.jsonl", run / "metrics.damaged.jsonl"
    lines = path.read_bytes().split(b"\n")
    damaged = DAMAGE[kind](lines[1])
    for number in range(2):
        path.write_bytes(b"\n".join([lines[0], damaged, *lines[2:]]))
        with (directory := RunDirectory(run)).locked():
            directory.tidy_metrics(15 if number else 20)
        said = " ".join(capsys.readouterr().out.split())
        assert "metrics.jsonl: damaged lines: 1, the first is line 2; moved" in said
        assert moved.read_bytes() == damaged + b"\n"  # once
    rows = metrics(trained()["glow"])
    assert metrics(run) == [rows[0], *(row for row in rows[2:] if row["step"] <= 15)]
    with directory.locked():
        path.write_bytes(b"1\n" + path.read_bytes())
        directory.tidy_metrics(15)
        directory.tidy_metrics(15)
    assert moved.read_bytes() == damaged + b"\n1\n"
    assert capsys.readouterr().out.count("damaged lines") == 1


ELSEWHERE = {"pipe": os.mkfifo, "link": lambda path: path.symlink_to("../private")}


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "metrics.damaged.jsonl"])
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_run_directory_leads_nowhere_else(kind, name, tmp_path):
    run = RunDirectory(tmp_path / "r")
    run.path.mkdir()
    (tmp_path / "private").write_text("")
    run.metrics.write_text("damaged\n")
    (run.path / name).unlink(missing_ok=True)
    ELSEWHERE[kind](run.path / name)
    refused = kind == "pipe" or name == ".lock"
    no_file = "not a regular file|No such device"  # the latter of a pipe without a reader
    with pytest.raises(UserError, match=no_file) if refused else nullcontext(), run.locked():
        run.tidy_metrics(step=3)
    if (kind, name) == ("link", "metrics.jsonl"):
        row = Row(step=1, images=1, seconds=1.0, split="train", bits_per_dim=1.0)
        with pytest.raises(RunError, match="not a regular file"), run.locked():
            run.log(row)
    assert (tmp_path / "private").read_text() == ""


@pytest.mark.parametrize("name", ["checkpoints", "samples"])
def test_a_folder_of_a_run_is_no_link(name, tmp_path):
    """In it files are replaced and removed."""
    run = RunDirectory(tmp_path / "r")
    run.path.mkdir()
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / ".x.tmp").write_text("")
    ELSEWHERE["link"](run.path / name)
    with pytest.raises(UserError, match=f"r/{name} is a link"), run.locked():
        pass
    assert tree(tmp_path / "private") == [".x.tmp"]


@pytest.mark.run
def test_one_process_at_a_time(tmp_path):
    """Also after the file `.lock` was deleted."""
    with RunDirectory(tmp_path / "r").locked():
        done = quick(*ENDLESS, cwd=tmp_path)
        done.failed(2, "--run-dir r", f"in use by another process (pid {os.getpid()})")
        (tmp_path / "r" / ".lock").unlink()
        done = quick(*ENDLESS, cwd=tmp_path)
        done.failed(2, "--run-dir r", "in use by another process (pid unknown)")
        assert not (tmp_path / "r" / ".lock").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def lock(handle, wait=True):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_directory, "lock", lock)
    with RunDirectory(tmp_path).locked():
        assert "has no locks (Function not implemented)" in capsys.readouterr().out


def test_a_disk_that_is_full_at_the_start(tmp_path):
    run, before = RunDirectory(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(RunError, match="config.yaml: cannot be written"), run.locked():
            run.begin(a_config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.run
@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_deleted_run_directory_stops_the_run(replaced, tmp_path):
    often = ["train.checkpoint_every=10", "train.sample_every=5", "train.validate_every=5"]
    process = cli_helpers.Forked([*ENDLESS, *often], cwd=tmp_path)
    cli_helpers.wait_for_step(tmp_path / "r", 3)
    (tmp_path / "r").rename(tmp_path / "aside")
    if replaced:
        (tmp_path / "r").mkdir()
    shutil.rmtree(tmp_path / "aside")
    done = process.result()
    done.failed(1, "r: the run directory was deleted or moved during training")
    assert done.err.count("\n") == 1
    # TensorBoard's own thread opens its file by name for each record, and may do so once more
    # if the directory was replaced.
    left = [name for name in tree(tmp_path) if not (replaced and "tfevents" in name)]
    assert left == (["r"] if replaced else [])


@pytest.mark.run
def test_a_damaged_checkpoint_names_the_sound_ones(run, tmp_path):
    def damage(path):
        data = path.read_bytes()
        path.unlink()  # it may be one of two names for the same bytes
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    folder = run / "checkpoints"
    source = "runs/glow_digits/checkpoints/step-00000015.safetensors"
    (folder / "best.safetensors").unlink()
    damage(last(run))
    advice = "to continue from step {}, add --resume"
    quick("train", *TINY_RUN, cwd=tmp_path).failed(2, advice.format(20))
    damage(folder / "step-00000020.safetensors")
    done = quick("train", *TINY_RUN, cwd=tmp_path)
    sound = "sound checkpoints of this run: step-00000015.safetensors (step 15) to continue"
    done.failed(2, "last.safetensors: damaged", sound, f"{advice.format(15)} {source}")
    assert done.err.count("\n") <= 6
    quick("train", *TINY_RUN, "--resume", source, cwd=tmp_path).ok()
    cli_helpers.assert_same_run(run, trained()["glow"])
    for path in folder.glob("*.safetensors"):
        damage(path)
    quick("train", *TINY_RUN, cwd=tmp_path).failed(2, "no other checkpoint of this run is sound")


@pytest.mark.run
def test_a_last_validation_that_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "mean_loss", lambda *args, **options: float("nan"))
    message = "finished at step 5, but its last validation loss is not finite"
    for _ in range(2):
        with pytest.raises(RunError, match=message):
            fit(a_config(train={"validate_every": 2}), RunDirectory(tmp_path), CPU)
    assert checkpoint_format.read(last(tmp_path)).meta["progress"]["finished"]
    assert summary(tmp_path)["finished"]

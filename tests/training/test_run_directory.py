"""What a run directory holds after kills, damage and deletion."""

import json
import os
import shutil
import time
from contextlib import nullcontext

import pytest
import torch
from catalogue import SMALL, TINY_RUN, sets
from cli_helpers import (
    Forked,
    assert_same_run,
    copy_of,
    last,
    left_overs,
    metrics,
    quick,
    summary,
    trained,
    tree,
    wait_for_step,
    within,
)

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.errors import RunError, UserError
from flowtrain.results import Row
from flowtrain.training.run_directory import RunDirectory

ENDLESS = ["train", *SMALL, *sets(train__num_steps=100_000, train__log_every=1), "--run-dir", "r"]


@pytest.fixture
def run(tmp_path):
    return copy_of(trained()["glow"], tmp_path / "runs" / "glow_digits")


def put_back(run, step):
    last(run).unlink()
    last(run).hardlink_to(run / "checkpoints" / f"step-{step:08d}.safetensors")


def cut(run):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + text[:40])


# --- kills ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kill",
    [
        lambda run: (run / "summary.json").unlink(),
        lambda run: (run / "summary.json").write_text("[" * 100_000),
        lambda run: (run / "summary.json").write_text(
            json.dumps({**summary(run), "finished": False, "step": 15})
        ),
        cut,
        lambda run: shutil.copy(last(run), run / "checkpoints" / "step-00000010.safetensors"),
        lambda run: (run / "checkpoints" / ".last.safetensors.x.tmp").write_text("half"),
        lambda run: (run / ".summary.json.x.tmp").write_text("half"),
    ],
    ids=["no summary", "damaged summary", "old summary", "metrics", "numbered", "half", "half 2"],
)
def test_a_finished_run_is_brought_up_to_date(kill, run, tmp_path):
    kill(run)
    done = quick("train", *TINY_RUN, cwd=tmp_path).ok()
    assert "nothing to do" in done.out and "damaged" not in done.out
    whole = trained()["glow"]
    assert summary(run) == summary(whole)
    assert_same_run(run, whole)
    assert tree(run) == tree(whole) and left_overs(run) == []


def test_a_stopped_run_is_brought_up_to_date(run, tmp_path):
    """Before the next checkpoint, which is far away."""
    put_back(run, 15)
    steps = sets(train__num_steps=100_000, train__checkpoint_every=100_000)
    process = Forked(
        ["train", *TINY_RUN, *steps, "--resume", last(run), "--run-dir", run], cwd=tmp_path
    )
    (run / "summary.json").unlink()
    with within(60, "the summary") as expired:
        while not (run / "summary.json").exists():
            expired()
    assert summary(run)["step"] == 15 and not summary(run)["finished"]
    process.process.terminate()
    assert process.result().code == 143


# --- a checkpoint that is written while training goes on ------------------------------------------

# Calls `meanwhile` in the thread that writes a checkpoint, before a last one is whole.
MEANWHILE = """
import os, signal, threading, time
from pathlib import Path
from flowtrain.checkpoints import background
fsync = os.fsync
def watched(handle):
    writes = threading.current_thread().name.startswith(background.THREAD)
    if writes and ".last." in os.readlink(f"/proc/self/fd/{handle}"):
        meanwhile()
    fsync(handle)
os.fsync = watched
"""
TWO_STEPS = """
def meanwhile():
    def steps():
        return Path("r/metrics.jsonl").read_text().count("train")
    wanted, give_up = steps() + 2, time.monotonic() + 30
    while steps() < wanted:
        assert time.monotonic() < give_up, "training waits"
        time.sleep(0.001)
"""
FULL = """
def meanwhile():
    raise OSError(28, "No space left on device")
"""
STOPPED = """
def meanwhile():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
"""
OFTEN = sets(train__checkpoint_every=5, train__validate_every=5, train__log_every=1)
GOING_ON = ["train", *SMALL, *OFTEN, *sets(train__num_steps=20, train__keep_checkpoints=9)]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    """What is written is the state of the checkpoint's step."""
    quick(*GOING_ON, "--run-dir", "r", cwd=tmp_path, first=MEANWHILE + TWO_STEPS).ok()
    quick(*GOING_ON, "--run-dir", "plain", cwd=tmp_path).ok()
    assert_same_run(tmp_path / "r", tmp_path / "plain")
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


def test_the_loop_raises_what_the_thread_has_raised(tmp_path):
    """Soon, and not only when the next checkpoint is due."""
    endless = [*GOING_ON, *sets(train__num_steps=100_000), "--run-dir", "r"]
    rare = sets(train__checkpoint_every=100, train__validate_every=100_000)
    quick(*endless, *rare, cwd=tmp_path, first=MEANWHILE + FULL).failed(
        1, "r/checkpoints/last.safetensors: cannot be written: No space left on device; what was"
    )
    run = tmp_path / "r"
    assert checkpoint_format.read(last(run)).meta["step"] == summary(run)["step"] == 0
    assert left_overs(run) == [] and 100 <= metrics(run)[-1]["step"] < 200


def test_the_lock_is_held_until_the_thread_has_written(tmp_path, monkeypatch):
    """Also where another error ends the run."""
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(0.05), fsync(handle)))
    run = RunDirectory(tmp_path / "r")
    with pytest.raises(RunError, match="another error"), run.locked():
        run.checkpoints.mkdir()
        run.save_best({"step": 1}, {"model.w": torch.ones(3)})
        raise RunError("another error")
    assert run.best.exists() and left_overs(run.path) == []


def test_a_signal_waits_for_the_thread(tmp_path):
    endless = [*GOING_ON, *sets(train__num_steps=100_000), "--run-dir", "r"]
    assert quick(*endless, cwd=tmp_path, first=MEANWHILE + STOPPED).code == 143
    run = tmp_path / "r"
    steps = [row["step"] for row in metrics(run) if row["split"] == "train"]
    assert checkpoint_format.read(last(run)).meta["step"] == summary(run)["step"] == steps[-1]
    assert (run / "checkpoints" / "step-00000005.safetensors").exists() and left_overs(run) == []


# --- damaged lines --------------------------------------------------------------------------------


def flipped(line):
    return line[:3] + bytes([line[3] ^ 1]) + line[4:]  # "step" is "suep", say


@pytest.mark.parametrize(
    "damaged",
    [
        flipped,
        lambda line: b"\xff\xfe" + line,
        lambda line: b'{"step": 10, "split": "train"}',
        lambda line: b"[" * 100_000,
        lambda line: b"3",
    ],
    ids=["bit", "bytes", "keys", "deep", "number"],
)
@pytest.mark.parametrize("resumes", [True, False], ids=["resumes", "finished"])
def test_damaged_metrics(damaged, resumes, run, tmp_path):
    before = (run / "metrics.jsonl").read_bytes()
    lines = before.split(b"\n")
    lines[1] = damaged(lines[1])
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    if resumes:
        put_back(run, 15)
    done = quick("train", *TINY_RUN, cwd=tmp_path).ok()
    assert done.out.count("metrics.jsonl: damaged lines: 1, the first is line 2") == 1
    assert (run / "metrics.damaged.jsonl").read_bytes() == lines[1] + b"\n"
    rows = metrics(trained()["glow"], timeless=True)
    assert metrics(run, timeless=True) == [rows[0], *rows[2:]]
    again = quick("train", *TINY_RUN, cwd=tmp_path).ok()
    assert "damaged" not in again.out
    assert (run / "metrics.damaged.jsonl").read_bytes() == lines[1] + b"\n"


def test_more_damage_is_added(run, tmp_path):
    for number in (3, 1):
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
        lines[number] = b"%d" % number
        (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
        quick("train", *TINY_RUN, cwd=tmp_path).ok()
    assert (run / "metrics.damaged.jsonl").read_bytes() == b"3\n1\n"


# --- names that lead elsewhere --------------------------------------------------------------------

NO_FILE = "not a regular file|No such device"  # the latter of a pipe without a reader
ELSEWHERE = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link": lambda path: path.symlink_to("../private"),
}


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "metrics.damaged.jsonl"])
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_run_directory_leads_nowhere_else(kind, name, tmp_path):
    """Nothing waits for a pipe, reads a device for ever, or writes to a file that a link names."""
    (tmp_path / "r").mkdir()
    (tmp_path / "private").write_text("")
    (tmp_path / "r" / "metrics.jsonl").write_text("damaged\n")
    (tmp_path / "r" / name).unlink(missing_ok=True)
    ELSEWHERE[kind](tmp_path / "r" / name)
    run = RunDirectory(tmp_path / "r")
    refused = kind != "link" or name == ".lock"
    expected = pytest.raises(UserError, match=NO_FILE) if refused else nullcontext()
    with expected, run.locked():
        run.tidy_metrics(step=3)
    if kind == "link" and name == "metrics.jsonl":
        row = Row(step=1, images=1, seconds=1.0, split="train", bits_per_dim=1.0)
        with pytest.raises(RunError, match="not a regular file"), run.locked():
            run.log(row)
    assert (tmp_path / "private").read_text() == ""


@pytest.mark.parametrize("name", ["checkpoints", "samples"])
def test_a_folder_of_a_run_is_no_link(name, tmp_path):
    """In it files are replaced and removed."""
    (tmp_path / "r").mkdir()
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / ".x.tmp").write_text("")
    ELSEWHERE["link"](tmp_path / "r" / name)
    run = RunDirectory(tmp_path / "r")
    with pytest.raises(UserError, match=f"r/{name} is a link"), run.locked():
        pass
    assert tree(tmp_path / "private") == [".x.tmp"]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_summary_that_is_no_file_is_written_anew(kind, tmp_path):
    run = RunDirectory(tmp_path)
    ELSEWHERE[kind](tmp_path / "summary.json")
    assert run.summary() == {}
    with run.locked():
        run.write_json("summary.json", {"step": 1})
    assert run.summary() == {"step": 1}


# --- deletion -------------------------------------------------------------------------------------


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_deleted_run_directory_stops_the_run(replaced, tmp_path):
    often = sets(train__checkpoint_every=10, train__sample_every=5, train__validate_every=5)
    process = Forked([*ENDLESS, *often], cwd=tmp_path)
    wait_for_step(tmp_path / "r", 3)
    (tmp_path / "r").rename(tmp_path / "aside")
    if replaced:
        (tmp_path / "r").mkdir()
    shutil.rmtree(tmp_path / "aside")
    done = process.result()
    done.failed(1, "r: the run directory was deleted or moved during training")
    assert done.err.count("\n") == 1
    # TensorBoard's own thread opens its file by name for each record, and may do so once more
    # where the directory was replaced.
    left = [name for name in tree(tmp_path) if not (replaced and "tfevents" in name)]
    assert left == (["r"] if replaced else [])


def test_a_deleted_lock_still_locks(tmp_path):
    first = Forked(ENDLESS, cwd=tmp_path)
    wait_for_step(tmp_path / "r", 1)
    (tmp_path / "r" / ".lock").unlink()
    second = quick(*ENDLESS, cwd=tmp_path)
    second.failed(2, "--run-dir r", "in use by another process (pid unknown)")
    assert not (tmp_path / "r" / ".lock").exists()
    first.process.terminate()
    assert first.result().code == 143


# --- a damaged checkpoint -------------------------------------------------------------------------


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # it may be one of two names for the same bytes
    path.write_bytes(data)


def test_a_damaged_checkpoint_names_the_sound_ones(run, tmp_path):
    folder = run / "checkpoints"
    damage(last(run))
    damage(folder / "step-00000020.safetensors")
    (folder / "best.safetensors").unlink()
    done = quick("train", *TINY_RUN, cwd=tmp_path)
    source = "runs/glow_digits/checkpoints/step-00000015.safetensors"
    done.failed(
        2,
        "last.safetensors: damaged",
        "sound checkpoints of this run: step-00000015.safetensors (step 15)",
        f"to go on from step 15, give the same command with --resume {source}",
    )
    assert done.err.count("\n") <= 6
    quick("train", *TINY_RUN, "--resume", source, cwd=tmp_path).ok()
    assert_same_run(run, trained()["glow"])
    for path in folder.glob("*.safetensors"):
        damage(path)
    quick("train", *TINY_RUN, cwd=tmp_path).failed(2, "no other checkpoint of this run is sound")


# --- a validation that is not finite --------------------------------------------------------------

NOT_FINITE = """
from flowtrain.training import reporting
reporting.mean_loss = lambda *args, **options: float("nan")
"""


def test_a_last_validation_that_is_not_finite(tmp_path):
    command = ["train", *TINY_RUN, "--run-dir", "r"]
    done = quick(*command, cwd=tmp_path, first=NOT_FINITE)
    done.failed(1, "r: finished at step 20, but its last validation loss is not finite")
    assert checkpoint_format.read(last(tmp_path / "r")).meta["progress"]["finished"]
    assert summary(tmp_path / "r")["finished"]
    quick(*command, cwd=tmp_path).failed(1, "its last validation loss is not finite")

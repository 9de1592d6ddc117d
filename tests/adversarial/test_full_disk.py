"""A disk that is full: exit code 1, a message, and nothing that was saved before is lost."""

import json

import pytest
from catalogue import SMALL, sets
from cli_helpers import Forked, last, left_overs, quick, trained, wait_for_step
from run_files import train_row

from flowtrain.checkpoints import format as checkpoint_format

pytestmark = pytest.mark.run


@pytest.mark.parametrize(
    # room: the longest file that the disk takes, beyond a checkpoint's bytes
    "room, what, options",
    [
        (-1000, "last.safetensors", []),
        (6000, "", sets(train__sample_every=1)),  # TensorBoard's file outgrows that
        (2000, "metrics.jsonl", sets(train__sample_every=5000, train__validate_every=5000)),
    ],
    ids=["checkpoint", "tensorboard", "metrics"],
)
def test_no_space_left(room, what, options, tmp_path):
    length = sets(train__checkpoint_every=2, train__log_every=5, train__num_steps=400)
    command = ["train", *SMALL, *length, *options]
    first = Forked(command, cwd=tmp_path)
    run = tmp_path / "runs" / "glow_digits"
    wait_for_step(run, 1)
    first.process.terminate()
    assert first.result().code == 143
    limit = last(run).stat().st_size + room
    step = checkpoint_format.read(last(run)).meta["step"]
    if what == "metrics.jsonl":  # nearly as long as it may be
        row = json.dumps(train_row(1, 4.0)) + "\n"
        (run / "metrics.jsonl").write_text(row * ((limit - 10) // len(row)))
    failed = quick(*command, cwd=tmp_path, file_limit=limit)
    failed.failed(1, "runs/glow_digits", what, "cannot be written", "File too large")
    assert checkpoint_format.read(last(run)).meta["step"] >= step
    assert left_overs(run) == []


def test_no_space_left_for_an_output(tmp_path):
    args = [trained()["glow"], "--num-images", 2000, "--out", "a.npz"]
    done = quick("sample", *args, cwd=tmp_path, file_limit=5000)
    done.failed(1, "a.npz: cannot be written", "File too large")
    assert list(tmp_path.iterdir()) == []

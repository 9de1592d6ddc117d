"""TensorBoard and Weights & Biases: their content, offline, from the real packages."""

import io
import json
import os
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from catalogue import TINY_RUN
from cli_helpers import copy_of, events, metrics, quick
from helpers import a_config
from PIL import Image

from flowtrain.errors import UserError
from flowtrain.training import loggers
from flowtrain.training.loop import fit
from flowtrain.training.resume import EXTEND
from flowtrain.training.run_directory import RunDirectory


@pytest.fixture(scope="module", autouse=True)
def nobody(tmp_path_factory):
    """A user who is not logged in, and who has chosen nothing."""
    home = str(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB")]:
            patch.delenv(name)
        for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
            patch.setenv(name, home)
        patch.setenv("NETRC", os.devnull)
        yield


@pytest.fixture
def anew():
    """Weights & Biases reads the environment once, before it is first used."""
    import wandb

    loggers.ended(wandb.teardown)
    yield
    loggers.ended(wandb.teardown)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 4 steps with all loggers, which is then extended to 8 steps without TensorBoard."""
    folder = tmp_path_factory.mktemp("loggers") / "run"
    train = {"batch_size": 8, "log_every": 2, "validate_every": 4, "sample_every": 4}
    for names, steps in ((["tensorboard", "wandb"], 4), (["wandb"], 8)):
        config = a_config(train={**train, "logger": names, "num_steps": steps})
        fit(config, RunDirectory(folder), torch.device("cpu"), "auto" if steps == 4 else EXTEND)
    return folder


def wandb_records(folder, kind):
    """All records of a kind in Weights & Biases' files, each with its file."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # Only then its process has written all.
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in pieces(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == kind:
                yield path, getattr(record, kind)


def pieces(log):
    """The records of a log of LevelDB's format: blocks of 32 KiB, in which a record has a checksum,
    its length and its kind, whole (1), or a first, middle or last part of one (2, 3, 4).
    """
    at, whole = 7, b""  # after the file's own header
    while at + 7 <= len(log):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def wandb_points(folder):
    """`{(chart, step): value}`, and the names of the runs."""
    points, names = {}, set()
    for path, history in wandb_records(folder, "history"):
        names.add(path.stem)
        for item in history.item:
            # A picture has a path, a size and so on.
            name, *of_picture = [item.key] if item.key else item.nested_key
            if not name.startswith("_") and of_picture in ([], ["path"]):
                points[name, history.step.num] = json.loads(item.value_json)
    return points, names


def chart_of(points, name):
    return {step: value for (chart, step), value in points.items() if chart == name}


@pytest.mark.run
def test_all_loggers_get_the_same_and_a_resumed_run_is_the_same_run(run):
    seen, (points, names) = events(run), wandb_points(run)
    tags = seen.Tags()["scalars"]
    assert {chart for chart, _ in points} == {*tags, "samples"}
    assert "train/clip_norm" not in tags  # a constant is no chart
    for tag in tags:
        expected = {point.step: pytest.approx(point.value) for point in seen.Scalars(tag)}
        chart = chart_of(points, tag)
        assert {step: value for step, value in chart.items() if step <= 4} == expected, tag
    for row in metrics(run):
        for key in ("lr", "grad_norm", "images_per_second") if row["split"] == "train" else ():
            assert points[f"train/{key}", row["step"]] == row[key]
        assert points[f"{row['split']}/bits_per_dim", row["step"]] == row["bits_per_dim"]
    (picture,) = seen.Images("samples")
    drawn = Image.open(io.BytesIO(picture.encoded_image_string))
    stored = Image.open(next(run.glob(f"wandb/*/files/{points['samples', 4]}"))).convert("RGB")
    assert np.array_equal(np.asarray(stored), np.asarray(drawn))
    # The second part of the run had one of the loggers, and another length.
    assert list(chart_of(points, "train/bits_per_dim")) == [2, 4, 6, 8]
    assert list(chart_of(points, "samples")) == [4, 8]
    assert [point.step for point in seen.Scalars("train/bits_per_dim")] == [2, 4]
    (name,) = names
    assert name.endswith((run / "logged-as").read_text().split()[0])
    *_, (_, record) = wandb_records(run, "run")
    values = {update.key: json.loads(update.value_json) for update in record.config.update}
    assert values["train"]["num_steps"] == 8


@pytest.mark.run
def test_weights_and_biases_takes_a_step_once(tmp_path, capfd):
    """Steps that come again after a rollback are dropped without a word."""
    (logger,) = loggers.opened(["wandb"], tmp_path, a_config(), 0)
    for step, value in ((3, 1.0), (5, 2.0), (4, 3.0), (5, 4.0), (6, 5.0)):
        logger.scalars({f"at {step}": value}, step)
    logger.picture("late", torch.zeros(3, 4, 4, dtype=torch.uint8), 2)
    logger.close()
    expected = {("at 3", 3): 1.0, ("at 5", 5): 4.0, ("at 6", 6): 5.0}
    assert wandb_points(tmp_path)[0] == expected
    command = f"wandb sync {tmp_path}/wandb/offline-run-*"
    assert capfd.readouterr() == (f"wandb: offline; this sends it: {command}\n", "")


@pytest.mark.run
def test_a_mode_that_the_user_has_chosen(tmp_path, anew, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (logger,) = loggers.opened(["wandb"], tmp_path, a_config(), 0)
    logger.scalars({"a": 1.0}, 1)
    logger.close()
    assert [path.name for path in tmp_path.iterdir()] == ["logged-as"]
    loggers.imported_wandb().teardown()
    monkeypatch.setenv("WANDB_MODE", "online")  # without a key
    with pytest.raises(UserError, match="train.logger: wandb: .*WANDB_MODE=offline"):
        loggers.opened(["wandb"], tmp_path, a_config(), 0)


@pytest.mark.run
@pytest.mark.parametrize("hangs", [False, True])
def test_a_server_that_cannot_be_reached(hangs, tmp_path, anew, monkeypatch, capsys):
    """The run of a user who is logged in is logged offline, even if the service never ends."""
    import wandb

    end, forever = wandb.teardown, threading.Event()
    if hangs:
        monkeypatch.setattr(wandb, "teardown", lambda: (end(), forever.wait()))
    monkeypatch.setattr(loggers, "PATIENCE", 0.5)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (logger,) = loggers.opened(["wandb"], tmp_path, a_config(), 0)
    forever.set()
    logger.scalars({"a": 1.0}, 1)
    logger.close()
    assert wandb_points(tmp_path)[0] == {("a", 1): 1.0}
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("wandb: ") and second.startswith("wandb: offline; this sends it")


@pytest.mark.run
def test_a_run_that_never_finishes_is_given_up(tmp_path, anew, monkeypatch, capsys):
    """A rollback then opens the loggers again."""
    run, config = RunDirectory(tmp_path), a_config(train={"logger": ["wandb"]})
    forever = threading.Event()
    with run.locked():
        run.cut_back(0, config)
        run.chart({"a": 1.0}, 1)
        with monkeypatch.context() as patch:
            patch.setattr(loggers, "PATIENCE", 0.5)
            (logger,) = run._loggers
            patch.setattr(logger, "_run", SimpleNamespace(settings=logger._run.settings))
            logger._run.finish = forever.wait
            run.close()
        run.cut_back(1, config)
        run.chart({"a": 2.0}, 2)
    forever.set()
    first, left, second = capsys.readouterr().out.splitlines()
    assert left.startswith("wandb: not all was sent; this sends it: wandb sync ")
    assert Path(left.split()[-1]).parent == tmp_path / "wandb"
    assert first == second and wandb_points(tmp_path)[0]["a", 2] == 2.0


def test_a_copied_run_is_another_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    known = set()
    for damaged in (b"", b"../up", b"\xff" * 8, b"a" * 200):
        (run / "logged-as").write_bytes(damaged)
        own = loggers.identity(run)
        assert len(own) == 8 and own == loggers.identity(run)
        known.add(own)
    assert len(known) == 4
    (run / "logged-as").write_text(own)  # by an earlier version
    assert loggers.identity(run) == own
    copied = copy_of(run, tmp_path / "copy")
    other = loggers.identity(copied)
    assert other != own and loggers.identity(copied) == other
    moved = run.rename(tmp_path / "moved")
    assert loggers.identity(moved) == own
    elsewhere = copy_of(moved, tmp_path / "of another machine")
    moved.rename(tmp_path / "old")
    assert loggers.identity(elsewhere.rename(moved)) == own


@pytest.mark.run
def test_a_logger_that_is_not_installed(tmp_path):
    """The error comes before the data are read, and nothing is written."""
    hidden = "import sys; sys.modules['wandb'] = None"
    command = ["train", *TINY_RUN, "train.logger=[tensorboard,wandb]"]
    done = quick(*command, cwd=tmp_path, first=hidden)
    done.failed(2, "train.logger: wandb needs the package wandb (the extra wandb): ")
    assert "reading" not in done.out and list(tmp_path.iterdir()) == []

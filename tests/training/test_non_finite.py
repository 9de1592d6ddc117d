"""Losses, gradients and weights that are not finite."""

import itertools
import json
import math
import os
import re
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from catalogue import TINY_RUN
from cli_helpers import last, metrics, quick, summary
from helpers import a_config

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.errors import RunError
from flowtrain.training import loop, stop
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory

pytestmark = pytest.mark.run


def train(folder, **keys):
    rare = {"log_every": 1, "checkpoint_every": 100, "validate_every": 100, "sample_every": 100}
    fit(a_config(train={**rare, **keys}), RunDirectory(folder), torch.device("cpu"))


def evidence_of(run):
    return [json.loads(path.read_text()) for path in sorted(run.glob("non-finite-*.json"))]


def assert_finite(path):
    tensors = checkpoint_format.read(path).tensors
    assert [name for name, t in tensors.items() if not torch.isfinite(t.float()).all()] == []


def test_a_rate_that_is_far_too_high(tmp_path):
    words = ["train.checkpoint_every=100", "train.log_every=1", "train.validate_every=1"]
    words += ["train.lr=1e30", "train.max_non_finite=3"]
    done = quick("train", *TINY_RUN, *words, cwd=tmp_path)
    last_evidence = "runs/glow_digits/non-finite-4.json"
    done.failed(1, "4 steps", "train.max_non_finite: 3", "bijection.", last_evidence, "train.lr")
    assert "back to step 0, with the learning rate times 0.5" in done.out
    assert done.out.count("first not finite: ") == 4
    run = tmp_path / "runs" / "glow_digits"
    evidence = evidence_of(run)
    rates = [evidence[0]["lr"] / 2**n for n in range(4)]
    assert [e["lr"] for e in evidence] == pytest.approx(rates)
    assert all(e["first_non_finite"].split()[-1].startswith("bijection.") for e in evidence)
    bad = ("nan", "inf", "-inf")
    assert all(e["loss"] in bad or e["grad_norm"] in bad for e in evidence)
    for path in (run / "checkpoints").iterdir():
        assert_finite(path)
    steps = [(row["split"], row["step"]) for row in metrics(run)]
    assert len(steps) == len(set(steps))


@pytest.mark.parametrize("every", [1, 100])
def test_the_batch_of_the_failed_step_is_computed_again(every, tmp_path, monkeypatch):
    seen = {"train_step": [], "first_non_finite": []}

    def recorded(name, function, owner, x, *rest):
        seen[name].append(x)
        return function(owner, x, *rest)

    for name in seen:
        monkeypatch.setattr(loop, name, partial(recorded, name, getattr(loop, name)))
    with pytest.raises(RunError, match="stopped at step 1:"):
        train(tmp_path, lr=1e30, max_non_finite=0, log_every=every, batch_size=8, accumulate=2)
    parts = seen["first_non_finite"]
    assert list(map(len, parts)) == [8, 8]  # as many at a time as in a forward pass of training
    again = torch.cat(parts)
    next_one = [False] if every == 100 else []  # already on its way
    assert [torch.equal(x, again) for x in seen["train_step"]] == [False, True, *next_one, True]
    assert evidence_of(tmp_path)[0]["first_non_finite"].startswith("output of ")
    saved = checkpoint_format.read(RunDirectory(tmp_path).last).meta["progress"]
    assert saved["step"] == 0 and saved["seconds"] > 0  # a rollback gives no time back


def test_weights_that_overflow_are_not_saved(tmp_path):
    """The gradient is finite, but the step takes the weights to infinity before a checkpoint."""
    with pytest.raises(RunError, match="1 steps not finite.*parameter bijection."):
        train(tmp_path, lr=1e39, checkpoint_every=1, max_non_finite=0)
    assert checkpoint_format.read(last(tmp_path)).meta["step"] == 0
    assert_finite(last(tmp_path))


def spoil(monkeypatch, number, before=lambda: None):
    """The loss of one step, counted from 1, is not finite. `before` is called before each step."""
    steps, real = itertools.count(1), loop.train_step

    def train_step(*args):
        before()
        loss, grad_norm = real(*args)
        factor = torch.nan if next(steps) == number else 1.0
        return loss * factor, grad_norm * factor

    monkeypatch.setattr(loop, "train_step", train_step)


def test_a_moment_of_too_high_a_rate_is_survived(tmp_path, monkeypatch, capsys):
    """Training goes back to the best checkpoint, the newest one, which is still being written."""
    fsync, steps = os.fsync, []

    def slowly(handle):
        if threading.current_thread() is not threading.main_thread() and len(steps) in (7, 8):
            time.sleep(0.5)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", slowly)
    spoil(monkeypatch, 8, lambda: steps.append(1))
    train(tmp_path, num_steps=20, batch_size=32, lr=2e-3, validate_every=1)
    out = capsys.readouterr().out
    assert "step 7: loss nan" in out
    back = int(re.search(r"back to step (\d+), with the learning rate times 0.5", out)[1])
    rows = [row for row in metrics(tmp_path) if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["lr"] for row in rows] == [2e-3] * back + [1e-3] * (20 - back)
    assert summary(tmp_path)["non_finite_steps"] == len(evidence_of(tmp_path)) == 1
    lines = map(str.split, out.splitlines())
    best = {int(words[1][:-1]): float(words[3]) for words in lines if words[-1:] == ["(best)"]}
    assert [*best.values()] == sorted(best.values(), reverse=True) and len(best) > 7
    assert back == max(step for step in best if step <= 7)  # its row in the metrics stays


def test_the_speed_is_that_of_training_without_the_rollback(tmp_path, monkeypatch):
    """A step takes a second, and the search for the layer a thousand. Each loss shown is finite."""
    now, shown = [0.0], []

    def take(seconds):
        now[0] += seconds

    spoil(monkeypatch, 2, lambda: take(1))
    monkeypatch.setattr(loop, "first_non_finite", lambda *args: take(1000))
    monkeypatch.setattr(loop.reporting, "show", lambda state, loss, *others: shown.append(loss))
    monkeypatch.setattr(stop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    train(tmp_path, batch_size=8, log_every=2)
    speeds = [row["images_per_second"] for row in metrics(tmp_path) if row["split"] == "train"]
    assert len(speeds) == 3 and min(speeds) > 1
    assert len(shown) >= 4 and all(map(math.isfinite, shown))
    assert summary(tmp_path)["seconds"] > 1000

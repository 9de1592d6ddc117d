"""Losses, gradients and weights that are not finite."""

import json
import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from catalogue import SHORT, TINY_RUN
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
    often = ["train.checkpoint_every=100", "train.log_every=1", "train.validate_every=1"]
    done = quick(
        "train", *TINY_RUN, *often, "train.lr=1e30", "train.max_non_finite=3", cwd=tmp_path
    )
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


ONCE = """
import torch
from flowtrain.bijections import DiagonalAffine, Flatten, Sequential
from flowtrain.bijections.base import Bijection

class Once(Bijection):
    calls = 0

    def forward(self, x, context=None):
        self.calls += torch.is_grad_enabled()
        bad = self.calls == 8 and torch.is_grad_enabled()
        return x * (torch.nan if bad else 1.0), x.new_zeros(len(x))

    def inverse(self, z, context=None):
        return z, z.new_zeros(len(z))

def build(shape):
    return Sequential(Flatten(shape), Once(), DiagonalAffine((64,)))
"""


def once(folder, *words, **options):
    """A short run of a model whose eighth step is not finite."""
    (folder / "mine").mkdir()
    (folder / "mine" / "once.py").write_text(ONCE)
    steady = ["train.log_every=1", "train.warmup_steps=0", "train.schedule=constant"]
    command = ["train", "model.name=mine.once", *SHORT, *steady, *words, "--run-dir", "r"]
    return quick(*command, cwd=folder, **options).ok()


def test_a_moment_of_too_high_a_rate_is_survived(tmp_path):
    """After the first event, half the rate is enough. The best checkpoint is the newest one."""
    done = once(tmp_path, "train.validate_every=1")
    assert "step 7: loss nan" in done.out
    back = int(re.search(r"back to step (\d+), with the learning rate times 0.5", done.out)[1])
    rows = [row for row in metrics(tmp_path / "r") if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["lr"] for row in rows] == [2e-3] * back + [1e-3] * (20 - back)
    assert summary(tmp_path / "r")["non_finite_steps"] == len(evidence_of(tmp_path / "r")) == 1
    lines = map(str.split, done.out.splitlines())
    best = {int(words[1][:-1]): float(words[3]) for words in lines if words[-1] == "(best)"}
    assert [*best.values()] == sorted(best.values(), reverse=True) and len(best) > 7
    assert back == max(step for step in best if step <= 7)  # its row in the metrics stays


SLOW = """
import os, threading, time
fsync = os.fsync
def slowly(handle):
    if threading.current_thread() is not threading.main_thread():
        time.sleep(0.2)
    fsync(handle)
os.fsync = slowly
"""


def test_it_rolls_back_to_a_checkpoint_that_is_still_being_written(tmp_path):
    done = once(tmp_path, "train.validate_every=100", first=SLOW)
    assert "step 7: loss nan" in done.out and "back to step 5, with" in done.out


def test_the_speed_is_that_of_training_without_the_rollback(tmp_path, monkeypatch):
    """A step takes a second, and the search for the layer a thousand. Each loss shown is finite."""
    now, calls, shown = [0.0], [], []

    def train_step(*args):
        now[0] += 1
        loss, grad_norm = real(*args)
        calls.append(loss)
        return (loss * torch.nan, grad_norm * torch.nan) if len(calls) == 2 else (loss, grad_norm)

    def search(*args):
        now[0] += 1000

    real = loop.train_step
    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(loop, "first_non_finite", search)
    monkeypatch.setattr(loop.reporting, "show", lambda state, loss, *others: shown.append(loss))
    monkeypatch.setattr(stop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    train(tmp_path, batch_size=8, log_every=2)
    speeds = [row["images_per_second"] for row in metrics(tmp_path) if row["split"] == "train"]
    assert len(speeds) == 3 and min(speeds) > 1
    assert len(shown) >= 4 and all(map(math.isfinite, shown))
    assert summary(tmp_path)["seconds"] > 1000

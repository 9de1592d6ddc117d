"""Losses, gradients and weights that are not finite."""

import json

import pytest
import torch
from catalogue import SHORT, TINY_RUN, sets
from cli_helpers import metrics, quick

from flowtrain.checkpoints import format as checkpoint_format


def test_a_rate_that_is_far_too_high(tmp_path):
    """It goes back, names a layer, lowers the rate, and in the end stops with evidence and finite
    weights.
    """
    often = sets(train__checkpoint_every=100, train__log_every=1, train__validate_every=1)
    done = quick(
        "train", *TINY_RUN, *often, *sets(train__lr=1e30, train__max_non_finite=3), cwd=tmp_path
    )
    done.failed(
        1,
        "4 steps",
        "train.max_non_finite: 3",
        "bijection.",
        "runs/glow_digits/non-finite-4.json",
        "train.lr",
    )
    assert "back at step 0, with the learning rate times 0.5" in done.out
    assert done.out.count("first not finite: ") == 4
    run = tmp_path / "runs" / "glow_digits"
    evidence = [json.loads((run / f"non-finite-{n}.json").read_text()) for n in (1, 2, 3, 4)]
    assert [e["lr"] for e in evidence] == pytest.approx(
        [evidence[0]["lr"] / 2**n for n in range(4)]
    )
    assert all(e["first_non_finite"].split()[-1].startswith("bijection.") for e in evidence)
    assert all(
        e["loss"] in ("nan", "inf", "-inf") or e["grad_norm"] in ("nan", "inf") for e in evidence
    )
    for path in (run / "checkpoints").iterdir():
        tensors = checkpoint_format.read(path).tensors
        assert [name for name, t in tensors.items() if not torch.isfinite(t.float()).all()] == []
    steps = [(row["split"], row["step"]) for row in metrics(run)]
    assert len(steps) == len(set(steps))


def test_what_is_known_one_step_later_is_the_same(tmp_path):
    """The device has been given another step meanwhile, which has changed nothing."""
    options = sets(
        train__lr=1e30,
        train__max_non_finite=0,
        train__warmup_steps=0,
        train__checkpoint_every=100,
        train__validate_every=100,
        train__sample_every=100,
    )
    evidence = []
    for every in (1, 100):
        command = [*TINY_RUN, *options, *sets(train__log_every=every), "--run-dir", f"r{every}"]
        quick("train", *command, cwd=tmp_path).failed(1, "stopped at step 1")
        evidence.append(json.loads((tmp_path / f"r{every}" / "non-finite-1.json").read_text()))
    assert evidence[0] == evidence[1]
    assert evidence[0]["first_non_finite"].startswith("output of ")


def test_weights_that_overflow_are_not_saved(tmp_path):
    """The gradient is finite, and the step takes the weights to infinity, just before a
    checkpoint.
    """
    options = sets(
        train__lr=1e39, train__warmup_steps=0, train__checkpoint_every=1, train__max_non_finite=0
    )
    quick("train", *TINY_RUN, *options, cwd=tmp_path).failed(
        1, "1 steps not finite", "parameter bijection."
    )
    saved = checkpoint_format.read(
        tmp_path / "runs" / "glow_digits" / "checkpoints" / "last.safetensors"
    )
    assert saved.meta["step"] == 0
    assert all(torch.isfinite(t.float()).all() for t in saved.tensors.values())


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


def once(folder):
    """The words of a short run of a model whose eighth step is not finite."""
    (folder / "mine").mkdir()
    (folder / "mine" / "once.py").write_text(ONCE)
    schedule = sets(train__log_every=1, train__warmup_steps=0, train__schedule="constant")
    return ["train", *sets(model__name="mine.once"), *SHORT, *schedule, "--run-dir", "r"]


def test_a_moment_of_too_high_a_rate_is_survived(tmp_path):
    """After the first event, half the rate is enough, and the run ends well; its best checkpoint is
    not lost.
    """
    done = quick(*once(tmp_path), *sets(train__validate_every=1), cwd=tmp_path).ok()
    assert (
        "step 7: loss nan" in done.out
        and "back at step 5, with the learning rate times 0.5" in done.out
    )
    rows = [row for row in metrics(tmp_path / "r") if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["lr"] for row in rows] == [2e-3] * 5 + [1e-3] * 15
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["non_finite_steps"] == 1
    assert (tmp_path / "r" / "non-finite-1.json").exists()
    best = [
        float(words[3]) for words in map(str.split, done.out.splitlines()) if words[-1] == "(best)"
    ]
    assert best == sorted(best, reverse=True) and len(best) > 7  # also across the way back


SLOW = """
import os, threading, time
fsync = os.fsync
def slowly(handle):
    if threading.current_thread() is not threading.main_thread():
        time.sleep(0.2)
    fsync(handle)
os.fsync = slowly
"""


def test_it_goes_back_to_a_checkpoint_that_is_still_being_written(tmp_path):
    rare = sets(train__validate_every=100)
    done = quick(*once(tmp_path), *rare, cwd=tmp_path, first=SLOW).ok()
    assert "step 7: loss nan" in done.out and "back at step 5, with" in done.out

"""`flowtrain sweep`: plans, halving, proposals, errors of the table, kills, and early ends."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue import sets
from cli_helpers import Forked, metrics, quick, report_of, summary, wait_for_step
from helpers import CPU, a_config
from run_files import a_run, validation_row

from flowtrain.errors import Interrupted, UserError
from flowtrain.tools.sweep import table
from flowtrain.tools.sweep.plan import begin, planned
from flowtrain.tools.sweep.trials import Result
from flowtrain.tools.sweep.work import Sweep, environments

KILLED = Path(__file__).with_name("killed.py")


def a_plan(**values):
    values = {"rows": ["none", "model.width=9"], "images": 1000, **values}
    return planned(values, a_config(data={"validation": 20}), "here")


def a_sweep(folder, **values):
    folder.mkdir(exist_ok=True)
    return Sweep(folder, a_plan(**values), CPU, [{}])


def finish(sweep, row, rung, *losses, seed=0, **values):
    """Writes the result of a trial, as `Trial.run` does."""
    trial = sweep.trials(row)[seed]
    trial.path.mkdir(exist_ok=True)
    found = Result(step=4, images=64, seconds=2, parameters=9, unit="nats", losses=losses, **values)
    (trial.path / f"rung-{rung}.json").write_text(json.dumps(found.content()))


def due(sweep):
    found = sweep.due()
    return found and (found[0], [(each.row, each.seed) for each in found[1]])


def test_the_budget_of_a_trial():
    plan = a_plan(rows=["train.accumulate=2 train.batch_size=30", "'model.steps=[1, 2]'"])
    words = ["seed=3", "train.clock=wall", "train.num_steps=17"]
    assert plan.settings(plan.rows[0], 3, False)[2:] == words
    assert plan.settings(plan.rows[1], 0, True)[0] == "model.steps=[1, 2]"
    plan = a_plan(images=None, seconds=5)
    words = ["seed=0", "train.clock=processor", "train.budget=5.0s"]
    assert plan.settings("none", 0, True) == words


@pytest.mark.parametrize(
    "values, shares",
    [
        ({}, [1]),
        ({"halving": 2}, [0.5, 1]),
        ({"halving": 3}, [1]),
        ({"halving": 2, "trials": 6, "ranges": {"train.lr": [0.1, 1]}}, [1 / 8, 1 / 4, 1 / 2, 1]),
    ],
)
def test_the_rungs(values, shares):
    assert a_plan(**values).shares == shares


def test_the_best_rows_go_on(tmp_path):
    """By the mean over seeds. A row that ends early goes no further, whichever its other seeds."""
    rows = ["none", "model.width=7", "model.width=8", "model.width=9"]
    sweep = a_sweep(tmp_path, rows=rows, seeds=2, halving=2)
    assert due(sweep) == (1, [(row, seed) for row in range(4) for seed in range(2)])
    for row, losses in enumerate([(1, 5), (2, 2), (3, 4)]):
        for seed, loss in enumerate(losses):
            finish(sweep, row, 1, loss, seed=seed)
    finish(sweep, 3, 1, seed=1, message="NaN")
    assert due(sweep) == (2, [(0, 0), (0, 1), (1, 0), (1, 1)])
    finish(sweep, 1, 2, seed=0, message="out of memory")
    # It leaves the earlier choice as it was.
    assert due(sweep) == (2, [(0, 0), (0, 1)])
    for seed in range(2):
        finish(sweep, 0, 2, 9, seed=seed)
    assert due(sweep) == (3, [(0, 0), (0, 1)])
    for seed in range(2):
        finish(sweep, 0, 3, 9, seed=seed)
    assert due(sweep) is None
    table.write(sweep)
    ends = [each["end"] for each in json.loads((tmp_path / "table.json").read_text())]
    assert ends == ["finished", "out of memory", "stopped at 0.25 of the budget", "NaN"]


def test_a_result_without_losses_is_damaged(tmp_path):
    (trial, *_) = a_sweep(tmp_path).trials(0)
    trial.path.mkdir(exist_ok=True)
    (trial.path / "rung-1.json").write_text('{"losses": []}')
    with pytest.raises(UserError, match=r"rung-1\.json: broken: neither losses nor a message"):
        trial.result(1)


def test_a_claim_is_exclusive_and_ends_with_its_process(tmp_path):
    (trial, *_) = a_sweep(tmp_path).trials(0)
    if (child := os.fork()) == 0:
        trial.claimed().__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with trial.claimed() as claim, trial.claimed() as other:
        assert claim is not None and other is None


@pytest.mark.parametrize(
    "code, output, message",
    [
        (2, "step 1\nflowtrain: a: wrong\nb: wrong\n", "a: wrong b: wrong"),
        (1, "Traceback\nValueError: wrong\n", "ValueError: wrong"),
        (1, "", "exit code 1"),
        (-signal.SIGKILL, "step 1\n", "ended by SIGKILL, perhaps for lack of memory"),
        (143, "stopped", None),
        (-signal.SIGINT, "", None),
        (-signal.SIGHUP, "", None),
    ],
)
def test_a_command_that_fails_or_is_stopped(code, output, message, tmp_path):
    """A failure is the result of the trial. After a signal it has none, and is tried again."""
    (trial, *_) = a_sweep(tmp_path).trials(0)
    with trial.claimed(), contextlib.suppress(Interrupted):
        trial.run(1, [], lambda words, log: [code, log.write(output.encode())][0])
    assert (trial.result(1) and trial.result(1).message) == message


def test_errors_over_seeds_and_images():
    """Of losses s + i for S seeds and N images: the variances of s and i over their numbers."""
    seeds, images = np.array([[0.0], [1.0], [5.0]]), np.array([[1.0, 2.0, 3.0, 6.0]])
    found = table.mean(seeds + images)
    wanted = {"mean": 5.0, "over_images": (14 / 3 / 4) ** 0.5, "over_seeds": (7 / 3) ** 0.5}
    assert found == pytest.approx(wanted)
    assert table.mean(images) == {"mean": 3.0, "over_seeds": None} | {
        "over_images": found["over_images"]
    }


def test_differences_are_in_pairs(tmp_path):
    """Of the same images at the last rung that both rows have reached."""
    sweep = a_sweep(tmp_path, halving=2)
    finish(sweep, 0, 1, 10, 20)
    finish(sweep, 1, 1, 11, 23)
    finish(sweep, 0, 2, 5, 6)
    text = table.write(sweep)
    rows = json.loads((tmp_path / "table.json").read_text())
    assert rows[0]["validation"]["mean"] == 5.5 and "difference to the first row" not in rows[0]
    assert rows[1]["difference to the first row"]["mean"] == 2
    assert rows[1]["difference to the first row"]["over_images"] == pytest.approx(1)
    assert "| `model.width=9` | 9 | 4 | 64 | 2 | 17.0000 +- 6.0000 | 2.0000 +- 1.0000 |" in text
    assert (tmp_path / "table.md").read_text() == text
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_has_the_end_of_each_seed(tmp_path):
    """With a budget of time, seeds end at different steps, which run_files counts as ten images."""
    sweep = a_sweep(tmp_path, seeds=2)
    for seed, trial in enumerate(sweep.trials(0)):
        a_run(trial.path, rows=[validation_row(2, 4.2), validation_row(4 + seed, 3 + seed)])
    assert table.curve(sweep, 0, "images").tolist() == [[20, 45], [4.2, 3.5], [0, 0.5]]


def test_proposals_follow_from_the_losses(tmp_path, monkeypatch):
    """Whoever asks for them: each time by a new process, or by one."""
    optuna = pytest.importorskip("optuna")
    ranges = {"model.width": {"low": 8, "high": 16, "step": 4}, "model.steps": ["1", "[2]"]}
    ranges |= {"train.lr": {"low": "1e-4", "high": 1, "log": True}}

    def proposed(folder, anew):
        sweep = a_sweep(folder, ranges=ranges, trials=14)
        while sweep.proposals.tell(sweep.loss):
            if anew:
                sweep = a_sweep(folder, ranges=ranges, trials=14)
            row = len(sweep.rows()) - 1
            finish(sweep, row, 1, float(row % 5), message="NaN" if row == 6 else None)
        return sweep.rows()

    rows = proposed(tmp_path / "one", anew=False)
    assert rows == proposed(tmp_path / "other", anew=True)
    assert rows[:2] == ["none", "model.width=9"] and len(set(rows)) == 16
    for row in rows[2:]:
        config = a_plan().config(row)
        assert config.model.width in (8, 12, 16) and 1e-4 <= config.train.lr <= 1
    storage = f"sqlite:///{tmp_path / 'one' / 'optuna.sqlite3'}"
    trials = optuna.load_study(study_name="sweep", storage=storage).trials
    assert [each.value for each in trials[:6]] == [2, 3, 4, 0, None, 2]
    with pytest.raises(UserError, match="ranges: train.lr: .*low"):
        a_sweep(tmp_path / "one", ranges={"train.lr": {"low": 2.0, "high": 1}})
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"ranges needs the package optuna \(the extra sweep\)"):
        a_sweep(tmp_path / "one", ranges=ranges)


def test_two_commands_may_begin_a_sweep_together(tmp_path, monkeypatch):
    """One writes the plan between the looks of the other."""
    plan, exists = a_plan(), Path.exists

    def look(path):
        found = exists(path)
        monkeypatch.undo()
        begin(tmp_path / "s", plan)
        return found

    monkeypatch.setattr(Path, "exists", look)
    begin(tmp_path / "s", plan)
    (tmp_path / "s" / "sweep.yaml").unlink()
    with pytest.raises(UserError, match="holds other files than a sweep's"):
        begin(tmp_path / "s", plan)


def test_a_worker_for_each_core_or_gpu(monkeypatch):
    for given, threads in (("2", "2"), ("4,2", "4"), ("0", "1"), ("", "1")):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert environments(CPU, 3) == [{"OMP_NUM_THREADS": threads}] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = environments(torch.device("cuda"), None)
    assert gpus == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert environments(torch.device("cuda"), 2) == [{"CUDA_VISIBLE_DEVICES": "5"}] * 2
    assert environments(torch.device("cuda", 1), None) == [{}]


@pytest.mark.run
def test_ten_kills_change_nothing(tmp_path):
    pytest.importorskip("optuna")
    found = report_of(KILLED, tmp_path / "k", "10")
    assert found["kills"] >= 10 and found["killed"] == found["whole"]
    ends = sorted(row["end"][:15] for row in found["whole"]["table"])
    assert ends == ["finished", "model.levels: 8", "stopped at 0.25", "stopped at 0.25"]


SWEEP = ["sweep", "--try", "none", *sets(model__steps=1, model__width=8, train__log_every=1)]
SWEEP += ["--images", "6400", "--workers", "1", "--device", "cpu", "--out", "s"]


@pytest.mark.run
def test_a_sweep_that_was_stopped_and_killed_goes_on(tmp_path):
    """A signal stops its command, too. If it alone is killed, its command goes on, and has the
    trial until it ends.
    """
    stopped, run = Forked(SWEEP, tmp_path), tmp_path / "s" / "000-seed0"
    wait_for_step(run, 3)
    stopped.process.terminate()
    assert stopped.result().code == 143
    step = summary(run)["step"]
    assert 3 <= step < 100
    killed = Forked(SWEEP, tmp_path)
    wait_for_step(run, step + 2)
    killed.process.kill()
    # The first process of torchrun works alone.
    done = quick(*SWEEP, cwd=tmp_path, RANK="0", WORLD_SIZE="2").ok()
    assert summary(run)["finished"] and metrics(run)[-1]["step"] == 100
    assert "| `none` |" in done.out and " finished |" in done.out
    assert "in use by another process" not in (run / "log.txt").read_text()

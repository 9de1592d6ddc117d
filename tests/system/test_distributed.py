"""Several processes: the same training as one, stopped, killed and continued as one."""

import fcntl
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import cli_helpers
import numpy as np
import pytest
import torch
from catalogue import CAUSAL, JET, SMALL, TARFLOW, sets
from cli_helpers import Forked, copy_of, last, left_overs, metrics, put_back, summary, trained
from helpers import a_config, compiles

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.data.batches import Batches
from flowtrain.data.splits import DataSet
from flowtrain.system import distributed

pytestmark = pytest.mark.run

FLOAT64 = "import torch; torch.set_default_dtype(torch.float64)"
# Traces without a C++ compiler.
TRACED = (
    f"{FLOAT64}; import functools; "
    "torch.compile = functools.partial(torch.compile, backend='aot_eager')"
)
MODEL = sets(model__steps=1, model__width=8, model__initialization="whitening")
# All that could differ: clipping, the average, warm-up, decay, weight decay, augmentation.
STEPS = sets(train__ema=0.9, train__clip_norm=0.2, train__warmup_steps=4, train__schedule="cosine")
STEPS += sets(train__weight_decay=1e-2, train__num_steps=20, data__shift=1, data__flip="true")
STEPS += sets(train__log_every=1, train__validate_every=4, train__sample_every=1000)
STEPS += sets(train__checkpoint_every=5, train__keep_checkpoints=5)
ALL = MODEL + STEPS
LONG = [*SMALL, *sets(train__num_steps=100_000, train__log_every=1, train__checkpoint_every=10)]
LONG += sets(train__validate_every=100_000, train__sample_every=100_000, train__keep_checkpoints=0)
PARTS = "train.batch_size x train.accumulate"


def parts(batch_size, accumulate=1):
    return sets(train__batch_size=batch_size, train__accumulate=accumulate)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def single(*args, **options):
    return cli_helpers.quick(*args, cwd=Path.cwd(), **options)


def several(count, *args, **options):
    return cli_helpers.begin(count, *args, cwd=Path.cwd(), **options)


def together(count, *args, **options):
    return [process.result() for process in several(count, *args, **options)]


def all_ok(count, *args, **options):
    """All ended well, and only the first printed anything, which is returned."""
    results = together(count, *args, **options)
    assert all(each.ok() for each in results)
    assert all(each.out + each.err == "" for each in results[1:]), results
    return results[0].out


def all_failed(results, code, *fragments):
    printed = [each for each in results if each.err]
    assert [each.code for each in results] == [code] * len(results), results
    assert len(printed) == 1, results
    printed[0].failed(code, *fragments)
    assert printed[0].err.count("flowtrain: ") == 1


def losses(run):
    return [row["loss"] for row in metrics(run)]


def assert_close_runs(one, other, tolerance):
    """Losses, validation, weights, their average and the optimizer's state, up to rounding."""
    rows = [[(r["step"], r["split"], r["images"]) for r in metrics(run)] for run in (one, other)]
    assert rows[0] == rows[1]
    assert losses(one) == pytest.approx(losses(other), abs=tolerance, rel=0)
    a, b = (checkpoint_format.read(last(run)).tensors for run in (one, other))
    assert any(name.startswith("ema.") for name in a)
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def alone():
    """One process, 32 images a step, in float64."""
    words = ["train", *ALL, *parts(32), "--run-dir", "alone"]
    cli_helpers.quick(*words, cwd=cli_helpers.FOLDER, first=FLOAT64).ok()
    return cli_helpers.FOLDER / "alone"


@pytest.mark.parametrize(
    "count, options",
    [
        (2, [*parts(8, 2), *sets(train__memory="reversible")]),
        (4, [*parts(8), *sets(data__max_in_memory=0, data__workers=1)]),
    ],
)
def test_the_same_losses_and_weights(count, options, alone):
    words = ["train", *ALL, *options, "--run-dir", "r"]
    out = all_ok(count, *words, first=FLOAT64)
    assert f"on cpu, {count} processes" in out
    assert_close_runs(alone, Path("r"), 1e-9)
    assert losses(alone)[0] - losses(alone)[-1] > 0.02
    assert checkpoint_format.read(last(Path("r"))).meta["processes"] == count


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("memory", ["store", "checkpoint"])
@pytest.mark.parametrize("compile", ["layers", "step"])
def test_the_same_compiled(compile, memory, alone):
    options = sets(train__compile=compile, train__memory=memory) + parts(8, 2)
    out = all_ok(2, "train", *ALL, *options, "--run-dir", "r", first=TRACED)
    assert f"train.compile={compile}: ready after" in out
    assert_close_runs(alone, Path("r"), 1e-9)


CLASSES = sets(model__classes=10)
ADAMW = CLASSES + sets(train__optimizer="adamw")
TRANSFORMER = ADAMW + sets(train__memory="checkpoint", train__precision="fp32")
NOISY = sets(dequantization__name="gaussian", dequantization__transform="center")
NOISY += sets(model__label_dropout=0.4)
MUON = sets(train__optimizer="muon", train__clip_norm=1, dequantization__name="variational")
CONVOLUTIONS = sets(model__dropout=0.2, model__attention=1, model__downsample=1)


@pytest.mark.parametrize(
    "words, first, tolerance",
    [
        # Muon orthogonalizes in bfloat16, which makes more of a difference in the last bits.
        (MODEL + CLASSES + MUON, FLOAT64, 1e-3),
        (CAUSAL + ADAMW + CONVOLUTIONS, FLOAT64, 1e-9),
        (TARFLOW + TRANSFORMER + NOISY, FLOAT64, 1e-9),
        (JET + TRANSFORMER, FLOAT64, 1e-9),
        # Weights stay: where a gradient is near zero, Adam makes a whole step of its rounding. A
        # loss, about 4, is a mean of 64^2 numbers of its size, whose order is worth about
        # 6e-8 * 4 * 64.
        (MODEL + sets(train__lr=1e-30), "", 2e-5),
    ],
    ids=["variational muon", "causal", "tarflow", "jet", "float32"],
)
def test_the_same_of_other_models(words, first, tolerance):
    words = ["train", *STEPS, *words, *sets(train__num_steps=5)]
    single(*words, *parts(32), "--run-dir", "1", first=first).ok()
    all_ok(2, *words, *parts(16), "--run-dir", "2", first=first)
    assert_close_runs(Path("1"), Path("2"), tolerance)


def resumed(count, *args, first=FLOAT64):
    """Output of the processes that go on with a run."""
    out = all_ok(count, *args, "--run-dir", "r", first=first)
    return out[out.index("continued from") :]


def test_resumed_by_two_processes_and_by_one_again(alone):
    run = put_back(copy_of(alone, Path("r")))
    out = resumed(2, "train", *ALL, *parts(4, 4))
    same = "a step takes 32 images as before, the same ones in the same order"
    assert f"saved by 1 process of 32 x 1 images ({PARTS}), now 2 of 4 x 4: {same}" in out
    assert_close_runs(alone, run, 1e-9)
    meta = checkpoint_format.read(last(put_back(run, 15))).meta
    assert (meta["step"], meta["processes"]) == (15, 2)
    out = resumed(1, "train", *ALL, *parts(32))
    assert f"saved by 2 processes of 4 x 4 images ({PARTS}), now 1 of 32 x 1: {same}" in out
    assert_close_runs(alone, run, 1e-9)
    put_back(run)
    assert "saved by" not in resumed(1, "train", *ALL, *parts(32))


NOTING = """
import numpy
from flowtrain.data.batches import Batches
from flowtrain.system import distributed

positions, used = Batches.positions, []

def noting(self, images):
    used.append(positions(self, images))
    numpy.save(f"process-{distributed.rank()}", used)
    return used[-1]

Batches.positions = noting
"""


def test_resumed_with_more_images_a_step(alone):
    """The order goes on after the images that were used."""
    run = put_back(copy_of(alone, Path("r")))
    command = ["train", *ALL, *parts(32)]
    out = resumed(2, *command, first=FLOAT64 + NOTING)
    assert "the order goes on after the 320 images already used" in out
    config = a_config(data={"name": "digits"})
    order = Batches(DataSet(config.data), config, 30 * 32, torch.device("cpu")).positions(10 * 32)
    used = [np.load(f"process-{rank}.npy") for rank in range(2)]  # from `NOTING`
    assert np.array_equal(order[: 10 * 64], np.concatenate(used, axis=1).ravel())
    assert summary(run)["images"] == 10 * 32 + 10 * 64
    assert losses(run)[:12] == losses(alone)[:12] and losses(run)[13] != losses(alone)[13]


def test_without_a_shared_file_system():
    """Process 1 has its data and nothing else, and gets nothing else. 20 steps are 10 and 10."""
    machines = [Path(name).absolute() for name in ("a", "b")]
    for machine in machines:
        machine.mkdir()
    x = np.random.default_rng(0).integers(0, 256, (80, 8, 8), "u1")
    np.savez(machines[0] / "own.npz", x_train=x)
    shutil.copy(machines[0] / "own.npz", machines[1])
    options = [*ALL, *sets(data__name="npz", data__path="own.npz"), *parts(8, 2), "--run-dir", "r"]
    all_ok(2, "train", *options, cwds=machines)
    whole = copy_of(machines[0] / "r", Path("whole"))
    put_back(machines[0] / "r")
    assert "at step 10" in all_ok(2, "train", *options, cwds=machines)
    cli_helpers.assert_same_run(whole, machines[0] / "r")
    assert left_overs(machines[0] / "r") == []
    put_back(machines[0] / "r")
    named = ["--resume", last(machines[0] / "r")]
    assert "at step 10" in all_ok(2, "train", *options, *named, cwds=machines)
    assert [path.name for path in machines[1].iterdir()] == ["own.npz"]
    evaluate = ["evaluate", "r", "--split", "train", "--set", "data.path=own.npz"]
    assert "r/evaluate-train.json" in all_ok(2, *evaluate, cwds=machines)
    # Other images on one machine are noticed, and so are missing ones.
    put_back(machines[0] / "r")
    np.savez(machines[1] / "own.npz", x_train=255 - x)
    results = together(2, "train", *options, cwds=machines)
    all_failed(results, 2, "images.content: process 0 has", "process 1")
    (machines[1] / "own.npz").unlink()
    all_failed(together(2, "train", *options, cwds=machines), 2, "own.npz")


def test_an_error_is_printed_once():
    all_failed(together(3, "train", *ALL, *sets(train__lr=-1)), 2, "train.lr", "got -1")
    options = ["train", *ALL, "--run-dir", "r"]
    Path("r").mkdir()
    with (Path("r") / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        all_failed(together(2, *options), 2, "--run-dir r", "in use by another process")
    env = cli_helpers.torchrun_environment(2)[0]
    del env["MASTER_PORT"]
    incomplete = Forked(["train", *ALL], cwd=Path.cwd(), **env).result()
    incomplete.failed(2, "MASTER_PORT: is ''", "torchrun")
    Forked(["train", "--dry-run"], cwd=Path.cwd(), WORLD_SIZE="1", RANK="0").result().ok()
    first, second = together(2, "train", *ALL, "--dry-run")
    assert "parameters: " in first.ok().out and second.ok().out == ""


def test_a_full_disk_ends_all():
    """An error of the one that writes, while the other waits for its gradients."""
    words, limits = ["train", *LONG, "--run-dir", "r"], (16_000, None)
    places = zip(cli_helpers.torchrun_environment(2), limits, strict=True)
    processes = [Forked(words, cwd=Path.cwd(), file_limit=limit, **env) for env, limit in places]
    all_failed([process.result() for process in processes], 1, "cannot be written", "is kept")


def test_steps_that_are_not_finite():
    options = sets(train__lr=1e39, train__warmup_steps=0, train__max_non_finite=1)
    results = together(2, "train", *ALL, *parts(16), *options, "--run-dir", "r")
    all_failed(results, 1, "2 steps not finite (train.max_non_finite: 1)")
    assert "back to step 0, with the learning rate times 0.5" in results[0].out
    assert len(list(Path("r").glob("non-finite-*.json"))) == 2
    assert checkpoint_format.read(last(Path("r"))).meta["progress"]["non_finite"] == 2


@pytest.mark.parametrize("rank, signum, code", [(1, signal.SIGTERM, 143), (0, signal.SIGINT, 130)])
def test_a_signal_to_one_stops_all(rank, signum, code):
    processes = several(2, "train", *LONG, "--run-dir", "r")
    cli_helpers.wait_for_step(Path("r"), 3)
    os.kill(processes[rank].process.pid, signum)
    results = [process.result() for process in processes]
    assert [(each.code, each.err) for each in results] == [(code, "")] * 2, results
    step = summary(Path("r"))["step"]
    assert checkpoint_format.read(last(Path("r"))).meta["step"] == step >= 3
    assert f"stopped by {signum.name} at step {step}; saved" in results[0].out
    assert results[1].out == "" and left_overs(Path("r")) == []


SOON = """
from flowtrain.system import heartbeat, torchrun
heartbeat.INTERVAL_SECONDS, heartbeat.TIMEOUT_SECONDS, torchrun.GRACE_SECONDS = 0.1, 3, 1
"""


@pytest.mark.parametrize(
    "victim, world, signum", [(1, 3, "SIGKILL"), (1, 3, "SIGSTOP"), (0, 2, "SIGSTOP")]
)
def test_the_death_of_one_ends_the_others(victim, world, signum):
    """The connections of a process that stands still stay open, but its heartbeats are missing."""
    first = SOON if signum == "SIGSTOP" else ""
    processes = several(world, "train", *LONG, "--run-dir", "r", first=first)
    cli_helpers.wait_for_step(Path("r"), 12)
    lost = processes.pop(victim).process
    os.kill(lost.pid, signal.Signals[signum])
    results = [process.result() for process in processes]
    lost.kill()
    silent = f"had no heartbeat from process {victim} for 3 s"
    killed = "has lost another process of this run: it was killed"
    message = silent if signum == "SIGSTOP" else killed
    all_failed(results, 1, message, "last.safetensors")
    assert checkpoint_format.read(last(Path("r"))).meta["step"] >= 10


STUCK = """
import time
from flowtrain.errors import RunError
from flowtrain.system import distributed
from flowtrain.training import reporting

def validate(*args):
    if distributed.is_main():
        time.sleep(600)
    raise RunError("a failure")

reporting.validate, heartbeat.STORE_SECONDS = validate, 1
"""


def test_the_failure_of_one_ends_who_waits_for_something_else():
    """As for a GPU, from which no error returns."""
    words = ["train", *LONG, *sets(train__validate_every=1), "--run-dir", "r"]
    all_failed(together(2, *words, first=SOON + STUCK), 1, "a failure")


SLOW = """
import time
from flowtrain.evaluation import score
from flowtrain.system import distributed, torchrun
from flowtrain.training import reporting

def sample(state, *others):
    time.sleep(4 * (distributed.is_main() and state.progress.step == 1))

def turned(x, side):
    time.sleep(4 * distributed.is_main())
    return x

reporting.sample, score.turned, torchrun.COLLECTIVE_SECONDS = sample, turned, 3
"""


def test_the_others_wait_for_process_0_as_long_as_it_takes():
    """For a picture, and for its share of a validation."""
    words = ["train", *LONG, *sets(train__num_steps=2, train__sample_every=1), "--run-dir", "r"]
    all_ok(2, *words, first=SLOW)


def test_torchrun_goes_on_after_the_death_of_one():
    words = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 -m flowtrain"
    launcher = [sys.executable, *words.split()]
    options = ["train", *LONG, *sets(train__num_steps=100), "--run-dir", "r"]
    process = cli_helpers.start(*options, cwd=Path.cwd(), command=launcher)
    cli_helpers.wait_for_step(Path("r"), 12, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (victim,) = [
        pid for pid in workers if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")
    ]
    os.kill(int(victim), signal.SIGKILL)
    done = cli_helpers.result(process)
    assert done.code == 0 and "Traceback" not in done.err, done
    # Not at all, if the launcher ends the other one before it notices.
    assert done.err.count("has lost another process of this run") <= 1
    assert "continued from r/checkpoints/last.safetensors at step" in done.out
    rows = metrics(Path("r"))
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 101))
    assert summary(Path("r"))["finished"] and left_overs(Path("r")) == []


FAST = """
import os, time
clock = time.perf_counter
time.perf_counter = lambda: clock() * (1 + 9 * int(os.environ["RANK"]))
"""


def test_a_budget_ends_for_all_at_once():
    options = sets(train__budget="1s", train__schedule="linear", train__warmup_steps=0)
    words = ["train", *LONG, *options, "--run-dir", "r"]
    all_ok(2, *words, first=FAST)
    after = summary(Path("r"))
    assert after["finished"] and after["seconds"] >= 1
    rates = [row["lr"] for row in metrics(Path("r")) if row["split"] == "train"]
    assert rates == sorted(rates, reverse=True) and rates[-1] < rates[0] / 3
    assert "nothing to do" in all_ok(2, *words)


@pytest.mark.parametrize("count, images", [(2, 101), (3, 2)])
def test_evaluation_is_sharded(count, images):
    options = ["evaluate", trained()["glow"], "--num-images", images, "--draws", 2]
    options += ["--json", "-", "--batch-size", 20]
    one = json.loads(single(*options, "--scores", "1.csv").ok().out)
    several = json.loads(all_ok(count, *options, "--scores", "n.csv"))
    assert one.keys() == several.keys() and several["num_images"] == images
    for key, value in one.items():
        close = pytest.approx(value, abs=1e-5, rel=1e-5) if isinstance(value, float) else value
        assert several[key] == close, key
    scores = [np.loadtxt(name, delimiter=",", skiprows=1) for name in ("1.csv", "n.csv")]
    np.testing.assert_allclose(*scores, rtol=1e-5)


def test_the_first_process_samples_and_interpolates():
    sample = ["sample", trained()["glow"], "--num-images", 4, "--out"]
    all_ok(2, *sample, "s.npz")
    all_ok(2, "interpolate", trained()["glow"], "--pairs", 1, "--out", "i.png")
    single(*sample, "1.npz").ok()
    assert np.array_equal(*(np.load(name)["images"] for name in ("s.npz", "1.npz")))
    assert sorted(path.name for path in Path().iterdir()) == ["1.npz", "i.png", "s.npz"]


def test_shares_and_means(monkeypatch):
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor: tensor.mul_(6))
    for world, count in [(2, 7), (3, 2), (3, 9)]:
        shares = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "group", distributed.Group(None, rank, world))
            shares.append(list(distributed.shard(count)))
        assert sum(shares, []) == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        tensor = torch.ones(2)
        distributed.average(tensor)
        assert tensor.tolist() == [6 / world] * 2

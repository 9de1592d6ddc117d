"""Several processes: the same training as one, stopped, killed and continued as one.

Most tests start the processes with torchrun's environment and without torchrun, to see the end of
each.
"""

import fcntl
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue import CAUSAL, JET, SMALL, TARFLOW, sets
from cli_helpers import (
    FOLDER,
    Forked,
    Result,
    assert_same_run,
    begin,
    copy_of,
    last,
    left_overs,
    metrics,
    quick,
    result,
    start,
    summary,
    torchrun_environment,
    trained,
    wait_for_step,
)
from helpers import a_config, batch_of, compiles, images, npz, tiny_flow

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.data.batches import Batches, augment
from flowtrain.data.splits import DataSet
from flowtrain.errors import EndedElsewhere, RunError, UserError, exit_code
from flowtrain.system import distributed, torchrun
from flowtrain.training.step import dequantization_noise
from flowtrain.training.stop import Stop

FLOAT64 = "import torch; torch.set_default_dtype(torch.float64)"
# Traces without a C++ compiler.
TRACED = (
    f"{FLOAT64}; import functools; "
    "torch.compile = functools.partial(torch.compile, backend='aot_eager')"
)
MODEL = sets(model__steps=1, model__width=8, model__initialization="whitening")
# All that could differ: clipping, the average, warm-up, decay, weight decay, augmentation, two-part
# steps.
ALL = [
    *MODEL,
    *sets(train__ema=0.9, train__clip_norm=0.2, train__warmup_steps=4, train__schedule="cosine"),
]
ALL += sets(
    train__weight_decay=1e-2,
    train__num_steps=20,
    data__shift=1,
    data__flip="true",
    train__log_every=1,
)
ALL += sets(
    train__validate_every=4,
    train__sample_every=1000,
    train__checkpoint_every=5,
    train__keep_checkpoints=5,
)
LONG = [*SMALL, *sets(train__num_steps=100_000, train__log_every=1, train__checkpoint_every=10)]
LONG += sets(train__validate_every=100_000, train__sample_every=100_000, train__keep_checkpoints=0)


def parts(batch_size, accumulate=1):
    return sets(train__batch_size=batch_size, train__accumulate=accumulate)


def together(count, *args, cwd=None, **options) -> list[Result]:
    return [process.result() for process in begin(count, *args, cwd=cwd, **options)]


def all_ok(results: list[Result]) -> str:
    """All ended well, and only the first said so; what it said."""
    assert all(each.ok() for each in results)
    assert all(each.out + each.err == "" for each in results[1:]), results
    return results[0].out


def all_failed(results: list[Result], code: int, *fragments: str) -> None:
    """All ended with this code, and one message for all."""
    said = [each for each in results if each.err]
    assert [each.code for each in results] == [code] * len(results), results
    assert len(said) == 1, results
    said[0].failed(code, *fragments)
    assert said[0].err.count("flowtrain: ") == 1


def losses(run):
    return [row["bits_per_dim"] for row in metrics(run)]


def assert_close_runs(one, other, tolerance):
    """Losses, validation, weights, their average and the optimizer's state, up to rounding."""
    assert [(row["step"], row["split"], row["images"]) for row in metrics(one)] == [
        (row["step"], row["split"], row["images"]) for row in metrics(other)
    ]
    assert losses(one) == pytest.approx(losses(other), abs=tolerance, rel=0)
    a, b = checkpoint_format.read(last(one)), checkpoint_format.read(last(other))
    assert a.tensors.keys() == b.tensors.keys() and any(
        name.startswith("ema.") for name in a.tensors
    )
    for name, tensor in a.tensors.items():
        torch.testing.assert_close(
            tensor, b.tensors[name], atol=tolerance, rtol=0, msg=lambda text, n=name: n + text
        )


# --- the same as one process ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    """One process, 32 images a step, in float64."""
    quick("train", *ALL, *parts(32), "--run-dir", "alone", cwd=FOLDER, first=FLOAT64).ok()
    return FOLDER / "alone"


@pytest.mark.parametrize(
    "count, options",
    [
        (2, parts(16)),
        (2, [*parts(8, 2), *sets(train__memory="reversible")]),
        (4, [*parts(8), *sets(data__max_in_memory=0, data__workers=1)]),
    ],
    ids=["2", "2-accumulating", "4-streamed"],
)
def test_the_same_losses_and_weights(count, options, alone, tmp_path):
    out = all_ok(
        together(count, "train", *ALL, *options, "--run-dir", "r", cwd=tmp_path, first=FLOAT64)
    )
    assert f"on cpu, {count} processes" in out
    assert_close_runs(alone, tmp_path / "r", 1e-9)
    assert losses(alone)[0] - losses(alone)[-1] > 0.02
    assert checkpoint_format.read(last(tmp_path / "r")).meta["processes"] == count


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("memory", ["store", "checkpoint"])
@pytest.mark.parametrize("compile", ["layers", "step"])
def test_the_same_compiled(compile, memory, alone, tmp_path):
    options = sets(train__compile=compile, train__memory=memory) + parts(8, 2)
    out = all_ok(together(2, "train", *ALL, *options, "--run-dir", "r", cwd=tmp_path, first=TRACED))
    assert f"train.compile={compile}: ready after" in out
    assert_close_runs(alone, tmp_path / "r", 1e-9)


def test_the_same_with_muon_classes_and_variational_noise(tmp_path):
    options = sets(
        train__optimizer="muon",
        model__classes=10,
        dequantization__name="variational",
        train__num_steps=5,
    )
    options += sets(train__clip_norm=1)
    quick("train", *ALL, *options, *parts(32), "--run-dir", "1", cwd=tmp_path, first=FLOAT64).ok()
    all_ok(
        together(
            2, "train", *ALL, *options, *parts(16), "--run-dir", "2", cwd=tmp_path, first=FLOAT64
        )
    )
    # Muon orthogonalizes in bfloat16, which makes more of a difference in the last bits.
    assert_close_runs(tmp_path / "1", tmp_path / "2", 1e-3)


def test_the_same_of_a_causal_flow_with_classes_and_dropout(tmp_path):
    words = ["train", *CAUSAL, *ALL[len(MODEL) :]]
    words += sets(model__classes=10, train__num_steps=5, train__optimizer="adamw")
    words += sets(model__dropout=0.2, model__attention=1, model__downsample=1)
    quick(*words, *parts(32), "--run-dir", "1", cwd=tmp_path, first=FLOAT64).ok()
    all_ok(together(2, *words, *parts(16), "--run-dir", "2", cwd=tmp_path, first=FLOAT64))
    assert_close_runs(tmp_path / "1", tmp_path / "2", 1e-9)


@pytest.mark.parametrize("words", [TARFLOW, JET], ids=["tarflow", "jet"])
def test_the_same_of_transformers(words, tmp_path):
    words = ["train", *words, *ALL[len(MODEL) :]]
    words += sets(train__num_steps=5, train__optimizer="adamw", train__memory="checkpoint")
    words += sets(train__precision="fp32", model__classes=10)
    quick(*words, *parts(32), "--run-dir", "1", cwd=tmp_path, first=FLOAT64).ok()
    all_ok(together(2, *words, *parts(16), "--run-dir", "2", cwd=tmp_path, first=FLOAT64))
    assert_close_runs(tmp_path / "1", tmp_path / "2", 1e-9)


def test_nearly_the_same_in_float32(tmp_path):
    """Weights stay: where a gradient is near zero, Adam makes a whole step of its rounding. A loss,
    about 4, is then a mean of 64^2 numbers of its size: their order is worth about 6e-8 * 4 * 64.
    """
    short = sets(train__num_steps=5, train__lr=1e-30)
    quick("train", *ALL, *short, *parts(32, 2), "--run-dir", "1", cwd=tmp_path).ok()
    all_ok(together(2, "train", *ALL, *short, *parts(16, 2), "--run-dir", "2", cwd=tmp_path))
    assert_close_runs(tmp_path / "1", tmp_path / "2", 2e-5)


SAVING_ALL = """
import torch
from flowtrain.system import distributed
from flowtrain.training import loop as training
from flowtrain.data.batches import Batches

loop, positions, used = training._loop, Batches.positions, []

def saving(state, *rest):
    first = {name: tensor.clone() for name, tensor in state.tensors().items()}
    loop(state, *rest)
    torch.save([first, state.tensors(), used], f"process-{distributed.rank()}.pt")

def noting(self, images):
    used.append(positions(self, images))
    return used[-1]

training._loop, Batches.positions = saving, noting
"""


def test_every_process_has_the_same_weights_and_average_and_other_images(tmp_path):
    # 1455 images: an epoch is 7.3 steps
    options = ["train", *ALL, *parts(100), *sets(train__num_steps=14)]
    all_ok(together(2, *options, "--run-dir", "r", cwd=tmp_path, first=SAVING_ALL))
    saved = [torch.load(tmp_path / f"process-{rank}.pt", weights_only=False) for rank in range(2)]
    for tensors in zip(*[each[:2] for each in saved], strict=True):
        assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    order = np.concatenate(
        [part for step in zip(saved[0][2], saved[1][2], strict=True) for part in step]
    )
    # each image once an epoch
    assert len(order) == 2800 and sorted(order[:1455]) == list(range(1455))
    # The data-dependent initialization is that of one process with the whole batch.
    quick(
        "train",
        *ALL,
        *parts(200),
        *sets(train__num_steps=1, train__lr=1e-30),
        "--run-dir",
        "1",
        cwd=tmp_path,
    ).ok()
    one = checkpoint_format.read(last(tmp_path / "1")).part("model")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, saved[0][0][f"model.{name}"], rtol=0, atol=1e-29)


@pytest.fixture
def as_process(monkeypatch):
    """Makes this process one of several, as far as its share is concerned."""

    def become(rank, world):
        monkeypatch.setattr(distributed, "group", distributed.Group(None, rank, world))

    yield become


def test_a_batch_is_cut_into_the_parts_of_the_processes(as_process, tmp_path):
    section = npz(tmp_path / "a.npz", train=50, validation=0, shift=2, flip=True)
    config = a_config(data=section)
    data = DataSet(config.data)

    def batch(rank, world, step, images, section=section):
        as_process(rank, world)
        settings = a_config(data=section)
        batches = Batches(data, settings, 24 // world, torch.device("cpu"))
        return batch_of(batches, step, images)[0]

    # What happens to an image does not depend on the number of images in a step.
    smaller = Batches(data, a_config(data=section), 12, torch.device("cpu"))
    halves = [batch_of(smaller, step, images)[0] for step, images in ((7, 31), (8, 43))]
    assert torch.equal(torch.cat(halves), batch(0, 1, 2, 31))

    streamed = {**section, "max_in_memory": 0, "workers": 1}
    for step, consumed in [(0, 0), (2, 48), (2, 31)]:  # the second spans two epochs
        whole = batch(0, 1, step, consumed)
        for world in (2, 3):
            assert torch.equal(
                whole, torch.cat([batch(rank, world, step, consumed) for rank in range(world)])
            )
        assert torch.equal(whole[12:], batch(1, 2, step, consumed, streamed))
    as_process(1, 2)
    pieces = Batches(data, config, 12, torch.device("cpu"))
    as_process(0, 1)
    whole = Batches(data, config, 24, torch.device("cpu")).first_of_all(64)
    assert torch.equal(pieces.first_of_all(64), whole)


def test_augmentation_of_a_part(tmp_path):
    x = images(20, (3, 8, 8))
    whole = augment(x, True, 2, 0, 100)
    assert torch.equal(augment(x[7:12], True, 2, 0, 107), whole[7:12])
    assert not torch.equal(augment(x, True, 2, 0), whole)


def test_noise_of_a_part():
    config = a_config()
    x = torch.zeros(40, 1, 2, 2)
    whole = dequantization_noise(config, 70, x)
    assert whole.shape == x.shape and len(whole.unique()) > 0.99 * x.numel()
    for begins, ends in [(0, 5), (19, 21), (7, 40)]:
        assert torch.equal(
            dequantization_noise(config, 70 + begins, x[begins:ends]), whole[begins:ends]
        )


# --- resuming -------------------------------------------------------------------------------------


def put_back(run, step=10):
    last(run).unlink()
    last(run).hardlink_to(run / "checkpoints" / f"step-{step:08d}.safetensors")
    return run


def test_20_steps_are_10_and_10(tmp_path):
    command = ["train", *ALL, *parts(16, 2), "--run-dir"]
    all_ok(together(2, *command, "whole", cwd=tmp_path))
    put_back(copy_of(tmp_path / "whole", tmp_path / "halves"))
    assert "at step 10" in all_ok(together(2, *command, "halves", cwd=tmp_path))
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    assert left_overs(tmp_path / "halves") == []


def resumed(count, *args, cwd, first=FLOAT64):
    """What the first of the processes that go on with a run says about it."""
    said = all_ok(together(count, *args, "--run-dir", "r", cwd=cwd, first=first))
    return said[said.index("going on from") :]


def saved_by(run):
    """The step of the last checkpoint, and the number of processes that wrote it."""
    meta = checkpoint_format.read(last(run)).meta
    return meta["step"], meta["processes"]


def test_resumed_by_two_processes_and_by_one_again(alone, tmp_path):
    run = put_back(copy_of(alone, tmp_path / "r"))
    said = resumed(2, "train", *ALL, *parts(4, 4), cwd=tmp_path)
    same = "a step takes 32 images as before, the same ones in the same order"
    assert f"saved by 1 process of 32 x 1 images ({PARTS}), now 2 of 4 x 4: {same}" in said
    assert_close_runs(alone, run, 1e-9)
    assert saved_by(put_back(run, 15)) == (15, 2)
    said = resumed(1, "train", *ALL, *parts(32), cwd=tmp_path)
    assert f"saved by 2 processes of 4 x 4 images ({PARTS}), now 1 of 32 x 1: {same}" in said
    assert_close_runs(alone, run, 1e-9)
    assert saved_by(put_back(run, 15)) == (15, 2)  # written by the two


def test_nothing_is_said_of_the_same_division(alone, tmp_path):
    put_back(copy_of(alone, tmp_path / "r"))
    assert "saved by" not in resumed(1, "train", *ALL, *parts(32), cwd=tmp_path)


PARTS = "train.batch_size x train.accumulate"


def used_images(folder, count):
    """The images that the steps of `SAVING_ALL` took, in order."""
    files = [folder / f"process-{rank}.pt" for rank in range(count)]
    used = [torch.load(file, weights_only=False)[2] for file in files]
    return np.concatenate([part for step in zip(*used, strict=True) for part in step])


def test_resumed_with_more_images_a_step_and_with_fewer_again(alone, tmp_path):
    """The order goes on after the images that were used, as when the number of processes is all
    that is changed.
    """
    run = put_back(copy_of(alone, tmp_path / "r"))
    command = ["train", *ALL, *parts(32)]
    said = resumed(2, *command, cwd=tmp_path, first=FLOAT64 + SAVING_ALL)
    assert f"saved by 1 process of 32 x 1 images ({PARTS}), now 2 of 32 x 1: " in said
    assert "a step takes 64 images, not 32: another run from here on" in said
    assert "the order goes on after the 320 images already used" in said
    assert "the 10 steps left take 640 images, not 320" in said
    config = a_config(data={"name": "digits"})
    order = Batches(DataSet(config.data), config, 30 * 32, torch.device("cpu")).positions(10 * 32)
    assert np.array_equal(order[: 10 * 64], used_images(tmp_path, 2))
    assert summary(run)["images"] == 10 * 32 + 10 * 64
    assert losses(run)[:12] == losses(alone)[:12] and losses(run)[13] != losses(alone)[13]

    assert saved_by(put_back(run, 15)) == (15, 2)
    said = resumed(1, *command, cwd=tmp_path, first=FLOAT64 + SAVING_ALL)
    assert "saved by 2 processes of 32 x 1 images" in said and "now 1 of 32 x 1" in said
    assert "a step takes 32 images, not 64: another run from here on" in said
    assert "the order goes on after the 640 images already used" in said
    assert "the 5 steps left take 160 images, not 320" in said
    assert np.array_equal(order[5 * 64 : 5 * 64 + 5 * 32], used_images(tmp_path, 1))
    assert summary(run)["images"] == 10 * 32 + 5 * 64 + 5 * 32

    put_back(run)
    # Now 10 * 32 images are used up, and a step of 2 * 20 is neither the old one nor the same
    # configuration.
    all_failed(
        together(2, "train", *ALL, *parts(20), "--run-dir", "r", cwd=tmp_path),
        2,
        "train.batch_size: ",
        "has 32, this command 20",
    )


def test_what_a_budget_means_for_another_number_of_processes(alone, tmp_path):
    """It ends by the clock, here after one step, and so does the decay of the learning rate."""
    options = [*ALL, *sets(train__num_steps="null", train__budget="1e-3s")]
    source = ["--resume", alone / "checkpoints" / "step-00000010.safetensors"]
    for size, *fragments in (
        (16, "a step takes 32 images as before", "train.budget counts seconds"),
        (32, "a step takes 64 images, not 32", "follows the clock of train.budget as before"),
    ):
        run = ["--run-dir", f"r{size}"]
        command = ["train", *options, *source, *parts(size), *run]
        said = all_ok(together(2, *command, cwd=tmp_path, first=FLOAT64))
        assert all(each in said for each in fragments), said


def test_the_order_goes_on_with_another_number_of_processes(as_process, tmp_path):
    config = a_config(data=npz(tmp_path / "a.npz", train=60, validation=0))
    data = DataSet(config.data)
    order = []
    for world, batch, steps in [(2, 4, 3), (1, 6, 2), (3, 8, 1)]:
        for _ in range(steps):
            consumed = len(order)
            for rank in range(world):
                as_process(rank, world)
                order += (
                    Batches(data, config, batch, torch.device("cpu")).positions(consumed).tolist()
                )
    assert sorted(order) == list(range(60))


def test_a_checkpoint_of_before(tmp_path):
    """Without the number of processes: there was one."""
    quick("train", *ALL, *parts(32), "--run-dir", "r", cwd=tmp_path).ok()
    run = put_back(tmp_path / "r")
    saved = checkpoint_format.read(last(run))
    old = {
        key: value
        for key, value in saved.meta.items()
        if key not in ("format", "versions", "processes")
    }
    last(run).unlink()
    checkpoint_format.write(last(run), old, saved.tensors)
    quick("train", *ALL, *parts(16), "--run-dir", "r", cwd=tmp_path).failed(
        2, "train.batch_size", "has 32"
    )
    all_ok(together(2, "train", *ALL, *parts(16), "--run-dir", "r", cwd=tmp_path))


def test_without_a_shared_file_system(tmp_path):
    """Process 1 has its data and nothing else, and gets nothing else."""
    machines = [tmp_path / name for name in ("a", "b")]
    rng = np.random.default_rng(0)
    for machine in machines:
        machine.mkdir()
    np.savez(machines[0] / "own.npz", x_train=rng.integers(0, 256, (80, 8, 8), "u1"))
    shutil.copy(machines[0] / "own.npz", machines[1])
    options = [*ALL, *sets(data__name="npz", data__path="own.npz"), *parts(8), "--run-dir", "r"]
    all_ok(together(2, "train", *options, cwds=machines))
    put_back(machines[0] / "r")
    assert "at step 10" in all_ok(together(2, "train", *options, cwds=machines))
    assert [path.name for path in machines[1].iterdir()] == ["own.npz"]
    out = all_ok(
        together(
            2, "evaluate", "r", "--split", "train", "--set", "data.path=own.npz", cwds=machines
        )
    )
    assert "r/evaluate-train.json" in out
    # Other images on one machine are noticed, and so are missing ones.
    put_back(machines[0] / "r")
    np.savez(machines[1] / "own.npz", x_train=rng.integers(0, 256, (80, 8, 8), "u1"))
    all_failed(
        together(2, "train", *options, cwds=machines),
        2,
        "images.content: process 0 has",
        "process 1",
    )
    (machines[1] / "own.npz").unlink()
    all_failed(together(2, "train", *options, cwds=machines), 2, "own.npz")


# --- what ends one ends all -----------------------------------------------------------------------


def test_an_error_is_said_once(tmp_path):
    all_failed(
        together(3, "train", *ALL, *sets(train__lr=-1), cwd=tmp_path), 2, "train.lr", "got -1"
    )
    options = ["train", *ALL, "--run-dir", "r"]
    (tmp_path / "r").mkdir()
    with (tmp_path / "r" / ".lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        all_failed(
            together(2, *options, cwd=tmp_path), 2, "--run-dir r", "in use by another process"
        )
    (tmp_path / "r" / "checkpoints").write_text("")
    all_failed(together(2, *options, cwd=tmp_path), 2, "--run-dir r", "is not a folder")
    all_failed(together(2, *options, "--device", "cuda:1", cwd=tmp_path), 2, "--device cuda:1")
    all_failed(together(2, "evaluate", "nowhere", cwd=tmp_path), 2, "nowhere")


def test_a_full_disk_ends_all(tmp_path):
    """An error of the one that writes, while the other waits for its gradients."""
    processes = []
    for rank, env in enumerate(torchrun_environment(2)):
        limit = 16_000 if rank == 0 else None
        processes.append(
            Forked(["train", *LONG, "--run-dir", "r"], cwd=tmp_path, file_limit=limit, **env)
        )
    all_failed([process.result() for process in processes], 1, "cannot be written", "is kept")


def test_steps_that_are_not_finite(tmp_path):
    options = [
        "train",
        *ALL,
        *parts(16),
        *sets(train__lr=1e39, train__warmup_steps=0, train__max_non_finite=1),
    ]
    results = together(2, *options, "--run-dir", "r", cwd=tmp_path)
    all_failed(results, 1, "2 steps not finite (train.max_non_finite: 1)")
    assert "back at step 0, with the learning rate times 0.5" in results[0].out
    assert len(list((tmp_path / "r").glob("non-finite-*.json"))) == 2
    assert checkpoint_format.read(last(tmp_path / "r")).meta["progress"]["non_finite"] == 2


@pytest.mark.parametrize("rank, signum, code", [(1, signal.SIGTERM, 143), (0, signal.SIGINT, 130)])
def test_a_signal_to_one_stops_all(rank, signum, code, tmp_path):
    processes = begin(2, "train", *LONG, "--run-dir", "r", cwd=tmp_path)
    wait_for_step(tmp_path / "r", 3)
    os.kill(processes[rank].process.pid, signum)
    results = [process.result() for process in processes]
    assert [each.code for each in results] == [code, code] and not any(
        each.err for each in results
    ), results
    step = summary(tmp_path / "r")["step"]
    assert checkpoint_format.read(last(tmp_path / "r")).meta["step"] == step >= 3
    assert (
        f"stopped by {signum.name} at step {step}; saved" in results[0].out and results[1].out == ""
    )
    assert left_overs(tmp_path / "r") == []


def test_a_signal_waits_until_all_agree(as_process, capfd):
    for world, agreed in [(1, signal.SIGTERM), (2, 0)]:
        as_process(0, world)
        stop = Stop()
        stop(signal.SIGTERM, None)
        assert (stop.asked, stop.signum) == (signal.SIGTERM, agreed)
    assert capfd.readouterr().out == 2 * "SIGTERM: finishing the step and saving\n"


def test_the_death_of_one_ends_the_others(tmp_path):
    processes = begin(3, "train", *LONG, "--run-dir", "r", cwd=tmp_path)
    wait_for_step(tmp_path / "r", 12)
    processes[1].process.kill()
    results = [process.result() for process in processes]
    assert results.pop(1).code == -signal.SIGKILL
    all_failed(
        results,
        1,
        "has lost another process of this run: it was killed",
        "r/checkpoints/last.safetensors",
    )
    assert checkpoint_format.read(last(tmp_path / "r")).meta["step"] >= 10


SLOW_SAMPLES = """
import time
from flowtrain.system import distributed, torchrun
from flowtrain.training import loop

def sample(state, *others):
    if distributed.is_main() and state.progress.step == 1:
        time.sleep(4)

loop.sample, torchrun.COLLECTIVE_SECONDS = sample, 3
"""


def test_the_others_wait_for_process_0_as_long_as_it_takes(tmp_path):
    """Its samples and checkpoints are no reason to believe that it is lost."""
    options = [*LONG, *sets(train__num_steps=2, train__sample_every=1)]
    words = ["train", *options, "--run-dir", "r"]
    all_ok(together(2, *words, cwd=tmp_path, first=SLOW_SAMPLES))


SOON = """
from flowtrain.system import heartbeat, torchrun
heartbeat.INTERVAL_SECONDS, heartbeat.TIMEOUT_SECONDS, torchrun.GRACE_SECONDS = 0.1, 3, 1
"""


@pytest.mark.parametrize("victim, world", [(1, 3), (0, 2)])
def test_a_process_that_stands_still_ends_the_others(victim, world, tmp_path):
    """Its connections stay open, so nothing but its silence says that it is lost."""
    processes = begin(world, "train", *LONG, "--run-dir", "r", cwd=tmp_path, first=SOON)
    wait_for_step(tmp_path / "r", 12)
    stopped = processes.pop(victim).process
    os.kill(stopped.pid, signal.SIGSTOP)
    results = [process.result() for process in processes]
    stopped.kill()
    said = [each for each in results if each.err]
    assert [each.code for each in results] == [1] * len(results) and len(said) == 1, results
    said[0].failed(1, f"heard nothing of process {victim} for 3 s", "last.safetensors is the last")
    assert checkpoint_format.read(last(tmp_path / "r")).meta["step"] >= 10


def test_torchrun_goes_on_after_the_death_of_one(tmp_path):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    torchrun += ["--max-restarts", "1", "-m", "flowtrain"]
    options = ["train", *LONG, *sets(train__num_steps=100), "--run-dir", "r"]
    launcher = start(*options, cwd=tmp_path, command=torchrun)
    wait_for_step(tmp_path / "r", 12)
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (victim,) = [
        pid for pid in workers if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")
    ]
    os.kill(int(victim), signal.SIGKILL)
    done = result(launcher)
    assert done.code == 0 and "Traceback" not in done.err, done
    assert done.err.count("has lost another process of this run") == 1
    assert "going on from r/checkpoints/last.safetensors at step" in done.out
    assert [row["step"] for row in metrics(tmp_path / "r") if row["split"] == "train"] == list(
        range(1, 101)
    )
    assert summary(tmp_path / "r")["finished"] and left_overs(tmp_path / "r") == []


def test_a_budget_ends_for_all_at_once(tmp_path):
    options = sets(train__budget="1s", train__schedule="linear", train__warmup_steps=0)
    fast = (
        "import os, time; c = time.perf_counter; time.perf_counter = lambda: c() * (1 + 9 * "
        "int(os.environ['RANK']))"
    )
    all_ok(together(2, "train", *LONG, *options, "--run-dir", "r", cwd=tmp_path, first=fast))
    after = summary(tmp_path / "r")
    assert after["finished"] and 1 <= after["seconds"] < 4
    rates = [row["lr"] for row in metrics(tmp_path / "r") if row["split"] == "train"]
    assert rates == sorted(rates, reverse=True) and rates[-1] < rates[0] / 3
    assert "nothing to do" in all_ok(
        together(2, "train", *LONG, *options, "--run-dir", "r", cwd=tmp_path)
    )


def test_an_environment_that_is_not_torchruns(tmp_path):
    env = torchrun_environment(2)[0]
    del env["MASTER_PORT"]
    Forked(["train", *ALL], cwd=tmp_path, **env).result().failed(
        2, "MASTER_PORT: is ''", "torchrun"
    )
    Forked(["train", "--dry-run"], cwd=tmp_path, WORLD_SIZE="1", RANK="0").result().ok()


def test_exit_codes():
    errors = [
        UserError(),
        RunError(),
        EndedElsewhere(2),
        KeyboardInterrupt(),
        SystemExit(143),
        OSError(28, ""),
        OSError(),
    ]
    assert [exit_code(error) for error in errors] == [2, 1, 2, 130, 143, 1, 2]
    assert exit_code(ValueError()) == 1


# --- the other commands ---------------------------------------------------------------------------


@pytest.mark.parametrize("count, images", [(2, 101), (3, 2)])
def test_evaluation_is_sharded(count, images, tmp_path):
    options = [
        "evaluate",
        trained()["glow"],
        "--num-images",
        images,
        "--draws",
        2,
        "--json",
        "-",
        "--batch-size",
        20,
    ]
    alone = quick(*options, "--scores", "1.csv", cwd=tmp_path).ok()
    results = together(count, *options, "--scores", "n.csv", cwd=tmp_path)
    assert all(each.ok() for each in results) and all(
        each.out + each.err == "" for each in results[1:]
    )
    one, several = (eval(text, {"null": None}) for text in (alone.out, results[0].out))
    assert one.keys() == several.keys() and several["num_images"] == images
    for key, value in one.items():
        assert several[key] == (
            pytest.approx(value, abs=1e-5, rel=1e-5) if isinstance(value, float) else value
        ), key
    scores = [np.loadtxt(tmp_path / name, delimiter=",", skiprows=1) for name in ("1.csv", "n.csv")]
    np.testing.assert_allclose(*scores, rtol=1e-5)


def test_an_image_that_is_not_finite_ends_all_after_the_result_is_written(tmp_path):
    saved = checkpoint_format.read(last(trained()["glow"]))
    name = next(
        name for name in saved.tensors if name.startswith("ema.") and name.endswith("shift")
    )
    saved.tensors[name][:] = torch.nan
    meta = {key: value for key, value in saved.meta.items() if key not in ("format", "versions")}
    checkpoint_format.write(tmp_path / "bad.safetensors", meta, saved.tensors)
    options = ["evaluate", "bad.safetensors", "--num-images", 5, "--json", "r.json"]
    all_failed(together(2, *options, cwd=tmp_path), 1, "5 of 5 images")
    assert (tmp_path / "r.json").exists()


def test_the_first_process_samples_and_interpolates(tmp_path):
    all_ok(
        together(2, "sample", trained()["glow"], "--num-images", 4, "--out", "s.npz", cwd=tmp_path)
    )
    all_ok(
        together(2, "interpolate", trained()["glow"], "--pairs", 1, "--out", "i.png", cwd=tmp_path)
    )
    quick("sample", trained()["glow"], "--num-images", 4, "--out", "1.npz", cwd=tmp_path).ok()
    assert np.array_equal(*(np.load(tmp_path / name)["images"] for name in ("s.npz", "1.npz")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.npz", "i.png", "s.npz"]


def test_a_dry_run_of_two(tmp_path):
    first, second = together(2, "train", *ALL, "--dry-run", cwd=tmp_path)
    assert "parameters: " in first.ok().out and second.ok().out == ""


def test_alone_nothing_is_shared():
    assert (distributed.world(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    assert distributed.total_later(torch.tensor([0.5, 2.0]), [0.1])() == [0.5, 2.0, 0.1]
    assert list(distributed.shard(7)) == list(range(7))
    flow = tiny_flow()
    assert distributed.parallel(flow) is flow
    with torchrun.setup():
        assert distributed.group is None

"""Checkpoints: what goes in comes out, and whatever has happened to the file is said and never
loaded.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue import TINY
from helpers import a_config, images, perturb, seeded, tiny_flow

import flowtrain
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.description import Progress
from flowtrain.checkpoints.format import read, write
from flowtrain.checkpoints.load import find, load_model, load_weights
from flowtrain.errors import RunError, UserError
from flowtrain.system.files import write_atomically
from flowtrain.training.optim import EMA, build_optimizers, first_state
from flowtrain.training.state import State
from flowtrain.training.step import train_step

CPU = torch.device("cpu")
SHAPE = (1, 4, 4)


def a_state(model="glow", ema=0.9, optimizer="adam", steps=2, **options):
    """The state of a run after a few steps."""
    config = a_config(model, train={"ema": ema, "optimizer": optimizer, "batch_size": 8}, **options)
    flow = tiny_flow(model if isinstance(model, str) else "glow")
    averaged = EMA(flow, ema) if ema else None
    state = State(
        config,
        flow,
        build_optimizers(flow, config.train),
        averaged,
        {"train": 20, "content": "abc"},
    )
    for step in range(steps):
        train_step(state, images(8, SHAPE, seed=step))
        [optimizer.step() for optimizer in state.optimizers]
        if averaged is not None:
            averaged.update(state.progress.averaged)
            state.progress.averaged += 1
        state.progress.step += 1
    return state


def saved(path, **options):
    state = a_state(**options)
    write(path, state.meta(), state.tensors())
    return state


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small checkpoint of few tensors, to be damaged."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    config = a_config("nice").resolved()
    meta = {
        "config": config,
        "shape": [1, 1, 2],
        "levels": 256,
        "step": 3,
    }
    write(
        path,
        meta,
        {"model.a": torch.randn(4, 3), "model.b": torch.arange(5), "model.c": torch.tensor(True)},
    )
    return path.read_bytes()


def spoiled(tmp_path, data):
    path = tmp_path / "spoiled.safetensors"
    path.write_bytes(data)
    return path


# ---------------------------------------------------------------- round trip


def test_round_trip(tmp_path):
    tensors = {
        "model.weight": torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last),
        "model.order": torch.randperm(5),
        "model.flag": torch.tensor(True),
        "ema.weight": torch.randn(2, 2).double(),
        "optimizer.step.weight": torch.tensor(7.0),
        "model.empty": torch.zeros(0, 3),
    }
    meta = {
        "config": {"ä": '€ " \\ \n'},
        "shape": (1, 2, 3),
        "levels": None,
        "step": 3,
        "data": {"content": "abc"},
        "processes": 2,
        "progress": asdict(Progress(step=3, best=None, seconds=0.1 + 0.2)),
    }
    write(tmp_path / "new folder" / "a.safetensors", meta, tensors)
    found = read(tmp_path / "new folder" / "a.safetensors")
    assert {key: found.meta[key] for key in meta} == meta
    assert (
        found.meta["format"] == checkpoint_format.FORMAT
        and found.meta["versions"]["torch"] == torch.__version__
    )
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (
            torch.equal(found.tensors[name], tensor) and found.tensors[name].dtype == tensor.dtype
        )
    assert found.part("model").keys() == {"weight", "order", "flag", "empty"} and found.part(
        "optimizer"
    ).keys() == {"step.weight"}


def test_it_is_an_ordinary_safetensors_file(tmp_path):
    import safetensors

    saved(tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        described = json.loads(file.metadata()["flowtrain"])
        assert "model.bijection.levels.0.layers.1.log_scale" in file.keys()  # noqa: SIM118
    assert described["config"]["model"]["name"] == "glow" and described["shape"] == list(SHAPE)


def test_the_bytes_are_those_of_safetensors(tmp_path):
    import safetensors.torch

    kinds = [torch.float64, torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.uint8]
    tensors = {f"model.{i}": torch.ones(3, 5 + i).to(kind) for i, kind in enumerate(kinds)}
    tensors["model.large"] = torch.randn(checkpoint_format.SMALL)
    tensors["model.a"] = torch.randn(7).half()
    parts = list(checkpoint_format.pieces({}, tensors))
    data = b"".join(parts)
    theirs = safetensors.torch.save(tensors)
    header, their_header = (
        json.loads(each[8 : 8 + int.from_bytes(each[:8], "little")]) for each in (data, theirs)
    )
    assert header.keys() - {"__metadata__"} == their_header.keys()
    found = safetensors.torch.load(data)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    # Tensors are aligned in memory, large ones are not copied, and small ones are one piece.
    assert len(parts[0]) % 8 == 0
    assert all(
        header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items()
    )
    large = tensors["model.large"].numpy()
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), large) for part in parts[1:])
    assert len(parts) == 4


def test_what_is_not_a_number_cannot_hide_in_the_description(tmp_path):
    with pytest.raises(ValueError):
        write(tmp_path / "a.safetensors", {"best": float("nan")}, {})


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamax", "muon"])
@pytest.mark.parametrize("ema", [0, 0.9])
@pytest.mark.parametrize("model", ["glow", "realnvp", "nice"])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path, model, ema, optimizer):
    state = saved(tmp_path / "a.safetensors", model=model, ema=ema, optimizer=optimizer)
    other = a_state(model, ema, optimizer, steps=0)
    perturb(other.flow, seed=8)
    other.restore(read(tmp_path / "a.safetensors"))
    assert other.progress == state.progress
    for one in (state, other):
        for step in (5, 6):
            train_step(one, images(8, SHAPE, seed=step))
            [optimizer.step() for optimizer in one.optimizers]
            if one.ema is not None:
                one.ema.update(one.progress.averaged)
                one.progress.averaged += 1
            one.progress.step += 1
    tensors = other.tensors()
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("model", ["glow", "realnvp", "nice"])
def test_saved_names(model):
    state = a_state(model)
    names = state.tensors().keys()
    own = set(state.flow.state_dict())
    assert {n.removeprefix("model.") for n in names if n.startswith("model.")} == own
    assert {n.removeprefix("ema.") for n in names if n.startswith("ema.")} == own
    assert not any("module." in n or n.startswith("n_averaged") for n in names)
    assert {n.split(".")[0] for n in names} == {"model", "ema", "optimizer"}


# ---------------------------------------------------------------- damage


@pytest.mark.run  # takes long
def test_any_changed_byte_is_noticed(tmp_path, small):
    assert read(spoiled(tmp_path, small)).meta["step"] == 3
    for position in range(len(small)):
        data = bytearray(small)
        data[position] ^= 1 << (position % 8)
        with pytest.raises(UserError, match=r"spoiled\.safetensors: damaged"):
            read(spoiled(tmp_path, data))


@pytest.mark.parametrize("change", [0x20, 0xFF])
@pytest.mark.run  # takes long
def test_changed_bytes_of_the_header_are_noticed(tmp_path, small, change):
    # 0x20 turns a digit of the checksum into the same digit in capitals, and so on.
    end = 8 + int.from_bytes(small[:8], "little")
    for position in range(0, end, 1 if change == 0x20 else 5):
        data = bytearray(small)
        data[position] ^= change
        with pytest.raises(UserError, match=r"spoiled\.safetensors"):
            read(spoiled(tmp_path, data))


def test_any_truncation_or_addition_is_noticed(tmp_path, small):
    for length in [*range(0, 200), *range(200, len(small), 17), len(small) - 1]:
        with pytest.raises(UserError, match=r"spoiled\.safetensors"):
            read(spoiled(tmp_path, small[:length]))
    for more in (b"\0", b" ", small):
        with pytest.raises(UserError, match=r"spoiled\.safetensors: damaged"):
            read(spoiled(tmp_path, small + more))


def test_exchanged_bytes_are_noticed(tmp_path, small):
    end = 8 + int.from_bytes(small[:8], "little")
    data = bytearray(small)
    data[end : end + 8], data[end + 8 : end + 16] = data[end + 8 : end + 16], data[end : end + 8]
    with pytest.raises(UserError, match="do not match its checksum"):
        read(spoiled(tmp_path, data))


class Malicious:
    """Its unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.pt", "last.safetensors"])
@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, name, dump):
    path, evidence = tmp_path / name, tmp_path / "it ran"
    with path.open("wb") as file:
        dump(Malicious(evidence), file)
    for load in (
        read,
        lambda p: flowtrain.load(str(p)),
        lambda p: flowtrain.load(str(p), trust_code=True),
    ):
        with pytest.raises(UserError, match=name):
            load(path)
    assert not evidence.exists()


def test_other_files_are_not_checkpoints(tmp_path):
    import safetensors.torch

    with pytest.raises(UserError, match=r"none\.safetensors: cannot be read: No such file"):
        read(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG" + bytes(100))
    with pytest.raises(UserError, match=r"picture\.png: not a flowtrain checkpoint"):
        read(tmp_path / "picture.png")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UserError, match="empty: not a flowtrain checkpoint"):
        read(tmp_path / "empty")
    (tmp_path / "other").write_bytes(
        safetensors.torch.save({"a": torch.zeros(2)}, {"format": "pt"})
    )
    with pytest.raises(UserError, match="other: not a flowtrain checkpoint"):
        read(tmp_path / "other")


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_format, "FORMAT", checkpoint_format.FORMAT + 1)
    saved(tmp_path / "a.safetensors")
    monkeypatch.undo()
    with pytest.raises(
        UserError,
        match=rf"a\.safetensors: written in checkpoint format {checkpoint_format.FORMAT + 1}",
    ):
        read(tmp_path / "a.safetensors")


# ---------------------------------------------------------------- a right checksum, wrong content


def crafted(path, description, header=None, data=b""):
    """A file with a right checksum whose description and header are what somebody made up."""
    metadata = {"flowtrain": description, "checksum": "0" * 64}
    text = json.dumps({"__metadata__": metadata, **(header or {})}, separators=(",", ":")).encode()
    blob = len(text).to_bytes(8, "little") + text + data
    path.write_bytes(blob.replace(b"0" * 64, hashlib.sha256(blob).hexdigest().encode()))
    return path


def described(**changes):
    """A good description with changes."""
    meta = {"format": 1, "versions": checkpoint_format.versions(), **a_state(steps=0).meta()}
    return json.dumps({**meta, **changes})


WRONG_PROGRESS = {
    "step": -1,
    "images": "many",
    "seconds": float("nan"),
    "best": float("inf"),
    "lr_scale": 0,
    "averaged": 2.5,
    "finished": None,
    "window_loss": [],
    "window_steps": True,
}
ENDLESS = dict.fromkeys(("images", "non_finite", "window_steps"), 10**19)
WRONG_DESCRIPTIONS = {
    "config": [None, [], "glow", 1],
    "shape": [None, [], [1, 4], [1, 4, 0], [1, 4, 4, 4], [1, 4, 10**9], [1, 4, "4"], 4],
    "levels": [0, -5, 1, 257, 2.5, "256", [], True],
    "step": [None, -1, 0.5, "0", True, 10**30, 3],
    "data": [None, [], "digits"],
    "processes": [0, -1, None, 1.5],
    "progress": [
        *[[], 3],
        *({key: value} for wrong in (WRONG_PROGRESS, ENDLESS) for key, value in wrong.items()),
    ],
    "versions": [None, [], {"flowtrain": 1}],
}


@pytest.mark.parametrize(
    "key, value", [(key, value) for key, values in WRONG_DESCRIPTIONS.items() for value in values]
)
def test_a_wrong_description_is_refused(tmp_path, key, value):
    path = crafted(tmp_path / "a", described(**{key: value}))
    with pytest.raises(UserError, match=f"a: not a valid checkpoint: .*{key}") as caught:
        read(path)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["format", "versions", "config", "shape", "levels", "step"])
def test_a_missing_key_of_the_description_is_named(tmp_path, key):
    meta = json.loads(described())
    del meta[key]
    with pytest.raises(UserError, match=f"a: not a valid checkpoint: {key}: Field required"):
        read(crafted(tmp_path / "a", json.dumps(meta)))


@pytest.mark.parametrize(
    "text",
    [None, 1, [], {}, "", "null", "[]", "3", "{", "[" * 10_000, '{"format":' * 10_000, "9" * 5000],
    ids=lambda text: str(text)[:12],
)
def test_a_description_that_is_none_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="a: not a valid checkpoint") as caught:
        read(crafted(tmp_path / "a", text))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "config, message",
    [
        ({"data": None}, "data: expected keys and values"),
        ({"model": []}, "model: expected keys and values"),
        ({"model": {"name": "glow", "levels": -5}}, "model.levels"),
        ({"model": {"name": "base"}}, "model.name: unknown name 'base'"),
        ({"model": {"name": ["os.path"]}}, "model.name is"),
        ({"data": {"name": "../x"}}, "data.name"),
        ({"surplus": 1}, "surplus: unknown key"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path, config, message):
    whole = {**a_state(steps=0).meta()["config"], **config}
    path = crafted(tmp_path / "a", described(config=whole))
    with pytest.raises(UserError, match=message):
        flowtrain.load(str(path))


def entry(start, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header, message",
    [
        ({"model.a": entry(0, 4), "model.b": entry(0, 4)}, "cannot be read"),
        ({"model.a": entry(0, 4), "model.b": entry(6, 8, "F16")}, "cannot be read"),
        ({"model.a": entry(0, 8, "Q64")}, "cannot be read"),
        ({"model.a": entry(0, 8, "F8_E8M0", [8])}, "cannot be read|does not fit this model"),
        ({"model.a": entry(0, 8, "F4", [16])}, "cannot be read|does not fit this model"),
        ({"model.a": entry(0, 2**60, "F32", [2**58])}, "cannot be read"),
        ({"model.a": entry(0, 8, "F32", [-2])}, "cannot be read"),
        ({"model.a": {}}, "cannot be read"),
        ({"model.a": None}, "cannot be read"),
        ({"other.a": entry(0, 8, "F32", [2])}, "'other.a' belongs to none of model, ema"),
    ],
)
def test_wrong_tensors_of_the_file_are_refused(tmp_path, header, message):
    path = crafted(tmp_path / "a", described(), header, bytes(8))
    with pytest.raises(UserError, match=f"a: .*({message})"):
        flowtrain.load(str(path))


WRONG_TENSORS = [
    (lambda t: t.new_zeros(0), "is 0 there and"),
    (lambda t: t.new_zeros(1), "is 1 there and"),
    (lambda t: t.new_zeros(3), "is 3 there and"),
    (lambda t: t.double(), "is torch.float64 there and torch.float32 here"),
    (lambda t: t.int(), "is torch.int32 there and torch.float32 here"),
    (lambda t: None, "is nothing there and"),
]


@pytest.mark.parametrize("part", ["model", "ema", "optimizer.exp_avg", "optimizer.step"])
@pytest.mark.parametrize("change, message", WRONG_TENSORS)
def test_a_run_does_not_go_on_with_tensors_that_do_not_fit(tmp_path, part, change, message):
    state = a_state()
    tensors = state.tensors()
    name = next(name for name in sorted(tensors) if re.match(rf"{part}\..*weight", name))
    tensors[name] = change(tensors[name])
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    write(tmp_path / "a.safetensors", state.meta(), kept)
    other = a_state(steps=0)
    before = [p.clone() for p in other.flow.parameters()]
    with pytest.raises(UserError, match=rf"does not fit this model: {re.escape(name)} {message}"):
        other.restore(read(tmp_path / "a.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(before, other.flow.parameters(), strict=True))


def test_surplus_tensors_are_named(tmp_path):
    state = a_state()
    for name in ("model.more", "ema.more", "optimizer.exp_avg.more", "optimizer.more"):
        write(tmp_path / "a.safetensors", state.meta(), {**state.tensors(), name: torch.zeros(2)})
        with pytest.raises(UserError, match=f"{name} is 2 there and nothing here"):
            a_state(steps=0).restore(read(tmp_path / "a.safetensors"))


OPTIMIZERS = ["adam", "adamw", "adamax", "muon"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_does_not_go_on_without_the_state_of_its_optimizer(tmp_path, optimizer):
    state = a_state(optimizer=optimizer)
    tensors = {k: t for k, t in state.tensors().items() if not k.startswith("optimizer.")}
    write(tmp_path / "a.safetensors", state.meta(), tensors)
    with pytest.raises(UserError, match="optimizer.* is nothing there and .*; and [0-9]+ more"):
        a_state(optimizer=optimizer, steps=0).restore(read(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_parameter_without_a_gradient_has_the_state_of_the_first_step(tmp_path, optimizer):
    """When its first gradient comes, a run that was resumed moves it as one that was not."""
    state = a_state(optimizer=optimizer, steps=0)
    idle = next(p for name, p in state.flow.named_parameters() if name.endswith("weight"))
    idle.requires_grad_(False)
    for step in range(2):
        train_step(state, images(8, SHAPE, seed=step))
        [each.step() for each in state.optimizers]
        state.progress.step += 1
    write(tmp_path / "a.safetensors", state.meta(), state.tensors())
    other = a_state(optimizer=optimizer, steps=0)
    other.restore(read(tmp_path / "a.safetensors"))
    idle.requires_grad_(True)
    for one in (state, other):
        train_step(one, images(8, SHAPE, seed=5))
        [each.step() for each in one.optimizers]
    tensors = other.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in state.tensors().items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_state_is_like_every_later_one(optimizer, dtype, request):
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(dtype)
    for each in a_state(optimizer=optimizer).optimizers:
        for parameter, values in each.state.items():
            first = first_state(each, parameter)
            assert {k: (v.shape, v.dtype) for k, v in first.items()} == {
                k: (v.shape, v.dtype) for k, v in values.items()
            }
            assert not any(value.any() for value in first.values())


@pytest.mark.parametrize(
    "name, change",
    [
        ("order", lambda t: t + 100),
        ("inverse_order", lambda t: t * 0),
        ("initialized", lambda t: ~t),
        ("keep", lambda t: t | True),
    ],
)
def test_buffers_that_no_training_leaves_so_are_refused(tmp_path, name, change):
    flow = tiny_flow("glow", permutation="shuffle", split="checkerboard")
    config = a_config(
        {"name": "glow", **TINY["glow"], "permutation": "shuffle", "split": "checkerboard"}
    )
    tensors = {f"model.{key}": tensor for key, tensor in flow.state_dict().items()}
    key = next(key for key in sorted(tensors) if key.endswith(f".{name}"))
    meta = {"config": config.resolved(), "shape": SHAPE, "levels": 256, "step": 1}
    write(tmp_path / "a.safetensors", meta, tensors)
    flowtrain.load(tmp_path / "a.safetensors")
    write(tmp_path / "a.safetensors", meta, {**tensors, key: change(tensors[key])})
    with pytest.raises(UserError, match=f"{key.removeprefix('model.')} has values that it cannot"):
        flowtrain.load(str(tmp_path / "a.safetensors"))


# ---------------------------------------------------------------- a disk that fails


@pytest.mark.parametrize("call", ["open", "fchmod", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a.safetensors"
    saved(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    state = a_state("nice")
    with pytest.raises(
        RunError, match=r"a\.safetensors: cannot be written: No space left on device"
    ):
        write(path, state.meta(), state.tensors())
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before


def test_it_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *args: (done.append("fsync"), fsync(*args))[1])
    monkeypatch.setattr(os, "replace", lambda *args: (done.append("replace"), replace(*args))[1])
    write_atomically(tmp_path / "a", b"abc")
    assert done[:2] == ["fsync", "replace"] and (tmp_path / "a").read_bytes() == b"abc"


# ---------------------------------------------------------------- finding a model


def touch(path, mtime):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (mtime, mtime))
    return path


def test_find(tmp_path):
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match="no run under"):
        find(None, runs)
    (runs / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match="no run under"):
        find(None, runs)
    last = touch(runs / "old" / "checkpoints" / "last.safetensors", 100)
    assert find(str(runs / "old")) == last == find(None, runs)
    best = touch(runs / "old" / "checkpoints" / "best.safetensors", 50)
    assert find(str(runs / "old")) == best == find(None, runs)
    # The newest run is the one that was written to last, whenever its best was.
    newer = touch(runs / "new" / "checkpoints" / "last.safetensors", 200)
    assert find(None, runs) == newer
    os.utime(last, (300, 300))
    assert find(None, runs) == best
    # A run of which somebody kept the best checkpoint only.
    kept = touch(runs / "kept" / "checkpoints" / "best.safetensors", 400)
    assert find(None, runs) == kept
    assert find(str(newer)) == newer
    with pytest.raises(UserError, match="empty: has no checkpoint"):
        find(str(runs / "empty"))
    with pytest.raises(UserError, match="nothing: no such checkpoint or run directory"):
        find(str(runs / "nothing"))


# ---------------------------------------------------------------- loading a model


def test_load(tmp_path):
    state = saved(tmp_path / "checkpoints" / "best.safetensors")
    x = images(3, SHAPE)
    for model in (tmp_path, tmp_path / "checkpoints" / "best.safetensors"):
        flow = flowtrain.load(str(model))
        assert torch.equal(
            flow.log_prob(x, seeded()), state.ema_flow.log_prob(x, seeded()).detach()
        )
        assert not flow.training and not any(p.requires_grad for p in flow.parameters())


def test_weights(tmp_path):
    state = saved(tmp_path / "a.safetensors")
    assert not torch.equal(
        state.flow.encode(images(3, SHAPE)), state.ema_flow.encode(images(3, SHAPE))
    )
    for asked, chosen, expected in (
        (None, "ema", state.ema_flow),
        ("ema", "ema", state.ema_flow),
        ("raw", "raw", state.flow),
    ):
        loaded = load_model(str(tmp_path / "a.safetensors"), CPU, asked)
        assert loaded.weights == chosen
        for a, b in zip(loaded.flow.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)
    saved(tmp_path / "b.safetensors", ema=0)
    assert load_model(str(tmp_path / "b.safetensors"), CPU).weights == "raw"
    with pytest.raises(UserError, match=r"--weights ema: .*b\.safetensors has none"):
        load_model(str(tmp_path / "b.safetensors"), CPU, "ema")
    with pytest.raises(UserError, match="--weights both"):
        load_model(str(tmp_path / "b.safetensors"), CPU, "both")


def test_the_dequantization_travels_along(tmp_path):
    saved(tmp_path / "a.safetensors", dequantization={"transform": "logit", "alpha": 0.01})
    dequantizer = flowtrain.load(str(tmp_path / "a.safetensors")).dequantizer
    assert (dequantizer.transform, dequantizer.alpha, dequantizer.levels) == ("logit", 0.01, 256)


@pytest.mark.parametrize(
    "other, message",
    [
        (
            {"width": 7},
            r"bijection\.levels\.0\.layers\.3\.conditioner\.\S+ is 6x18 there and 7x18 here",
        ),
        ({"steps": 3}, r"bijection\.\S+ is nothing there and \S+ here"),
        (
            {"steps": 1},
            r"bijection\.levels\.0\.layers\.4\.initialized is a number there and nothing here",
        ),
        ({"permutation": "conv1x1"}, r"matrix is nothing there and 4x4 here"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_name(tmp_path, other, message):
    saved(tmp_path / "a.safetensors")
    flow = tiny_flow("glow", **other)
    before = [p.clone() for p in flow.parameters()]
    with pytest.raises(UserError, match=rf"a\.safetensors: does not fit this model: .*{message}"):
        load_weights(flow, read(tmp_path / "a.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))


USERS_CODE = {
    "model": "def build(shape):\n    return flowtrain.models.glow.build(shape, levels=2, steps=2, "
    "width=6)\n",
    "data": "def build(root, split, *, seed=0):\n    return flowtrain.datasets.digits.build(root, "
    "split, seed=seed)\n",
}


@pytest.mark.parametrize("section", USERS_CODE)
def test_a_dotted_name_needs_trust(tmp_path, monkeypatch, section):
    (tmp_path / "users_package").mkdir()
    (tmp_path / "users_package" / f"{section}.py").write_text(
        "import flowtrain.datasets.digits, flowtrain.models.glow\n"
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'it ran')!r}).touch()\n{USERS_CODE[section]}"
    )
    state = a_state()
    meta = json.loads(json.dumps(state.meta()))
    meta["config"][section] = {"name": f"users_package.{section}"}
    write(tmp_path / "a.safetensors", meta, state.tensors())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_package", raising=False)  # the other section's
    with pytest.raises(
        UserError, match=rf"{section}\.name is 'users_package\.{section}'.*--trust-code"
    ):
        flowtrain.load(str(tmp_path / "a.safetensors"))
    assert not (tmp_path / "it ran").exists() and f"users_package.{section}" not in sys.modules
    flow = flowtrain.load(str(tmp_path / "a.safetensors"), trust_code=True)
    assert (tmp_path / "it ran").exists()
    assert torch.equal(flow.encode(images(3, SHAPE)), state.ema_flow.encode(images(3, SHAPE)))

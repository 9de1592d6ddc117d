"""Checkpoints: what goes in comes out, and whatever has happened to the file is said and never
loaded.
"""

import errno
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import a_config, images, perturb, seeded, tiny_flow

import flowtrain
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.format import read, write
from flowtrain.checkpoints.load import find, load_model, load_weights
from flowtrain.errors import RunError, UserError
from flowtrain.system.files import write_atomically
from flowtrain.training.optim import Average, build_optimizers
from flowtrain.training.state import State
from flowtrain.training.step import train_step

CPU = torch.device("cpu")
SHAPE = (1, 4, 4)


def a_state(model="glow", ema=0.9, optimizer="adam", steps=2, **options):
    """The state of a run after a few steps."""
    config = a_config(model, train={"ema": ema, "optimizer": optimizer, "batch_size": 8}, **options)
    flow = tiny_flow(model if isinstance(model, str) else "glow")
    averaged = Average(flow, ema) if ema else None
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
        "data": {},
        "progress": {},
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
        "empty.tensor": torch.zeros(0, 3),
    }
    meta = {
        "step": 3,
        "config": {"ä": '€ " \\ \n'},
        "progress": {"best": None, "seconds": 0.1 + 0.2},
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
    assert found.part("model").keys() == {"weight", "order", "flag"} and found.part(
        "optimizer"
    ).keys() == {"step.weight"}


def test_it_is_an_ordinary_safetensors_file(tmp_path):
    import safetensors

    saved(tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        described = json.loads(file.metadata()["flowtrain"])
        assert "model.bijection.levels.0.layers.1.log_scale" in file.keys()  # noqa: SIM118
    assert described["config"]["model"]["name"] == "glow" and described["shape"] == list(SHAPE)


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
            if one.average is not None:
                one.average.update(one.progress.averaged)
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


def test_any_changed_byte_is_noticed(tmp_path, small):
    assert read(spoiled(tmp_path, small)).meta["step"] == 3
    for position in range(len(small)):
        data = bytearray(small)
        data[position] ^= 1 << (position % 8)
        with pytest.raises(UserError, match=r"spoiled\.safetensors: damaged"):
            read(spoiled(tmp_path, data))


@pytest.mark.parametrize("change", [0x20, 0xFF])
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


# ---------------------------------------------------------------- a disk that fails


@pytest.mark.parametrize(
    "module, call", [(tempfile, "mkstemp"), (os, "fchmod"), (os, "fsync"), (os, "replace")]
)
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, module, call):
    path = tmp_path / "a.safetensors"
    saved(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, call, full)
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
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


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
            flow.log_prob(x, seeded()), state.evaluated.log_prob(x, seeded()).detach()
        )
        assert not flow.training and not any(p.requires_grad for p in flow.parameters())


def test_weights(tmp_path):
    state = saved(tmp_path / "a.safetensors")
    assert not torch.equal(
        state.flow.encode(images(3, SHAPE)), state.evaluated.encode(images(3, SHAPE))
    )
    for asked, chosen, expected in (
        (None, "ema", state.evaluated),
        ("ema", "ema", state.evaluated),
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
    assert torch.equal(flow.encode(images(3, SHAPE)), state.evaluated.encode(images(3, SHAPE)))

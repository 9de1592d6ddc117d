"""Checkpoints: round trips, exact resumption, and the refusal of every damaged file."""

import functools
import hashlib
import json
import os
import pickle
import re
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import safetensors.torch
import torch
from catalogue import TINY
from coding_helpers import loaded as in_memory
from dataset_helpers import Evil
from helpers import CPU, a_config, images, perturb, seeded, tiny_flow

import flowtrain
from flowtrain.bijections.precision import default_dtype
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.description import Progress
from flowtrain.checkpoints.format import read, write
from flowtrain.checkpoints.load import find, load_model, model_hash
from flowtrain.config import Train
from flowtrain.errors import UserError
from flowtrain.training.optim import EMA, build_optimizers
from flowtrain.training.state import State
from flowtrain.training.step import optimizer_step, train_step

SHAPE = (1, 4, 4)
OPTIMIZERS = get_args(Train.model_fields["optimizer"].annotation)


def go_on(state, *seeds):
    for seed in seeds:
        optimizer_step(state, train_step(state, images(8, SHAPE, seed=seed))[1])
        state.progress.step += 1


def a_state(ema=0.9, optimizer="adam", steps=2, **options):
    config = a_config(train={"ema": ema, "optimizer": optimizer, "batch_size": 8}, **options)
    flow = tiny_flow()
    optimizers, averaged = build_optimizers(flow, config.train), EMA(flow, ema) if ema else None
    state = State(config, flow, optimizers, averaged, {"train": 20, "content": "abc"})
    go_on(state, *range(steps))
    return state


def saved(path, **options):
    state = a_state(**options)
    write(path, state.meta(), state.tensors())
    return state


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []
    assert all(one[name].dtype == other[name].dtype for name in one)


def test_round_trip(tmp_path):
    tensors = {
        "model.weight": torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last),
        "model.order": torch.randperm(5),
        "model.flag": torch.tensor(True),
        "ema.weight": torch.randn(2, 2).double(),
        "optimizer.step.weight": torch.tensor(7.0),
        "model.empty": torch.zeros(0, 3),
    }
    meta = {"config": {"ä": '€ " \\ \n'}, "shape": (1, 2, 3), "levels": None, "step": 3}
    meta |= {"data": {"content": "abc"}, "processes": 2}
    meta["progress"] = asdict(Progress(step=3, best=None, seconds=0.1 + 0.2))
    write(tmp_path / "new folder" / "a.safetensors", meta, tensors)
    found = read(tmp_path / "new folder" / "a.safetensors")
    assert {key: found.meta[key] for key in meta} == meta
    assert found.meta["format"] == checkpoint_format.FORMAT
    assert found.meta["versions"]["torch"] == torch.__version__
    assert_equal(found.tensors, tensors)
    assert found.part("model").keys() == {"weight", "order", "flag", "empty"}
    assert found.part("optimizer").keys() == {"step.weight"}
    with pytest.raises(ValueError):
        write(tmp_path / "a.safetensors", {"best": float("nan")}, {})


def test_the_bytes_are_those_of_safetensors(tmp_path):
    kinds = [torch.float64, torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.uint8]
    tensors = {f"model.{i}": torch.ones(3, 5 + i).to(kind) for i, kind in enumerate(kinds)}
    tensors["model.large"] = torch.randn(checkpoint_format.SMALL)
    tensors["model.a"] = torch.randn(7).half()
    parts = list(checkpoint_format.pieces({"step": 3}, tensors))
    data = b"".join(parts)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["flowtrain"])["step"] == 3
    assert_equal(safetensors.torch.load(data), tensors)
    # Tensors are aligned in memory, large ones are not copied, and small ones are one piece.
    assert len(parts[0]) % 8 == 0
    offsets = {name: header[name]["data_offsets"][0] for name in tensors}
    assert all(offsets[name] % tensor.itemsize == 0 for name, tensor in tensors.items())
    large = tensors["model.large"].numpy()
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), large) for part in parts[1:])
    assert len(parts) == 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_continues_from_its_checkpoint_bit_for_bit(tmp_path, optimizer):
    """Also with a parameter whose first gradient comes later, and not without the optimizer."""
    state = a_state(optimizer=optimizer, steps=0)
    idle = next(p for name, p in state.flow.named_parameters() if name.endswith("weight"))
    idle.requires_grad_(False)
    go_on(state, 0, 1)
    tensors, own = state.tensors(), set(state.flow.state_dict())
    for part in ("model", "ema"):
        assert {n.partition(".")[2] for n in tensors if n.startswith(f"{part}.")} == own
    assert {n.partition(".")[0] for n in tensors} == {"model", "ema", "optimizer"}
    write(tmp_path / "a.safetensors", state.meta(), tensors)
    other = a_state(optimizer=optimizer, steps=0)
    perturb(other.flow, seed=8)
    other.restore(read(tmp_path / "a.safetensors"))
    assert other.progress == state.progress
    idle.requires_grad_(True)
    for one in (state, other):
        go_on(one, 5, 6)
    assert_equal(state.tensors(), other.tensors())
    assert other.progress == state.progress
    tensors = {k: t for k, t in tensors.items() if not k.startswith("optimizer.")}
    write(tmp_path / "a.safetensors", state.meta(), tensors)
    with pytest.raises(UserError, match="optimizer.* is missing; and [0-9]+ more"):
        other.restore(read(tmp_path / "a.safetensors"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    meta = {"config": a_config("nice").resolved(), "shape": [1, 1, 2], "levels": 256, "step": 3}
    tensors = {"a": torch.randn(4, 3), "b": torch.arange(5), "c": torch.tensor(True)}
    write(path, meta, {f"model.{name}": tensor for name, tensor in tensors.items()})
    return path.read_bytes()


def test_a_file_of_more_than_half_the_memory_is_refused(small, tmp_path, monkeypatch):
    path = tmp_path / "small.safetensors"
    path.write_bytes(small)
    monkeypatch.setattr(checkpoint_format.capacity, "total", lambda: 2 * len(small))
    assert read(path).meta["step"] == 3
    monkeypatch.setattr(checkpoint_format.capacity, "total", lambda: 2 * len(small) - 2)
    with pytest.raises(UserError, match="cannot be read: .* bytes, more than"):
        read(path)


@pytest.mark.run
def test_any_change_is_noticed(tmp_path, small):
    path = tmp_path / "spoiled.safetensors"

    def refused(data, why="spoiled.safetensors: damaged"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=why):
            read(path)

    def flipped(position, bits):
        return small[:position] + bytes([small[position] ^ bits]) + small[position + 1 :]

    path.write_bytes(small)
    assert read(path).meta["step"] == 3
    end = 8 + int.from_bytes(small[:8], "little")
    for position in range(len(small)):
        refused(flipped(position, 1 << (position % 8)))
    for position in range(end):  # 0x20 turns a digit of the checksum into the same in capitals
        refused(flipped(position, 0x20), "spoiled.safetensors")
    for length in [*range(200), *range(200, len(small), 17), len(small) - 1]:
        refused(small[:length], "spoiled.safetensors")
    for more in (b"\0", b" ", small):
        refused(small + more)
    exchanged = small[end + 8 : end + 16] + small[end : end + 8]
    refused(small[:end] + exchanged + small[end + 16 :], "do not match its checksum")


@pytest.mark.parametrize("name", ["model.pt", "last.safetensors"])
@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, monkeypatch, name, dump):
    monkeypatch.chdir(tmp_path)
    with Path(name).open("wb") as file:
        dump(Evil(), file)
    for trust in (False, True):
        with pytest.raises(UserError, match=name):
            flowtrain.load(name, trust_code=trust)
    assert not Path("executed").exists()


def test_other_files_are_not_checkpoints(tmp_path):
    for name, message in (("none", "No such file"), (".", "Is a directory")):
        with pytest.raises(UserError, match=f"cannot be read: {message}"):
            read(tmp_path / name)
    theirs = safetensors.torch.save({"a": torch.zeros(2)}, {"format": "pt"})
    for name, data in {"a.png": b"\x89PNG" + bytes(100), "empty": b"", "other": theirs}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: not a flowtrain checkpoint"):
            read(tmp_path / name)


def crafted(path, description, header=None, data=b""):
    """A file with a right checksum, and a description and header that somebody made up."""
    metadata = {"flowtrain": description, "checksum": "0" * 64}
    text = json.dumps({"__metadata__": metadata, **(header or {})}, separators=(",", ":")).encode()
    blob = len(text).to_bytes(8, "little") + text + data
    path.write_bytes(blob.replace(b"0" * 64, hashlib.sha256(blob).hexdigest().encode()))
    return path


@functools.cache
def good():
    return {"format": 1, "versions": checkpoint_format.versions(), **a_state(steps=0).meta()}


def refused(path, description, message):
    with pytest.raises(UserError, match=f"a: not a valid checkpoint: .*{message}") as caught:
        read(crafted(path / "a", description))
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


NOT_FINITE = float("nan"), float("inf")
WRONG_PROGRESS = [("step", -1), ("images", "many"), ("seconds", NOT_FINITE[0]), ("lr_scale", 0)]
WRONG_PROGRESS += [("best", NOT_FINITE[1]), ("best", 3.5), ("averaged", 2.5), ("finished", None)]
WRONG_PROGRESS += [("window_loss", []), ("window_steps", True)]
WRONG_PROGRESS += [(key, 10**19) for key in ("images", "non_finite", "window_steps")]
WRONG_DESCRIPTIONS = {
    "config": [None, [], "glow", 1],
    "shape": [None, [], [2, 4, 4], [1, 4], [1, 4, 0], [1, 4, 4, 4], [1, 4, 10**9], [1, 4, "4"], 4],
    "levels": [0, -5, 1, 257, 2.5, "256", [], True],
    "step": [None, -1, 0.5, "0", True, 10**30, 3],
    "data": [None, [], "digits"],
    "processes": [0, -1, None, 1.5],
    "progress": [[], 3, *({key: value} for key, value in WRONG_PROGRESS)],
    "versions": [None, [], {"flowtrain": 1}],
}


def test_a_wrong_description_is_refused(tmp_path):
    for key, values in WRONG_DESCRIPTIONS.items():
        for value in values:
            refused(tmp_path, json.dumps({**good(), key: value}), key)
    for key in ("format", "versions", "config", "shape", "levels", "step"):
        meta = {k: value for k, value in good().items() if k != key}
        refused(tmp_path, json.dumps(meta), f"{key}: Field required")
    for version in (checkpoint_format.FORMAT - 1, checkpoint_format.FORMAT + 1):
        with pytest.raises(UserError, match=f"a: written in checkpoint format {version}"):
            read(crafted(tmp_path / "a", json.dumps({**good(), "format": version})))
    for text in (None, 1, [], {}, "", "null", "[]", "3", "{", "[" * 10_000, "9" * 5000):
        refused(tmp_path, text, "")


def test_a_wrong_configuration_is_refused(tmp_path):
    for config, message in (
        ({"data": None}, "data: expected keys and values"),
        ({"model": {"name": "glow", "levels": -5}}, "model.levels"),
        ({"model": {"name": "base"}}, "model.name: unknown name 'base'"),
        ({"model": {"name": ["os.path"]}}, "model.name is"),
        ({"data": {"name": "../x"}}, "data.name"),
    ):
        whole = {**good()["config"], **config}
        path = crafted(tmp_path / "a", json.dumps({**good(), "config": whole}))
        with pytest.raises(UserError, match=message):
            flowtrain.load(path)


def entry(start, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_wrong_tensors_of_the_file_are_refused(tmp_path):
    for header, message in (
        ({"model.a": entry(0, 4), "model.b": entry(0, 4)}, "cannot be read"),
        ({"model.a": entry(0, 4), "model.b": entry(6, 8, "F16")}, "cannot be read"),
        ({"model.a": entry(0, 8, "Q64")}, "cannot be read"),
        ({"model.a": entry(0, 8, "F8_E8M0", [8])}, "cannot be read|does not fit this model"),
        ({"model.a": entry(0, 8, "F4", [16])}, "cannot be read|does not fit this model"),
        ({"model.a": entry(0, 2**60, "F32", [2**58])}, "cannot be read"),
        ({"model.a": entry(0, 8, "F32", [-2])}, "cannot be read"),
        ({"model.a": None}, "cannot be read"),
        ({"other.a": entry(0, 8, "F32", [2])}, "'other.a' belongs to none of model, ema"),
    ):
        path = crafted(tmp_path / "a", json.dumps(good()), header, bytes(8))
        with pytest.raises(UserError, match=f"a: .*({message})"):
            flowtrain.load(path)


WRONG_TENSORS = [
    (lambda t: t.new_zeros(0), "is 0 there and"),
    (lambda t: t.new_zeros(3, 5), "is 3x5 there and"),
    (lambda t: t.double(), "is torch.float64 there and torch.float32 here"),
    (lambda t: t.int(), "is torch.int32 there and torch.float32 here"),
    (lambda t: None, "is missing"),
]


@pytest.mark.parametrize("part", ["model", "ema", "optimizer.exp_avg", "optimizer.step"])
def test_a_run_does_not_continue_with_tensors_that_do_not_fit(tmp_path, part):
    state, other = a_state(), a_state(steps=0)
    tensors, before = state.tensors(), {n: p.clone() for n, p in other.tensors().items()}
    name = next(name for name in sorted(tensors) if re.match(rf"{part}\..*weight", name))
    changes = [({**tensors, name: change(tensors[name])}, m) for change, m in WRONG_TENSORS]
    for more in (f"{part}.more", f"{part.partition('.')[0]}.more"):
        changes.append(({**tensors, more: torch.zeros(2)}, "is not in this model"))
    for wrong, message in changes:
        kept = {key: tensor for key, tensor in wrong.items() if tensor is not None}
        write(tmp_path / "a.safetensors", state.meta(), kept)
        named = [n for n in wrong if wrong[n] is not tensors.get(n)][0]
        expected = rf"does not fit this model: {re.escape(named)} {message}"
        with pytest.raises(UserError, match=expected):
            other.restore(read(tmp_path / "a.safetensors"))
        assert_equal(other.tensors(), before)


def test_buffers_that_no_training_leaves_so_are_refused(tmp_path):
    options = {"permutation": "shuffle", "split": "checkerboard"}
    tensors = tiny_flow("glow", **options).state_dict(prefix="model.")
    config = a_config({"name": "glow", **TINY["glow"], **options})
    meta = {"config": config.resolved(), "shape": SHAPE, "levels": 256, "step": 1}
    write(tmp_path / "a.safetensors", meta, tensors)
    flowtrain.load(tmp_path / "a.safetensors")
    for name, change in (
        ("order", lambda t: t + 100),
        ("inverse_order", lambda t: t * 0),
        ("initialized", lambda t: ~t),
        ("keep", lambda t: t | True),
    ):
        key = next(key for key in sorted(tensors) if key.endswith(f".{name}"))
        write(tmp_path / "a.safetensors", meta, {**tensors, key: change(tensors[key])})
        wrong = f"{key.removeprefix('model.')} has values that it cannot"
        with pytest.raises(UserError, match=wrong):
            flowtrain.load(tmp_path / "a.safetensors")


def touch(path, mtime):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (mtime, mtime))
    return path


def test_find(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = Path("runs")
    with pytest.raises(UserError, match="no run under"):
        find(None)
    (runs / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match="no run under"):
        find(None)
    last = touch(runs / "old" / "checkpoints" / "last.safetensors", 100)
    assert find(str(runs / "old")) == last == find(None)
    best = touch(runs / "old" / "checkpoints" / "best.safetensors", 50)
    assert find(str(runs / "old")) == best == find(None)
    # The newest run is the one that was written to last, whenever its best was.
    newer = touch(runs / "new" / "checkpoints" / "last.safetensors", 200)
    assert find(None) == newer == find(str(newer))
    os.utime(last, (300, 300))
    assert find(None) == best
    # A run of which somebody kept the best checkpoint only.
    kept = touch(runs / "kept" / "checkpoints" / "best.safetensors", 400)
    assert find(None) == kept
    with pytest.raises(UserError, match="empty: has no checkpoint"):
        find(str(runs / "empty"))
    with pytest.raises(UserError, match="nothing: no such checkpoint or run directory"):
        find(str(runs / "nothing"))


def test_loading(tmp_path):
    path = tmp_path / "checkpoints" / "best.safetensors"
    state = saved(path, dequantization={"transform": "logit", "alpha": 0.01})
    for model in (tmp_path, path):
        flow = flowtrain.load(str(model))
        assert_equal(flow.state_dict(), state.ema_flow.state_dict())
        assert not flow.training and not any(p.requires_grad for p in flow.parameters())
        dequantizer = flow.dequantizer
        found = (dequantizer.transform, dequantizer.alpha, dequantizer.num_bins)
        assert found == ("logit", 0.01, 256)
    with pytest.raises(AssertionError):
        assert_equal(state.flow.state_dict(), state.ema_flow.state_dict())
    x = images(2, SHAPE)
    with default_dtype(torch.float64):
        flow = flowtrain.load(path, CPU)
        found = flow.log_prob(x, seeded()), flow.draw_latents(2, seeded())
    assert_equal(flow.state_dict(), state.ema_flow.state_dict())
    assert torch.equal(found[0], flow.log_prob(x, seeded()))
    assert torch.equal(found[1], flow.draw_latents(2, seeded()))
    for asked, expected in ((None, state.ema_flow), ("ema", state.ema_flow), ("raw", state.flow)):
        loaded = load_model(str(path), CPU, asked)
        assert loaded.weights == (asked or "ema")
        assert_equal(loaded.flow.state_dict(), expected.state_dict())
    saved(tmp_path / "b.safetensors", ema=0)
    assert load_model(str(tmp_path / "b.safetensors"), CPU).weights == "raw"
    with pytest.raises(UserError, match=r"--weights ema: .*b\.safetensors has none"):
        load_model(str(tmp_path / "b.safetensors"), CPU, "ema")
    with pytest.raises(UserError, match="--weights both"):
        load_model(str(tmp_path / "b.safetensors"), CPU, "both")
    write(tmp_path / "c.safetensors", state.meta(), state.flow.double().state_dict(prefix="model."))
    assert flowtrain.load(tmp_path / "c.safetensors").dtype == torch.float64


def test_the_hash_of_a_model_depends_on_its_preprocessing():
    flow, noise = tiny_flow(), [{"transform": "logit", "alpha": alpha} for alpha in (0.05, 0.1)]
    one, other = (model_hash(in_memory(flow, a_config(dequantization=each))) for each in noise)
    assert one != other


def test_a_configuration_may_lack_sections(tmp_path):
    """In a stranger's file. Their values are the defaults."""
    meta = {"config": {"model": a_config().resolved()["model"]}, "shape": SHAPE, "levels": 256}
    tensors = tiny_flow().state_dict(prefix="model.")
    write(tmp_path / "a.safetensors", {**meta, "step": 0}, tensors)
    model = load_model(str(tmp_path / "a.safetensors"), CPU)
    assert model_hash(model) and model.alone()[0]["config"]["data"] == {"root": "data"}

"""Every configuration key has an effect: each is flipped, and something that a user can see
changes.

A key of the schema that is not in the tables fails `test_every_key_is_flipped`.
"""

import copy
import functools
import json
import os
import threading
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
import torch._dynamo
from helpers import PLAIN, batch_of, compiles
from PIL import Image

from flowtrain import config as configuration
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.format import read
from flowtrain.config import (
    Config,
    Data,
    Dequantization,
    Model,
    Train,
    component_names,
    component_schema,
    parse,
)
from flowtrain.data.batches import Batches
from flowtrain.data.splits import DataSet
from flowtrain.errors import RunError, UserError
from flowtrain.flow.flow import initialize
from flowtrain.results import Row
from flowtrain.system.capacity import peak
from flowtrain.training.dry_run import dry_run
from flowtrain.training.loop import fit
from flowtrain.training.optim import build_optimizers
from flowtrain.training.run_directory import RunDirectory
from flowtrain.training.state import State
from flowtrain.training.step import train_step

pytestmark = pytest.mark.run  # many seconds in all

BASE = {
    "data": {"name": "digits", "root": "data"},
    "model": {"name": "glow", "levels": 1, "steps": 1, "width": 8},
    "train": {
        "num_steps": 4,
        "batch_size": 16,
        "log_every": 1,
        "validate_every": 4,
        "checkpoint_every": 2,
    }
    | {"keep_checkpoints": 1, "sample_every": 4, "ema": 0.5, **PLAIN, "lr": 0.01},
}
LOGIT = {"dequantization": {"transform": "logit"}}
VARIATIONAL = {"dequantization": {"name": "variational", "steps": 2, "width": 4}}
GAUSSIAN = {"dequantization": {"name": "gaussian"}}
REALNVP = {"model": {"name": "realnvp", "levels": 1, "width": 4, "blocks": 1}}
NICE = {"model": {"name": "nice", "couplings": 2, "width": 8, "hidden_layers": 1}}
PLANAR = {"model": {"name": "planar", "layers": 2}}
MAF = {"model": {"name": "maf", "layers": 2, "width": 8, "hidden_layers": 1}}
CNF = {"model": {"name": "cnf", "width": 8, "hidden_layers": 1}}
IAF = {"model": {**MAF["model"], "name": "iaf"}}
CAUSAL = {"model": {"name": "causal", "width": 8, "blocks": 1, "units": 2, "window": 1}}
TARFLOW = {"model": {"name": "tarflow", "patch": 4, "width": 8, "blocks": 2, "layers": 1}}
JET = {"model": {"name": "jet", "patch": 4, "width": 8, "couplings": 2, "layers": 1}}
SPHERE = {"data": {"name": "sphere", "count": 60}}
SPHERE["model"] = {"name": "sphere", "layers": 1, "width": 8, "hidden_layers": 1, "bins": 3}
NPZ = {"data": {"name": "npz", "path": "square.npz"}}
FOLDER = {"data": {"name": "folder", "path": "pictures", "size": 8, "channels": 1}}
COLOUR = {"data": {**FOLDER["data"], "channels": 3}}
PATCHES = {
    name: {"data": {**FOLDER["data"], "size": 16}, **base}
    for name, base in (("tarflow", TARFLOW), ("jet", JET))
}
LAYOUT = {"data": {"name": "npz", "path": "layout.npz"}, **NICE}
POINTS = {
    name: {"data": {"name": name, "count": 60}, **NICE}
    for name in ("two_moons", "eight_gaussians", "checkerboard", "pinwheel", "spiral", "rings")
}
# Options that the other data set or model requires.
ALSO = {"data.name": ["data.path=square.npz"], "model.name": ["model.width=8"]}

# The key, another value, the part of the outcome that must change, and what is added to BASE.
FLIPS = [
    ("seed", 1, "loss"),
    ("data.name", "npz", "content"),
    ("data.split_seed", 1, "content"),
    ("data.validation", 20, "content"),
    ("data.n_bits", 3, "levels", NPZ),
    ("data.flip", True, "loss"),
    ("data.shift", 2, "loss"),
    ("npz:data.path", "other.npz", "content", NPZ),
    ("npz:data.layout", "nchw", "shape", LAYOUT),
    ("folder:data.path", "more_pictures", "content", FOLDER),
    ("folder:data.size", 4, "shape", FOLDER),
    ("folder:data.channels", 3, "shape", FOLDER),
    ("folder:data.resize", "stretch", "loss", FOLDER),
    *((f"{name}:data.count", 61, "content", base) for name, base in POINTS.items()),
    *(
        (f"{name}:data.noise", 0.3, "content", POINTS[name])
        for name in ("two_moons", "eight_gaussians")
    ),
    *((f"{name}:data.noise", 0.3, "content", POINTS[name]) for name in ("spiral", "rings")),
    ("pinwheel:data.arms", 3, "content", POINTS["pinwheel"]),
    ("sphere:data.count", 61, "content", SPHERE),
    ("sphere:data.components", 3, "content", SPHERE),
    ("sphere:data.concentration", 3, "content", SPHERE),
    ("model.name", "nice", "parameters"),
    ("model.classes", 10, "parameters"),
    ("model.label_dropout", 0.5, "loss", {"model": {**CAUSAL["model"], "classes": 10}}),
    ("model.context", "downsample", "parameters"),
    ("model.context", "grey", "parameters", COLOUR),
    ("model.context_factor", 4, "loss", {"model": {"context": "downsample"}}),
    ("glow:model.levels", 2, "parameters"),
    ("glow:model.steps", 2, "parameters"),
    ("glow:model.width", 9, "parameters"),
    ("glow:model.coupling", "additive", "parameters"),
    ("glow:model.permutation", "reverse", "parameters"),
    ("glow:model.permutation", "conv1x1", "parameters"),
    ("glow:model.permutation", "shuffle", "parameters"),
    ("glow:model.permutation", "shuffle", "loss", {"model": {"permutation": "reverse"}}),
    ("glow:model.initialization", "whitening", "loss"),
    ("glow:model.coupling", "spline", "parameters"),
    ("glow:model.coupling", "mixture", "parameters"),
    ("glow:model.prior", "spline", "parameters", {"model": {"levels": 2}}),
    ("glow:model.prior", "mixture", "parameters", {"model": {"levels": 2}}),
    ("glow:model.steps", [1, 2], "parameters", {"model": {"levels": 2}}),
    ("glow:model.width", [8, 9], "parameters", {"model": {"levels": 2}}),
    ("glow:model.bins", 3, "parameters", {"model": {"coupling": "spline"}}),
    ("glow:model.components", 3, "parameters", {"model": {"coupling": "mixture"}}),
    ("glow:model.split", "checkerboard", "parameters"),
    ("glow:model.split", "mixed", "parameters", {"model": {"steps": 2}}),
    ("glow:model.conditioner", "gated", "parameters"),
    ("glow:model.blocks", 2, "parameters", {"model": {"conditioner": "gated"}}),
    ("realnvp:model.levels", 2, "parameters", REALNVP),
    ("realnvp:model.width", 5, "parameters", REALNVP),
    ("realnvp:model.blocks", 2, "parameters", REALNVP),
    ("nice:model.couplings", 3, "parameters", NICE),
    ("nice:model.width", 9, "parameters", NICE),
    ("nice:model.hidden_layers", 2, "parameters", NICE),
    ("nice:model.prior", "gaussian", "loss", NICE),
    ("planar:model.layers", 3, "parameters", PLANAR),
    ("maf:model.layers", 3, "parameters", MAF),
    ("maf:model.width", 9, "parameters", MAF),
    ("maf:model.hidden_layers", 2, "parameters", MAF),
    ("maf:model.order", "random", "loss", MAF),
    ("maf:model.transform", "spline", "parameters", MAF),
    ("maf:model.transform", "mixture", "parameters", MAF),
    ("iaf:model.layers", 3, "parameters", IAF),
    ("iaf:model.width", 9, "parameters", IAF),
    ("iaf:model.hidden_layers", 2, "parameters", IAF),
    ("iaf:model.order", "random", "loss", IAF),
    ("iaf:model.transform", "spline", "parameters", IAF),
    ("iaf:model.transform", "mixture", "parameters", IAF),
    ("sphere:model.layers", 2, "parameters", SPHERE),
    ("sphere:model.width", 9, "parameters", SPHERE),
    ("sphere:model.hidden_layers", 2, "parameters", SPHERE),
    ("sphere:model.bins", 4, "parameters", SPHERE),
    ("cnf:model.blocks", 2, "parameters", CNF),
    ("cnf:model.width", 9, "parameters", CNF),
    ("cnf:model.hidden_layers", 2, "parameters", CNF),
    ("cnf:model.solver", "dopri8", "loss", CNF),
    ("cnf:model.rtol", 0.5, "loss", {"model": {**CNF["model"], "rtol": 1e-6, "atol": 1e-6}}),
    ("cnf:model.atol", 0.5, "loss", {"model": {**CNF["model"], "rtol": 1e-6, "atol": 1e-6}}),
    ("cnf:model.trace", "exact", "loss", CNF),
    ("cnf:model.trace", "hutchinson", "loss", {"data": POINTS["pinwheel"]["data"], **CNF}),
    ("cnf:model.adjoint", True, "loss", CNF),
    ("causal:model.width", 9, "parameters", CAUSAL),
    ("causal:model.blocks", 2, "parameters", CAUSAL),
    ("causal:model.token", 1, "parameters", CAUSAL),
    ("causal:model.token", 4, "parameters", CAUSAL),
    ("causal:model.components", 2, "parameters", CAUSAL),
    ("causal:model.units", 3, "parameters", CAUSAL),
    ("causal:model.window", 2, "parameters", CAUSAL),
    ("causal:model.attention", 1, "parameters", CAUSAL),
    ("causal:model.downsample", 1, "parameters", CAUSAL),
    ("causal:model.dropout", 0.5, "loss", CAUSAL),
    *(("tarflow:model.patch", patch, "parameters", TARFLOW) for patch in (1, 2)),
    *((f"{name}:model.patch", 8, "parameters", base) for name, base in PATCHES.items()),
    ("tarflow:model.width", 9, "parameters", TARFLOW),
    ("tarflow:model.blocks", 3, "parameters", TARFLOW),
    ("tarflow:model.layers", 2, "parameters", TARFLOW),
    ("tarflow:model.mixing", "none", "parameters", TARFLOW),
    ("tarflow:model.bounded", False, "loss", TARFLOW),
    ("jet:model.patch", 2, "parameters", JET),
    ("jet:model.width", 9, "parameters", JET),
    ("jet:model.couplings", 3, "parameters", JET),
    ("jet:model.layers", 2, "parameters", JET),
    ("jet:model.mixing", "permutation", "parameters", JET),
    ("jet:model.bounded", False, "loss", JET),
    ("dequantization.name", "variational", "parameters"),
    ("dequantization.steps", 3, "parameters", VARIATIONAL),
    ("dequantization.width", 5, "parameters", VARIATIONAL),
    ("dequantization.name", "gaussian", "loss"),
    ("dequantization.sigma", 0.3, "loss", GAUSSIAN),
    ("dequantization.transform", "logit", "loss"),
    ("dequantization.alpha", 0.2, "loss", LOGIT),
    ("train.num_steps", 3, "steps"),
    ("train.batch_size", 17, "images"),
    ("train.accumulate", 2, "images"),
    ("train.lr", 0.02, "lr"),
    ("train.warmup_steps", 3, "lr"),
    ("train.schedule", "linear", "lr"),
    ("train.schedule", "cosine", "lr"),
    ("train.optimizer", "adamw", "loss", {"train": {"weight_decay": 0.5}}),
    ("train.optimizer", "adamax", "loss"),
    ("train.optimizer", "muon", "loss"),
    ("train.weight_decay", 1.0, "loss"),
    ("train.clip_norm", 0.01, "loss"),
    ("train.precision", "bf16", "loss"),
    ("train.ema", 0, "weights"),
    ("train.ema", 0.1, "validation"),
    ("train.log_every", 2, "steps"),
    ("train.validate_every", 2, "validation"),
    ("train.checkpoint_every", 3, "files", {"train": {"keep_checkpoints": 5}}),
    ("train.keep_checkpoints", 2, "files"),
    ("train.sample_every", 3, "files"),
    ("train.logger", [], "events"),
]
# The parts that are known before any training.
BUILT = {"content", "shape", "levels", "parameters"}
# Keys that have a test of their own below.
SPECIAL = {
    *("data.root", "data.max_in_memory", "data.workers"),
    *("train.budget", "train.memory", "train.max_non_finite", "train.compile", "train.cuda_graph"),
    *(f"{name}:data.test_count" for name in [*POINTS, "sphere"]),
    *(f"imagenet{side}:data.version" for side in (32, 64)),
    # tests/datasets/test_hub.py has these, because they need a package that may be missing.
    *(f"hub:data.{key}" for key in ("repository", "path", "subset", "revision", "image", "label")),
    *(f"hub:data.{key}" for key in ("train_split", "test_split", "size", "channels", "resize")),
}


def schema_fields():
    """Every key with its field; `data.root`, or `glow:model.steps` for an option of a model or data
    set.
    """
    sections = {"data": Data, "model": Model, "dequantization": Dequantization, "train": Train}
    assert Config.model_fields.keys() == {"seed", *sections}
    yield "seed", Config.model_fields["seed"]
    for name, section in sections.items():
        yield from ((f"{name}.{key}", field) for key, field in section.model_fields.items())
    for base in (Data, Model):
        for kind in component_names(base):
            schema = component_schema(base, kind)
            for key in schema.option_names:
                yield f"{kind}:{base.section}.{key}", schema.model_fields[key]


def test_every_key_is_flipped():
    assert {key for key, _ in schema_fields()} == {key for key, *_ in FLIPS} | SPECIAL


def test_every_choice_is_flipped():
    """A key that takes one of several words is flipped from or to each of them."""
    tried = {(key, str(flip[0])) for key, *flip in FLIPS}
    for key, _, _, base in [(*flip, {})[:4] for flip in FLIPS]:
        section, _, option = (key.partition(":")[2] or key).partition(".")
        tried.add((key, str(merged(BASE, base).get(section, {}).get(option))))
    choices = {
        (key, str(choice))
        for key, field in schema_fields()
        if get_origin(field.annotation) is Literal and key not in SPECIAL
        for choice in get_args(field.annotation)
        if choice != field.default
    }
    assert choices - tried == {("folder:data.resize", "exact")}  # It refuses these images.


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """Makes the current folder, with a few images in every format."""
    folder = tmp_path_factory.mktemp("keys")
    before = Path.cwd()
    os.chdir(folder)
    random = np.random.default_rng(0)
    for name, shape in {"square": (8, 8, 1), "other": (8, 8, 1), "layout": (3, 8, 3)}.items():
        np.savez(f"{name}.npz", x_train=random.integers(0, 256, (60, *shape), dtype=np.uint8))
    for name, count in {"pictures": 40, "more_pictures": 50}.items():
        Path(name).mkdir()
        for index in range(count):
            Image.fromarray(random.integers(0, 256, (10, 17, 3), dtype=np.uint8)).save(
                f"{name}/{index}.png"
            )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWTRAIN_CACHE", str(folder / "cache"))
        yield folder
    os.chdir(before)


def merged(*layers):
    values = {}
    for layer in layers:
        for section, options in layer.items():
            values[section] = (
                {**values.get(section, {}), **options} if isinstance(options, dict) else options
            )
    for section, options in values.items():  # another data set or model has other options
        if section in ("model", "data") and options["name"] != BASE[section]["name"]:
            values[section] = dict(
                next(layer[section] for layer in layers[1:] if "name" in layer.get(section, {}))
            )
    return values


def build(values):
    """What a user can see of the data and the model before any training."""
    settings = parse(values)
    data = DataSet(settings.data)
    flow = build_flow(settings, data.shape, data.levels)
    return {
        "content": data.fingerprint,
        "shape": data.shape,
        "levels": data.levels,
        "parameters": {name: tensor.shape for name, tensor in flow.state_dict().items()},
    }


def train(values, folder):
    """Trains, and returns what a user can see of it."""
    settings = parse(values)
    run = RunDirectory(folder)
    fit(settings, run, torch.device("cpu"))
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps = [row for row in rows if row["split"] == "train"]
    saved = read(run.last)
    return {
        "loss": [Row.model_validate(row).loss for row in steps],
        "lr": [row["lr"] for row in steps],
        "steps": [row["step"] for row in steps],
        "images": [row["images"] for row in steps],
        "validation": [
            (row["step"], row["bits_per_dim"]) for row in rows if row["split"] == "validation"
        ],
        "files": sorted(
            path.name for part in (run.checkpoints, run.samples) for path in part.iterdir()
        ),
        "events": len(list(folder.glob("events.out.tfevents.*"))),
        "weights": sorted({name.partition(".")[0] for name in saved.tensors}),
    }


@pytest.fixture(scope="module")
def outcome(here):
    """A cached `train`: many flips start from the same configuration."""
    cache = {}

    def of(values):
        key = json.dumps(values, sort_keys=True)
        if key not in cache:
            cache[key] = train(values, here / f"run{len(cache)}")
        return cache[key]

    return of


def every(flips):
    ids = [f"{key}={value}".replace(":", "-") for key, value, *_ in flips]
    rows = [(*flip, {})[:4] for flip in flips]
    return pytest.mark.parametrize("key, value, part, base", rows, ids=ids)


def before_and_after(key, value, base):
    before = merged(BASE, base)
    key = key.partition(":")[2] or key
    words = [f"{key}={json.dumps(value)}", *ALSO.get(key, [])]
    after = configuration.override(copy.deepcopy(before), words)
    assert configuration.differences(parse(before).resolved(), parse(after).resolved()) != []
    return before, after


@every([flip for flip in FLIPS if flip[2] in BUILT])
def test_flip_what_is_built(key, value, part, base):
    before, after = before_and_after(key, value, base)
    assert build(before)[part] != build(after)[part]


@every([flip for flip in FLIPS if flip[2] not in BUILT])
def test_flip_what_is_trained(key, value, part, base, outcome):
    before, after = before_and_after(key, value, base)
    assert outcome(before)[part] != outcome(after)[part]


@pytest.mark.parametrize(
    "layer",
    [{}, LOGIT, VARIATIONAL, REALNVP, NPZ],
    ids=["base", "logit", "variational", "realnvp", "npz"],
)
def test_nothing_flipped_nothing_changed(layer, outcome, here):
    values = merged(BASE, layer)
    assert train(values, here / f"again-{len(list(here.iterdir()))}") == outcome(values)


# --- the keys whose effect is not in those files --------------------------------------------------


def test_data_root(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for root in ("one", "two"):
        values = merged(BASE, {"data": {"name": "mnist", "root": str(tmp_path / root)}})
        with pytest.raises(UserError, match=f"data.root: MNIST is not in {tmp_path / root}"):
            DataSet(parse(values).data).split("test")


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("version", ["oord2016", "chrabaszcz2017"])
def test_data_version(side, version, tmp_path):
    values = merged(BASE, {"data": {"name": f"imagenet{side}", "version": version}})
    values["data"]["root"] = str(tmp_path)
    with pytest.raises(UserError, match=f"imagenet{side} of data.version {version} is not in"):
        DataSet(parse(values).data).split("test")


@pytest.mark.parametrize("name", [*POINTS, "sphere"])
def test_data_test_count(name):
    for count in (5, 6):
        values = merged(BASE, {"data": {"name": name, "test_count": count}})
        assert len(DataSet(parse(values).data).split("test")) == count


@pytest.mark.parametrize(
    "gigabytes, workers, threads", [(4, 2, 0), (0, 0, 0), (0, 1, 1), (0, 2, 2)]
)
def test_data_max_in_memory_and_workers(gigabytes, workers, threads):
    """The keys decide how batches are read, and by how many threads, but not what they are."""
    values = merged(BASE, {"data": {"max_in_memory": gigabytes, "workers": workers}})
    settings = parse(values)
    made = Batches(DataSet(settings.data), settings, 16, torch.device("cpu"))
    assert made.streams == (gigabytes == 0)
    first, _ = batch_of(made, 3)
    assert sum(thread.name.startswith("data") for thread in threading.enumerate()) == threads
    made.close()
    plain = parse(BASE)
    other = Batches(DataSet(plain.data), plain, 16, torch.device("cpu"))
    assert torch.equal(first, batch_of(other, 3)[0])


@pytest.mark.parametrize("seconds", [0.1, 0.5])
def test_train_budget(seconds, tmp_path):
    values = configuration.override(merged(BASE), [f"train.budget={seconds}s"])
    assert "num_steps" not in values["train"]
    fit(parse(values), RunDirectory(tmp_path / "run"), torch.device("cpu"))
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    used = [row["seconds"] for row in rows if row["split"] == "train"]
    # The clock goes on between the decision to take another step and the row of the last.
    assert all(time < seconds for time in used[:-2]) and used[-1] >= seconds


def test_train_memory():
    """The gradients are the same, from fewer activations."""
    taken, gradients = {}, {}
    for mode in ("store", "checkpoint", "reversible"):
        settings = parse(
            merged(BASE, {"train": {"memory": mode}, "model": {"steps": 4, "width": 32}})
        )
        flow = build_flow(settings, (1, 8, 8), 17)
        x = torch.randint(
            17, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        )
        initialize(flow, x, torch.rand(x.shape, generator=torch.Generator().manual_seed(1)))
        state = State(settings, flow, build_optimizers(flow, settings.train), None, {})
        taken[mode] = peak(lambda state=state, x=x: train_step(state, x), x.device)
        gradients[mode] = [p.grad for p in flow.parameters()]
    assert taken["reversible"] < taken["checkpoint"] < taken["store"]
    torch.testing.assert_close(gradients["store"], gradients["checkpoint"])
    torch.testing.assert_close(gradients["store"], gradients["reversible"], rtol=1e-3, atol=1e-5)


@compiles
@pytest.mark.parametrize("value, graphs", [("off", 0), ("layers", 1), ("step", 1)])
def test_train_compile(value, graphs, monkeypatch):
    """Something is compiled, into few graphs, and the gradients are the same."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()
    x = torch.randint(17, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    gradients = []
    for compile in ("off", value):
        settings = parse(merged(BASE, {"train": {"compile": compile}}))
        flow = build_flow(settings, (1, 8, 8), 17)
        initialize(flow, x, torch.rand(x.shape, generator=torch.Generator().manual_seed(1)))
        train_step(State(settings, flow, [], None, {}), x)
        gradients.append([p.grad for p in flow.parameters()])
    assert counts["unique_graphs"] == graphs
    torch.testing.assert_close(*gradients)


def test_train_cuda_graph():
    values = merged(BASE, {"train": {"cuda_graph": True}})
    with pytest.raises(UserError, match="^train.cuda_graph: needs a CUDA device"):
        dry_run(parse(values), torch.device("cpu"))


@pytest.mark.parametrize("limit", [0, 2])
def test_train_max_non_finite(limit, tmp_path):
    values = merged(BASE, {"train": {"max_non_finite": limit, "lr": 1e30}})
    with pytest.raises(RunError, match=f"train.max_non_finite: {limit}"):
        fit(parse(values), RunDirectory(tmp_path / "run"), torch.device("cpu"))
    assert len(list((tmp_path / "run").glob("non-finite-*.json"))) == limit + 1

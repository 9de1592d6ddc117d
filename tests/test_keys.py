"""Every configuration key has an effect: other values, taken from the schema, change the outcome.

Only keys that need a particular setting, value or effect are in the tables.
"""

import functools
import itertools
import json
import os
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
from catalogue import POINTS, TINY, TORUS
from catalogue import SPHERE as SPHERE_MODEL
from helpers import CPU, PLAIN, images, initialized
from PIL import Image

from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.format import read
from flowtrain.config import Config, Data, Model, Section, component_names, component_schema, parse
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.system.capacity import moments
from flowtrain.training.loop import fit
from flowtrain.training.optim import build_optimizers
from flowtrain.training.run_directory import RunDirectory
from flowtrain.training.state import State
from flowtrain.training.step import train_step

pytestmark = pytest.mark.run  # many seconds in all

SHORT = {"num_steps": 4, "batch_size": 16, "log_every": 1, "validate_every": 4}
SHORT |= {"checkpoint_every": 2, "keep_checkpoints": 1, "sample_every": 4, "ema": 0.5}
BASE = {
    "data": {"name": "digits"},
    "model": {"name": "glow", "levels": 1, "steps": 1, "width": 8},
    "train": {**SHORT, **PLAIN, "lr": 0.01},
}
NICE = {"model": {"name": "nice", "couplings": 2, "width": 8, "hidden_layers": 1}}
CNF = {"name": "cnf", "width": 8, "hidden_layers": 1}
EXACT_CNF = {"model": {**CNF, "rtol": 1e-6, "atol": 1e-6}}
NPZ = {"data": {"name": "npz", "path": "square.npz"}}
FOLDER = {"name": "folder", "path": "pictures", "size": 8, "channels": 1}
SPHERE = {"data": {"name": "sphere", "count": 60}, "model": SPHERE_MODEL}

# The settings in which the options of a data set or model are changed, if not a tiny model on
# digits, or the defaults of the data set.
SETTINGS = {
    **{name: {"data": {"name": name, "count": 60}, **NICE} for name in POINTS},
    "npz": NPZ,
    "folder": {"data": FOLDER},
    "sphere": SPHERE,
    "vectors": {"data": {"name": "vectors", "path": "v.npy"}, **NICE},
    "torus": {"data": {"name": "torus", "count": 60}, "model": TORUS},
    "cnf": {"model": CNF},
}
# The same for a single key, if it has an effect only there.
SETTINGS |= {
    "data.n_bits": NPZ,
    "npz:data.layout": {"data": {"name": "npz", "path": "layout.npz"}, **NICE},
    "model.class_prior": {"model": {"levels": 2, "classes": 10}},
    "model.label_dropout": {"model": {"name": "causal", **TINY["causal"], "classes": 10}},
    "model.context": {"data": {**FOLDER, "channels": 3}},
    **dict.fromkeys(("jet:model.patch", "tarflow:model.patch"), {"data": {**FOLDER, "size": 16}}),
    "model.context_factor": {"model": {"context": "downsample"}},
    "causal:model.orders": {"data": {"name": "digits", "flip": False}},
    "glow:model.bins": {"model": {"coupling": "spline"}},
    "glow:model.components": {"model": {"coupling": "mixture"}},
    "glow:model.blocks": {"model": {"conditioner": "gated"}},
    "cnf:model.rtol": EXACT_CNF,
    "cnf:model.atol": EXACT_CNF,
    "cnf:model.trace": {"data": {"name": "pinwheel", "count": 60}, "model": CNF},
    "dequantization.steps": {"dequantization": {"name": "variational", "width": 4}},
    "dequantization.width": {"dequantization": {"name": "variational", "steps": 2}},
    "dequantization.sigma": {"dequantization": {"name": "gaussian"}},
    "dequantization.alpha": {"dequantization": {"transform": "logit"}},
    "train.optimizer": {"train": {"weight_decay": 0.5}},
    "train.checkpoint_every": {"train": {"keep_checkpoints": 5}},
}
# Values for keys of other types, and for those whose next value has no effect in so short a run.
VALUES = {
    "npz:data.path": ["other.npz"],
    "folder:data.path": ["more_pictures"],
    "vectors:data.path": ["w.npy"],
    "model.classes": [10],  # as the digits have
    "glow:model.steps": [3, [1, 2]],
    "glow:model.width": [7, [8, 9]],
    "cnf:model.rtol": [0.5],
    "cnf:model.atol": [0.5],
    "train.warmup_steps": [3],
    "train.clip_norm": [0.01],
    "train.ema": [0.1],
    "train.validate_every": [2],
    "train.sample_every": [3],
    "train.logger": [[]],
}
# The part of the outcome that must change, if not data, model or loss.
PARTS = {"num_steps": "steps", "batch_size": "images", "accumulate": "images"}
PARTS |= dict.fromkeys(("lr", "warmup_steps", "schedule"), "lr")
PARTS |= {"ema": "validation", "log_every": "steps", "validate_every": "validation"}
PARTS |= dict.fromkeys(("checkpoint_every", "keep_checkpoints", "sample_every"), "files")
PARTS = {f"train.{key}": part for key, part in PARTS.items()} | {"train.logger": "events"}
# Choices without an effect here: refused for these images, and equal to one of the others.
LEFT_OUT = {("folder:data.resize", "exact"), ("cnf:model.trace", "auto")}
# Keys with a test of their own: below, in data/ (test_batches.py), training/ (test_resume.py,
# test_stop.py, test_non_finite.py, test_loss.py), cli/, datasets/ (test_datasets.py, test_hub.py).
SPECIAL = {"data.name", "model.name", "data.root", "data.max_in_memory", "data.workers"}
SPECIAL |= {f"train.{key}" for key in ("budget", "memory", "max_non_finite", "compile")}
SPECIAL |= {"train.cuda_graph", "train.clock"}
SPECIAL |= {"imagenet32:data.version", "imagenet64:data.version"}
SPECIAL |= {f"hub:data.{key}" for key in component_schema(Data, "hub").option_names}


def fields_of_keys():
    """Every key with its field: `data.root`, or `glow:model.steps` for an option."""
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            options = field.annotation.model_fields
            yield from ((f"{name}.{key}", option) for key, option in options.items())
        else:
            yield name, field
    for base in (Data, Model):
        for kind in component_names(base):
            schema = component_schema(base, kind)
            for key in schema.option_names:
                yield f"{kind}:{base.section}.{key}", schema.model_fields[key]


FIELDS = dict(fields_of_keys())


def merged(*layers):
    """Settings on top of others; a section with another name replaces the one before."""
    values = {}
    for layer in layers:
        for section, options in layer.items():
            named = section in ("data", "model") and "name" in options
            values[section] = {**({} if named else values.get(section, {})), **options}
    return values


def changed(values, key, value):
    section, _, option = key.rpartition(":")[2].partition(".")
    return {**values, section: {**values.get(section, {}), option: value} if option else value}


def settings_of(key):
    scope = key.partition(":")[0] if ":" in key else ""
    model = {"model": {"name": scope, **TINY[scope]}} if scope in TINY else {}
    return merged(BASE, SETTINGS.get(scope, model), SETTINGS.get(key, {}))


def variants(key):
    """Settings that differ in one key: its value, and each choice or another number."""
    values, field = settings_of(key), FIELDS[key]
    section, _, option = key.rpartition(":")[2].partition(".")
    now = parse(values).resolved()[section]
    now = now[option] if option else now
    if get_origin(field.annotation) is Literal:
        others = [each for each in get_args(field.annotation) if (key, each) not in LEFT_OUT]
        return [changed(values, key, each) for each in others]
    if key in VALUES:
        return [values, *(changed(values, key, each) for each in VALUES[key])]
    if now is None or isinstance(now, bool):
        return [values, changed(values, key, not now)]
    assert isinstance(now, int | float), f"{key} needs a value in VALUES"
    for number in (now + 1, 2 * now, now / 2, now + 0.5, now - 1):
        other = changed(values, key, number)
        if number != now and fits(other):
            return [values, other]
    raise AssertionError(f"{key} needs a value in VALUES")


def fits(values):
    try:
        return bool(built(json.dumps(values)))
    except UserError:
        return False


@functools.cache
def built(values):
    """Data and model of a configuration in JSON, before any training."""
    settings = parse(json.loads(values))
    data = DataSet(settings.data)
    flow = build_flow(settings, data.shape, data.num_bins)
    try:
        tests = len(data.split("test"))
    except UserError:  # it has none
        tests = 0
    parameters = {name: tensor.shape for name, tensor in flow.state_dict().items()}
    return data.fingerprint, data.shape, data.num_bins, tests, parameters


def trained(values, folder):
    """Trains, and returns what a user can see of it."""
    run = RunDirectory(folder)
    fit(parse(values), run, CPU)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps = [row for row in rows if row["split"] == "train"]
    validated = [row for row in rows if row["split"] == "validation"]
    files = [path.name for part in (run.checkpoints, run.samples) for path in part.iterdir()]
    return {
        "loss": [row["loss"] for row in steps],
        "lr": [row["lr"] for row in steps],
        "steps": [row["step"] for row in steps],
        "images": [row["images"] for row in steps],
        "validation": [(row["step"], row["loss"]) for row in validated],
        "files": sorted(files),
        "events": len(list(folder.glob("events.out.tfevents.*"))),
        "weights": sorted({name.partition(".")[0] for name in read(run.last).tensors}),
    }


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """Makes the current folder, with a few images in every format."""
    folder = tmp_path_factory.mktemp("keys")
    before = Path.cwd()
    os.chdir(folder)
    random = np.random.default_rng(0)
    for name, shape in {"square": (8, 8, 1), "other": (8, 8, 1), "layout": (3, 8, 3)}.items():
        np.savez(f"{name}.npz", x_train=random.integers(0, 256, (60, *shape), dtype=np.uint8))
    for name in "vw":
        np.save(f"{name}.npy", random.normal(size=(60, 3)).astype(np.float32))
    for name, count in {"pictures": 40, "more_pictures": 50}.items():
        Path(name).mkdir()
        for index in range(count):
            pixels = random.integers(0, 256, (10, 17, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{name}/{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWTRAIN_CACHE", str(folder / "cache"))
        yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def outcome(here):
    """A cached `trained`: many keys are changed in the same settings."""
    numbers = itertools.count()
    cached = functools.cache(
        lambda values: trained(json.loads(values), here / f"run{next(numbers)}")
    )
    return lambda values: cached(json.dumps(values))


@pytest.mark.parametrize("key", [key for key in FIELDS if key not in SPECIAL])
def test_every_key_has_an_effect(key, outcome):
    for one, other in itertools.combinations(variants(key), 2):
        if part := PARTS.get(key):
            assert outcome(one)[part] != outcome(other)[part]
            assert part != "lr" or outcome(one)["loss"] != outcome(other)["loss"]
        elif built(json.dumps(one)) == built(json.dumps(other)):
            assert outcome(one)["loss"] != outcome(other)["loss"]


@pytest.mark.parametrize("layer", [{}, {**NPZ, "dequantization": {"name": "variational"}}])
def test_nothing_changed_nothing_differs(layer, outcome, here):
    values = merged(BASE, layer)
    assert trained(values, here / f"again-{bool(layer)}") == outcome(values)


def test_no_average_is_kept(outcome):
    assert outcome(BASE)["weights"] == ["ema", "model", "optimizer"]
    assert outcome(changed(BASE, "train.ema", 0))["weights"] == ["model", "optimizer"]


def test_train_memory():
    """Fewer activations are kept (`test_bijections.py` compares the gradients)."""
    taken = {}
    x = images(64, (1, 8, 8), 17)
    for mode in ("store", "checkpoint", "reversible"):
        changes = {"train": {"memory": mode}, "model": {"steps": 4, "width": 32}}
        settings = parse(merged(BASE, changes))
        flow = initialized(build_flow(settings, (1, 8, 8), 17), x, seed=1)
        state = State(settings, flow, build_optimizers(flow, settings.train), None, {})
        taken[mode] = max(moments(lambda state=state: train_step(state, x), CPU))
    assert taken["reversible"] < taken["checkpoint"] < taken["store"]

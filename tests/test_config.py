"""The configuration: accepted values, `KEY=VALUE`, and messages."""

import copy
import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torchdiffeq  # noqa: F401  (Its import makes tensors, which must not be on the meta device.)
import yaml
from helpers import REPOSITORY, memory_below
from PIL import Image

from flowtrain.checkpoints.build import build_flow
from flowtrain.cli.configs import find_config, headline, shipped_configs
from flowtrain.config import (
    Data,
    Model,
    component_names,
    differences,
    json_schema,
    load_config,
    load_yaml,
    override,
    parse,
)
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.training.loss import require_possible

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
STEPS = {"train": {"num_steps": 10}}
# Configurations for models of more than a million parameters, as in the papers.
PAPER_SIZED = {"causal_cifar", "best_cifar", "jet_cifar", "maf_mnist", "nice_mnist"}
PAPER_SIZED |= {"glow_cifar", "glow_mnist", "realnvp_cifar", "realnvp_mnist", "tarflow_cifar"}
PAPER_SIZED |= {"tarflow_imagenet64", "causal_cifar_day"}


def parsed(overrides, values=STEPS):
    return parse(override(copy.deepcopy(values), overrides), trust_code=True)


def written(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text, expected",
    [
        ("train.lr=5e-4", 5e-4),  # PyYAML reads it as a string.
        ("data.flip=null", None),
        ("data.validation=5000", 5000.0),
        ("model.levels = 2", 2),
        ("train.compile=off", "off"),  # PyYAML reads it as false.
        ("train.logger=wandb", ["wandb"]),
        ("train.budget=90", 90.0),
        ("train.budget=90s", 90.0),
        ("train.budget=.5h", 1800.0),
        ("train.budget=1.5e2m", 9000.0),
        ("train.budget=2 min", 120.0),
        ("train.budget=2hours", 7200.0),
        ("seed=010", 10),  # PyYAML reads it as octal.
        *((f"data.root={name}", Path(name).absolute()) for name in ("2024", "2024-05-01", "a #1")),
    ],
)
def test_a_setting(text, expected):
    found = parsed([text])
    for part in text.partition("=")[0].strip().split("."):
        found = getattr(found, part)
    assert found == expected and type(found) is type(expected)


def test_a_whole_file(tmp_path):
    text = "seed: 3\ndata: {name: digits}\nmodel:\n  name: nice\n  width: 5\n"
    path = written(tmp_path / "mine.yaml", f"{text}train:\n  num_steps: 7\n  lr: 5e-4\n")
    config = load_config(path, ["train.lr=1e-2", "model.couplings=6"])
    model = config.model
    assert (config.seed, model.width, model.couplings, config.train.lr) == (3, 5, 6, 0.01)
    # The resolved configuration is a configuration itself, and the same one.
    resolved = load_config(written(tmp_path / "resolved.yaml", config.yaml())).resolved()
    assert resolved == config.resolved() == json.loads(json.dumps(config.resolved()))


@pytest.mark.parametrize("order", [1, -1])
def test_another_name_drops_the_options_of_the_old_one(order):
    values = {"model": {"levels": 2, "coupling": "additive"}, "data": {"n_bits": 5}, **STEPS}
    config = parsed(["model.name=nice", "model.width=9"][::order], values)
    assert (config.model.name, config.model.width) == ("nice", 9)
    assert not hasattr(config.model, "levels") and config.data.n_bits == 5
    same = parsed(["model.name=glow"], values).model  # the default, given explicitly
    assert (same.levels, same.coupling) == (2, "additive")
    data = {"name": "folder", "path": "/a", "size": 8, "channels": 1, "validation": 7, "shift": 1}
    data = parsed(["data.name=npz", "data.path=/b.npz"][::order], {"data": data, **STEPS}).data
    assert (data.name, str(data.path), data.validation, data.shift) == ("npz", "/b.npz", 7, 1)
    assert not hasattr(data, "size")


def test_steps_and_budget_clear_each_other():
    for before, texts, *expected in (
        ({"num_steps": 10}, ["train.budget=1min"], None, 60.0),
        ({"budget": "1min"}, ["train.num_steps=10"], 10, None),
        ({"num_steps": 10, "budget": None}, ["train.budget=5"], None, 5.0),
        ({}, ["train.budget=60", "train.num_steps=3"], 3, None),
        ({}, ["train.num_steps=3", "train.budget=60"], None, 60.0),
    ):
        train = parsed(texts, {"train": before}).train
        assert [train.num_steps, train.budget] == expected


@pytest.mark.parametrize(
    "text, message",
    [
        # a misspelt key, and the nearest right one
        ("train.batchsize=3", r"unknown key; did you mean train\.batch_size\? \(value 3\)"),
        ("lr=3", r"lr: unknown key; did you mean train\.lr\?"),
        ("trian.lr=3", r"trian: unknown key; did you mean train\.lr\?"),
        ("model.name=glwo", r"name: unknown name 'glwo'; did you mean glow\?; there are causal, "),
        ("data.name=minst", r"unknown name 'minst'; did you mean mnist\?.* a folder of images is"),
        ("data.path=/a", r"data\.path: unknown key; it belongs to data.name folder or hub or npz"),
        ("model.name=no_such.module", r"model\.name: cannot import 'no_such\.module'"),
        ("model.name=os.path", r"model\.name: module 'os\.path' has no function `build`"),
        # a wrong type or value
        ("train.batch_size=x", r"train\.batch_size: .*integer.*got 'x'"),
        ("data.name=npz data.path=[a]", r"data\.path: Input is not a valid path, got \['a'\]"),
        (r'data.name=npz data.path="a\0"', r"data\.path: no path has a null character, got "),
        (r'data.name=npz data.path="\ud800"', r"data\.path: .* surrogates not allowed, got "),
        ("train.lr=.nan", r"train\.lr: .*finite"),
        ("train.budget=1:30", r"train\.budget: expected a duration .*got '1:30'"),
        ("train.logger=[wandb,wandb]", r"train\.logger: one of them is named twice"),
        ("model.width=x", r"model\.width: .*integer.*; or .*list"),
        # out of range
        ("model.width=[8,-1]", r"model\.width: "),
        ("model.bins=300", "less than or equal to 256"),
        ("model.context=blue", "'none', 'downsample' or 'grey'"),
        ("model.context_factor=3", "2 or 4"),
        ("model.label_dropout=1", "less than 1"),
        ("dequantization.sigma=0", "greater than 0"),
        ("dequantization.sigma=1.5", "less than or equal to 1"),
        ("train.budget=1e400h", "finite"),
        ("train.logger=3", "a valid list"),
        # a boolean is no number
        ("train.batch_size=yes", r"train.batch_size: expected a number, not a boolean, got "),
        ("train.budget=true", r"train.budget: expected a number, not a boolean, got "),
        ("model.width=[8,true]", r"model.width: expected a number, not a boolean, got "),
        # no key, or no section
        ("train.lr", r"--set train\.lr: expected key=value"),
        ("=3", r"--set =3: expected key=value"),
        ("train.lr=[1", r"--set train\.lr=\[1: the value is not YAML"),
        ("train.num_steps.x=3", r"--set train\.num_steps\.x: train\.num_steps has no keys"),
        (f"{'.'.join('a' * 21)}=1", r"a key has at most 20 levels"),
        (f"{'.'.join('a' * 20)}=1", r"unknown key"),
    ],
)
def test_a_mistake_names_the_key_and_the_value(text, message):
    with pytest.raises(UserError, match=message):
        parsed(text.split())


def test_several_mistakes():
    with pytest.raises(UserError) as error:
        parsed(["train.lr=x", "data.n_bits=0", "model.wdith=3"])
    assert all(key in str(error.value) for key in ("train.lr", "data.n_bits", "model.wdith"))
    with pytest.raises(UserError, match=r"995 more keys are wrong$") as error:
        parsed([f"train.key_{i}=1" for i in range(1000)])
    assert str(error.value).count("\n") == 5


def test_every_whole_number_has_an_upper_limit():
    """Beyond any real use, so that no value makes a command hang or take all memory."""

    def unlimited(schema, path=""):
        found = []
        if isinstance(schema, dict):
            bounded = {"maximum", "exclusiveMaximum", "const", "enum"} & schema.keys()
            found += [path] if schema.get("type") == "integer" and not bounded else []
            schema = schema.items()
        elif isinstance(schema, list):
            schema = enumerate(schema)
        else:
            return []
        return found + [each for key, value in schema for each in unlimited(value, f"{path}/{key}")]

    assert unlimited(json_schema()) == []


# ten levels of ten aliases each: 10**10 values
BOMB = "{a0: &a0 [1], " + ", ".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)
)


@pytest.mark.run
@pytest.mark.parametrize(
    "text, message",
    [
        (BOMB + ", train: *a10}", "with its aliases, it is longer than 65536 characters"),
        ("{a: &a [*a]}", "a value contains itself"),
        ("{" + "a: {" * 21 + "}" * 22, "more than 20 levels"),
        ("{a: " + "b" * 2**16 + "}", "longer than 65536 characters"),
        ("{a: !!timestamp 2024-13-45}", "month must be"),
        ("{a: !!bool x}", "a value does not fit its type"),
        ("{a: !!float " + "1:" * 200 + "1.5}", "a value does not fit its type"),
        ("a: 1\nb: {c: 1}\na: 2", r"a is given twice \(line 3, column 1\)$"),
        ("{a: !!python/name:os.system x}", "could not determine a constructor"),
        ("{a: !" + "x" * 60000 + " x}", "could not determine a constructor"),
        *((text, r"as YAML: .*\(line \d, column \d+\)$") for text in ("a: b: c", "\t- a")),
        ("- 1\n- 2\n", "expected keys and values, got list"),
        *((text, "has no keys") for text in ("", "# all as usual", "{}")),
        ("train:\n", "train: expected keys and values, got None"),
        ("1: 2\ntrain: {num_steps: 3}\n", "1: Keys should be strings"),
        ("train: {budget: null}", "neither is given"),
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_a_bad_file_is_refused_in_one_line(text, message, tmp_path):
    refused = pytest.raises(UserError, match=rf"bad\.yaml.*{message}")
    with memory_below(5e7), refused as error:
        load_config(written(tmp_path / "bad.yaml", text))
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(2**40)
    for name, why in (("binary", ".*decode"), ("sparse", "1099511627776"), ("none", "No such")):
        with pytest.raises(UserError, match=rf"{name}\.yaml: cannot be read as YAML: {why}"):
            load_config(tmp_path / f"{name}.yaml")


def test_aliases_may_be_used(tmp_path):
    text = "model: {name: nice, width: &w 16, hidden_layers: *w}\ntrain: {num_steps: *w}"
    assert load_config(written(tmp_path / "good.yaml", text)).train.num_steps == 16


@pytest.mark.parametrize("first", ["", "train.lr=", "train.lr=[", "model=", "model.name=x."])
@pytest.mark.parametrize("last", ["", "=1", "x\x1b[2J=1"])
def test_messages_are_short_and_printable(first, last):
    with pytest.raises(UserError) as error:
        parsed([first + "x" * 10000 + last])
    assert len(str(error.value)) < 800 and str(error.value).isprintable()


def test_differences():
    old, new = parsed([]).resolved(), parsed(["train.lr=0.5", "model.width=3"]).resolved()
    assert differences(old, new) == [("model.width", 512, 3), ("train.lr", 0.005, 0.5)]
    assert differences(old, old) == []
    assert differences({"a": 1}, {"b": {"c": 2}}) == [("a", 1, None), ("b", None, {"c": 2})]


def test_a_dotted_name_is_a_users_own_module(tmp_path, monkeypatch):
    (tmp_path / "my_flows").mkdir()
    own = "def build(shape, *, depth: int, wide: bool = False):\n    return None\n"
    written(tmp_path / "my_flows" / "small.py", own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = parsed(["model.name=my_flows.small", "model.depth=3"])
    assert config.model.options() == {"depth": 3, "wide": False}
    with pytest.raises(UserError, match=r"model\.depth: missing"):
        parsed(["model.name=my_flows.small"])
    with pytest.raises(UserError, match=r"model\.depth: .*got 'x'"):
        parsed(["model.name=my_flows.small", "model.depth=x"])
    written(tmp_path / "my_flows" / "small.py", f"{own}\n# edited\n".replace("depth", "height"))
    importlib.reload(sys.modules["my_flows.small"])  # as notebooks do
    assert parsed(["model.name=my_flows.small", "model.height=3"]).model.options()["height"] == 3


def test_the_schema_has_every_key_with_a_description():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    sections = [kind["properties"] for kind in schema["$defs"].values() if "properties" in kind]
    names = {keys["name"]["const"] for keys in sections if "const" in keys.get("name", {})}
    assert names >= {*component_names(Data), *component_names(Model)}
    for keys in sections:
        undescribed = [k for k, about in keys.items() if about.get("description", "")[-1:] != "."]
        assert set(undescribed) <= {"name"}


@pytest.mark.parametrize("name", ["configuration", "models"])
def test_a_generated_page_is_up_to_date(name):
    page = runpy.run_path(str(REPOSITORY / "docs" / f"{name}.py"))["page"]()
    found = (REPOSITORY / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page == found, f"docs/{name}.md is stale: run `make docs`"


def test_the_shipped_configurations():
    names = {path.stem for path in CONFIGS}
    assert names >= PAPER_SIZED and set(shipped_configs()) >= names
    unmeasured = {path for path in CONFIGS if "not yet measured" in headline(path)}
    assert unmeasured == {path for path in CONFIGS if path.parent.name == "gpu"}
    for path in CONFIGS:  # none depends on the defaults of training
        assert len(headline(path)) > 20 and not headline(path).startswith("data:")
        keys = load_yaml(path)["train"].keys()
        assert keys >= {"optimizer", "lr", "schedule", "warmup_steps", "clip_norm", "batch_size"}
        assert keys & {"num_steps", "budget"}


@pytest.mark.run
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_builds_its_model(path, tmp_path):
    config = load_config(path)
    section = config.data
    if section.name == "folder":
        for name in ("a.png", "b.png"):
            Image.new("RGB", (9, 9)).save(tmp_path / name)
        section = load_config(path, [f"data.path={tmp_path}"]).data
    data = DataSet(section)
    with torch.device("meta"):
        flow = build_flow(config, data.shape, data.num_bins)
    require_possible(flow, config.train, torch.device("cuda"))
    count = sum(p.numel() for p in flow.parameters())
    assert count > 1e6 if path.stem in PAPER_SIZED else count < 5e6
    assert parse(yaml.safe_load(path.read_text())).resolved() == config.resolved()


def test_a_configuration_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("glow_digits.yaml", "glow_digits"):
        assert find_config(name).samefile(REPOSITORY / "configs" / "glow_digits.yaml")
    (tmp_path / "configs").mkdir()
    for own in (tmp_path / "configs" / "glow_digits.yaml", tmp_path / "glow_digits.yaml"):
        own.write_text("")
        assert find_config("glow_digits.yaml").samefile(own)
    message = r"--config glow_digts\.yaml: no such file.*did you mean glow_digits\?"
    with pytest.raises(UserError, match=message):
        find_config("glow_digts.yaml")

"""The configuration: what is accepted, what `--set` does, and what the messages say."""

import json
import runpy
import time
import tracemalloc

import pytest
import torch
import torchdiffeq  # noqa: F401  (Its import makes tensors, which must not be on the meta device.)
import yaml
from helpers import REPOSITORY
from PIL import Image

from flowtrain.checkpoints.build import build_flow
from flowtrain.cli.configs import find_config, headline, shipped_configs
from flowtrain.config import (
    Data,
    Dequantization,
    Model,
    Train,
    component_names,
    component_schema,
    differences,
    json_schema,
    load_config,
    load_yaml,
    override,
    parse,
)
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
STEPS = {"train": {"num_steps": 10}}
PAPER_SIZED = {
    "jet_cifar",
    "tarflow_cifar",
    "tarflow_imagenet64",
    "causal_cifar",
    "best_cifar",
    "glow_cifar",
    "glow_mnist",
    "realnvp_cifar",
    "realnvp_mnist",
    "nice_mnist",
    "maf_mnist",
}
SMALL = {
    "baseline_cifar",
    "glow_cifar_small",
    "glow_mnist_small",
    "glow_digits",
    "realnvp_digits",
    "nice_digits",
}
SMALL |= {"glow_mnist_conditional"}
SMALL |= {
    "realnvp_two_moons",
    "planar_eight_gaussians",
    "maf_checkerboard",
    "cnf_pinwheel",
    "cnf_digits",
}


def parsed(overrides, values=STEPS):
    return parse(override(json.loads(json.dumps(values)), overrides), trust_code=True)


def value(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "text, key, expected",
    [
        ("train.lr=5e-4", "train.lr", 5e-4),  # PyYAML reads it as a string.
        ("train.lr=0.1", "train.lr", 0.1),
        ("train.lr=1", "train.lr", 1.0),
        ("train.batch_size=32", "train.batch_size", 32),
        ("train.ema=0", "train.ema", 0.0),
        ("seed=7", "seed", 7),
        ("data.flip=true", "data.flip", True),
        ("data.flip=null", "data.flip", None),
        ("data.validation=5000", "data.validation", 5000.0),
        ("data.validation=0.2", "data.validation", 0.2),
        ("model.coupling=additive", "model.coupling", "additive"),
        ("model.levels = 2", "model.levels", 2),
        ("train.compile=off", "train.compile", "off"),  # PyYAML reads it as false.
        ("train.budget=90", "train.budget", 90.0),
        ("train.budget=90s", "train.budget", 90.0),
        ("train.budget=30min", "train.budget", 1800.0),
        ("train.budget=1e3", "train.budget", 1000.0),
        ("train.budget=.5h", "train.budget", 1800.0),
        ("train.budget=1.5e2m", "train.budget", 9000.0),
        ("train.budget=2 m", "train.budget", 120.0),
        ("train.budget=1.5h", "train.budget", 5400.0),
        ("train.budget=2hours", "train.budget", 7200.0),
    ],
)
def test_set(text, key, expected):
    found = value(parsed([text]), key)
    assert found == expected and type(found) is type(expected)


def test_a_whole_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "seed: 3\ndata: {name: digits}\nmodel:\n  name: nice\n  width: 5\ntrain:\n  num_steps: "
        "7\n  lr: 5e-4\n"
    )
    config = load_config(path, ["train.lr=1e-2", "model.couplings=6"])
    assert (config.seed, config.model.width, config.model.couplings, config.train.lr) == (
        3,
        5,
        6,
        0.01,
    )
    # The resolved configuration is a configuration itself, and the same one.
    (tmp_path / "resolved.yaml").write_text(config.yaml())
    assert load_config(tmp_path / "resolved.yaml").resolved() == config.resolved()
    assert json.loads(json.dumps(config.resolved())) == yaml.safe_load(config.yaml())


def test_defaults_are_the_models_own():
    config = parse(STEPS)
    assert (config.model.name, config.model.levels, config.model.steps, config.model.width) == (
        "glow",
        3,
        32,
        512,
    )
    assert config.data.root.is_absolute()


# ---------------------------------------------------------------- --set and sections


@pytest.mark.parametrize("order", [1, -1])
def test_another_name_drops_the_options_of_the_old_one(order):
    values = {
        "model": {"name": "glow", "levels": 2, "coupling": "additive"},
        "data": {"n_bits": 5},
        **STEPS,
    }
    config = parsed(["model.name=nice", "model.width=9"][::order], values)
    assert (config.model.name, config.model.width) == ("nice", 9)
    assert not hasattr(config.model, "levels") and config.data.n_bits == 5


@pytest.mark.parametrize("order", [1, -1])
def test_another_data_set_drops_the_options_of_the_old_one(order):
    values = {
        "data": {
            "name": "folder",
            "path": "/a",
            "size": 8,
            "channels": 1,
            "validation": 7,
            "shift": 1,
        },
        **STEPS,
    }
    config = parsed(["data.name=npz", "data.path=/b.npz"][::order], values)
    assert (config.data.name, str(config.data.path), config.data.validation) == ("npz", "/b.npz", 7)
    assert config.data.shift == 1 and not hasattr(config.data, "size")


def test_the_same_name_drops_nothing():
    values = {"model": {"levels": 2, "width": 16}, **STEPS}
    config = parsed(["model.name=glow"], values)  # the default, given explicitly
    assert (config.model.levels, config.model.width) == (2, 16)


@pytest.mark.parametrize(
    "before, text, num_steps, budget",
    [
        ({"num_steps": 10}, "train.budget=1min", None, 60.0),
        ({"budget": "1min"}, "train.num_steps=10", 10, None),
        ({"num_steps": 10}, "train.num_steps=20", 20, None),
        ({"num_steps": 10, "budget": None}, "train.budget=5", None, 5.0),
        ({}, "train.budget=5", None, 5.0),
    ],
)
def test_steps_and_budget_clear_each_other(before, text, num_steps, budget):
    train = parsed([text], {"train": before}).train
    assert (train.num_steps, train.budget) == (num_steps, budget)


def test_the_later_of_two_lengths_counts():
    assert parsed(["train.budget=60", "train.num_steps=3"]).train.num_steps == 3
    assert parsed(["train.num_steps=3", "train.budget=60"]).train.budget == 60


def test_steps_and_budget_in_a_file_are_an_error(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text("train: {num_steps: 10, budget: 1min}\n")
    with pytest.raises(
        UserError, match=r"both\.yaml.*train\.num_steps and train\.budget: both are given"
    ):
        load_config(path)
    path.write_text("train: {budget: null}\n")
    with pytest.raises(UserError, match="neither is given"):
        load_config(path)


def test_data_and_a_model_are_enough():
    """Such a configuration is trained by the recipe that did best. tests/training/test_step.py
    shows that every model can be.
    """
    train = parse({"data": {"name": "cifar10"}, "model": {"name": "glow"}}).train
    assert (train.num_steps, train.budget) == (None, 1800)
    tuned = load_config(find_config("glow_cifar_small.yaml")).train
    for key in ("optimizer", "schedule", "warmup_steps", "clip_norm", "ema", "batch_size"):
        assert getattr(train, key) == getattr(tuned, key), key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_does_not_depend_on_the_defaults_of_training(path):
    keys = load_yaml(path)["train"].keys()
    assert keys >= {"optimizer", "lr", "schedule", "warmup_steps", "clip_norm", "batch_size"}
    assert keys & {"num_steps", "budget"}


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "text, message",
    [
        # a misspelt key, and the nearest right one
        (
            "train.batchsize=3",
            r"train\.batchsize: unknown key; did you mean train\.batch_size\? \(value 3\)",
        ),
        ("train.learning_rate=3", r"train\.learning_rate: unknown key"),
        ("train.warmup=3", r"unknown key; did you mean train\.warmup_steps\?"),
        ("model.level=3", r"did you mean model\.levels\?"),
        ("model.lr=3", r"model\.lr: unknown key; did you mean train\.lr\?"),
        ("lr=3", r"lr: unknown key; did you mean train\.lr\?"),
        ("data.nbits=3", r"did you mean data\.n_bits\?"),
        ("trian.lr=3", r"trian: unknown key; did you mean train\.lr\?"),
        (
            "model.name=glwo",
            r"model\.name: unknown name 'glwo'; did you mean glow\?; "
            r"there are causal, cnf, glow, iaf, ",
        ),
        ("data.name=minst", r"data\.name: unknown name 'minst'; did you mean mnist\?"),
        ("data.path=/a", r"data\.path: unknown key"),  # the digits have none
        ("data.name=npz", r"data\.path: missing"),
        ("model.name=no_such.module", r"model\.name: cannot import 'no_such\.module'"),
        ("model.name=os.path", r"model\.name: module 'os\.path' has no function `build`"),
        # a wrong type or value
        ("train.batch_size=x", r"train\.batch_size: .*integer.*got 'x'"),
        ("train.batch_size=1.5", r"train\.batch_size: .*got 1\.5"),
        ("train.batch_size=0", r"train\.batch_size: .*greater than or equal to 1.*got 0"),
        ("train.lr=0", r"train\.lr: .*greater than 0"),
        ("train.lr=.nan", r"train\.lr: .*finite"),
        ("train.lr=.inf", r"train\.lr: .*finite"),
        ("train.lr=fast", r"train\.lr: .*got 'fast'"),
        ("train.ema=1", r"train\.ema: .*less than 1"),
        ("train.schedule=step", r"train\.schedule: .*'constant', 'linear' or 'cosine', got 'step'"),
        ("train.optimizer=sgd", r"train\.optimizer: .*'adamax' or 'muon', got 'sgd'"),
        (
            "train.budget=soon",
            r"train\.budget: expected a duration such as 90s, 30min or 1\.5h, got 'soon'",
        ),
        ("train.budget=0", r"train\.budget: .*greater than 0"),
        ("train.budget=-5", r"train\.budget: "),
        ("data.n_bits=9", r"data\.n_bits: .*got 9"),
        ("data.validation=-1", r"data\.validation: .*got -1"),
        ("data.flip=perhaps", r"data\.flip: .*got 'perhaps'"),
        ("model.coupling=cubic", r"model\.coupling: .*got 'cubic'"),
        ("model.levels=0", r"model\.levels: .*got 0"),
        ("seed=-1", r"seed: .*got -1"),
        ("dequantization.alpha=0.5", r"dequantization\.alpha: "),
        # no key, or no section
        ("train.lr", r"--set train\.lr: expected key=value"),
        ("=3", r"--set =3: expected key=value"),
        ("train.lr=[1", r"--set train\.lr=\[1: the value is not YAML"),
        ("train.num_steps.x=3", r"--set train\.num_steps\.x: train\.num_steps has no keys"),
        ("seed.x=3", r"seed: .*got \{'x': 3\}"),
        ("train=3", r"train: expected keys and values, got 3"),
        ("model=glow", r"model: expected keys and values, got 'glow'"),
    ],
)
def test_mistakes_name_the_key_and_the_value(text, message):
    with pytest.raises(UserError, match=message):
        parsed([text])


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


@pytest.mark.parametrize("section", ["model", "data"])
def test_a_module_of_ones_own_needs_trust(section):
    values = {**STEPS, section: {"name": "no_such.module"}}
    with pytest.raises(UserError, match=f"{section}.name is 'no_such.module', a module outside"):
        parse(values)
    with pytest.raises(UserError, match="cannot import 'no_such.module'"):
        parse(values, trust_code=True)


def test_every_mistake_is_named():
    with pytest.raises(UserError) as error:
        parsed(["train.lr=x", "data.n_bits=0", "model.wdith=3"])
    assert all(key in str(error.value) for key in ("train.lr", "data.n_bits", "model.wdith"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1", "cannot be read as YAML"),
        ("- 1\n- 2\n", "expected keys and values, got list"),
        ("just words", "expected keys and values, got str"),
        ("train:\n", r"train: expected keys and values, got None"),
        ("!!python/object/apply:os.system ['touch /tmp/it-ran']", "cannot be read as YAML"),
        ("1: 2\ntrain: {num_steps: 3}\n", "1: Keys should be strings"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"bad\.yaml.*{message}"):
        load_config(path)


# ten levels of ten aliases each: 10**10 values
BOMB = "{a0: &a0 [1], " + ", ".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)
)


@pytest.mark.run  # takes long
@pytest.mark.parametrize(
    "text, message",
    [
        (BOMB + "}", "with its aliases, it is longer than 65536 characters"),
        (BOMB + ", train: *a10}", "with its aliases, it is longer than"),
        ("{a: &a [*a]}", "a value contains itself"),
        ("{a: " + "[" * 30000 + "}", "more than 20 levels"),
        ("{" + "a: {" * 21 + "}" * 22, "more than 20 levels"),
        ("{a: " + "b" * 2**16 + "}", "longer than 65536 characters"),
        ("{a: 2024-13-45}", "month must be"),
        ("{a: !!python/name:os.system x}", "could not determine a constructor"),
        ("{a: !" + "x" * 60000 + " x}", "could not determine a constructor"),
    ],
    ids=lambda text: text[:20],
)
@pytest.mark.parametrize("option", [False, True])
def test_yaml_that_is_deep_or_large_is_refused(text, message, option, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("seed: 1" if option else text)
    started = time.process_time()
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as error:
        load_config(path, ["data.name=digits", f"data.root={text}"] if option else [])
    assert tracemalloc.get_traced_memory()[1] < 5e7
    tracemalloc.stop()
    assert time.process_time() - started < 5
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_aliases_may_be_used(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(
        "model: &m {name: glow, width: &w [16, 8]}\ntrain: {num_steps: 3}\n"
        "dequantization: {width: 4}\n"
    )
    assert load_config(path).model.width == [16, 8]
    path.write_text("model: {name: nice, width: &w 16, hidden_layers: *w}\ntrain: {num_steps: *w}")
    assert load_config(path).train.num_steps == 16


def test_a_yaml_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"sparse\.yaml: cannot be read as YAML: 1099511627776"):
        load_config(tmp_path / "sparse.yaml")


@pytest.mark.parametrize(
    "text", ["model: {steps: 1\ntrain: [", "a:\n  - b\n c: d", 'a: "b\n\n\n', "a: b: c", "\t- a"]
)
def test_a_syntax_error_is_one_line_with_its_place(text, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"as YAML: .*\(line \d, column \d+\)$") as error:
        load_config(tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "train.lr=" + "x" * 10000,
        "train.batch_size=[" + "[1, 2], " * 2000 + "]",
        "train.batch_size={a: " + "[1, 2, 3], b: " * 1 + "x}",
        "model=" + "x" * 10000,
        "x" * 10000 + "=1",
        "x" * 10000,
        "train.lr=[" + "x" * 10000,
        "seed=0x" + "f" * 10000,
        "model.name=" + "x" * 10000,
        "model.name=" + "x." * 10000 + "x",
        "seed=" + "9" * 5000,
        "x\x1b[2J=1",
        "train.num_steps." + "y" * 10000 + "=1",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_what_is_shown_of_a_value_is_short(text):
    with pytest.raises(UserError) as error:
        parsed([text])
    assert len(str(error.value)) < 800 and str(error.value).isprintable()


def test_a_key_of_many_levels_is_refused():
    with pytest.raises(UserError, match="a key has at most 20 levels") as error:
        parsed([".".join("a" * 5000) + "=1"])
    assert len(str(error.value)) < 200
    with pytest.raises(UserError, match="unknown key"):
        parsed([".".join("a" * 20) + "=1"])


def test_a_thousand_mistakes_are_six_lines():
    started = time.process_time()
    with pytest.raises(UserError, match=r"995 more keys are wrong$") as error:
        parsed([f"train.key_{i}=1" for i in range(1000)])
    assert str(error.value).count("\n") == 5
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "text",
    [
        "train.batch_size=true",
        "train.batch_size=yes",
        "train.lr=true",
        "train.num_steps=on",
        "seed=false",
        "data.validation=true",
        "data.n_bits=true",
        "train.budget=true",
        "model.width=true",
        "model.width=[8,true]",
        "model.bins=true",
    ],
)
def test_a_boolean_is_no_number(text):
    key, _, _ = text.partition("=")
    with pytest.raises(UserError, match=rf"{key}: expected a number, not a boolean, got "):
        parsed([text])


def test_a_boolean_is_no_number_for_a_choice_of_numbers():
    with pytest.raises(UserError, match=r"data\.channels: "):
        parsed(["data.name=folder", "data.path=/a", "data.size=8", "data.channels=true"])


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml: cannot be read as YAML"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_differences():
    old, new = parsed([]).resolved(), parsed(["train.lr=0.5", "model.width=3"]).resolved()
    assert differences(old, new) == [("model.width", 512, 3), ("train.lr", 0.005, 0.5)]
    assert differences(old, old) == []
    assert differences({"a": 1}, {"b": {"c": 2}}) == [("a", 1, None), ("b", None, {"c": 2})]


# ---------------------------------------------------------------- a user's own module


def test_a_dotted_name_is_a_users_own_module(tmp_path, monkeypatch):
    (tmp_path / "my_flows").mkdir()
    (tmp_path / "my_flows" / "small.py").write_text(
        "from flowtrain.bijections import Flatten\n"
        "def build(shape, *, depth: int, wide: bool = False):\n"
        "    return Flatten(shape)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = parsed(["model.name=my_flows.small", "model.depth=3"])
    assert config.model.options() == {"depth": 3, "wide": False}
    with pytest.raises(UserError, match=r"model\.depth: missing"):
        parsed(["model.name=my_flows.small"])
    with pytest.raises(UserError, match=r"model\.depth: .*got 'x'"):
        parsed(["model.name=my_flows.small", "model.depth=x"])


# ---------------------------------------------------------------- the schema and the shipped files


def resolve(schema, node):
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def section_schema(schema, section, name):
    """The properties of a section, of the data set or model `name` if there are several."""
    node = resolve(schema, schema["properties"][section])
    kinds = [resolve(schema, kind) for kind in node.get("anyOf", [node])]
    if len(kinds) == 1:
        return kinds[0]["properties"]
    return next(kind["properties"] for kind in kinds if kind["properties"]["name"]["const"] == name)


def every_section():
    """Each section of a configuration, with the options of each data set and model."""
    yield from (("dequantization", Dequantization), ("train", Train))
    for base in (Data, Model):
        for name in component_names(base):
            yield f"{base.package}.{name}", component_schema(base, name)


def test_the_schema_knows_every_key():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"].startswith("https://json-schema.org/")
    for path in CONFIGS:
        config = load_config(path).resolved()
        for section in ("data", "model", "train", "dequantization"):
            known = section_schema(schema, section, config[section].get("name"))
            assert set(config[section]) == set(known), (path.name, section)
    assert schema["additionalProperties"] is False
    for base in (Data, Model):
        for name in component_names(base):
            assert "name" in section_schema(schema, base.section, name)
    assert "description" in section_schema(schema, "train", None)["lr"]


@pytest.mark.parametrize("name, kind", list(every_section()))
def test_every_key_is_described_in_full_sentences(name, kind):
    for key, field in kind.model_fields.items():
        text = field.description or ""
        assert text[:1].isupper() or text[0].isdigit(), f"{name}: {key}: {text!r}"
        assert text.endswith("."), f"{name}: {key}: {text!r}"


def test_the_page_of_keys_is_up_to_date():
    page = runpy.run_path(str(REPOSITORY / "docs" / "configuration.py"))["page"]()
    written = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == written, "docs/configuration.md is stale: run `make docs`"


def test_the_shipped_configurations():
    assert {path.stem for path in CONFIGS} >= PAPER_SIZED | SMALL
    assert set(shipped_configs()) >= {path.stem for path in CONFIGS}
    unmeasured = {path.stem for path in CONFIGS if "not yet measured" in headline(path)}
    assert unmeasured == {path.stem for path in CONFIGS if path.parent.name == "gpu"}
    assert len(headline(REPOSITORY / "configs" / "glow_digits.yaml")) > 20


@pytest.mark.run  # takes long
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
        flow = build_flow(config, data.shape, data.levels)
    count = sum(p.numel() for p in flow.parameters())
    assert count > 1e6 if path.stem in PAPER_SIZED else count < 5e6
    assert headline(path) and not headline(path).startswith("data:")
    # No key of the file is unknown.
    assert parse(yaml.safe_load(path.read_text())).resolved() == config.resolved()


def test_a_configuration_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("glow_digits.yaml", "glow_digits"):
        assert find_config(name).samefile(REPOSITORY / "configs" / "glow_digits.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "glow_digits.yaml").write_text("")
    assert find_config("glow_digits.yaml").samefile(tmp_path / "configs" / "glow_digits.yaml")
    (tmp_path / "glow_digits.yaml").write_text("")
    assert find_config("glow_digits.yaml").samefile(tmp_path / "glow_digits.yaml")
    with pytest.raises(
        UserError,
        match=r"--config glow_digts\.yaml: no such file.*did you mean glow_digits\?",
    ):
        find_config("glow_digts.yaml")

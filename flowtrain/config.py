"""The configuration: its schema, YAML files, `--set` overrides, and the JSON schema (`python -m
flowtrain.config`).

`model.name` and `data.name` each name a function that builds the model or the data set. The section
then takes the keys declared here and the function's keyword arguments, its options.
"""

import functools
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from flowtrain.errors import UserError, cut, did_you_mean, short, shown
from flowtrain.system.files import read_regular
from flowtrain.types import Period, Policy, Positive, Steps

# Far more than any configuration needs. Beyond them, a file or a value is refused unread.
LARGEST_YAML = 2**16  # characters, also with all aliases written out
DEEPEST = 20  # levels of keys and lists


def _absolute(path: Path) -> Path:
    """Makes a path absolute, so that a run finds its data again from any folder."""
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:  # ~nobody
        raise ValueError(str(error)) from error


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: object, info: ValidationInfo) -> object:
        """pydantic would take `true` for 1."""
        assert info.field_name is not None
        kinds = _types_in(cls.model_fields[info.field_name].annotation)
        values = value if isinstance(value, list) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(v, bool) for v in values):
            raise PydanticCustomError("boolean", "expected a number, not a boolean")
        return value


def _types_in(annotation: object) -> set[object]:
    """The types that a value may have, and those of the values of a `Literal`."""
    parts = typing.get_args(annotation)
    if not parts:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return set().union(*map(_types_in, parts))


class Component(Section):
    """A section whose `name` is a module, and whose further keys are that module's options."""

    section: ClassVar[str]
    package: ClassVar[str]  # flowtrain.PACKAGE has the modules
    arguments: ClassVar[set[str]]  # those of `build` that are not options
    option_names: ClassVar[list[str]] = []
    name: str

    def options(self) -> dict[str, Any]:
        """The options of the module's `build` with their values."""
        return {key: getattr(self, key) for key in self.option_names}


class Data(Component):
    """The data set, how it is split, and how its images are augmented."""

    section, package = "data", "datasets"
    arguments = {"root", "split", "seed"}
    name: str = Field(
        "digits",
        description="The data set: a module of flowtrain.datasets, or a module of your own by its "
        "dotted name.",
    )
    root: AbsolutePath = Field(
        Path("data"), validate_default=True, description="Folder of downloaded data sets."
    )
    validation: NonNegativeFloat = Field(
        0.1,
        description="How many training images are held out for model selection: a count, or a "
        "fraction below 1.",
    )
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed that chooses which images are held out. It is independent of `seed`."
    )
    n_bits: Annotated[int, Field(ge=1, le=8)] = Field(
        8,
        description="Reduce the colour depth of 8-bit images to this many bits, for example 5 as "
        "in Glow's CelebA-HQ setup.",
    )
    flip: bool | None = Field(
        None,
        description="Flip training images horizontally at random. With null, the data set decides.",
    )
    shift: Annotated[int, Field(ge=0, le=2**16)] = Field(
        0, description="Shift training images at random by up to this many pixels."
    )
    max_in_memory: NonNegativeFloat = Field(
        4.0,
        description="Largest training set in GiB that is held on the device. Threads read a larger "
        "one as it is needed. On a CPU, mapped files are never held.",
    )
    workers: Annotated[int, Field(ge=0, le=1000)] = Field(
        2, description="Number of threads that read a training set not held on the device."
    )

    @property
    def resize_policy(self) -> Policy:
        """How images of another size are brought to that of the data: as in the data set, or
        `crop` where it has no policy.
        """
        policy: Policy = self.options().get("resize", "crop")
        return policy


class Model(Component):
    """The normalizing flow."""

    section, package = "model", "models"
    # Those of `build`, given by keyword or position.
    arguments = {"shape", "data_levels", "classes", "context"}
    name: str = Field(
        "glow",
        description="The model: a module of flowtrain.models, or a module of your own by its "
        "dotted name.",
    )
    classes: Annotated[int, Field(ge=0, le=2**16)] = Field(
        0,
        description="Number of classes. Each has its own prior at the coarsest level, or the "
        "networks of a causal flow see it. 0 trains without labels. The training loss is that of "
        "an image given its class. Validation and evaluation report the image alone.",
    )
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Probability with which an image loses its label in training, for models whose "
        "networks see the class. They then also know images without a class, which "
        "`sample --guidance` needs; 0.1 is usual. Validation and evaluation still report the mean "
        "over the classes.",
    )
    context: Literal["none", "downsample", "grey"] = Field(
        "none",
        description="What all networks see of the image itself, so that the model is of images "
        "given that: nothing, the image at a fraction of its sides (super-resolution), or its "
        "brightness (colorization). All likelihoods are then conditional on it.",
    )
    context_factor: Literal[2, 4] = Field(
        2, description="How many times shorter the sides of a `downsample` context are."
    )


class Dequantization(Section):
    """How integers become real numbers."""

    name: Literal["uniform", "variational", "gaussian"] = Field(
        "uniform",
        description="The noise that is added: uniform, or variational, where a flow that sees the "
        "image draws it. `gaussian` is for pictures: the model is then a density of noisy images, "
        "and has no bits/dim.",
    )
    sigma: Annotated[float, Field(gt=0, le=1)] = Field(
        0.05,
        description="Standard deviation of Gaussian noise (gaussian only), where 0 is black and 1 "
        "is white. TarFlow's 0.05 to 0.15 are for images in [-1, 1], and are 0.025 to 0.075 here.",
    )
    steps: Positive = Field(
        4, description="Number of steps in the flow of the noise (variational only)."
    )
    width: Positive = Field(
        32,
        description="Number of channels in the hidden layers of that flow's networks (variational "
        "only).",
    )
    transform: Literal["center", "logit"] = Field(
        "center",
        description="What follows the noise: `center` subtracts 1/2, `logit` applies the logit.",
    )
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.05, description="How far the logit stays from 0 and 1."
    )


_DURATION = re.compile(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*(s|sec|m|min|h|hours?)?\s*")


def _seconds(value: object) -> object:
    """Converts `30min`, `90s`, `1.5h` or a number of seconds to seconds."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value)
    if not match:
        raise ValueError("expected a duration such as 90s, 30min or 1.5h")
    unit = (match[2] or "s")[0]
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[unit]


Duration = Annotated[PositiveFloat, BeforeValidator(_seconds, json_schema_input_type=float | str)]


def _off(value: object) -> object:
    """YAML reads `off` as false."""
    return "off" if value is False else value


LoggerName = Literal["tensorboard", "wandb"]


def _listed(value: object) -> object:
    """A single word stands for a list of one."""
    return [value] if isinstance(value, str) else value


def _once(names: list[LoggerName]) -> list[LoggerName]:
    if len(set(names)) < len(names):
        raise ValueError("one of them is named twice")
    return names


Loggers = Annotated[
    list[LoggerName],
    BeforeValidator(_listed, json_schema_input_type=LoggerName | list[LoggerName]),
    AfterValidator(_once),
]


class Train(Section):
    """Optimization, and how often things happen. Periods are in steps; a period longer than the run
    is legal. The defaults are those that did best for most models of images (docs/experiments.md).
    """

    num_steps: Period | None = Field(
        None, description="Number of optimizer steps. Give either this or `budget`."
    )
    budget: Duration | None = Field(
        1800.0,
        description="Wall-clock time: seconds, or with a unit, such as 90s, 30min or 1.5h. The "
        "default holds unless `num_steps` is given.",
    )
    batch_size: Positive = Field(
        64, description="Number of images per forward pass, in each process."
    )
    accumulate: Positive = Field(
        1, description="Number of forward passes whose gradients make one optimizer step."
    )
    lr: PositiveFloat = Field(5e-3, description="Peak learning rate.")
    warmup_steps: Steps = Field(
        50, description="Number of steps over which the learning rate rises linearly from 0."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear",
        description="Learning rate after the warm-up: `constant`, or a `linear` or `cosine` decay "
        "to 0 at the end. With a budget, the decay begins at 0 s.",
    )
    optimizer: Literal["adam", "adamw", "adamax", "muon"] = Field(
        "muon",
        description="The optimizer. `muon` uses Muon for the weights of the conditioners that are "
        "matrices, and AdamW for the rest. In a planar flow, that is all.",
    )
    weight_decay: NonNegativeFloat = Field(
        0.0,
        description="Weight decay. It acts only on the weights of the conditioners' convolutions "
        "and linear layers.",
    )
    clip_norm: NonNegativeFloat = Field(
        50.0,
        description="Largest norm of the gradient. 0 does not clip. The default acts on outliers "
        "alone.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of the conditioners. The rest of the flow is float32."
    )
    memory: Literal["store", "checkpoint", "reversible"] = Field(
        "store",
        description="What is kept for the backward pass: `store` keeps all activations, "
        "`checkpoint` keeps the inputs of the layers, and `reversible` keeps only the output, from "
        "which the inverse computes them again.",
    )
    compile: Annotated[Literal["off", "layers", "step"], BeforeValidator(_off)] = Field(
        "off",
        description="What `torch.compile` compiles: nothing, the layers that have a network (those "
        "of one shape share the code), or the whole forward and backward pass of a step. The first "
        "batch is compared with the computation without it.",
    )
    cuda_graph: bool = Field(
        False,
        description="Record the forward and backward pass of the first step as a CUDA graph, and "
        "replay it in the others. It needs a CUDA device. The first batch is compared with the "
        "computation without it.",
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="Decay of the averaged weights. 0 keeps no average."
    )
    max_non_finite: Steps = Field(
        5,
        description="Number of non-finite steps that a run survives. One more stops it with exit "
        "code 1.",
    )
    log_every: Period = Field(50, description="Steps between lines of metrics.")
    validate_every: Period = Field(
        500, description="Steps between evaluations on the validation split."
    )
    checkpoint_every: Period = Field(500, description="Steps between checkpoints.")
    keep_checkpoints: Steps = Field(
        1, description="Number of numbered checkpoints to keep, besides last and best."
    )
    sample_every: Period = Field(500, description="Steps between sample grids.")
    logger: Loggers = Field(
        ["tensorboard"],
        description="Where the charts and pictures go besides `metrics.jsonl`: `tensorboard`, "
        "`wandb`, both, or none (`[]`). A run that goes on may change it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _steps_instead_of_the_default_budget(cls, values: object) -> object:
        if isinstance(values, Mapping) and values.get("num_steps") is not None:
            return {"budget": None, **values}
        return values

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.num_steps is None) == (self.budget is None):
            given = "both are given" if self.num_steps is not None else "neither is given"
            raise ValueError(f"give one of train.num_steps and train.budget: {given}")
        return self


class Config(Section):
    """A whole run. `data` and `model` also hold the options of the modules that they name."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed of the weights, of the order of the images and of the noise."
    )
    data: Data
    model: Model
    dequantization: Dequantization
    train: Train

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain data for YAML and JSON."""
        return self.model_dump(mode="json")

    def yaml(self) -> str:
        return yaml.safe_dump(self.resolved(), sort_keys=False)


class Named(NamedTuple):
    """A data set or a model that a name stands for."""

    build: Callable[..., Any]
    about: str  # paragraphs of documentation: first the name, then shape and files
    details: str


def _named(documented: object, build: Callable[..., Any]) -> Named:
    paragraphs = [inspect.getdoc(documented) or "", inspect.getdoc(build) or ""]
    if documented is build:
        paragraphs[1] = paragraphs[0].partition("\n\n")[2]
    about, details = (" ".join(text.partition("\n\n")[0].split()) for text in paragraphs)
    return Named(build, about, details)


@functools.cache
def _shipped(base: type[Component]) -> dict[str, Named]:
    """The data sets or models of flowtrain: modules with a function `build`, and the functions in
    tables `BUILDS` of modules that hold several.
    """
    spec = importlib.util.find_spec(f"flowtrain.{base.package}")
    assert spec is not None
    found = {}
    for info in pkgutil.iter_modules(spec.submodule_search_locations):
        module = importlib.import_module(f"flowtrain.{base.package}.{info.name}")
        if hasattr(module, "build"):
            found[info.name] = _named(module, module.build)
        for name, build in getattr(module, "BUILDS", {}).items():
            found[name] = _named(build, build)
    return dict(sorted(found.items()))


def component_names(base: type[Component]) -> list[str]:
    """The names of the data sets (`Data`) or models (`Model`) of flowtrain."""
    return list(_shipped(base))


def component(base: type[Component], name: str) -> Named:
    """The data set or model of a name. A dotted name is a module of the user.

    Raises:
        UserError: if there is no such module, or it has no `build`.
    """
    key = f"{base.section}.name"
    parts = name.split(".")
    if 1 < len(parts) <= DEEPEST and all(part.isidentifier() for part in parts):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"{key}: cannot import {shown(name)}: {short(error)}") from error
        if not hasattr(module, "build"):
            raise UserError(f"{key}: module {shown(name)} has no function `build`")
        return _named(module, module.build)
    names = component_names(base)
    if name not in names:
        own = "; a folder of images is data.name=folder data.path=DIR data.size=SIDE"
        raise UserError(
            f"{key}: unknown name {shown(name)}{did_you_mean(name, names)}; there are "
            f"{', '.join(names)}{own if base is Data else ''}"
        )
    return _shipped(base)[name]


def component_name(base: type[Component], values: Mapping[str, Any]) -> str:
    """What the `name` of a section is in a configuration that is not checked yet."""
    section = values.get(base.section)
    default = base.model_fields["name"].default
    return str(section.get("name", default) if isinstance(section, Mapping) else default)


@functools.cache
def component_schema(base: type[Component], name: str) -> type[Component]:
    """The keys of `base` and the options of the named module's `build` as one pydantic model."""
    build = component(base, name).build
    described = _described_arguments(build)
    hints = typing.get_type_hints(build, include_extras=True)
    fields: dict[str, Any] = {}
    for key, parameter in inspect.signature(build).parameters.items():
        if key not in base.arguments:
            kind = hints.get(key, Any)
            default = ... if parameter.default is parameter.empty else parameter.default
            absolute = {Path: AbsolutePath, Path | None: AbsolutePath | None}
            fields[key] = (
                absolute.get(kind, kind),
                Field(default, description=described.get(key)),
            )
    schema: type[Component] = create_model(
        f"{base.__name__}_{name.replace('.', '_')}", __base__=base, **fields
    )
    schema.option_names = list(fields)
    return schema


def _described_arguments(function: Callable[..., object]) -> dict[str, str]:
    """What the section `Args:` of a function's docstring says about each argument."""
    section = (inspect.getdoc(function) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def parse(
    values: Mapping[str, Any], where: str = "configuration", trust_code: bool = False
) -> Config:
    """Checks a nested mapping and fills in the defaults.

    Only with `trust_code` may `model.name` and `data.name` be modules outside flowtrain, which are
    then imported. It is for what the user has written, or has said to be trusted.

    Raises:
        UserError: if a key is unknown or missing, or its value is wrong. The message names `where`,
            the key and the value.
    """
    for section in ("data", "model", "train", "dequantization"):
        if not isinstance(values.get(section, {}), Mapping):
            raise UserError(
                f"{where}: {section}: expected keys and values, got {shown(values[section])}"
            )
    sections: dict[str, type[Section]] = {"dequantization": Dequantization, "train": Train}
    for base in (Data, Model):
        name = component_name(base, values)
        if "." in name and not trust_code:
            raise UserError(
                f"{where}: {base.section}.name is {shown(name)}, a module outside flowtrain; "
                f"loading it runs its code. If you trust it, say --trust-code"
            )
        sections[base.section] = component_schema(base, name)
    # A section that is left out is checked like an empty one.
    fields: Any = {
        k: (kind, Field(default_factory=dict, validate_default=True))
        for k, kind in sections.items()
    }
    schema = create_model("ConfigOfThese", __base__=Config, **fields)
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("\n".join(_described(error, schema, where))) from error


# What other trainers call some keys. The letters of these names do not lead to ours.
ELSEWHERE = {
    "learning_rate": "train.lr",
    "epochs": "train.num_steps",
    "max_epochs": "train.num_steps",
    "max_steps": "train.num_steps",
    "iterations": "train.num_steps",
    "grad_clip": "train.clip_norm",
    "max_grad_norm": "train.clip_norm",
    "image_size": "data.size",
    "hidden_channels": "model.width",
}
LINES = 5  # wrong keys in one message
ALTERNATIVES = 4  # of what is wrong with a key


def _described(error: ValidationError, schema: type[BaseModel], where: str) -> list[str]:
    """One line per key. A key with alternatives, such as a number or a list of numbers, says what
    is wrong by each of them.
    """
    known = set(_keys(schema))
    wrong: dict[str, list[Mapping[str, Any]]] = {}
    for each in error.errors():
        loc = [str(part) for part in each["loc"]]
        # Behind the key, pydantic appends its names of the alternatives.
        key = next(
            (name for n in range(len(loc), 0, -1) if (name := ".".join(loc[:n])) in known),
            ".".join(loc),
        )
        wrong.setdefault(key, []).append(each)
    lines = []
    for key, errors in list(wrong.items())[:LINES]:
        first, *others = [_describe(each, key, schema) for each in errors[:ALTERNATIVES]]
        also = "".join(f"; or {each.removeprefix(f'{cut(key)}: ')}" for each in others)
        lines.append(f"{where}: {first}{also}")
    if len(wrong) > LINES:
        lines.append(f"{where}: {len(wrong) - LINES} more keys are wrong")
    return lines


def _describe(error: Mapping[str, Any], key: str, schema: type[BaseModel]) -> str:
    if error["type"] == "extra_forbidden":
        return f"{cut(key)}: unknown key{_meant(key, schema)} (value {shown(error['input'])})"
    if error["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = cut(error["msg"].removeprefix("Value error, "), 300)
    if error["type"] == "value_error" and "." not in key:
        return message
    return f"{cut(key)}: {message}, got {shown(error['input'])}"


def _meant(key: str, schema: type[BaseModel]) -> str:
    """What an unknown key may stand for: a key that belongs to other names, or a similar one."""
    section, _, option = key.rpartition(".")
    for base in (Data, Model):
        if section == base.section and (names := owners(base, option)):
            return f"; it belongs to {section}.name {' or '.join(names)}"
    if option in ELSEWHERE:
        return f"; did you mean {ELSEWHERE[option]}?"
    return did_you_mean(key, _keys(schema))


def owners(base: type[Component], option: str) -> list[str]:
    """The data sets or models that come with flowtrain and have this option."""
    return [
        name
        for name in component_names(base)
        if option in component_schema(base, name).option_names
    ]


def all_keys() -> list[str]:
    """Every key of a configuration, with the options of all data sets and models of flowtrain."""
    keys = list(_keys(Config))
    for base in (Data, Model):
        options = {
            option
            for name in component_names(base)
            for option in component_schema(base, name).option_names
        }
        keys += [f"{base.section}.{option}" for option in sorted(options)]
    return keys


def keys_like(option: str) -> list[str]:
    """The keys that end in `option`, or that other trainers call so, training first."""
    if option in ELSEWHERE:
        return [ELSEWHERE[option]]
    found = [key for key in all_keys() if key.rpartition(".")[2] == option]
    return sorted(found, key=lambda key: not key.startswith("train."))


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in schema.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


# --- files ----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses values that are too deep or too large before it makes
    them. What an alias stands for counts each time.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.size = 0
        self.sizes: dict[yaml.Node, int] = {}  # of what is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        before, alias = self.size, self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"it has more than {DEEPEST} levels")
        node = super().compose_node(parent, index)
        assert node is not None
        self.depth -= 1
        if not alias:
            self.size += 1 + len(node.value) * isinstance(node, yaml.ScalarNode)
            self.sizes[node] = self.size - before
        elif node in self.sizes:
            self.size += self.sizes[node]
        else:
            raise yaml.YAMLError("a value contains itself")
        if self.size > LARGEST_YAML:
            raise yaml.YAMLError(f"with its aliases, it is longer than {LARGEST_YAML} characters")
        return node


def _yaml(text: str) -> Any:
    """The value of YAML. Raises `ValueError` that says in one line what is wrong."""
    if len(text) > LARGEST_YAML:
        raise ValueError(f"it is longer than {LARGEST_YAML} characters")
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (_Loader is a safe one)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise ValueError(f"{cut(error.problem or error.context or '')}{at}") from error
    except (ValueError, yaml.YAMLError) as error:  # ValueError: a date that does not exist
        raise ValueError(short(error)) from error


def load_yaml(path: Path) -> dict[str, Any]:
    """The keys and values in a YAML file. Raises `UserError`."""
    try:
        values = _yaml(read_regular(path, 4 * LARGEST_YAML).decode())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else short(error)
        raise UserError(f"{path}: cannot be read as YAML: {why}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration in a YAML file, with `--set` overrides. Raises `UserError`."""
    overrides = list(overrides)
    values = override(load_yaml(path), overrides)
    given = cut(" --set ".join(overrides))
    where = f"{path} with --set {given}" if overrides else str(path)
    return parse(values, where, trust_code=True)


def override(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Applies `key.sub=value` strings to a nested mapping, in place, and returns it.

    Another `data.name` or `model.name` drops the options that belonged to the old one. Setting one
    of `train.num_steps` and `train.budget` clears the other. Raises `UserError`.
    """
    assignments = [_assignment(text) for text in overrides]
    # Names come first, so that the order on the command line does not matter.
    for keys, value in sorted(assignments, key=lambda a: a[0][-1:] != ["name"]):
        section = values
        for depth, key in enumerate(keys[:-1]):
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise UserError(
                    f"--set {cut('.'.join(keys))}: {cut('.'.join(keys[: depth + 1]))} has no keys"
                )
        if keys in (["data", "name"], ["model", "name"]):
            base = Data if keys[0] == "data" else Model
            if section.get("name", base.model_fields["name"].default) != value:
                for option in [k for k in section if k not in base.model_fields]:
                    del section[option]
        if keys[0] == "train" and keys[-1] in ("num_steps", "budget") and value is not None:
            section.pop("budget" if keys[-1] == "num_steps" else "num_steps", None)
        section[keys[-1]] = value
    return values


def _assignment(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {cut(text)}: expected key=value, such as train.lr=5e-4")
    keys = key.strip().split(".")
    if len(keys) > DEEPEST:
        raise UserError(f"--set {cut(text)}: a key has at most {DEEPEST} levels")
    try:
        return keys, _yaml(value)
    except ValueError as error:
        raise UserError(f"--set {cut(text)}: the value is not YAML: {error}") from error


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """`(key, old value, new value)` for each key in which two resolved configurations differ."""
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors. It has every shipped data set and model
    with its options.
    """
    fields: dict[str, Any] = {}
    for base in (Data, Model):
        default = base.model_fields["name"].default
        kinds = []
        for name in component_names(base):
            field: Any = (Literal[name], name) if name == default else (Literal[name], ...)
            schema_of_name = component_schema(base, name)
            kinds.append(
                create_model(f"{base.section}_{name}", __base__=schema_of_name, name=field)
            )
        any_of_them = typing.Union[tuple(kinds)]  # type: ignore[valid-type]  # noqa: UP007
        fields[base.section] = (any_of_them, Field(default_factory=dict))
    for section, kind in (("dequantization", Dequantization), ("train", Train)):
        fields[section] = (kind, Field(default_factory=dict))
    model: Any = create_model("flowtrain", __base__=Config, **fields)
    schema: dict[str, Any] = model.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))

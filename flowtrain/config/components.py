"""The data sets and models behind `data.name` and `model.name`, and their options.

A section takes the keys of `schema.py` and the keyword arguments of the named function `build`.
"""

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, create_model

from flowtrain.config.schema import (
    AbsolutePath,
    Component,
    Config,
    Data,
    Dequantization,
    Model,
    Train,
)
from flowtrain.errors import UserError, did_you_mean, raised, short, shown

DEEPEST = 20  # parts of a dotted name


class Named(NamedTuple):
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
    """The data sets or models of flowtrain: functions `build` of modules, and those in `BUILDS`."""
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
    """The data set or model of a name. A dotted name is a module of the user. Raises `UserError` if
    there is no such module, or it has no `build`.
    """
    key = f"{base.section}.name"
    parts = name.split(".")
    if 1 < len(parts) <= DEEPEST and all(part.isidentifier() for part in parts):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(name)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"{key}: cannot import {shown(name)}: {raised(error)}") from error
        if not callable(getattr(module, "build", None)):
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
    """The `name` of a section in an unchecked configuration."""
    section = values.get(base.section)
    default = base.model_fields["name"].default
    return str(section.get("name", default) if isinstance(section, Mapping) else default)


def component_schema(base: type[Component], name: str) -> type[Component]:
    """The keys of `base` and the options of the named module's `build` as one pydantic model."""
    build = component(base, name).build
    try:
        return _schema_of(base, name, build)
    except Exception as error:
        if "." not in name:
            raise
        raise UserError(
            f"{base.section}.name: the signature of `build` of {name}: {type(error).__name__}: "
            f"{short(error)}"
        ) from error


@functools.cache  # by `build`, which a reloaded module of the user replaces
def _schema_of(base: type[Component], name: str, build: Callable[..., Any]) -> type[Component]:
    described = _described_arguments(build)
    hints = typing.get_type_hints(build, include_extras=True)
    absolute = {Path: AbsolutePath, Path | None: AbsolutePath | None}
    fields: dict[str, Any] = {}
    for key, parameter in inspect.signature(build).parameters.items():
        if key not in base.arguments:
            kind = hints.get(key, Any)
            default = ... if parameter.default is parameter.empty else parameter.default
            field = Field(default, description=described.get(key))
            fields[key] = absolute.get(kind, kind), field
    schema: type[Component] = create_model(
        f"{base.__name__}_{name.replace('.', '_')}", __base__=base, **fields
    )
    schema.option_names = list(fields)
    return schema


def _described_arguments(function: Callable[..., object]) -> dict[str, str]:
    """The section `Args:` of a function's docstring, by argument."""
    section = (inspect.getdoc(function) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


# Names of keys in other trainers, whose letters do not lead to ours.
ELSEWHERE = {"learning_rate": "train.lr", "image_size": "data.size"}
ELSEWHERE |= {"hidden_channels": "model.width"}
ELSEWHERE |= dict.fromkeys(("epochs", "max_epochs", "max_steps", "iterations"), "train.num_steps")
ELSEWHERE |= dict.fromkeys(("grad_clip", "max_grad_norm"), "train.clip_norm")


def owners(base: type[Component], option: str) -> list[str]:
    """The data sets or models of flowtrain that have this option."""
    names = component_names(base)
    return [name for name in names if option in component_schema(base, name).option_names]


def all_keys() -> list[str]:
    """Every key of a configuration, with the options of all data sets and models of flowtrain."""
    keys = list(keys_of(Config))
    for base in (Data, Model):
        schemas = [component_schema(base, name) for name in component_names(base)]
        options = {option for schema in schemas for option in schema.option_names}
        keys += [f"{base.section}.{option}" for option in sorted(options)]
    return keys


def keys_like(option: str) -> list[str]:
    """The keys that end in `option`, or have this name in other trainers, training first."""
    if option in ELSEWHERE:
        return [ELSEWHERE[option]]
    found = [key for key in all_keys() if key.rpartition(".")[2] == option]
    return sorted(found, key=lambda key: not key.startswith("train."))


def keys_of(schema: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in schema.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, with every data set and model of flowtrain."""
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

"""Configurations from YAML files and from `KEY=VALUE` on the command line."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, create_model

from flowtrain.config.components import component_name, component_schema
from flowtrain.config.messages import described
from flowtrain.config.schema import Config, Data, Dequantization, Model, Section, Train
from flowtrain.errors import UserError, cut, short, shown
from flowtrain.system.files import read_regular

# Limits far beyond any configuration. A larger file or value is refused unread.
LARGEST_YAML = 2**16  # characters, also with all aliases written out
DEEPEST = 20  # levels of keys and lists

# YAML 1.1 reads 010 as 8, 1:30 as 90, and 2024-05-01 as a date. Here these are texts.
_TEXT = re.compile(r"[-+]?0[0-9_]|[-+]?[0-9_]+:|[0-9]{4}-")


def parse(
    values: Mapping[str, Any], where: str = "configuration", trust_code: bool = False
) -> Config:
    """Checks a nested mapping and fills in the defaults.

    Only with `trust_code` may `model.name` and `data.name` be modules outside flowtrain, which are
    then imported. It is for configurations that the user has written or trusts.

    Raises `UserError` with `where`, the key and the value if a key is unknown or missing, or its
    value is wrong.
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
                f"loading it runs its code. If you trust it, add --trust-code"
            )
        sections[base.section] = component_schema(base, name)
    # A section that is left out is checked like an empty one.
    empty = Field(default_factory=dict, validate_default=True)
    fields: Any = {key: (kind, empty) for key, kind in sections.items()}
    schema = create_model("ConfigOfThese", __base__=Config, **fields)
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("\n".join(described(error, schema, where))) from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses values that are too deep or too large before it makes
    them, and keys that are given twice. Each alias counts with its whole value.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.size = 0
        self.sizes: dict[yaml.Node, int] = {}  # of what is complete

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        text = kind is yaml.ScalarNode and _TEXT.match(value)
        return self.DEFAULT_SCALAR_TAG if text else super().resolve(kind, value, implicit)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:  # PyYAML would take the last value
                problem = f"{key.value} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return node

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
    """The value of YAML. Raises `ValueError` with one line on the mistake."""
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
    except (ArithmeticError, AttributeError, LookupError) as error:  # such as `!!bool x`
        raise ValueError("a value does not fit its type") from error


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
    values = load_yaml(path)
    if not values:
        raise UserError(f"{path}: has no keys")
    values = override(values, overrides)
    given = cut(" --set ".join(overrides))
    where = f"{path} with --set {given}" if overrides else str(path)
    return parse(values, where, trust_code=True)


def override(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Applies `key.sub=value` strings to a nested mapping, in place, and returns it.

    Another `data.name` or `model.name` drops the options of the old one. Setting one of
    `train.num_steps` and `train.budget` clears the other. Raises `UserError`.
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
        read = _yaml(value)
    except ValueError as error:
        raise UserError(f"--set {cut(text)}: the value is not YAML: {error}") from error
    # In a file, " #" begins a comment. Here it may be a part of a path.
    as_written = isinstance(read, str) and read and value.strip().startswith(read)
    return keys, value.strip() if as_written else read


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

"""Messages about wrong configurations, one line for each key."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from flowtrain.config.components import ELSEWHERE, keys_of, owners
from flowtrain.config.schema import Data, Model
from flowtrain.errors import cut, did_you_mean, shown

LINES = 5  # wrong keys in one message
ALTERNATIVES = 4  # messages about one key


def described(error: ValidationError, schema: type[BaseModel], where: str) -> list[str]:
    """One line per key, with the mistakes by each alternative, such as a number or a list."""
    known = set(keys_of(schema))
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
        return f"{key}: missing; add {key}={'PATH' if key.endswith('.path') else 'VALUE'}"
    message = cut(error["msg"].removeprefix("Value error, ").partition(" for <class")[0], 300)
    if error["type"] == "value_error" and "." not in key:
        return message
    return f"{cut(key)}: {message}, got {shown(error['input'])}"


def _meant(key: str, schema: type[BaseModel]) -> str:
    """A likely meaning of an unknown key: one of other names, or a similar one."""
    section, _, option = key.rpartition(".")
    for base in (Data, Model):
        if section == base.section and (names := owners(base, option)):
            return f"; it belongs to {section}.name {' or '.join(names)}"
    if option in ELSEWHERE:
        return f"; did you mean {ELSEWHERE[option]}?"
    return did_you_mean(key, keys_of(schema))

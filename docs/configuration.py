"""Writes docs/configuration.md from the schema of the configuration: `make docs`."""

import inspect
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowtrain.config import (
    Component,
    Config,
    Section,
    component,
    component_names,
    component_schema,
)

PAGE = """\
<!-- Written by `make docs` from the schema; change docs/configuration.py or the descriptions. -->
# Configuration keys

A configuration is a YAML file with the sections below. On a command line, `section.key=value` (or
`--set section.key=value`) overrides one key. Commands on a trained model take keys of `data`.
`flowtrain train --dry-run` checks a configuration, and `RUN/config.yaml` has every key of a run.
`python -m flowtrain.config` prints a JSON schema for editors.

Values and default are in parentheses, options of a data set or a model under its name. There,
`root` stands for `data.root`, which only downloaded data sets use.

{keys}
## Notes

- Another `data.name` or `model.name` on the command line drops the options of the old one. Setting
  one of `train.num_steps` and `train.budget` clears the other.
- A resumed run must keep every key, except `data.root`, `data.path`, `data.max_in_memory`,
  `data.workers`, `train.compile`, `train.cuda_graph` and `train.logger`. `train.batch_size`,
  `train.accumulate` and the number of processes may change if a step has as many images as before.
- `--resume CHECKPOINT` into a new run directory also accepts another `train` section, apart from
  `train.optimizer`.
- `train.budget` counts time over all parts of a run, with validations and checkpoints, but without
  work that a kill threw away.
"""


def page() -> str:
    sections = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    keys = Config.model_fields.keys() - sections.keys()
    parts, homes = [*items("", Config, keys).values(), ""], dict[str, str]()
    for section, kind in sections.items():
        parts += [f"## {section}\n", filled(inspect.getdoc(kind) or "")]
        parts += [*items(f"{section}.", kind, kind.model_fields).values(), ""]
        if issubclass(kind, Component):
            for name in component_names(kind):
                parts += section_of(kind, name, homes)
    return PAGE.format(keys="\n".join(parts))


def section_of(base: type[Component], name: str, homes: dict[str, str]) -> list[str]:
    """The section about one model or data set. `homes` has the section of each item; the others
    link to it.
    """
    named, kind = component(base, name), component_schema(base, name)
    parts = [f"### {base.section}.name: {name}\n", filled(named.about), filled(named.details)]
    own, elsewhere = list[str](), dict[str, list[str]]()
    for key, item in items(f"{base.section}.", kind, kind.option_names).items():
        if (home := homes.setdefault(item, name)) == name:
            own.append(item)
        else:
            elsewhere.setdefault(home, []).append(f"`{key}`")
    parts += [*own, ""] if own else []
    for home, keys in elsewhere.items():
        parts.append(filled(f"{', '.join(keys)}: as for [{home}](#{base.section}name-{home})."))
    return parts


def filled(text: str, indent: str = "") -> str:
    """A paragraph in lines of at most 100 characters."""
    lines = textwrap.wrap(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines) + "\n"


def items(prefix: str, kind: type[Section], keys: Iterable[str]) -> dict[str, str]:
    """An item of a list for each key."""
    schema, found = kind.model_json_schema(), dict[str, str]()
    for key in keys:
        about = schema["properties"][key]
        default = code(about["default"]) if "default" in about else "required"
        text = f"- `{prefix}{key}` ({values(about)}; {default}): {about['description']}"
        found[f"{prefix}{key}"] = filled(text, "  ").rstrip("\n")
    return found


def values(about: Mapping[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "anyOf" in about:
        return " or ".join(values(kind) for kind in about["anyOf"])
    if "enum" in about:
        return ", ".join(map(code, about["enum"]))
    if about["type"] == "array":
        return f"list of {values(about['items']).replace('integer', 'integers')}"
    if about["type"] == "string":
        return "path" if about.get("format") == "path" else "string"
    if about["type"] in ("boolean", "null"):
        return {"boolean": "`true`, `false`", "null": "`null`"}[about["type"]]
    if about.keys() >= {"minimum", "maximum"}:
        return f"{about['type']} {about['minimum']}..{about['maximum']}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {about[bound]}" for bound, sign in signs.items() if bound in about]
    return " ".join([about["type"], ", ".join(bounds)]).strip()


def code(value: object) -> str:
    """A value as YAML has it."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return f"`{words[value]}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")

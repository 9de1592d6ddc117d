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

A configuration is a YAML file with the sections below. A key that is left out has its default.
On a command line, `section.key=value` overrides one key; `--set section.key=value` is the same.
Commands on a trained model take keys of `data`. `flowtrain train --dry-run` checks a configuration
without writing anything. `RUN/config.yaml` is the configuration of a run with every key.

Each data set and each model has keys of its own, its options, which are listed under its name.
There, `root` stands for `data.root`, and (C, H, W) for channels, height and width.

`python -m flowtrain.config > flowtrain.schema.json` writes the same as a JSON schema, for editors.

{keys}
## Notes

- One optimizer step takes `train.accumulate` times `train.batch_size` images. One step with
  `accumulate: 2` is the same as one with twice the batch size.
- `--set` with another `data.name` or `model.name` drops the options that belonged to the old one.
  Setting one of `train.num_steps` and `train.budget` clears the other.
- A resumed run must have every key as before, with three exceptions. Where the data lie and how
  they are read may change: `data.root`, `data.path`, `data.max_in_memory`, `data.workers`. So may
  how a step is computed, and where its charts go: `train.compile`, `train.cuda_graph`,
  `train.logger`. And `train.batch_size`, `train.accumulate` and the number of processes may change
  if a step has as many images as before.
- `--resume CHECKPOINT` into a new run directory also accepts another `train` section, apart from
  `train.optimizer`.
- `train.budget` counts the wall-clock time of training with its validations and checkpoints, over
  all parts of a run. It does not count the work since the last checkpoint that a kill threw away.
"""


def page() -> str:
    sections = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    parts = [table("", Config, Config.model_fields.keys() - sections.keys())]
    for section, kind in sections.items():
        about = filled(inspect.getdoc(kind) or "")
        parts += [f"## {section}\n", about, table(f"{section}.", kind, kind.model_fields)]
        if issubclass(kind, Component):
            for name in component_names(kind):
                parts += section_of(kind, name)
    return PAGE.format(keys="\n".join(parts))


def section_of(base: type[Component], name: str) -> list[str]:
    """The section about one model or data set."""
    named, kind = component(base, name), component_schema(base, name)
    parts = [f"### {base.section}.name: {name}\n", filled(named.about), filled(named.details)]
    if kind.option_names:
        parts.append(table(f"{base.section}.", kind, kind.option_names))
    return parts


def filled(text: str) -> str:
    """A paragraph in lines of at most 100 characters."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False) + "\n"


def table(prefix: str, kind: type[Section], keys: Iterable[str]) -> str:
    """A row for each key."""
    schema = kind.model_json_schema()
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        about = schema["properties"][key]
        default = code(about["default"]) if "default" in about else "required"
        rows.append(f"| `{prefix}{key}` | {values(about)} | {default} | {about['description']} |")
    return "\n".join(rows) + "\n"


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

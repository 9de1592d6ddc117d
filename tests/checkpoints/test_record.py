"""Reading a run directory whose files are damaged."""

import json
import os
from pathlib import Path

import pytest
import yaml
from run_files import ROWS, SUMMARY, a_run

from flowtrain.checkpoints import record
from flowtrain.errors import UserError


def damage(name, text):
    def apply(run):
        (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return apply


def pipe(name):
    def apply(run):
        (run / name).unlink()
        os.mkfifo(run / name)

    return apply


def huge(name):
    """A file that takes no room on the disk."""

    def apply(run):
        with (run / name).open("wb") as file:
            file.truncate(2**40)

    return apply


def without(name, key):
    def apply(run):
        load, dump = (
            (yaml.safe_load, yaml.safe_dump) if name.endswith("yaml") else (json.loads, json.dumps)
        )
        values = load((run / name).read_text())
        del values[key]
        (run / name).write_text(dump(values))

    return apply


BROKEN = {
    "no configuration": (
        lambda run: (run / "config.yaml").unlink(),
        "a/config.yaml: cannot be read",
    ),
    "a configuration without a model": (
        without("config.yaml", "model"),
        "a/config.yaml: model: Field required",
    ),
    "no summary": (
        lambda run: (run / "summary.json").unlink(),
        "a/summary.json: cannot be read: No such file",
    ),
    "half a summary": (
        damage("summary.json", '{"step": 4'),
        "a/summary.json: broken: Invalid JSON",
    ),
    "a summary without a key": (
        without("summary.json", "parameters"),
        "a/summary.json: parameters: Field required",
    ),
    "a summary of another type": (
        damage("summary.json", json.dumps({**SUMMARY, "parameters": "many"})),
        "a/summary.json: parameters: Input should be a valid integer, unable to parse string as "
        "an integer, got 'many'",
    ),
    "NaN": (
        damage("summary.json", json.dumps({**SUMMARY, "seconds": float("nan")})),
        "a/summary.json: seconds:",
    ),
    "a broken line": (
        damage("metrics.jsonl", f"{json.dumps(ROWS[0])}\n{{\n"),
        "a/metrics.jsonl, line 2: broken",
    ),
    "a line of another kind": (damage("metrics.jsonl", "[1]\n"), "a/metrics.jsonl, line 1: broken"),
    "bytes": (damage("metrics.jsonl", b"\xff\xfe\n"), "a/metrics.jsonl: cannot be read"),
    "a broken evaluation": (
        damage("evaluate-test.json", "{}"),
        "a/evaluate-test.json: bound: Field required",
    ),
    **{
        f"{problem.__name__}: {name}": (problem(name), f"a/{name}: cannot be read")
        for problem in (pipe, huge)
        for name in ("config.yaml", "summary.json", "metrics.jsonl", "evaluate-test.json")
    },
}


@pytest.mark.parametrize("apply, fragment", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(apply, fragment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    apply(a_run(Path("a")))
    with pytest.raises(UserError) as caught:
        record.read(Path("a"))
    assert fragment in str(caught.value)

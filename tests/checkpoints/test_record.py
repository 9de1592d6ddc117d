"""Reading a run directory whose files are damaged."""

import json
import os
from pathlib import Path

import pytest
from run_files import ROWS, SUMMARY, a_run

from flowtrain.checkpoints import record
from flowtrain.errors import UserError


def summary(**changes):
    values = {**SUMMARY, **changes}
    return json.dumps({key: value for key, value in values.items() if value != "gone"})


PIPE, HUGE = "a pipe", "a file of 1 TiB, which takes no room on the disk"
BROKEN = [
    ("config.yaml", None, "a/config.yaml: cannot be read"),
    ("config.yaml", "data: {name: digits}", "a/config.yaml: model: Field required"),
    ("summary.json", None, "a/summary.json: cannot be read: No such file"),
    ("summary.json", '{"step": 4', "a/summary.json: broken: Invalid JSON"),
    ("summary.json", summary(parameters="gone"), "a/summary.json: parameters: Field required"),
    ("summary.json", summary(parameters="many"), "as an integer, got 'many'"),
    ("summary.json", summary(seconds=float("nan")), "a/summary.json: seconds:"),
    ("summary.json", summary(seconds=1.7e308), "a/summary.json: broken: seconds is too large"),
    ("metrics.jsonl", f"{json.dumps(ROWS[0])}\n{{\n", "a/metrics.jsonl, line 2: broken"),
    ("metrics.jsonl", f"{json.dumps(ROWS[0] | {'images': 10**400})}\n", "images is too large"),
    ("metrics.jsonl", "[1]\n", "a/metrics.jsonl, line 1: broken"),
    ("metrics.jsonl", "[" * 100_000 + "\n", "a/metrics.jsonl, line 1: broken"),
    ("metrics.jsonl", b"\xff\xfe\n", "a/metrics.jsonl: cannot be read"),
    ("evaluate-test.json", "{}", "a/evaluate-test.json: bound: Field required"),
    *(
        (name, problem, f"a/{name}: cannot be read")
        for problem in (PIPE, HUGE)
        for name in ("config.yaml", "summary.json", "metrics.jsonl", "evaluate-test.json")
    ),
]


@pytest.mark.parametrize("name, content, message", BROKEN, ids=lambda text: ascii(text)[:40])
def test_a_broken_file_is_named(name, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = a_run(Path("a")) / name
    path.unlink()
    if content == PIPE:
        os.mkfifo(path)
    elif content == HUGE:
        with path.open("wb") as file:
            file.truncate(2**40)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        record.read(Path("a"))
    assert message in str(caught.value)

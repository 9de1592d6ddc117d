"""Mutation test: small slips in the package, each of which a test should catch.

`mutants.txt` has the slips, each as two lines like those of a diff. The first is a snippet that
occurs once in the package, so a file that moves keeps its mutants. The tests of the mutated file
are found by its path: `flowtrain/a/b.py` has those in `tests/a/test_b.py`, then the others in
`tests/a`, then those in `FURTHER`. A test without output for `--seconds` counts as a failure.

    python tests/mutants.py --only resuming
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".txt")
COPIED = ("flowtrain", "tests", "configs", "docs", "benchmarks", "notebooks")
MEMORY = 8 * 2**30  # bytes that the tests of one mutant may take
IMPORTED = (
    *("torch", "torchvision", "torch.utils.tensorboard", "safetensors.torch", "sklearn.datasets"),
    *("matplotlib.figure", "pydantic", "typer", "rich", "yaml"),
)

# Further folders and files of tests, by a folder of the package.
LIKELIHOODS = ["bijections", "models", "flow", "latents", "evaluation"]
FURTHER = {
    **dict.fromkeys(("bijections", "nets", "models", "flow", "latents"), LIKELIHOODS),
    **dict.fromkeys(("checkpoints", "data", "datasets", "system"), ["checkpoints", "data"]),
    "pictures": ["evaluation", "latents"],
    "flowtrain": ["evaluation/test_evaluate.py", "training", "cli", "tools", "test_keys.py"],
}


class Mutant(NamedTuple):
    """A slip: what is replaced by what, and where it is in the table."""

    number: int  # from 1
    part: str  # heading in the table
    snippet: str
    replacement: str


def table() -> list[Mutant]:
    mutants: list[Mutant] = []
    part = snippet = ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        mark, text = line[:2], line[2:]
        if mark == "# ":
            part = text
        elif mark == "- ":
            snippet = text
        elif mark == "+ ":
            mutants.append(Mutant(len(mutants) + 1, part, snippet, text))
    return mutants


def sources(root: Path = ROOT) -> dict[Path, str]:
    files = sorted((root / "flowtrain").rglob("*.py"))
    return {file.relative_to(root): file.read_text(encoding="utf-8") for file in files}


def file_of(mutant: Mutant, texts: dict[Path, str]) -> Path:
    """The file with the snippet.

    Raises:
        ValueError: the snippet does not occur exactly once in the package.
    """
    found = [path for path, text in texts.items() for _ in range(text.count(mutant.snippet))]
    if len(found) != 1:
        raise ValueError(f"{mutant.snippet!r} occurs {len(found)} times in the package")
    return found[0]


def tests_of(file: Path) -> list[Path]:
    """Files of tests for a file of the package, the nearest ones first."""
    tests = ROOT / "tests"
    nearest = tests / Path(*file.parts[1:]).with_name(f"test_{file.name}")
    folder = nearest.parent
    while not folder.is_dir():
        folder = folder.parent
    places = [nearest, tests / f"test_{file.parts[1]}.py"]
    if folder != tests:
        places += [folder / f"test_{folder.name}.py", folder]
    for name in reversed(file.parent.parts):
        places += [tests / place for place in FURTHER.get(name, [])]
    files: list[Path] = []
    for place in places:
        files += sorted(place.rglob("test_*.py")) if place.is_dir() else [place]
    return [each.relative_to(ROOT) for each in dict.fromkeys(files) if each.is_file()]


@dataclass
class Run:
    """The tests of one mutant, in a process of their own, in a copy of the repository."""

    mutant: Mutant
    file: Path
    copy: Path

    def start(self) -> None:
        original = (ROOT / self.file).read_text(encoding="utf-8")
        changed = original.replace(self.mutant.snippet, self.mutant.replacement)
        (self.copy / self.file).write_text(changed, encoding="utf-8")
        self.begun = self.alive = self.looked = time.monotonic()
        self.length = 0
        self.pid = start_tests(self.copy, tests_of(self.file))

    def result(self, seconds: float) -> dict[str, object] | None:
        """What has come of it, if it is over: after so many seconds without output, it is."""
        now, log = time.monotonic(), self.copy / "log"
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        paused, self.looked = now - self.looked > 10, now  # this process itself, or the machine
        if paused or log.stat().st_size > self.length:
            self.length, self.alive = log.stat().st_size, now
        hangs = pid == 0 and now - self.alive > seconds
        if pid == 0 and not hangs:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if hangs:
            os.waitpid(self.pid, 0)
        shutil.copy2(ROOT / self.file, self.copy / self.file)
        output = log.read_text(encoding="utf-8", errors="replace")
        outcome = "time-out" if hangs else outcome_of(os.waitstatus_to_exitcode(status), output)
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        last = re.findall(r"^tests/\S+", output, re.MULTILINE)[-1:] if hangs else []
        test = failed[1] if failed else last[0] if last else None
        found = {"file": str(self.file), "outcome": outcome, "test": test}
        return {**self.mutant._asdict(), **found, "seconds": round(now - self.begun, 1)}


def outcome_of(code: int, output: str) -> str:
    if code == 0:
        return "survived"
    if code in (1, 2):  # a test failed, or could not be collected
        return "caught"
    if code < 0:
        return "crash"
    raise SystemExit(f"pytest ended with exit code {code}:\n{output[-3000:]}")


class CommandsLast:
    """Tests that run a command come last."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: bool(item.get_closest_marker("run")))


def start_tests(copy: Path, tests: Iterable[object]) -> int:
    """Runs them up to the first failure, in a fork, which need not import torch again."""
    if pid := os.fork():
        return pid
    code = 3
    try:
        os.setsid()
        log = os.open(copy / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.chdir(copy)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        sys.path.insert(0, str(copy))
        sys.argv[1:] = []
        options = ["-x", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
        code = int(pytest.main([*options, *map(str, tests)], [CommandsLast()]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def copy_repository(copy: Path) -> None:
    for name in COPIED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file() and not file.is_symlink():
            shutil.copy2(file, copy)
    (copy / "log").touch()


def run(mutants: list[Mutant], results: Path, jobs: int, seconds: float) -> None:
    texts = sources()
    runs = [Run(mutant, file_of(mutant, texts), Path()) for mutant in mutants]
    for module in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        free = [Path(folder, str(number)) for number in range(jobs)]
        for copy in free:
            copy_repository(copy)
        running: list[Run] = []
        while runs or running:
            while runs and free:
                running.append(runs.pop(0))
                running[-1].copy = free.pop()
                running[-1].start()
            time.sleep(0.1)
            for each in list(running):
                if (result := each.result(seconds)) is not None:
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(result) + "\n")
                    print("{number:>4} {outcome:8} {seconds:6} s  {test}".format_map(result))
                    running.remove(each)
                    free.append(each.copy)


def read(path: Path) -> dict[tuple[str, str], dict[str, object]]:
    """The newest result of each mutant, by snippet and replacement."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = map(json.loads, lines)
    return {(result["snippet"], result["replacement"]): result for result in results}


def summarize(known: list[dict[str, object]]) -> None:
    for part in dict.fromkeys(result["part"] for result in known):
        of_part = [result for result in known if result["part"] == part]
        counts = collections.Counter(str(result["outcome"]) for result in of_part)
        words = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        print(f"{part}: {len(of_part)}, {words}")
    for result in known:
        if result["outcome"] == "survived":
            print("{number:>4} {file}\n     - {snippet}\n     + {replacement}".format_map(result))
    caught = sum(result["outcome"] != "survived" for result in known)
    print(f"{caught} of {len(known)} mutants are caught")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="number, or a part of the heading, the file or the snippet")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--seconds", type=float, default=180, help="limit of one test")
    parser.add_argument("--again", action="store_true", help="also mutants with a result")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "mutants.jsonl")
    options = parser.parse_args()
    mutants, texts, known = table(), sources(), read(options.results)
    chosen = []
    for mutant in mutants:
        words = f"{mutant.part} {file_of(mutant, texts)} {mutant.snippet}"
        named = [str(mutant.number)] if (options.only or "").isdigit() else words
        if (options.only or "") in named and (options.again or mutant[2:] not in known):
            chosen.append(mutant)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    run(chosen, options.results, options.jobs, options.seconds)
    known = read(options.results)
    summarize([known[mutant[2:]] for mutant in mutants if mutant[2:] in known])


if __name__ == "__main__":
    main()

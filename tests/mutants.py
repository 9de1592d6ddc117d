"""Mutation test: small slips in the package, each of which a test should catch.

`mutants.txt` has the slips, each as two lines like those of a diff. The first is a snippet that
occurs once in the package, so a file that moves keeps its mutants. The tests of the mutated file
are found by its path: `flowtrain/a/b.py` has those in `tests/a/test_b.py`, then the others in
`tests/a`, then those in `NEIGHBOURS`. `--wide` runs survivors again, with the tests of other
folders. A test without output for `--seconds` counts as a failure.

    python tests/mutants.py --results before.jsonl
    python tests/mutants.py --results after.jsonl --compare before.jsonl
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

# Further folders and files of tests, by a folder of the package: always, and with `--wide`.
NEIGHBOURS = {
    "nets": ["bijections/test_bijections.py", "models/test_models.py"],
    "models": ["bijections/test_bijections.py"],
    "data": ["datasets"],
    "flowtrain": ["runs", "evaluation/test_evaluate.py"],
}
LIKELIHOODS = ["bijections", "models", "flow", "latents", "evaluation"]
WIDE = {
    **dict.fromkeys(("bijections", "nets", "models", "flow", "latents"), LIKELIHOODS),
    **dict.fromkeys(("checkpoints", "data", "datasets", "system"), ["checkpoints", "data"]),
    "pictures": ["evaluation", "latents"],
}
INTEGRATION = ["training", "cli", "tools", "test_keys.py"]


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


def tests_of(file: Path, wide: bool = False) -> list[Path]:
    """Files of tests for a file of the package, the nearest ones first."""
    tests = ROOT / "tests"
    nearest = tests / Path(*file.parts[1:]).with_name(f"test_{file.name}")
    folder = nearest.parent
    while not folder.is_dir():
        folder = folder.parent
    places = [nearest, tests / f"test_{file.parts[1]}.py"]
    if folder != tests:
        places += [folder / f"test_{folder.name}.py", folder]
    for name in reversed(file.parent.parts[1:] or file.parent.parts):
        further = NEIGHBOURS.get(name, []) + (WIDE.get(name, []) if wide else [])
        places += [tests / place for place in further]
    places += [tests / place for place in INTEGRATION if wide]
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
    wide: bool

    def start(self, first: set[object]) -> None:
        original = (ROOT / self.file).read_text(encoding="utf-8")
        changed = original.replace(self.mutant.snippet, self.mutant.replacement)
        (self.copy / self.file).write_text(changed, encoding="utf-8")
        self.begun = self.alive = self.looked = time.monotonic()
        self.length = 0
        self.pid = start_tests(self.copy, tests_of(self.file, self.wide), first)

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
        took = round(now - self.begun, 1)
        return {**self.mutant._asdict(), "file": str(self.file), "wide": self.wide} | {
            "outcome": outcome, "test": test, "seconds": took
        }  # fmt: skip


def outcome_of(code: int, output: str) -> str:
    if code == 0:
        return "survived"
    if code in (1, 2):  # a test failed, or could not be collected
        return "caught"
    if code < 0:
        return "crash"
    raise SystemExit(f"pytest ended with exit code {code}:\n{output[-3000:]}")


class Ordered:
    """Tests that have caught another mutant come first, and those that run a command last."""

    def __init__(self, first: set[object]):
        self.first = first

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(
            key=lambda item: (item.nodeid not in self.first, bool(item.get_closest_marker("run")))
        )


def start_tests(copy: Path, tests: Iterable[object], first: set[object]) -> int:
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
        code = int(pytest.main([*options, *map(str, tests)], [Ordered(first)]))
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


def run(mutants: list[Mutant], results: Path, jobs: int, seconds: float, wide: bool) -> None:
    texts = sources()
    runs = [Run(mutant, file_of(mutant, texts), Path(), wide) for mutant in mutants]
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
                running[-1].start({result["test"] for result in read(results).values()})
            time.sleep(0.1)
            for each in list(running):
                if (result := each.result(seconds)) is not None:
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(result) + "\n")
                    print(line_of(result), flush=True)
                    running.remove(each)
                    free.append(each.copy)


def require_passing(tests: set[str]) -> None:
    """Runs the tests that caught mutants without one: a test that fails then proves nothing."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder, "0")
        copy_repository(copy)
        pid = start_tests(copy, sorted(tests), set())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != 0:
            raise SystemExit(f"fails without a mutant:\n{(copy / 'log').read_text()[-3000:]}")


def line_of(result: dict[str, object]) -> str:
    by = result["test"] or result["snippet"]
    return f"{result['number']:>4} {result['outcome']:8} {result['seconds']:6} s  {by}"


def key_of(result: dict[str, object]) -> tuple[object, object]:
    return result["snippet"], result["replacement"]


def read(path: Path) -> dict[tuple[object, object], dict[str, object]]:
    """The newest result of each mutant."""
    found: dict[tuple[object, object], dict[str, object]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        result = json.loads(line)
        found[key_of(result)] = result
    return found


def summarize(known: list[dict[str, object]]) -> None:
    for part in dict.fromkeys(result["part"] for result in known):
        of_part = [result for result in known if result["part"] == part]
        counts = collections.Counter(str(result["outcome"]) for result in of_part)
        words = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        print(f"{part}: {len(of_part)}, {words}")
    for result in known:
        if result["outcome"] == "survived":
            print(f"{result['number']:>4} {result['file']}")
            print(f"     - {result['snippet']}\n     + {result['replacement']}")
    caught = sum(result["outcome"] != "survived" for result in known)
    print(f"{caught} of {len(known)} mutants are caught")


def lost(before: list[dict[str, object]], now: list[dict[str, object]]) -> list[str]:
    """What was caught and no longer is. A snippet that was edited is found by its number."""
    by_key = {key_of(result): result for result in now}
    by_number = {result["number"]: result for result in now}
    found = []
    for result in before:
        if result["outcome"] != "survived":
            new = by_key.get(key_of(result)) or by_number.get(result["number"])
            if new is None or new["outcome"] == "survived":
                found.append(f"{result['number']}: {result['snippet']} (by {result['test']})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="number, or a part of the heading, the file or the snippet")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--seconds", type=float, default=180, help="limit of one test")
    parser.add_argument("--again", action="store_true", help="also mutants with a result")
    parser.add_argument("--wide", action="store_true", help="survivors, with more tests")
    parser.add_argument("--verify", action="store_true", help="run what caught them without one")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "mutants.jsonl")
    parser.add_argument("--compare", type=Path, help="earlier results; fails if one is lost")
    options = parser.parse_args()
    mutants, texts, known = table(), sources(), read(options.results)
    chosen = []
    for mutant in mutants:
        old = known.get((mutant.snippet, mutant.replacement))
        survived = old is not None and old["outcome"] == "survived"
        words = f"{mutant.part} {file_of(mutant, texts)} {mutant.snippet}"
        named = [str(mutant.number)] if (options.only or "").isdigit() else words
        if options.only and options.only not in named:
            continue
        if old is None or options.again or options.wide and survived and not old["wide"]:
            chosen.append(mutant)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    run(chosen, options.results, options.jobs, options.seconds, options.wide)
    known = read(options.results)
    now = [known[key] for mutant in mutants if (key := tuple(mutant[2:])) in known]
    summarize(now)
    if options.verify:
        require_passing({str(result["test"]) for result in now if result["test"]})
    if options.compare and (gone := lost(list(read(options.compare).values()), now)):
        raise SystemExit("no longer caught:\n" + "\n".join(gone))


if __name__ == "__main__":
    main()

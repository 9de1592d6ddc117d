"""Mutation test: small slips in the package, each of which a test should catch.

`mutants.txt` has the slips, each as two lines like those of a diff. The first is a snippet that
occurs once in the package, so a file that moves keeps its mutants. The tests of the mutated file
are found by its path: `flowtrain/a/b.py` has those in `tests/a/test_b.py`, then the others in
`tests/a`, then those in `FURTHER`. A test that takes more than `--seconds` counts as a failure.

    python tests/mutants.py --only resuming
"""

import argparse
import contextlib
import itertools
import os
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".txt")
COPIED = ("flowtrain", "tests", "configs", "docs", "benchmarks", "notebooks")
MEMORY = 8 * 2**30  # bytes that the tests of one mutant may take

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
    part, mutants = "", list[Mutant]()
    for line, following in itertools.pairwise(TABLE.read_text(encoding="utf-8").splitlines()):
        if line.startswith("# "):
            part = line[2:]
        elif line.startswith("- "):
            mutants.append(Mutant(len(mutants) + 1, part, line[2:], following[2:]))
    return mutants


def sources() -> dict[Path, str]:
    files = sorted((ROOT / "flowtrain").rglob("*.py"))
    return {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in files}


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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """This file is a plugin of the runs below: tests that run a command come last."""
    items.sort(key=lambda item: bool(item.get_closest_marker("run")))


def failed_test(mutant: Mutant, copy: Path, seconds: float) -> str | None:
    """The first test that fails in a copy of the repository with the slip. None if none does."""
    texts = sources()
    file = file_of(mutant, texts)
    changed = texts[file].replace(mutant.snippet, mutant.replacement)
    (copy / file).write_text(changed, encoding="utf-8")
    words = ["-x", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-p", "mutants"]
    words += ["-o", f"faulthandler_timeout={seconds}", "-o", "faulthandler_exit_on_timeout=true"]
    command = [sys.executable, "-m", "pytest", *words, *map(str, tests_of(file))]
    paths = os.pathsep.join([str(copy), str(copy / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with (copy / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=copy, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        code = process.wait()
    with contextlib.suppress(ProcessLookupError):  # commands of a test that hangs
        os.killpg(process.pid, signal.SIGKILL)
    (copy / file).write_text(texts[file], encoding="utf-8")
    output = (copy / "log").read_text(encoding="utf-8", errors="replace")
    if code > 2:  # 1 is a test that failed, 2 one that could not be collected
        raise SystemExit(f"pytest ended with exit code {code}:\n{output[-3000:]}")
    named = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    named += reversed(re.findall(r"^tests/\S+", output, re.MULTILINE))  # of one without a report
    return named[0] if code else None


def copy_repository(copy: Path) -> None:
    for name in COPIED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file() and not file.is_symlink():
            shutil.copy2(file, copy)


def run(mutants: list[Mutant], jobs: int, seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # the tests inherit it
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    survived = []

    def tried(mutant: Mutant) -> str | None:
        copy = free.get()
        try:
            return failed_test(mutant, copy, seconds)
        finally:
            free.put(copy)

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        for number in range(jobs):
            copy_repository(Path(folder, str(number)))
            free.put(Path(folder, str(number)))
        for mutant, test in zip(mutants, pool.map(tried, mutants), strict=True):
            print(f"{mutant.number:>4} {f'caught by {test}' if test else 'survived'}", flush=True)
            survived += [] if test else [mutant]
    for mutant in survived:
        print(f"{mutant.number:>4} {mutant.part}\n- {mutant.snippet}\n+ {mutant.replacement}")
    print(f"{len(mutants) - len(survived)} of {len(mutants)} mutants are caught")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the heading, file or snippet")
    parser.add_argument("--first", type=int, default=1, help="number of the first one to try")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--seconds", type=float, default=180, help="limit of one test")
    options = parser.parse_args()
    texts = sources()
    chosen = [
        mutant
        for mutant in table()[options.first - 1 :]
        if options.only in f"{mutant.part} {file_of(mutant, texts)} {mutant.snippet}"
    ]
    run(chosen, options.jobs, options.seconds)


if __name__ == "__main__":
    main()

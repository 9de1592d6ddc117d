"""The packages import in one direction."""

import ast
import functools
import graphlib
import shutil
from pathlib import Path

import pytest
from catalogue import TINY_RUN
from cli_helpers import flowtrain

PACKAGE = Path(__file__).resolve().parents[1] / "flowtrain"

# Lowest first. Packages of one row never import each other.
ROWS = [
    ["errors", "results", "types"],
    ["system"],
    ["bijections"],
    ["nets"],
    ["flow", "models"],
    ["foreign"],
    ["config", "datasets"],
    ["data"],
    ["checkpoints"],
    ["pictures"],
    ["evaluation"],
    ["latents", "training"],
    ["cli"],
    ["tools"],
    ["__main__"],
]
# The tools that use another one. Each arrow is a reason to put code into the core instead.
TOOLS = {("explore", "ood"), ("hub", "report"), ("report", "doctor")}
HEIGHT = {name: height for height, row in enumerate(ROWS) for name in row}


@functools.cache
def parsed() -> dict[str, ast.Module]:
    """The files of the package by their dotted names."""
    files = sorted(PACKAGE.rglob("*.py"))
    names = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    return {name: ast.parse(file.read_text()) for name, file in zip(names, files, strict=True)}


@functools.cache
def imports() -> list[tuple[str, str, str]]:
    """`(module, package or module, name)` of each import of flowtrain in flowtrain."""
    found = []
    for own, tree in parsed().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flowtrain"):
                found += [(own, str(node.module), each.name) for each in node.names]
            elif isinstance(node, ast.Import):
                names = [each.name for each in node.names if each.name.startswith("flowtrain.")]
                found += [(own, *name.rpartition(".")[::2]) for name in names]
    return found


def part_of(module: str) -> str:
    """The package, the tool, or the module beside the packages, of a dotted name."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[0] == "tools" else 1])


def test_every_package_has_a_row():
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    there |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert there == HEIGHT.keys(), "ROWS above, and the table in ARCHITECTURE.md"


def test_imports_go_down():
    wrong, of_tools = [], set()
    for module, package, name in imports():
        own, other = part_of(module), part_of(f"{package}.{name}")
        if own.startswith("tools.") and other.startswith("tools.") and own != other:
            of_tools.add((own.partition(".")[2], other.partition(".")[2]))
        elif HEIGHT.get(own.partition(".")[0], 99) <= HEIGHT.get(other.partition(".")[0], -1):
            wrong += [f"{module} imports {other}"] if own != other else []
    assert wrong == [], "a package imports only from rows above its own (ARCHITECTURE.md)"
    assert of_tools == TOOLS, "tools that use another tool: TOOLS above, and ARCHITECTURE.md"


def test_no_two_files_import_each_other():
    """Neither for types alone."""
    graph = {name: set() for name in parsed()}
    for module, package, name in imports():
        both = f"{package}.{name}"
        graph[module].add(both if both in graph else package)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_a_package_does_not_import_the_private_names_of_another_module():
    private = [each for each in imports() if each[2][0] == "_" and each[2][:2] != "__"]
    assert private == []


@pytest.mark.run
def test_the_core_works_without_the_tools(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "flowtrain", ignore=shutil.ignore_patterns("tools", "zoo"))
    shutil.copytree(PACKAGE.parent / "configs", tmp_path / "configs")
    for words in (["train", *TINY_RUN, "--run-dir", "run"], ["evaluate", "run"], ["sample", "run"]):
        flowtrain(*words, cwd=tmp_path).ok()
    assert (tmp_path / "run" / "sample.png").exists()
    out = flowtrain("--help", cwd=tmp_path).ok().out
    assert "interpolate" in out and "doctor" not in out

"""The packages import in one direction, and the command line starts without torch."""

import ast
import functools
import graphlib
import shutil
import subprocess
import sys
from pathlib import Path

from catalogue import TINY_RUN

PACKAGE = Path(__file__).resolve().parents[1] / "flowtrain"

# Lowest first. Packages of one row never import each other.
ROWS = [
    ["errors", "results", "types"],
    ["system"],
    ["bijections"],
    ["nets"],
    ["flow", "models"],
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


def part_of(module: str) -> str:
    """The package, the tool, or the module beside the packages, that a dotted name belongs to."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[:1] == ["tools"] else ".".join(parts[:1])


@functools.cache
def parsed() -> list[tuple[Path, ast.Module]]:
    return [(file, ast.parse(file.read_text())) for file in sorted(PACKAGE.rglob("*.py"))]


def arrows() -> list[tuple[str, str, str]]:
    """`(file, from, to)` for every import of flowtrain in flowtrain, wherever it stands in a
    file.
    """
    found = []
    for file, tree in parsed():
        relative = file.relative_to(PACKAGE)
        own = relative.with_suffix("").parts[0]
        if own == "tools" and len(relative.parts) > 2:
            own = f"tools.{relative.parts[1]}"
        for node in ast.walk(tree):
            names = []
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith("flowtrain")
            ):
                names = (
                    [node.module]
                    if "." in node.module
                    else [f"flowtrain.{a.name}" for a in node.names]
                )
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names if a.name.startswith("flowtrain.")]
            found += [(str(relative), own, part_of(name)) for name in names]
    return found


def test_every_package_has_a_height():
    there = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert there - {"__init__"} == HEIGHT.keys()


def test_imports_go_down():
    def height(part: str) -> int | None:
        return HEIGHT.get(part.partition(".")[0])

    found = {(own, other): file for file, own, other in arrows() if own != other}
    of_tools = {pair for pair in found if all(part.startswith("tools.") for part in pair)}
    assert {(a.partition(".")[2], b.partition(".")[2]) for a, b in of_tools} == TOOLS
    wrong = [
        f"{file}: {own} imports {other}"
        for (own, other), file in found.items()
        if (own, other) not in of_tools
        if (high := height(own)) is not None and (low := height(other)) is not None
        if low >= high
    ]
    assert wrong == []


def test_no_two_files_import_each_other():
    """Neither for types alone."""
    names = {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts): t for f, t in parsed()}
    imports = {}
    for own, tree in names.items():
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        found = {(node.module, f"{node.module}.{a.name}") for node in nodes for a in node.names}
        imports[own] = {name if name in names else module for module, name in found}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the files


def test_a_package_does_not_import_the_private_names_of_another_module():
    wrong = []
    for file, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flowtrain"):
                wrong += [
                    f"{file}: {a.name}"
                    for a in node.names
                    if a.name[0] == "_" and a.name[:2] != "__"
                ]
    assert wrong == []


def test_the_command_line_starts_without_torch():
    """One process imports one module after the other, and says which one brings torch."""
    modules = [f"flowtrain.cli.{path.stem}" for path in (PACKAGE / "cli").glob("[!_]*.py")]
    modules += [
        f"flowtrain.tools.{p.parent.name}.command" for p in PACKAGE.glob("tools/*/command.py")
    ]
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{{name}} imports torch")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert len(modules) > 15 and done.returncode == 0


def test_the_core_works_without_the_tools(tmp_path):
    """It starts, trains, evaluates and samples with `tools/` deleted."""
    shutil.copytree(PACKAGE, tmp_path / "flowtrain", ignore=shutil.ignore_patterns("tools", "zoo"))
    shutil.copytree(PACKAGE.parent / "configs", tmp_path / "configs")
    for words in (["train", *TINY_RUN, "--run-dir", "run"], ["evaluate", "run"], ["sample", "run"]):
        command = [sys.executable, "-m", "flowtrain", *words]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "run" / "sample.png").exists()
    help_of_all = subprocess.run([*command[:3], "--help"], cwd=tmp_path, capture_output=True)
    assert b"interpolate" in help_of_all.stdout and b"doctor" not in help_of_all.stdout

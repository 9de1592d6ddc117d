"""The packages import in one direction, and the command line starts without torch."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

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
    ["latents"],
    ["training", "runs", "compression", "explore"],
    ["cli"],
    ["__main__"],
]
HEIGHT = {name: height for height, row in enumerate(ROWS) for name in row}


def part_of(module: str) -> str:
    """The package, or the module beside the packages, that a dotted name belongs to."""
    return module.split(".")[1] if "." in module else ""


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
    wrong = [
        f"{file}: {own} imports {other}"
        for file, own, other in arrows()
        if own in HEIGHT and other in HEIGHT and own != other
        if HEIGHT[other] >= HEIGHT[own]
    ]
    assert wrong == []


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
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{{name}} imports torch")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert len(modules) > 15 and done.returncode == 0

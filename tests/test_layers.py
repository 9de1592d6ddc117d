"""The packages import in one direction, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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


def arrows() -> list[tuple[str, str, str]]:
    """`(file, from, to)` for every import of flowtrain in flowtrain, wherever it stands in a
    file.
    """
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        relative = file.relative_to(PACKAGE)
        own = relative.with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
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
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flowtrain"):
                wrong += [
                    f"{file}: {a.name}"
                    for a in node.names
                    if a.name[0] == "_" and a.name[:2] != "__"
                ]
    assert wrong == []


@pytest.mark.parametrize(
    "module", [f"flowtrain.cli.{p.stem}" for p in (PACKAGE / "cli").glob("[!_]*.py")]
)
def test_the_command_line_starts_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

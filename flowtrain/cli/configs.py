"""Finds configuration files by name.

It imports nothing heavy, because the command line's help and completion use it.
"""

import os
import shlex
from pathlib import Path

from flowtrain.errors import UserError, did_you_mean

DEMO = "glow_digits"


def config_folders() -> list[Path]:
    """Where a bare name is looked up: in `configs/` here, in the installed package, and beside the
    package in a checkout. Each has a folder `gpu` for configurations that were not measured.
    """
    package = Path(__file__).resolve().parents[1]
    folders = (Path("configs"), package / "configs", package.parent / "configs")
    return [each for folder in folders for each in (folder, folder / "gpu")]


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with flowtrain, by file name without `.yaml`."""
    return {
        path.stem: path for folder in config_folders()[2:] for path in sorted(folder.glob("*.yaml"))
    }


def headline(path: Path) -> str:
    """The first comment line of a configuration: what it is."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def find_config(name: str) -> Path:
    """Looks for `name` as given, then in `configs/`, then among the shipped ones. The end `.yaml`
    may be left out.

    Raises `UserError` if there is none.
    """
    for folder in [Path(), *config_folders()]:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    shipped = shipped_configs()
    if Path(name).is_dir():
        raise UserError(
            f"--config {name}: is a folder; for images, flowtrain train {shlex.quote(name)}"
        )
    if os.path.lexists(name):
        raise UserError(f"--config {name}: not a regular file")
    raise UserError(
        f"--config {name}: no such file, here, in configs/ or among the shipped ones"
        f"{did_you_mean(name.removesuffix('.yaml'), shipped)} (shipped: {', '.join(shipped)})"
    )

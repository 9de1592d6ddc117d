"""Optional packages: where one is imported, and the error and the command where it is missing."""

import importlib
import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from flowtrain.errors import UserError


def install_command(package: str) -> str:
    """The command that installs a package for the Python that runs this process. An extra of
    flowtrain would need flowtrain on an index.
    """
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is None:  # uv makes environments without it
        return f"uv pip install --python {python} {package}"
    pip = shutil.which("pip")
    if pip is not None and Path(pip).parent == Path(sys.executable).parent:
        return f"pip install {package}"
    return f"{python} -m pip install {package}"


def required(what: str, name: str, oldest: tuple[int, ...], extra: str) -> Any:
    """The package `name` of an extra, for `what`, a key or a command. Raises `UserError` if it is
    missing, is a mere folder of this name, or is older than the version `oldest`.
    """
    try:
        package = importlib.import_module(name)
        version: str = package.__version__
    except (ImportError, AttributeError):
        raise missing(what, name, extra=extra) from None
    if tuple(map(int, re.findall(r"\d+", version)[: len(oldest)])) < oldest:
        raise UserError(
            f"{what} needs version {'.'.join(map(str, oldest))} of the package {name}, and "
            f"{version} is installed: {install_command(f'--upgrade {name}')}"
        )
    return package


def missing(what: str, *packages: str, extra: str) -> UserError:
    """The error to raise if `what`, a key or a command, needs packages of an extra that are not
    there.
    """
    named = f"package{'s' * (len(packages) > 1)} {' and '.join(packages)}"
    command = install_command(" ".join(packages))
    return UserError(f"{what} needs the {named} (the extra {extra}): {command}")

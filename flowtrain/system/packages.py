"""Optional packages: the command that installs one, and the error where one is missing."""

import importlib.util
import shlex
import shutil
import sys
from pathlib import Path

from flowtrain.errors import UserError


def install_command(package: str) -> str:
    """The command that installs a package for the Python that runs this process.

    It names the package itself. An extra of flowtrain would need flowtrain on an index, or the
    folder that it was installed from.
    """
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is None:  # uv makes environments without it
        return f"uv pip install --python {python} {package}"
    pip = shutil.which("pip")
    if pip is not None and Path(pip).parent == Path(sys.executable).parent:
        return f"pip install {package}"
    return f"{python} -m pip install {package}"


def missing(what: str, *packages: str) -> UserError:
    """The error to raise where `what`, a key or a command, needs packages that are not there."""
    named = f"package{'s' * (len(packages) > 1)} {' and '.join(packages)}"
    return UserError(f"{what} needs the {named}: {install_command(' '.join(packages))}")

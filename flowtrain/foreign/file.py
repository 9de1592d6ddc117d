"""Flows in files of the user: `FILE.py:NAME` on a command line."""

import contextlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowtrain.errors import UserError, did_you_mean, raised
from flowtrain.flow.flow import Flow
from flowtrain.foreign.contract import Foreign
from flowtrain.foreign.model import ForeignModel

log = logging.getLogger("flowtrain")

_NAMED = re.compile(r"(?P<file>.+\.py)(:(?P<name>\w*))?")


def is_foreign(model: str) -> bool:
    """Whether a `MODEL` is `FILE.py:NAME`, or the file without a name.

    A path that exists is none, because an archive may name a model by its path, but no code to run.
    A folder, such as a run, is none either.
    """
    match = _NAMED.fullmatch(model)
    exists = os.path.lexists if match is not None and match["name"] else os.path.isdir
    return match is not None and not exists(model)


def flow_named(model: str) -> Flow:
    """The flow that `FILE.py:NAME` names, by running the file. NAME is a `Foreign`, a `Flow`, or a
    function without arguments that returns one. Raises `UserError`.
    """
    match = _NAMED.fullmatch(model)
    assert match is not None
    path, name = Path(match["file"]), match["name"]
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not name:
        raise UserError(f"{model}: give the name of a flow in it: {path}:NAME")
    log.info(f"running the code of {path}, because {model} names it")
    with _own_code(path, str(path)):
        values = _run(path)
    if name not in values:
        own = [each for each in values if not each.startswith("_")]
        raise UserError(f"{model}: {path} has no {name}{did_you_mean(name, own)}")
    with _own_code(path, model):
        found = values[name]
        if callable(found) and not hasattr(found, "forward"):
            found = found()
        if isinstance(found, Flow):
            return found
        if not isinstance(found, Foreign):
            raise UserError(
                f"is a {type(found).__name__}; expected flowtrain.Foreign(flow, shape=..., "
                f"num_bins=...) or a function that returns one"
            )
        return ForeignModel(found)


@contextlib.contextmanager
def _own_code(path: Path, where: str) -> Iterator[None]:
    """Modules beside a file can be imported, as for a script. Any error of its code is a
    `UserError` that begins with `where`.
    """
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {raised(error)}") from error
    finally:
        with contextlib.suppress(ValueError):  # the code may have removed it
            sys.path.remove(folder)


def _run(path: Path) -> dict[str, Any]:
    """The names in a file."""
    # The path is not resolved, because a link may lead to a file without the suffix of Python.
    spec = importlib.util.spec_from_file_location(f"flowtrain_foreign_{path.stem}", path.absolute())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for classes whose modules are looked up
    spec.loader.exec_module(module)
    return vars(module)

"""Flows in files of the user: `FILE.py:NAME` on a command line."""

import importlib.util
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from flowtrain.errors import UserError, did_you_mean, short
from flowtrain.flow.flow import Flow
from flowtrain.foreign.contract import Foreign
from flowtrain.foreign.model import ForeignModel

log = logging.getLogger("flowtrain")

_NAMED = re.compile(r"(?P<file>.+\.py)(:(?P<name>\w*))?")


def is_foreign(model: str) -> bool:
    """Whether a `MODEL` is `FILE.py:NAME`, or the file without a name.

    A path that exists is none, because an archive may name a model by its path, but no code to run.
    """
    match = _NAMED.fullmatch(model)
    return match is not None and not (match["name"] and os.path.lexists(model))


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
    values = _run(path)
    if name not in values:
        own = [each for each in values if not each.startswith("_")]
        raise UserError(f"{model}: {path} has no {name}{did_you_mean(name, own)}")
    found = values[name]
    if callable(found) and not hasattr(found, "forward"):
        try:
            found = found()
        except UserError as error:
            raise UserError(f"{model}: {error}") from error
        except Exception as error:
            raise UserError(f"{model}: {_words(error, path)}") from error
    if isinstance(found, Flow):
        return found
    if not isinstance(found, Foreign):
        raise UserError(
            f"{model}: is a {type(found).__name__}; expected flowtrain.Foreign(flow, shape=..., "
            f"num_bins=...) or a function that returns one"
        )
    try:
        return ForeignModel(found)
    except UserError as error:
        raise UserError(f"{model}: {error}") from error


def _run(path: Path) -> dict[str, Any]:
    """The names in a file. Modules beside it can be imported, as for a script."""
    spec = importlib.util.spec_from_file_location(f"flowtrain_foreign_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for classes whose modules are looked up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {_words(error, path)}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return vars(module)


def _words(error: BaseException, path: Path) -> str:
    """An error of the user's code, with the line in the file."""
    line = getattr(error, "lineno", None)  # of a SyntaxError
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path.resolve()):
            line = trace.tb_lineno
        trace = trace.tb_next
    where = "" if line is None else f"line {line}: "
    return f"{where}{type(error).__name__}: {short(error)}"

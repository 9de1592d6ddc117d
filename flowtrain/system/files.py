"""Files that are written whole or not at all."""

import errno
import os
import tempfile
from pathlib import Path

from flowtrain.errors import RunError, UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name, flushes to the disk, then renames.

    Raises:
        RunError: if that fails. A file of that name is then as before.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp"
        )
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}; what was saved before is kept"
        ) from error


# Errors that mean that the path is wrong. Any other error of writing is the disk's.
_BAD_PATH = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


def save(path: Path, data: bytes) -> None:
    """Writes a file that the user asked for, and makes its parent folder if it is missing.

    Raises:
        UserError: if the path cannot be written.
        RunError: if the disk fails, for example because it is full.
    """
    try:
        write_atomically(path, data)
    except RunError as error:
        if path.is_dir() or getattr(error.__cause__, "errno", None) in _BAD_PATH:
            raise UserError(str(error)) from error
        raise

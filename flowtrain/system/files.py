"""Files that are written whole or not at all, and files from outside, which are only read if they
are regular files.
"""

import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

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


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading. Every file that may come from a stranger is opened here.

    Raises:
        OSError: as `open` does, and at once if it is not a regular file. Reading a pipe waits for
            a writer, and a device may never end.
    """
    return open(path, "rb", opener=_regular)  # noqa: SIM115 (the caller closes it)


def _regular(path: str, flags: int) -> int:
    # Otherwise opening a pipe would wait for a writer.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # `open` itself refuses a folder
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", path)


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a file, as `open_regular` opens it.

    Raises:
        OSError: as `open_regular`, and before anything is read if it has more than `limit` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EINVAL, f"{size} bytes, more than {limit}", str(path))
        return file.read(size)

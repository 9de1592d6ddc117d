"""Files that are written whole or not at all, and files from outside, which are only read if they
are regular files. `tests/system/test_files.py` checks that no other module opens one.
"""

import contextlib
import errno
import glob
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

from flowtrain.errors import RunError, UserError, shown

try:
    import fcntl
except ImportError:  # Windows, which opens no folders, and renames and removes no open files
    import msvcrt

    fcntl = None  # type: ignore[assignment]

Piece = bytes | bytearray | memoryview


def write_atomically(path: Path, data: bytes | Iterable[Piece], also: Sequence[Path] = ()) -> None:
    """Writes `data`, or all its pieces, to a temporary name in the same folder, flushes it to the
    disk, renames it, and flushes the folder. `also` are further names in that folder for the same
    bytes, made before `path`. A replaced file keeps its permissions. A new one gets the
    umask's. Raises `RunError` if it fails. A file at `path` is then as before.
    """
    replaced = None if path.is_symlink() or not path.is_file() else path.stat().st_mode & 0o777

    def new(temporary: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        return os.open(temporary, flags, 0o666 if replaced is None else replaced)

    with _naming(path), _temporary(path, new) as (temporary, handle, close):
        assert handle is not None
        if replaced is not None and hasattr(os, "fchmod"):
            os.fchmod(handle, replaced)  # the umask may have taken some
        with os.fdopen(handle, "wb", closefd=False) as file:
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(handle)
        if fcntl is None:
            close()
        for name in also:
            _link(temporary, name)
        temporary.replace(path)
        # A new name survives a power cut. The file is whole by now, so a folder that cannot be
        # read, or a file system that flushes no folders, is no error.
        with contextlib.suppress(OSError):
            _flush(path.parent, os.O_RDONLY)


@contextlib.contextmanager
def _temporary(
    path: Path, new: Callable[[Path], int | None]
) -> Iterator[tuple[Path, int | None, Callable[[], None]]]:
    """A hidden name beside `path`, the file or folder that `new` makes and opens there, and a
    function that closes it early. It is removed at the end if it still has that name. Names of
    earlier processes that died are removed first. A lock protects this one.
    """
    remove_left_overs(path.parent, path.name[:40])
    while True:
        temporary = path.with_name(f".{path.name[:40]}.{os.urandom(4).hex()}.tmp")
        handle, held = new(temporary), contextlib.ExitStack()
        if handle is not None:
            held.callback(os.close, handle)
        try:
            if handle is not None:
                with contextlib.suppress(OSError):  # a file system without locks
                    lock(handle)
            if not temporary.exists():  # removed by another process, before the lock
                continue
            yield temporary, handle, held.close
            return
        finally:
            held.close()
            _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _link(source: Path, name: Path) -> None:
    """A second name for the bytes of a file, or a copy on a file system without hard links."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with _naming(name):
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copy(source, temporary)
                _flush(temporary, os.O_RDWR)
            temporary.replace(name)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}; what was saved before is kept"
        ) from error


def make_folder_of(path: Path) -> None:
    """Raises `RunError`, as `write_atomically` does, if that fails."""
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def remove_left_overs(folder: Path, name: str | None = None) -> None:
    """Removes temporary files and folders of dead processes: all, or those for a file of `name`.
    A living process holds a lock on its own.
    """
    pattern = ".*.tmp" if name is None else f".{glob.escape(name)}.{'[0-9a-f]' * 8}.tmp"
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if fcntl is None:
                path.unlink()  # fails for open files, and for folders, which then stay
                continue
            handle = _open_to_lock(path)
            try:
                lock(handle, wait=False)
                _remove(path)
            finally:
                os.close(handle)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Waits for others that are in this context for the same file, which has to exist."""
    handle = _open_to_lock(path)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            lock(handle)
        yield
    finally:
        os.close(handle)


def _open_to_lock(path: Path) -> int:
    """A descriptor, for writing if possible: NFS 4 locks no file that is open for reading alone."""
    writes = path.is_file() and os.access(path, os.W_OK)
    return _regular(os.fspath(path), os.O_RDWR if writes else os.O_RDONLY)


# Windows locks bytes, and others cannot read them. This one is the last of 2 GiB.
_LOCKED_BYTE = 2**31 - 1
_WAIT_SECONDS = 0.1  # between two attempts to lock


def lock(handle: int, wait: bool = True) -> None:
    """Locks an open file or folder until it is closed, or the process ends in any way. Raises
    `BlockingIOError` if another process has the lock and this one does not `wait`, and another
    `OSError` on a file system without locks.
    """
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    before = os.lseek(handle, 0, os.SEEK_CUR)
    os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
    try:
        while True:
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
                return
            except PermissionError as error:
                if not wait:
                    raise BlockingIOError(*error.args) from error
                time.sleep(_WAIT_SECONDS)
    finally:
        os.lseek(handle, before, os.SEEK_SET)


def open_folder(path: Path) -> int | None:
    """A descriptor of a folder, or None on Windows."""
    return None if fcntl is None else os.open(path, os.O_RDONLY | os.O_DIRECTORY)


# Errors that mean that the path is wrong. Any other error of writing is the disk's.
_BAD_PATH = {errno.EACCES, errno.EPERM, errno.EROFS}
_BAD_PATH |= {errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


def save(path: Path, data: bytes, *, named: bool = True) -> None:
    """Writes a file of the user, and makes its parent folder if it is missing.

    If the user has `named` the path, a link stays, and its target is written. Otherwise a link may
    be a stranger's and lead to any file of the user, so it is replaced.

    Raises:
        UserError: if the path cannot be written. A pipe or a device is not replaced.
        RunError: if the disk fails, for example because it is full.
    """
    target = path.resolve() if named and path.is_symlink() else path
    if is_special(target):
        raise UserError(f"{path}: cannot be written: not a regular file")
    try:
        make_folder_of(target)
        write_atomically(target, data)
    except RunError as error:
        if path.is_dir() or getattr(error.__cause__, "errno", None) in _BAD_PATH:
            raise UserError(str(error)) from error
        raise


def is_special(path: Path) -> bool:
    """Whether a pipe, a device or the like is at `path`."""
    return path.exists() and not path.is_file() and not path.is_dir()


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading. Every file that may come from a stranger is opened here. Raises
    `OSError` as `open` does, and for a pipe or a device, which could be read forever.
    """
    return open(path, "rb", opener=_regular)  # noqa: SIM115 (the caller closes it)


def append_regular(path: Path) -> BinaryIO:
    """Opens a file for appending, and makes it if it is missing. Raises `OSError` as `open_regular`
    does, and for a link, which may lead to any file of the user.
    """
    if path.is_symlink():
        raise _not_regular(path)
    return open(path, "ab", opener=_regular)  # noqa: SIM115 (the caller closes it)


def _regular(path: str, flags: int) -> int:
    # Otherwise opening a pipe would wait for a writer.
    unix = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    descriptor = os.open(path, flags | unix, 0o666)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # `open` itself refuses a folder
        return descriptor
    os.close(descriptor)
    raise _not_regular(path)


def _not_regular(path: Path | str) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))


def require_regular(path: Path) -> None:
    """For files that another library opens. Raises `OSError` if `path`, or anything in that folder,
    is neither a regular file nor a folder.
    """
    for here, _, names in os.walk(path, followlinks=False):
        for name in names:
            require_regular(Path(here, name))
    if is_special(path):
        raise _not_regular(path)


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a file. Raises `OSError` as `open_regular` does, and if it has more than
    `limit` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EINVAL, f"{size} bytes, more than {limit}", str(path))
        return file.read(size)


def content_of(path: Path, limit: int) -> bytes:
    """As `read_regular`, but raises `UserError`."""
    try:
        return read_regular(path, limit)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


MAX_NAME_BYTES = 255  # of a file or folder
DEEPEST = 100  # folders in each other


def check_names(names: Iterable[str]) -> None:
    """Raises `ValueError` unless files of these names, relative paths with "/", can be written into
    one folder, and nowhere else.
    """
    names = list(names)
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{shown(name)} is not a file name")
    seen = set(names)
    if len(seen) < len(names):
        raise ValueError("two files have the same name")
    for name in names:
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{shown(name)} is not a plain relative path")
        if len(parts) > DEEPEST:
            raise ValueError(f"{shown(name)} is in more than {DEEPEST - 1} folders")
        if "\0" in name or os.name == "nt" and any(c in name for c in '\\:*?"<>|'):
            raise ValueError(f"{shown(name)} has a character that no file name can have")
        if any(len(_file_system_bytes(part)) > MAX_NAME_BYTES for part in parts):
            raise ValueError(
                f"{shown(name)} is longer than the {MAX_NAME_BYTES} bytes that a file name can have"
            )
        for i in range(1, len(parts)):
            folder = "/".join(parts[:i])
            if folder in seen:
                raise ValueError(f"{shown(name)} needs a folder where the file {shown(folder)} is")


def _file_system_bytes(name: str) -> bytes:
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        raise ValueError(f"{shown(name)} is not a file name") from None


def require_absent(names: Iterable[str], out: Path) -> None:
    """Raises `UserError` if a file or folder in `out` is in the way of files with these names."""
    names = list(names)
    present = next((name for name in names if os.path.lexists(out / name)), None)
    if present is not None:
        raise UserError(f"--out {out}: {shown(present)} already exists; give another folder")
    for folder in {parent for name in names for parent in Path(name).parents}:
        if os.path.lexists(out / folder) and not (out / folder).is_dir():
            raise UserError(
                f"--out {out}: {shown(str(folder))} is a file, not a folder; give another folder"
            )


def write_folder(out: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Makes new files in a folder, which may exist, by their names: all of them or none. They are
    written into a temporary folder, which is renamed, or else moved into the existing folder. They
    are not flushed to the disk. Raises `RunError` if that fails, and `UserError` as
    `require_absent` does.
    """
    there, names = out.is_dir(), []
    with _naming(out):
        home = out if there else out.parent
        home.mkdir(parents=True, exist_ok=True)
        with new_folder(home / (out.name or "all")) as temporary:  # "." has no name
            for name, data in files:
                names.append(name)
                with _naming(out / name):
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    # Names that differ in case alone are the same on some file systems.
                    with (temporary / name).open("xb") as file:
                        file.write(data)
            require_absent(names, out)
            if not there:
                temporary.rename(out)
                return
            with contextlib.ExitStack() as undo:
                for name in names:
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    (temporary / name).rename(out / name)
                    undo.callback((out / name).unlink)
                undo.pop_all()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, locked while it is filled. It is removed at the end unless
    it was renamed, and after a kill by `remove_left_overs`.
    """

    def new(temporary: Path) -> int | None:
        temporary.mkdir()
        return open_folder(temporary)

    with _temporary(path, new) as (temporary, _, _):
        yield temporary


class PerhapsUnread:
    """A stream that discards all output after an `error`, such as a closed pipe."""

    def __init__(self, stream: IO[str], error: type[OSError] = OSError):
        self._stream, self._error = stream, error

    @contextlib.contextmanager
    def _silent(self) -> Iterator[None]:
        try:
            yield
        except self._error:
            # Python flushes the stream again at its end, which must not fail either.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def write(self, text: str) -> int:
        with self._silent():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._silent():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

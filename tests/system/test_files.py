"""Files that are written whole or not at all, and which files are read."""

import ast
import errno
import fcntl
import os
import signal
import socket
import threading
import types
from pathlib import Path
from unittest import mock

import pytest
from like_windows import locking

from flowtrain.errors import RunError, UserError
from flowtrain.system import files
from flowtrain.system.files import check_names, save, write_atomically, write_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_order_of_flushes_and_names(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle):
        done.append("folder" if os.path.samestat(os.fstat(handle), tmp_path.stat()) else "file")
        fsync(handle)

    def renamed(source, name):
        replace(source, name)
        done.append(Path(name).name)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    for data in (b"old", b"new"):
        write_atomically(tmp_path / "a", data, also=[tmp_path / "b"])
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == data
        assert done == ["file", "b", "a", "folder"]
        done.clear()

    no_links = mock.Mock(side_effect=OSError(95, "Operation not supported"))
    monkeypatch.setattr(os, "link", no_links)
    write_atomically(tmp_path / "a", [b"co", b"py"], also=[tmp_path / "b"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"copy"
    assert done == ["file", "file", "b", "a", "folder"] and names(tmp_path) == ["a", "b"]


def test_folders_and_interruptions(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="cannot be written: No such file"):
        write_atomically(tmp_path / "gone" / "a", b"")
    save(tmp_path / "new" / "a", b"abc")
    assert (tmp_path / "new" / "a").read_bytes() == b"abc"

    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=SystemExit(143)))
    with pytest.raises(SystemExit):
        write_atomically(tmp_path / "a", b"abc")
    assert names(tmp_path) == ["new"]


@pytest.mark.parametrize("nfs", [False, True])
def test_only_files_of_dead_processes_are_removed(nfs, tmp_path, monkeypatch):
    """On NFS 4, which locks only files that are open for writing, folders stay."""
    flock = fcntl.flock

    def lock(handle, how):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, how)

    folders = [".folder.x.tmp"] if nfs else []
    if nfs:
        monkeypatch.setattr(fcntl, "flock", lock)
    for name in (".dead.x.tmp", ".alive.x.tmp", "tmp", ".x", "x.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".folder.x.tmp" / "inner").mkdir(parents=True)
    os.mkfifo(tmp_path / ".fifo.tmp")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        file = (tmp_path / ".alive.x.tmp").open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(write, b"locked")
        os.read(os.pipe()[0], 1)  # until it is killed
    os.read(read, 6)
    try:
        files.remove_left_overs(tmp_path)
        kept = [".alive.x.tmp", ".fifo.tmp", *folders, ".x", "tmp", "x.tmp"]
        assert names(tmp_path) == kept
        with (
            files.one_at_a_time(tmp_path / "tmp"),
            (tmp_path / "tmp").open("w") as other,
            pytest.raises(BlockingIOError),
        ):
            files.lock(other.fileno(), wait=False)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    files.remove_left_overs(tmp_path)
    assert not (tmp_path / ".alive.x.tmp").exists()


def test_temporary_files_of_a_name(tmp_path, monkeypatch):
    """What a kill left goes with the next file of the name. A file that another process took for
    left, between its making and its lock, is made again.
    """
    for name in (".a[1].png.0123abcd.tmp", ".b.png.0123abcd.tmp", ".a[1].png.backup.tmp"):
        (tmp_path / name).write_text("half")
    save(tmp_path / "a[1].png", b"whole")
    kept = [".a[1].png.backup.tmp", ".b.png.0123abcd.tmp", "a[1].png"]
    assert names(tmp_path) == kept
    flock, removed = fcntl.flock, []

    def late(handle, how):
        if not removed:
            removed.extend(tmp_path.glob(".c.*.tmp"))
            removed[0].unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_atomically(tmp_path / "c", b"abc")
    assert removed and (tmp_path / "c").read_bytes() == b"abc" and names(tmp_path) == [*kept, "c"]


def test_locks_and_folders_of_windows(tmp_path, monkeypatch):
    """`test_a_run_without_what_windows_lacks` has the rest."""
    monkeypatch.setattr(files, "fcntl", None)
    own = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setattr(files, "msvcrt", own, raising=False)
    (tmp_path / ".dead.tmp").mkdir()  # stays, because it may be a living one
    files.remove_left_overs(tmp_path)
    write_folder(tmp_path / "out", [("a", b"1")])
    write_folder(tmp_path / "out", [("b", b"2")])
    assert names(tmp_path / "out") == ["a", "b"] and names(tmp_path) == [".dead.tmp", "out"]

    entered = threading.Event()

    def wait():
        with files.one_at_a_time(tmp_path / "out" / "a"):
            entered.set()

    thread = threading.Thread(target=wait)
    with files.one_at_a_time(tmp_path / "out" / "a"):
        thread.start()
        assert not entered.wait(3 * files._WAIT_SECONDS)
    thread.join()
    assert entered.is_set()


@pytest.mark.parametrize("mask", [0o022, 0o077])
@pytest.mark.parametrize("before", [None, 0o600, 0o664])
def test_permissions_are_those_of_the_umask_or_of_the_file_before(before, mask, tmp_path):
    path = tmp_path / "a"
    if before is not None:
        path.write_bytes(b"before")
        path.chmod(before)
    kept = os.umask(mask)
    try:
        write_atomically(path, b"after")
        write_folder(tmp_path / "new", [("a", b"")])
    finally:
        os.umask(kept)
    assert path.stat().st_mode & 0o777 == (0o666 & ~mask if before is None else before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_written_whole_or_not_at_all(there, tmp_path):
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "other").write_text("")
    home = out if there else tmp_path
    (home / ".out.0123abcd.tmp").mkdir()  # a kill left it
    (home / ".out.0123abcd.tmp" / "half").write_text("")
    before = set(tmp_path.rglob("*")) - {*home.glob(".out.*"), *home.glob(".out.*/*")}

    def content(error=None):
        yield "a.png", b"1"
        yield "inner/b.png", b"2"
        if error is not None:
            raise error
        assert not (out / "a.png").exists()

    with pytest.raises(SystemExit):
        write_folder(out, content(SystemExit(143)))
    for other in ("a.png/c", "a.png"):  # "A.png" and "a.png" are one on some file systems
        with pytest.raises(RunError, match=f"out/{other}: cannot be written: File exists"):
            write_folder(out, [("a.png", b""), (other, b"")])
    assert set(tmp_path.rglob("*")) == before
    write_folder(out, content())
    new = {out / "a.png", out / "inner", out / "inner" / "b.png"}
    assert set(tmp_path.rglob("*")) - before - {out} == new
    with pytest.raises(UserError, match="'a.png' already exists"):
        write_folder(out, [("a.png", b"")])
    with pytest.raises(UserError, match="'a.png' is a file, not a folder"):
        write_folder(out, [("a.png/c", b"")])


def test_the_current_folder_is_filled_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, rename = [("a", b"1"), ("inner/b", b"2")], Path.rename

    def full(source, target):
        if target.name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(RunError, match="No space left"):
        write_folder(Path(), made)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    write_folder(Path(), made)
    assert names(tmp_path) == ["a", "inner"] and names(tmp_path / "inner") == ["b"]


@pytest.mark.parametrize(
    "names, message",
    [
        (["a", "b", "a"], "two files have the same name"),
        ([1], "1 is not a file name"),
        ([["a"]], r"\['a'\] is not a file name"),
        *[([name], "is not a plain relative path") for name in ("", "/a", "a/../b", "./a", "a//b")],
        (["a/" * 100 + "b"], "is in more than 99 folders"),
        (["a\0"], "has a character that no file name can have"),
        (["b" * 256], "is longer than the 255 bytes"),
        (["ö" * 128], "is longer than the 255 bytes"),
        (["\ud800"], "is not a file name"),
        (["a/b", "a"], "'a/b' needs a folder where the file 'a' is"),
        (["a/b/c", "a/b"], "'a/b/c' needs a folder where the file 'a/b' is"),
    ],
)
def test_names_that_cannot_be_unpacked(names, message):
    with pytest.raises(ValueError, match=message):
        check_names(names)


def test_names_that_can_be_unpacked(monkeypatch):
    check_names(["a/" * 99 + "b", "b" * 255, "ö" * 127, "c:x", "a\\..\\b", "..a", " "])
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        for name in ("c:x", "a\\..\\b"):
            with pytest.raises(ValueError, match="has a character that no file name can have"):
                check_names([name])
        check_names(["plain.png"])


@pytest.fixture
def soon():
    """A test that waits fails."""
    before = signal.signal(signal.SIGALRM, mock.Mock(side_effect=TimeoutError))
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def special(kind):
    path = Path(kind)
    if kind == "socket":
        socket.socket(socket.AF_UNIX).bind(kind)
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(special("fifo"))
    return path


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("kind", ["fifo", "link", "/dev/zero", "socket", "folder"])
def test_nothing_else_is_opened_or_replaced(kind, tmp_path, monkeypatch):
    """A device that root writes to would be gone for the whole machine."""
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = special(kind)
    before, open_files = path.lstat(), len(list(Path("/proc/self/fd").iterdir()))
    others = {"folder": "Is a directory", "socket": "No such device"}
    with pytest.raises(OSError, match=others.get(kind, "not a regular file")):
        files.read_regular(path, 1000)
    with pytest.raises(OSError):
        files.append_regular(path)
    with pytest.raises(UserError, match=f"{path}: cannot be written: "):
        save(path, b"x")
    if kind == "folder":
        (path / "file").touch()
        files.require_regular(path)
        os.mkfifo(path / "deeper")
    with pytest.raises(OSError, match="not a regular file"):
        files.require_regular(path)
    assert os.path.samestat(path.lstat(), before)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files


def test_regular_files_and_links(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "link"):
        assert files.read_regular(tmp_path / name, 7) == b"content"
        with files.open_regular(tmp_path / name) as file:
            assert file.read() == b"content"
    with pytest.raises(OSError, match="7 bytes, more than 6"):
        files.read_regular(tmp_path / "file", 6)
    for line in (b"a", b"b"):
        with files.append_regular(tmp_path / "new") as file:
            file.write(line)
    assert (tmp_path / "new").read_bytes() == b"ab"
    for name in ("link", "dangling"):  # in a stranger's folder, it may lead to any file
        with pytest.raises(OSError, match="not a regular file"):
            files.append_regular(tmp_path / name)
    files.require_regular(tmp_path / "dangling")
    for name, target in (("link", "file"), ("dangling", "nowhere")):
        save(tmp_path / name, b"after")
        assert (tmp_path / name).is_symlink() and (tmp_path / target).read_bytes() == b"after"
        save(tmp_path / name, b"anew", named=False)  # a stranger may have made it
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == b"anew"
        assert (tmp_path / target).read_bytes() == b"after"


# Calls that look like opening a file by its name, and files that call them for something else:
# files of the package or the system, open files, new files, bytes, folders.
OPENING = {
    "open": "system/files system/arrays system/nvidia system/torchrun datasets/base datasets/cache "
    "datasets/imagenet cli/configs cli/main pictures/lossless training/run_directory",
    "fdopen": "system/files",
    "memmap": "datasets/cache",
    "load": "system/distributed checkpoints/format config/files tools/archive/command "
    "tools/export/formats tools/quality/features tools/weights/tensors",
    "read_text": "system/capacity system/device tools/hub/page tools/report/report",
    "read_bytes": "checkpoints/zoo tools/explore/server",
    "fromfile": "",
}


def test_files_are_opened_in_one_place():
    package = Path(files.__file__).parents[1]
    for file in package.rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text()))
        calls = [node.func for node in nodes if isinstance(node, ast.Call)]
        called = {call.attr for call in calls if isinstance(call, ast.Attribute)} & {*OPENING}
        called |= {call.id for call in calls if isinstance(call, ast.Name)} & {"open"}
        name = str(file.relative_to(package).with_suffix(""))
        wrong = {call for call in called if name not in OPENING[call].split()}
        assert not wrong, (
            f"flowtrain/{name}.py calls {wrong}. A file may be a stranger's or a device: open it "
            "with open_regular or read_regular of flowtrain.system.files. If it opens nothing by "
            "its name, add it to OPENING in this test."
        )


def test_a_private_file_is_never_open_to_others(tmp_path, monkeypatch):
    (tmp_path / "a").touch(0o600)
    modes, fchmod = [], os.fchmod

    def watched(handle, mode):
        modes.append(os.fstat(handle).st_mode & 0o077)
        fchmod(handle, mode)

    monkeypatch.setattr(os, "fchmod", watched)
    write_atomically(tmp_path / "a", b"secret")
    assert modes == [0]

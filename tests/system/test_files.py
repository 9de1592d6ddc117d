"""Files that are written whole or not at all, and which files are read."""

import ast
import fcntl
import os
import signal
import socket
from pathlib import Path

import pytest

from flowtrain.errors import RunError, UserError
from flowtrain.system.files import (
    append_regular,
    check_names,
    open_regular,
    read_regular,
    remove_left_overs,
    require_regular,
    save,
    write_atomically,
    write_folder,
)


def test_the_folder_is_flushed_after_the_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle):
        done.append("folder" if os.path.samestat(os.fstat(handle), tmp_path.stat()) else "file")
        fsync(handle)

    def renamed(*names):
        done.append("name")
        replace(*names)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(tmp_path / "a", b"abc")
    assert done == ["file", "name", "folder"]


@pytest.mark.parametrize("links", [True, False])
def test_the_second_name_is_there_first(links, tmp_path, monkeypatch):
    def no_links(*names):
        raise OSError(95, "Operation not supported")

    replace = os.replace
    names = []

    def renamed(source, name):
        replace(source, name)
        names.append(Path(name).name)

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "replace", renamed)
    for data in (b"old", b"new"):
        write_atomically(tmp_path / "a", data, also=[tmp_path / "b"])
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == data
    assert names == ["b", "a", "b", "a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_it_makes_no_folder(tmp_path):
    with pytest.raises(RunError, match="cannot be written: No such file"):
        write_atomically(tmp_path / "gone" / "a", b"")
    assert not (tmp_path / "gone").exists()
    save(tmp_path / "new" / "a", b"abc")
    assert (tmp_path / "new" / "a").read_bytes() == b"abc"


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(handle):
        raise SystemExit(143)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(SystemExit):
        write_atomically(tmp_path / "a", b"abc")
    assert list(tmp_path.iterdir()) == []


def test_only_files_of_dead_processes_are_removed(tmp_path):
    for name in (".dead.x.tmp", ".alive.x.tmp", "tmp", ".x", "x.tmp"):
        (tmp_path / name).write_text("")
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
        remove_left_overs(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            *[".alive.x.tmp", ".fifo.tmp", ".x", "tmp", "x.tmp"]
        ]
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    remove_left_overs(tmp_path)
    assert not (tmp_path / ".alive.x.tmp").exists()


def test_what_a_kill_left_goes_with_the_next_file_of_that_name(tmp_path):
    for name in (".a[1].png.0123abcd.tmp", ".b.png.0123abcd.tmp", ".a[1].png.backup.tmp"):
        (tmp_path / name).write_text("half")
    save(tmp_path / "a[1].png", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *[".a[1].png.backup.tmp", ".b.png.0123abcd.tmp", "a[1].png"]
    ]


def test_a_file_that_another_process_took_for_left_is_made_again(tmp_path, monkeypatch):
    """Between its making and its lock."""
    flock, removed = fcntl.flock, []

    def late(handle, how):
        if not removed:
            removed.extend(tmp_path.glob(".*.tmp"))
            removed[0].unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_atomically(tmp_path / "a", b"abc")
    assert removed and (tmp_path / "a").read_bytes() == b"abc"


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

    def files(error=None):
        yield "a.png", b"1"
        yield "inner/b.png", b"2"
        if error is not None:
            raise error
        assert not (out / "a.png").exists()

    with pytest.raises(SystemExit):
        write_folder(out, files(SystemExit(143)))
    with pytest.raises(RunError, match="out/a.png/c: cannot be written: File exists"):
        write_folder(out, [("a.png", b""), ("a.png/c", b"")])
    assert set(tmp_path.rglob("*")) == before
    write_folder(out, files())
    assert set(tmp_path.rglob("*")) - before - {out} == {
        *[out / "a.png", out / "inner", out / "inner" / "b.png"]
    }
    with pytest.raises(UserError, match="'a.png' is there already"):
        write_folder(out, [("a.png", b"")])


# --- reading --------------------------------------------------------------------------------------


def test_a_regular_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_regular(tmp_path / name, 7) == b"content"
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content"


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="1099511627776 bytes, more than 1000"):
        read_regular(tmp_path / "sparse", 1000)


@pytest.fixture
def soon():
    """A test that waits fails."""

    def expired(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("kind", ["fifo", "link", "/dev/zero", "/dev/random", "socket", "folder"])
def test_nothing_else_is_opened(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = tmp_path / "fifo"
    if kind in ("fifo", "link"):
        os.mkfifo(path)
    if kind == "link":
        path = tmp_path / "link"
        path.symlink_to("fifo")
    if kind == "socket":
        path = tmp_path / "socket"
        socket.socket(socket.AF_UNIX).bind("socket")
    if kind == "folder":
        path = tmp_path
    if kind.startswith("/dev"):
        path = tmp_path / kind
    others = {"folder": "Is a directory", "socket": "No such device"}
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match=others.get(kind, "not a regular file")):
        read_regular(path, 1000)
    if kind != "folder":
        with pytest.raises(OSError):
            append_regular(path)
        with pytest.raises(OSError, match="not a regular file"):
            require_regular(path)
    if not kind.startswith("/dev"):
        (tmp_path / "inner").mkdir()
        (tmp_path / "inner" / "file").write_text("")
        require_regular(tmp_path / "inner")
        os.mkfifo(tmp_path / "inner" / "deeper")
        with pytest.raises(OSError, match="not a regular file"):
            require_regular(tmp_path / "inner")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("kind", ["pipe", "socket", "a link to a pipe"])
def test_only_regular_files_are_replaced(kind, tmp_path):
    """A device that root writes to would be gone for the whole machine."""
    path = tmp_path / "a"
    if kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        os.mkfifo(path)
    if kind == "a link to a pipe":
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    before = path.lstat()
    with pytest.raises(UserError, match=f"{path}: cannot be written: not a regular file"):
        save(path, b"x")
    assert os.path.samestat(path.lstat(), before)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays(there, tmp_path):
    file, link = tmp_path / "folder" / "file", tmp_path / "link"
    file.parent.mkdir()
    if there:
        file.write_bytes(b"before")
    link.symlink_to(file)
    save(link, b"after")
    assert link.is_symlink() and file.read_bytes() == b"after"
    save(link, b"anew", named=False)  # a stranger may have made it
    assert not link.is_symlink() and (link.read_bytes(), file.read_bytes()) == (b"anew", b"after")


def test_lines_are_appended_but_not_through_a_link(tmp_path):
    for _ in range(2):
        with append_regular(tmp_path / "file") as file:
            file.write(b"line\n")
    assert (tmp_path / "file").read_bytes() == b"line\nline\n"
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(OSError, match="not a regular file"):
            append_regular(tmp_path / name)
    require_regular(tmp_path / "dangling")
    assert not (tmp_path / "nowhere").exists()


def test_windows_has_other_names_of_files(monkeypatch):
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        refused = []
        for name in ("c:x", "a\\..\\b", "plain.png"):
            try:
                check_names([name])
            except ValueError:
                refused.append(name)
    assert refused == ["c:x", "a\\..\\b"]


# Calls that look like opening a file by its name, and what they open.
OPENING = {
    "system/files.py": {"open", "fdopen"},
    "system/arrays.py": {"open"},  # a member of what `open_regular` has opened
    "system/capacity.py": {"read_text"},  # the system's
    "system/distributed.py": {"load"},  # bytes
    "checkpoints/format.py": {"load"},  # bytes
    "checkpoints/zoo.py": {"read_bytes"},  # the package's
    "cli/configs.py": {"open"},  # the package's
    "tools/archive/command.py": {"load"},  # an archive that was read
    "config/files.py": {"load"},  # text
    "datasets/base.py": {"open"},  # what `open_regular` has opened
    "datasets/cache.py": {"open", "memmap"},  # a new file, and what `open_regular` has opened
    "datasets/imagenet.py": {"open"},  # members of archives, and new files
    "tools/explore/server.py": {"read_bytes"},  # the package's
    "pictures/lossless.py": {"open"},  # bytes
    "tools/hub/page.py": {"read_text"},  # the package's
    "tools/report/report.py": {"read_text"},  # the package's
    "system/nvidia.py": {"open"},  # the system's
    "system/torchrun.py": {"open"},  # the null device
    "training/run_directory.py": {"open"},  # a folder
}


def test_files_are_opened_in_one_place():
    package = Path(__file__).parents[2] / "flowtrain"
    names = {"open", "fdopen", "read_text", "read_bytes", "load", "fromfile", "memmap"}
    found = {}
    for file in package.rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text()))
        calls = [node.func for node in nodes if isinstance(node, ast.Call)]
        called = {call.attr for call in calls if isinstance(call, ast.Attribute)} & names
        called |= {call.id for call in calls if isinstance(call, ast.Name)} & {"open"}
        if called:
            found[str(file.relative_to(package))] = called
    assert found == OPENING

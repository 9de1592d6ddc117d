"""Files from outside: only regular files are read, and everything else is refused at once."""

import os
import signal
import socket
from pathlib import Path

import pytest

from flowtrain.system.files import open_regular, read_regular


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
    assert len(list(Path("/proc/self/fd").iterdir())) == before

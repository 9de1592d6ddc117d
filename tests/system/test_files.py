"""Files that are written whole or not at all."""

import fcntl
import os
from pathlib import Path

import pytest

from flowtrain.errors import RunError
from flowtrain.system.files import remove_left_overs, save, write_atomically


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
        write_atomically(tmp_path / "a", data, also=tmp_path / "b")
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
    os.mkfifo(tmp_path / ".fifo.tmp")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        file = (tmp_path / ".alive.x.tmp").open("w")
        fcntl.lockf(file, fcntl.LOCK_EX)
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

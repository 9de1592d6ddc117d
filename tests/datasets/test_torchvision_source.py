"""Data sets that torchvision downloads: once, verified, and with one message for what fails."""

import contextlib
import errno
import functools
import http.server
import logging
import shutil
import socket
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from dataset_helpers import COUNTS, LABELS, TORCHVISION, build, check, downloads, pipe
from fake_hub import serving

from flowtrain.datasets import torchvision_source
from flowtrain.errors import RunError, UserError

mnist = functools.partial(torchvision_source.mnist, split="train")


@contextlib.contextmanager
def served(directory):
    """The address of a web server on this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(directory))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with serving(server):
        yield f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture
def closed():
    """The address of a port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def set_source(name, monkeypatch, *addresses):
    """Where a data set is downloaded from."""
    from torchvision import datasets

    source = getattr(datasets, TORCHVISION[name][0])
    if hasattr(source, "mirrors"):
        monkeypatch.setattr(source, "mirrors", list(addresses))
    elif name == "svhn":
        splits = {part: [addresses[0] + f[1], *f[1:]] for part, f in source.split_list.items()}
        monkeypatch.setattr(source, "split_list", splits)
    else:
        monkeypatch.setattr(source, "url", addresses[0] + source.filename)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder with the files of a tiny MNIST, to be served."""
    downloads("mnist", tmp_path / "site", monkeypatch)
    return tmp_path / "site"


@pytest.mark.parametrize("name", TORCHVISION)
def test_without_a_network_files_placed_by_hand_are_enough(name, tmp_path, monkeypatch, closed):
    monkeypatch.chdir(tmp_path)
    wanted = downloads(name, tmp_path / "site", monkeypatch)
    set_source(name, monkeypatch, closed)
    place = tmp_path / "data" / TORCHVISION[name][2]
    files = list((tmp_path / "site").iterdir())
    with pytest.raises(UserError) as raised:
        build(name, Path("data"), "test").read()
    message = str(raised.value)
    assert message.startswith("data.root: ") and f"Tried {closed}" in message
    needed = [file.name for file in files if name != "svhn" or "test" in file.name]
    assert all(each in message for each in needed) and f"into {place} " in message
    assert "Connection refused" in message and "\n" not in message
    assert raised.value.__suppress_context__
    place.mkdir(parents=True, exist_ok=True)
    for file in files:  # do as the message says
        shutil.copy(file, place)
    for part, count in COUNTS.items():
        images = build(name, Path("data"), part)
        assert np.array_equal(check(images, count), wanted[part]) and images.at_hand()
        assert np.array_equal(images.labels(), LABELS[part]) and images.labels().dtype == np.int64


def test_mnist_is_downloaded_once(site, tmp_path, monkeypatch, closed, caplog, capsys):
    root = tmp_path / "a" / "data"
    caplog.set_level(logging.INFO, "flowtrain")
    with served(site) as address:
        set_source("mnist", monkeypatch, closed, address)  # the first mirror is down
        mnist(root).read()
    assert str(root) in caplog.text and address in caplog.text
    assert len(mnist(root, split="test").read()) == COUNTS["test"]
    assert "%" not in capsys.readouterr().err and socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_damaged_raw_files(site, tmp_path, monkeypatch, closed, name):
    shutil.copytree(site, tmp_path / "MNIST" / "raw")
    mnist(tmp_path).read()
    set_source("mnist", monkeypatch, closed)
    raw = tmp_path / "MNIST" / "raw" / name
    whole = raw.read_bytes()
    for content in (whole[:-1], b"", whole + b"x"):
        raw.write_bytes(content)
        with pytest.raises(UserError, match=rf"{raw.parent} .* \({name} has \d+ bytes, not \d+\)"):
            mnist(tmp_path).read()
    raw.write_bytes(b"\xff" * 8 + whole[8:])  # its header
    with pytest.raises(UserError, match="are damaged .*Delete train-images-idx3-ubyte, .* there"):
        mnist(tmp_path).read()
    pipe(raw)
    with pytest.raises(UserError, match="not a regular file"):
        mnist(tmp_path).read()
    raw.unlink()
    raw.write_bytes(whole)
    monkeypatch.setattr(torchvision_source, "IDX_COUNTS", {"train": 60000})
    with pytest.raises(UserError, match=r"\(23, 1, 28, 28\), not \(60000, 1, 28, 28\)"):
        mnist(tmp_path).read()


def test_a_full_disk_is_not_the_users_mistake(site, tmp_path, monkeypatch):
    import torchvision.datasets

    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torchvision.datasets, "MNIST", mock.Mock(side_effect=error, mirrors=[]))
    with pytest.raises(RunError, match=rf"{tmp_path}.*No space left"):
        mnist(tmp_path).read()


def test_a_stalled_server_is_given_up(site, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision_source, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        set_source("mnist", monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(UserError, match=r"could not be downloaded .*timed out"):
            mnist(tmp_path).read()

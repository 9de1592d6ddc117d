"""Data sets that torchvision downloads: once, verified, and with one message for what fails."""

import contextlib
import errno
import functools
import gzip
import hashlib
import http.server
import io
import logging
import os
import pickle
import shutil
import socket
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import build, check, corrupt, cut, noise
from helpers import SHARED, shared

from flowtrain.datasets import torchvision_source
from flowtrain.datasets.torchvision_source import mnist
from flowtrain.errors import RunError, UserError


@contextlib.contextmanager
def served(directory):
    """A web server on this machine: gives its address and the list of paths asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(directory))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def closed():
    """The address of a port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """MNIST of 6 + 4 images: a folder to be served, the images, and a way to set the mirrors."""
    import torchvision.datasets

    site = tmp_path / "site"
    site.mkdir()
    wanted, resources, sizes = {}, [], {}
    for split, prefix, count in (("train", "train", 6), ("test", "t10k", 4)):
        wanted[split] = noise(count, 1, 28, 28, seed=count)
        head = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        labels = (0x801).to_bytes(4, "big") + count.to_bytes(4, "big") + bytes(count)
        for name, data in (
            (f"{prefix}-images-idx3-ubyte", head + wanted[split].tobytes()),
            (f"{prefix}-labels-idx1-ubyte", labels),
        ):
            (site / f"{name}.gz").write_bytes(gzip.compress(data))
            resources.append((f"{name}.gz", md5(site / f"{name}.gz")))
            sizes[name] = len(data)
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    monkeypatch.setattr(torchvision_source, "IDX_COUNTS", {"train": 6, "test": 4})
    monkeypatch.setattr(torchvision_source, "IDX_SIZES", sizes)
    return (
        site,
        wanted,
        functools.partial(monkeypatch.setattr, torchvision.datasets.MNIST, "mirrors"),
    )


def test_mnist_is_downloaded_once(tiny_mnist, tmp_path, closed, caplog, capsys):
    site, wanted, set_mirrors = tiny_mnist
    root = tmp_path / "a" / "data"
    caplog.set_level(logging.INFO, "flowtrain")
    with served(site) as (address, asked):
        set_mirrors([closed, address])  # the first mirror is down
        assert np.array_equal(check(mnist(root, "train"), 6), wanted["train"])
        assert asked
        assert str(root) in caplog.text and address in caplog.text
        asked.clear()
        assert np.array_equal(check(mnist(root, "test"), 4), wanted["test"])
        assert not asked, "the files were there"
    assert socket.getdefaulttimeout() is None
    assert "%" not in capsys.readouterr().err  # no progress bar in a log


def test_progress_bar_on_a_terminal(tiny_mnist, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    site, _, set_mirrors = tiny_mnist
    with served(site) as (address, _):
        set_mirrors([address])
        mnist(tmp_path / "data", "train").read()
    assert "100" in screen.getvalue()


def test_files_placed_by_hand_are_enough(tiny_mnist, tmp_path, closed):
    site, wanted, set_mirrors = tiny_mnist
    set_mirrors([closed])
    with pytest.raises(UserError) as raised:
        mnist(tmp_path / "data", "train").read()
    message = str(raised.value)
    place = tmp_path / "data" / "MNIST" / "raw"
    assert str(place) in message and closed in message and "data.root" in message
    names = [file.name for file in site.iterdir()]
    assert len(names) == 4 and all(name in message for name in names)
    assert "Connection refused" in message and "\n" not in message
    for name in names:  # do as the message says
        shutil.copy(site / name, place)
    assert np.array_equal(check(mnist(tmp_path / "data", "train"), 6), wanted["train"])


@pytest.mark.parametrize("damage", [corrupt, cut])
def test_damaged_download(tiny_mnist, tmp_path, damage):
    site, _, set_mirrors = tiny_mnist
    damage(site / "t10k-images-idx3-ubyte.gz")
    with served(site) as (address, _):
        set_mirrors([address])
        with pytest.raises(UserError, match=r"could not be downloaded .*corrupted.*by hand"):
            mnist(tmp_path / "data", "train").read()


def test_download_that_is_no_gzip(tiny_mnist, tmp_path, monkeypatch):
    import torchvision.datasets

    site, _, set_mirrors = tiny_mnist
    for file in site.iterdir():
        file.write_text("<html>log in to the hotel's network</html>")
    sums = [(name, md5(site / name)) for name, _ in torchvision.datasets.MNIST.resources]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", sums)
    with served(site) as (address, _):
        set_mirrors([address])
        with pytest.raises(UserError, match=r"could not be downloaded \(Not a gzipped file"):
            mnist(tmp_path / "data", "train").read()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    "damage", [cut, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes() + b"x")]
)
def test_damaged_raw_file(tiny_mnist, tmp_path, closed, damage, name):
    site, wanted, set_mirrors = tiny_mnist
    with served(site) as (address, _):
        set_mirrors([address])
        mnist(tmp_path, "train").read()
    set_mirrors([closed])
    damage(tmp_path / "MNIST" / "raw" / name)
    with pytest.raises(UserError, match=rf"damaged \({name} has \d+ bytes, not \d+\)") as raised:
        mnist(tmp_path, "train").read()
    assert str(tmp_path / "MNIST" / "raw") in str(raised.value)


def test_damaged_raw_header(tiny_mnist, tmp_path, closed):
    site, _, set_mirrors = tiny_mnist
    with served(site) as (address, _):
        set_mirrors([address])
        mnist(tmp_path, "train").read()
    raw = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    raw.write_bytes(b"\xff" * 16 + raw.read_bytes()[16:])
    with pytest.raises(UserError, match="damaged"):
        mnist(tmp_path, "train").read()


def test_wrong_number_of_images(tiny_mnist, tmp_path, monkeypatch):
    site, _, set_mirrors = tiny_mnist
    monkeypatch.setattr(torchvision_source, "IDX_COUNTS", {"train": 60000, "test": 10000})
    with served(site) as (address, _):
        set_mirrors([address])
        with pytest.raises(UserError, match=r"\(6, 1, 28, 28\), not \(60000, 1, 28, 28\)"):
            mnist(tmp_path, "train").read()


def test_full_disk_is_not_the_users_mistake(tmp_path):
    def load(source, root):
        raise OSError(errno.ENOSPC, "No space left on device")

    files = torchvision_source.Files([], {"x": None})
    images = torchvision_source.images("MNIST", tmp_path, files, (1, 1, 1), 1, load, lambda cls: [])
    with pytest.raises(RunError, match=rf"{tmp_path}.*No space left"):
        images.read()


def test_a_stalled_server_is_given_up(tiny_mnist, tmp_path, monkeypatch):
    _, _, set_mirrors = tiny_mnist
    monkeypatch.setattr(torchvision_source, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        set_mirrors([f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        with pytest.raises(UserError, match=r"could not be downloaded .*timed out"):
            mnist(tmp_path, "train").read()


def closed_urls(monkeypatch, closed):
    from torchvision import datasets

    for cls in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(cls, "mirrors", [closed])
    for cls in (datasets.CIFAR10, datasets.CIFAR100):
        monkeypatch.setattr(cls, "url", closed + cls.filename)
    files = datasets.SVHN.split_list
    moved = {s: [closed + f[1], *f[1:]] for s, f in files.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", moved)


@pytest.mark.parametrize(
    "name, place, file",
    [
        ("mnist", "MNIST/raw", "t10k-images-idx3-ubyte.gz"),
        ("fashion_mnist", "FashionMNIST/raw", "t10k-images-idx3-ubyte.gz"),
        ("cifar10", "", "cifar-10-python.tar.gz"),
        ("cifar100", "", "cifar-100-python.tar.gz"),
        ("svhn", "", "test_32x32.mat"),
    ],
)
def test_offline(name, place, file, tmp_path, monkeypatch, closed):
    closed_urls(monkeypatch, closed)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        build(name, Path("data"), "test").read()
    message = str(raised.value)
    assert f"put {file}" in message or f" {file}" in message
    assert f"into {tmp_path / 'data' / place} " in message and f"Tried {closed}" in message
    assert "Connection refused" in message and "\n" not in message
    assert raised.value.__suppress_context__


def test_cifar10_from_its_archive(tmp_path, monkeypatch):
    from torchvision import datasets

    inside = tmp_path / "cifar-10-batches-py"
    inside.mkdir()
    wanted = noise(5, 3, 32, 32)

    def write(name, value):
        (inside / name).write_bytes(pickle.dumps(value))
        return [name, md5(inside / name)]

    batch = {"data": wanted[:3].reshape(3, -1), "labels": [0] * 3}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [write("data_batch_1", batch)])
    batch = {"data": wanted[3:].reshape(2, -1), "labels": [0] * 2}
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write("test_batch", batch)])
    _, sum_ = write("batches.meta", {"label_names": ["cat"]})
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sum_}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    site = tmp_path / "site"
    site.mkdir()
    with tarfile.open(site / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(inside, "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(site / "cifar-10-python.tar.gz"))
    monkeypatch.setattr(torchvision_source, "CIFAR_COUNTS", {"train": 3, "test": 2})
    root = tmp_path / "root"
    with served(site) as (address, _):
        monkeypatch.setattr(datasets.CIFAR10, "url", address + "cifar-10-python.tar.gz")
        pixels = check(build("cifar10", root, "train"), 3)
    assert np.array_equal(pixels, wanted[:3])
    assert np.array_equal(check(build("cifar10", root, "test"), 2), wanted[3:])
    for name in ("cifar-10-batches-py/data_batch_1", "cifar-10-python.tar.gz"):
        (root / name).rename(root / "aside")
        os.mkfifo(root / name)
        with pytest.raises(UserError, match="not a regular file"):
            build("cifar10", root, "train").read()
        (root / "aside").rename(root / name)
    corrupt(root / "cifar-10-batches-py" / "data_batch_1")
    (root / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(UserError, match=r"are damaged .*Delete cifar-10-batches-py there"):
        build("cifar10", root, "train").read()


def test_svhn_from_its_file(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision import datasets

    wanted = noise(3, 3, 32, 32)
    labels = np.ones((3, 1), np.uint8)
    savemat(tmp_path / "test_32x32.mat", {"X": wanted.transpose(2, 3, 1, 0), "y": labels})
    entry = ["http://127.0.0.1:1/", "test_32x32.mat", md5(tmp_path / "test_32x32.mat")]
    monkeypatch.setattr(datasets.SVHN, "split_list", {"test": entry})
    monkeypatch.setattr(torchvision_source, "SVHN_COUNTS", {"test": 3})
    assert np.array_equal(check(build("svhn", tmp_path, "test"), 3), wanted)


@shared
def test_real_mnist_is_read_where_it_cannot_be_written():
    pixels = check(mnist(SHARED, "test"), 10000)
    assert 32 < pixels.mean() < 35
    from torchvision.datasets import MNIST

    raw = MNIST(SHARED, train=False, download=False).data.numpy()
    assert np.array_equal(pixels[:, 0], raw)


@shared
def test_truncated_real_mnist(tmp_path):
    shutil.copytree(SHARED / "MNIST", tmp_path / "MNIST", copy_function=os.symlink)
    raw = tmp_path / "MNIST" / "raw"
    raw.chmod(0o755)
    (raw / "t10k-images-idx3-ubyte").unlink()
    (raw / "t10k-images-idx3-ubyte").write_bytes(bytes(1000))
    with pytest.raises(UserError, match="1000 bytes, not 7840016"):
        mnist(tmp_path, "test").read()

"""Every data set: what it promises before reading, what it reads, what it says when it cannot."""

import contextlib
import dataclasses
import errno
import functools
import gzip
import hashlib
import http.server
import importlib
import inspect
import io
import logging
import os
import pickle
import pkgutil
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from catalogue import POINTS
from helpers import REPOSITORY, SHARED, shared
from PIL import Image

import flowtrain.datasets
from flowtrain.datasets import base, digits, folder, mnist, npz, torchvision_source
from flowtrain.errors import RunError, UserError

DOWNLOADED = {  # name: shape, flip
    "mnist": ((1, 28, 28), False),
    "fashion_mnist": ((1, 28, 28), False),
    "cifar10": ((3, 32, 32), True),
    "cifar100": ((3, 32, 32), True),
    "svhn": ((3, 32, 32), False),
}
HELPERS = {"base", "torchvision_source", "points"}


def module(name):
    return importlib.import_module(f"flowtrain.datasets.{name}")


def check(images, count=None):
    """What every data set promises about its pixels; returns them."""
    pixels = images.read()
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert pixels.shape[1:] == images.shape and pixels.max() < images.levels
    assert count is None or len(pixels) == count
    return pixels


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path_factory):
    """No test reaches the network, a proxy or the user's own cache."""
    connect = socket.socket.connect

    def local(self, address):
        assert address[0] in ("127.0.0.1", "localhost"), f"a test wants to reach {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("FLOWTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


# ---------------------------------------------------------------- every module


def test_every_data_set_is_tested():
    found = {info.name for info in pkgutil.iter_modules(flowtrain.datasets.__path__)}
    assert found == set(DOWNLOADED) | {"digits", "npz", "folder", "sphere", *POINTS, *HELPERS}


@pytest.mark.parametrize("name", [*DOWNLOADED, "digits", "npz", "folder"])
def test_signature_is_a_schema(name):
    parameters = inspect.signature(module(name).build).parameters
    assert list(parameters)[:3] == ["root", "split", "seed"]
    options = list(parameters.values())[3:]
    assert all(o.kind == o.KEYWORD_ONLY and o.annotation is not o.empty for o in options)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_described_before_anything_is_read(name, tmp_path):
    for split in ("train", "test"):
        images = module(name).build(tmp_path / "none", split)
        assert (images.shape, images.flip) == DOWNLOADED[name]
        assert images.levels == 256 and images.key is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(dataclasses.FrozenInstanceError):
        images.levels = 2


def test_importing_is_light():
    code = (
        "import sys, pkgutil, importlib, flowtrain.datasets as d\n"
        "before = set(sys.modules)\n"
        "for m in pkgutil.iter_modules(d.__path__):\n"
        "    importlib.import_module('flowtrain.datasets.' + m.name)\n"
        "new = set(sys.modules) - before\n"
        "assert not new & {'torch', 'torchvision', 'sklearn', 'rich'}, new"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------- hold_out


@pytest.mark.parametrize(
    "n, held, count",
    [(1797, 0.1, 180), (10, 3, 3), (10, 0.25, 2), (10, 0, 0), (10, 0.0, 0), (5, 0.01, 1)]
    + [(10, 2.0, 2), (2, 1, 1)],
)
def test_hold_out(n, held, count):
    kept, out = base.hold_out(n, held, 0)
    assert len(out) == count
    assert sorted([*kept, *out]) == list(range(n))
    assert (np.diff(kept) > 0).all() and (np.diff(out) > 0).all()


def test_hold_out_depends_on_the_seed_alone():
    first, again, other = (base.hold_out(100, 0.3, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other
    # Pinned: a resumed run, on any machine and numpy, has to find the same validation images.
    assert base.hold_out(20, 5, 0)[1].tolist() == [1, 4, 9, 10, 11]


@pytest.mark.parametrize(
    "n, held", [(10, 10), (10, 11), (1, 0.5), (0, 0), (10, -1), (10, 1.5), (10, float("nan"))]
)
def test_hold_out_refuses(n, held):
    with pytest.raises(UserError, match=r"cannot hold"):
        base.hold_out(n, held, 0)


# ---------------------------------------------------------------- image files


def test_resize_leaves_the_right_size_alone():
    pixels = noise(20, 30, 3)
    for policy in ("crop", "stretch", "exact"):
        out = base.resize(Image.fromarray(pixels), (3, 20, 30), policy)
        assert np.array_equal(out, pixels.transpose(2, 0, 1)) and out.flags.c_contiguous


@pytest.mark.parametrize("size", [(40, 20), (41, 20), (20, 40), (20, 47)])
def test_crop_keeps_the_middle(size):
    wide = np.full((*size, 3), 255, np.uint8)
    top, left = (size[0] - 20) // 2, (size[1] - 20) // 2
    wide[top : top + 20, left : left + 20] = middle = noise(20, 20, 3)
    out = base.resize(Image.fromarray(wide), (3, 20, 20), "crop")
    assert np.array_equal(out, middle.transpose(2, 0, 1))


def test_crop_and_stretch_differ():
    image = Image.new("L", (60, 20), 0)
    image.paste(255, (20, 0, 40, 20))  # a white square in the middle third
    assert base.resize(image, (1, 10, 10), "crop").min() > 225
    stretched = base.resize(image, (1, 10, 10), "stretch")
    assert stretched[0, :, 0].max() < 30 and stretched[0, :, 5].min() > 225


def test_downsampling_is_antialiased():
    checks = Image.fromarray(np.indices((640, 640)).sum(0).astype(np.uint8) % 2 * 255)
    out = base.resize(checks, (1, 16, 16), "crop")
    assert out.min() >= 120 and out.max() <= 136


def test_exact_names_both_sizes():
    with pytest.raises(UserError, match=r"30x20 .*not 20x20"):
        base.resize(Image.new("RGB", (30, 20)), (3, 20, 20), "exact")


def pixel(image, channels):
    return base.resize(image, (channels, *image.size[::-1]), "exact")[:, 0, 0].tolist()


@pytest.mark.parametrize(
    "image, channels, wanted",
    [
        (Image.new("RGB", (2, 2), (10, 20, 30)), 3, [10, 20, 30]),
        (Image.new("RGB", (2, 2), (255, 0, 0)), 1, [76]),
        (Image.new("L", (2, 2), 9), 3, [9, 9, 9]),
        (Image.new("1", (2, 2), 1), 1, [255]),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), 3, [255, 255, 255]),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), 3, [255, 0, 0]),
        (Image.new("LA", (2, 2), (0, 0)), 1, [255]),
        (Image.new("RGB", (2, 2), (200, 100, 0)).convert("P", palette=1), 3, None),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), 3, [255, 0, 0]),
        (Image.fromarray(np.full((2, 2), 0x8001, np.uint16)), 1, [0x80]),
        (Image.fromarray(np.full((2, 2), 0x8001, np.int32)), 3, [0x80] * 3),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_modes(image, channels, wanted):
    if wanted is None:
        wanted = list(image.convert("RGB").getpixel((0, 0)))
    assert pixel(image, channels) == wanted


def test_transparent_palette_is_white(tmp_path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "p.png", transparency=1)
    with Image.open(tmp_path / "p.png") as image:
        assert image.mode == "P" and pixel(image, 3) == [255, 255, 255]


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the left becomes the top
    image.save(tmp_path / "a.png", exif=exif)
    out = base.open_image(tmp_path / "a.png", (1, 16, 8), 256, "exact")
    assert out[0, :8].min() == 255 and out[0, 8:].max() == 0


def test_a_large_jpeg_decodes_reduced_to_the_same_picture(tmp_path):
    image = Image.fromarray(noise(128, 128)).resize((1024, 1024))
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    jpg, png = (base.open_image(tmp_path / f"a.{s}", (1, 120, 120), 256) for s in ("jpg", "png"))
    assert np.abs(jpg.astype(int) - png).mean() < 2


@pytest.mark.parametrize("levels", [256, 32, 2, 17])
def test_open_image_levels(tmp_path, levels):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    out = base.open_image(tmp_path / "a.png", (1, 16, 16), levels)[0]
    wanted = {256: values, 32: values >> 3, 2: values >> 7}.get(
        levels, np.round(values / 255 * 16).astype(np.uint8)
    )
    assert out.dtype == np.uint8 and np.array_equal(out, wanted) and out.max() == levels - 1


def test_open_image_errors(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    Image.fromarray(noise(30, 30)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tiff")
    names = ["none.png", "empty.png", "text.png", "eps.png", "cut.png", "float.tiff", "."]
    for name in names:
        with pytest.raises(UserError) as raised:
            base.open_image(tmp_path / name, (1, 8, 8), 256)
        assert str(tmp_path / name) in str(raised.value)
    with pytest.raises(UserError, match=r"eps.png cannot be read as an image \(cannot identify"):
        base.open_image(tmp_path / "eps.png", (1, 8, 8), 256)  # Ghostscript was not asked
    with pytest.raises(UserError, match=r"whole.png: the image is 30x30"):
        base.open_image(tmp_path / "whole.png", (1, 8, 8), 256, "exact")


# ---------------------------------------------------------------- digits


def test_digits(tmp_path):
    parts = {s: digits.build(tmp_path, s) for s in ("train", "test")}
    train, test = check(parts["train"], 1617), check(parts["test"], 180)
    assert parts["train"].shape == (1, 8, 8) and parts["train"].levels == 17
    assert train.max() == 16 and not parts["train"].flip
    from sklearn.datasets import load_digits

    every = load_digits().images.reshape(1797, -1).astype(np.uint8)
    both = np.concatenate([train, test]).reshape(1797, -1)
    assert np.array_equal(every[np.lexsort(every.T)], both[np.lexsort(both.T)])
    assert not np.array_equal(check(digits.build(tmp_path, "test", seed=1)), test)


# ---------------------------------------------------------------- downloads


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
        assert np.array_equal(check(mnist.build(root, "train"), 6), wanted["train"])
        assert asked
        assert str(root) in caplog.text and address in caplog.text
        asked.clear()
        assert np.array_equal(check(mnist.build(root, "test"), 4), wanted["test"])
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
        mnist.build(tmp_path / "data", "train").read()
    assert "100" in screen.getvalue()


def test_files_placed_by_hand_are_enough(tiny_mnist, tmp_path, closed):
    site, wanted, set_mirrors = tiny_mnist
    set_mirrors([closed])
    with pytest.raises(UserError) as raised:
        mnist.build(tmp_path / "data", "train").read()
    message = str(raised.value)
    place = tmp_path / "data" / "MNIST" / "raw"
    assert str(place) in message and closed in message and "data.root" in message
    names = [file.name for file in site.iterdir()]
    assert len(names) == 4 and all(name in message for name in names)
    assert "Connection refused" in message and "\n" not in message
    for name in names:  # do as the message says
        shutil.copy(site / name, place)
    assert np.array_equal(check(mnist.build(tmp_path / "data", "train"), 6), wanted["train"])


def corrupt(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("damage", [corrupt, cut])
def test_damaged_download(tiny_mnist, tmp_path, damage):
    site, _, set_mirrors = tiny_mnist
    damage(site / "t10k-images-idx3-ubyte.gz")
    with served(site) as (address, _):
        set_mirrors([address])
        with pytest.raises(UserError, match=r"could not be downloaded .*corrupted.*by hand"):
            mnist.build(tmp_path / "data", "train").read()


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
            mnist.build(tmp_path / "data", "train").read()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    "damage", [cut, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes() + b"x")]
)
def test_damaged_raw_file(tiny_mnist, tmp_path, closed, damage, name):
    site, wanted, set_mirrors = tiny_mnist
    with served(site) as (address, _):
        set_mirrors([address])
        mnist.build(tmp_path, "train").read()
    set_mirrors([closed])
    damage(tmp_path / "MNIST" / "raw" / name)
    with pytest.raises(UserError, match=rf"damaged \({name} has \d+ bytes, not \d+\)") as raised:
        mnist.build(tmp_path, "train").read()
    assert str(tmp_path / "MNIST" / "raw") in str(raised.value)


def test_damaged_raw_header(tiny_mnist, tmp_path, closed):
    site, _, set_mirrors = tiny_mnist
    with served(site) as (address, _):
        set_mirrors([address])
        mnist.build(tmp_path, "train").read()
    raw = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    raw.write_bytes(b"\xff" * 16 + raw.read_bytes()[16:])
    with pytest.raises(UserError, match="damaged"):
        mnist.build(tmp_path, "train").read()


def test_wrong_number_of_images(tiny_mnist, tmp_path, monkeypatch):
    site, _, set_mirrors = tiny_mnist
    monkeypatch.setattr(torchvision_source, "IDX_COUNTS", {"train": 60000, "test": 10000})
    with served(site) as (address, _):
        set_mirrors([address])
        with pytest.raises(UserError, match=r"\(6, 1, 28, 28\), not \(60000, 1, 28, 28\)"):
            mnist.build(tmp_path, "train").read()


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
            mnist.build(tmp_path, "train").read()


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
        module(name).build(Path("data"), "test").read()
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
        pixels = check(module("cifar10").build(root, "train"), 3)
    assert np.array_equal(pixels, wanted[:3])
    assert np.array_equal(check(module("cifar10").build(root, "test"), 2), wanted[3:])
    corrupt(root / "cifar-10-batches-py" / "data_batch_1")
    (root / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(UserError, match=r"are damaged .*Delete cifar-10-batches-py there"):
        module("cifar10").build(root, "train").read()


def test_svhn_from_its_file(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision import datasets

    wanted = noise(3, 3, 32, 32)
    labels = np.ones((3, 1), np.uint8)
    savemat(tmp_path / "test_32x32.mat", {"X": wanted.transpose(2, 3, 1, 0), "y": labels})
    entry = ["http://127.0.0.1:1/", "test_32x32.mat", md5(tmp_path / "test_32x32.mat")]
    monkeypatch.setattr(datasets.SVHN, "split_list", {"test": entry})
    monkeypatch.setattr(module("svhn"), "COUNTS", {"test": 3})
    assert np.array_equal(check(module("svhn").build(tmp_path, "test"), 3), wanted)


@shared
def test_real_mnist_is_read_where_it_cannot_be_written():
    pixels = check(mnist.build(SHARED, "test"), 10000)
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
        mnist.build(tmp_path, "test").read()


# ---------------------------------------------------------------- npz


def saved(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


@pytest.mark.parametrize(
    "array, layout, shape, wanted",
    [
        (noise(9, 6, 5), "nhwc", (1, 6, 5), lambda a: a[:, None]),
        (noise(9, 6, 5), "nchw", (1, 6, 5), lambda a: a[:, None]),
        (noise(9, 6, 5, 1), "nhwc", (1, 6, 5), lambda a: a.transpose(0, 3, 1, 2)),
        (noise(9, 6, 5, 3), "nhwc", (3, 6, 5), lambda a: a.transpose(0, 3, 1, 2)),
        (noise(9, 3, 6, 5), "nchw", (3, 6, 5), lambda a: a),
        (
            np.asfortranarray(noise(9, 6, 5, 3)),
            "nhwc",
            (3, 6, 5),
            lambda a: a.transpose(0, 3, 1, 2),
        ),
    ],
)
def test_npz_layouts(tmp_path, array, layout, shape, wanted):
    other = array[::-1][:4]
    path = saved(tmp_path / "a.npz", x_train=array, x_test=other, y_train=np.zeros(9))
    for split, source in (("train", array), ("test", other)):
        images = npz.build(tmp_path, split, path=path, layout=layout)
        assert images.shape == shape and images.levels == 256 and not images.flip
        assert np.array_equal(check(images), wanted(source))


def test_npz_without_a_test_split_holds_out_a_tenth(tmp_path):
    array = np.arange(40, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    path = saved(tmp_path / "a.npz", x_train=array)

    def values(split, seed):
        return check(npz.build(tmp_path, split, seed=seed, path=path))[:, 0, 0, 0].tolist()

    test, train = values("test", 0), values("train", 0)
    assert len(test) == 4 and sorted(test + train) == list(range(40))
    assert values("test", 0) == test != values("test", 1)


def test_npz_shape_comes_from_the_header(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.npz", x_train=noise(100, 8, 8, 3))
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **k: pytest.fail("pixels read"))
    assert npz.build(tmp_path, "train", path=path).shape == (3, 8, 8)


GOOD = noise(9, 8, 8, 3)


@pytest.mark.parametrize(
    "arrays, options, message",
    [
        ({"x": GOOD, "y": GOOD}, {}, r"no array x_train \(it has x, y\).*np.savez"),
        ({"x_test": GOOD}, {}, r"no array x_train \(it has x_test\)"),
        ({"x_train": GOOD / 255}, {}, r"x_train in .*a.npz has the type float64, not uint8"),
        ({"x_train": GOOD.astype(object)}, {}, r"x_train in .* has the type object"),
        ({"x_train": GOOD, "x_test": GOOD / 255}, {}, r"x_test in .*float64"),
        ({"x_train": GOOD.reshape(9, -1)}, {}, r"x_train .*shape \(9, 192\): images are"),
        ({"x_train": GOOD[None]}, {}, r"x_train .*shape \(1, 9, 8, 8, 3\): images are"),
        ({"x_train": np.uint8(3)}, {}, r"x_train .*shape \(\): images are"),
        ({"x_train": noise(9, 8, 8, 4)}, {}, r"4 channels .*where 1 or 3 are allowed"),
        ({"x_train": noise(9, 3, 8, 8)}, {}, r"8 channels .*nhwc: set data.layout: nchw"),
        ({"x_train": GOOD}, {"layout": "nchw"}, r"8 channels .*nchw: set data.layout: nhwc"),
        ({"x_train": GOOD, "x_test": noise(9, 9, 8, 3)}, {}, r"8x8 with 3 .*x_test 9x8 with 3"),
        ({"x_train": GOOD[:0]}, {}, r"no pixels"),
        ({"x_train": GOOD[:1]}, {}, r"one image"),
    ],
)
def test_npz_refuses(tmp_path, arrays, options, message):
    path = saved(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message) as raised:
        npz.build(tmp_path, "train", path=path, **options)
    assert str(path) in str(raised.value)


def broken(kind, path):
    """Damage an .npz in the way of `kind`; returns it."""
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
        return path
    (np.savez if kind == "bytes" else np.savez_compressed)(path, x_train=noise(50, 8, 8, 3))
    if kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, GOOD)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif kind in ("bytes", "deflate"):
        corrupt(path)
    elif kind in ("short", "header"):
        with zipfile.ZipFile(path) as archive:
            data = archive.read("x_train.npy")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x_train.npy", data[:-10] if kind == "short" else b"junk" * 60)
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", r"there is no file"),
        ("folder", r"cannot be opened"),
        ("text", r"not an .npz file, or is cut short"),
        ("empty", r"not an .npz file, or is cut short"),
        ("npy", r"not an .npz file"),
        ("cut", r"not an .npz file, or is cut short"),
        ("bytes", r"x_train in .* damaged .*CRC"),
        ("deflate", r"x_train in .* damaged"),
        ("short", r"x_train in .* is damaged"),
        ("header", r"x_train in .* is damaged or not a plain array"),
    ],
)
def test_npz_damage(tmp_path, kind, message):
    path = broken(kind, tmp_path / "a.npz")
    with pytest.raises(UserError, match=message) as raised:
        images = npz.build(tmp_path, "train", path=path)
        assert kind in ("bytes", "deflate"), "all else is seen before the pixels are read"
        images.read()
    assert str(path) in str(raised.value)


@shared
def test_real_cifar10():
    start = time.perf_counter()
    images = npz.build(SHARED, "test", path=SHARED / "cifar10.npz")
    assert images.shape == (3, 32, 32) and time.perf_counter() - start < 0.5
    pixels = check(images, 10000)
    with np.load(SHARED / "cifar10.npz") as file:
        assert np.array_equal(pixels[7, 2], file["x_test"][7, :, :, 2])


# ---------------------------------------------------------------- folder


def draw(path, size=(12, 12), mode="RGB", seed=0, **options):
    """Save an image of one colour, which every resizing keeps: the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, seed).convert(mode).save(path, **options)


def grow(root, count=20, suffix=".png"):
    for i in range(count):
        draw(root / f"{i:03}{suffix}", seed=i)
    return root


def values(images):
    return check(images)[:, 0, 0, 0].tolist()


@pytest.fixture
def decoded(monkeypatch):
    """The paths decoded."""
    paths = []
    decode = base.decode

    def counted(path, *args):
        paths.append(path)
        return decode(path, *args)

    monkeypatch.setattr(base, "decode", counted)
    return paths


def test_folder_of_mixed_images(tmp_path):
    tree = tmp_path / "tree"
    draw(tree / "b" / "deep" / "one.PNG", (20, 30), "L", 10)
    draw(tree / "a.JPeG", (64, 20), "RGB", 20, quality=100)
    draw(tree / "c.bmp", (8, 8), "RGB", 30)
    draw(tree / "d.webp", (9, 8), "RGB", 40, lossless=True)
    draw(tree / "e.png", (8, 8), "P", 51)
    draw(tree / "f.png", (8, 8), "RGBA", 60)
    draw(tree / "Z.png", (3, 3), "LA", 70)
    draw(tree / ".hidden.png")
    draw(tree / ".thumbs" / "x.png")
    (tree / "notes.txt").write_text("not an image")
    draw(tree / "test" / "t.png", seed=99)
    for channels in (3, 1):
        images = folder.build(tmp_path, "train", path=tree, size=8, channels=channels)
        assert images.shape == (channels, 8, 8) and images.levels == 256 and not images.flip
        # by relative path, as bytes sort: Z, a, b/deep/one, c, d, e, f
        assert np.allclose(values(images), [70, 20, 10, 30, 40, 51, 60], atol=1)
        assert isinstance(images.read(), np.memmap) and not images.read().flags.writeable


def test_folder_resize_policies(tmp_path):
    image = Image.new("L", (36, 12), 0)
    image.paste(255, (12, 0, 24, 12))
    (tmp_path / "train").mkdir()
    draw(tmp_path / "test" / "t.png")
    image.save(tmp_path / "train" / "a.png")
    build = functools.partial(folder.build, tmp_path, "train", path=tmp_path, size=12, channels=1)
    assert check(build(resize="crop")).min() > 225
    assert check(build(resize="stretch")).min() == 0
    with pytest.raises(
        UserError, match=r"1 of 1 images .* not 12x12, the first train/a.png \(36x12\)"
    ):
        build(resize="exact").read()


def test_folder_exact(tmp_path):
    tree = grow(tmp_path / "tree")
    assert len(values(folder.build(tmp_path, "train", path=tree, size=12, resize="exact"))) == 18
    for name in ("004", "007"):
        draw(tree / "train" / f"{name}.png", (12, 13))
    grow(tree / "train", 4)
    with pytest.raises(UserError, match=r"data.size: 2 of \d+ .*first train/004.png \(12x13\)"):
        for split in ("train", "test"):
            folder.build(tmp_path, split, seed=3, path=tree, size=12, resize="exact").read()


def test_folder_holds_out_a_stable_tenth(tmp_path):
    tree = grow(tmp_path / "tree", 30)
    build = functools.partial(folder.build, tmp_path, path=tree, size=4)
    test, train = values(build("test")), values(build("train"))
    assert len(test) == 3 and sorted(test + train) == list(range(30))
    assert train == sorted(train) and test == sorted(test)
    assert values(build("test", seed=1)) != test
    elsewhere = tmp_path / "copy"  # another machine: other times, another place
    shutil.copytree(tree, elsewhere, copy_function=shutil.copy)
    copy = functools.partial(folder.build, tmp_path, path=elsewhere, size=4)
    assert values(copy("test")) == test
    assert copy("test").key == build("test").key
    keys = {build("test").key, build("train").key, build("test", seed=1).key}
    keys.add(folder.build(tmp_path, "test", path=tree, size=5).key)
    assert len(keys) == 4
    (tree / "000.png").write_bytes(b"")  # an unreadable file keeps its place in the split
    (tree / f"{test[0]:03}.png").write_bytes(b"")
    assert values(build("test")) == test[1:]


@pytest.mark.parametrize(
    "folders, train, test",
    [
        (("train", "test", ""), {"train"}, {"test"}),
        (("test", "", "val"), {"", "val"}, {"test"}),
        (("test", "", "val/test"), {"", "val/test"}, {"test"}),
        (("train", "", "val"), {"train"}, {"train"}),
        (("", "val", "deep/test"), {"", "val", "deep/test"}, {"", "val", "deep/test"}),
    ],
)
def test_folder_train_and_test(tmp_path, folders, train, test):
    for n, name in enumerate(folders):
        for i in range(10):
            draw(tmp_path / "tree" / name / f"{i}.png", seed=10 * n + i)
    build = functools.partial(folder.build, tmp_path, path=tmp_path / "tree", size=4)
    found = {split: values(build(split)) for split in ("train", "test")}
    parts = {s: {folders[v // 10] for v in vs} for s, vs in found.items()}
    assert parts["train"] == train and parts["test"] <= test
    assert not set(found["train"]) & set(found["test"])
    assert len(found["train"] + found["test"]) == 10 * len(train | test)


def test_folder_test_without_train_is_whole(tmp_path):
    draw(tmp_path / "test" / "a.png", seed=1)
    with pytest.raises(UserError, match="no image in"):
        folder.build(tmp_path, "train", path=tmp_path, size=4)
    draw(tmp_path / "b.png", seed=2)
    assert values(folder.build(tmp_path, "train", path=tmp_path, size=4)) == [2]
    assert values(folder.build(tmp_path, "test", path=tmp_path, size=4)) == [1]


def damaged_tree(root):
    grow(root / "train")
    draw(root / "test" / "t.png")
    (root / "train" / "003.png").write_bytes(b"")
    (root / "train" / "005.png").write_text("not an image")
    whole = io.BytesIO()
    Image.fromarray(noise(50, 50, 3)).save(whole, "JPEG")
    (root / "train" / "007.jpg").write_bytes(whole.getvalue()[:1000])
    (root / "train" / "gone.png").symlink_to(root / "nowhere.png")
    return root


def test_folder_names_and_counts_unreadable_files(tmp_path, caplog, decoded):
    tree = damaged_tree(tmp_path / "tree")
    for start in ("first", "second"):
        caplog.clear()
        images = folder.build(tmp_path, "train", path=tree, size=4)
        assert values(images) == [i for i in range(20) if i not in (3, 5)]
        assert "4 of 22 train images" in caplog.text, start
        for name in ("003.png", "005.png", "007.jpg", "gone.png"):
            assert f"train/{name}: " in caplog.text
        assert str(tree) in caplog.text
    assert len(decoded) == 22  # the second start remembered them
    assert "t.png" not in caplog.text


def test_folder_with_no_readable_image(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("no")
    with pytest.raises(UserError, match=r"no image in .* can be read \(\d.png: cannot identify"):
        folder.build(tmp_path, "train", path=tmp_path, size=4).read()
    assert not list(Path(os.environ["FLOWTRAIN_CACHE"]).rglob("*.npy"))


def test_folder_decodes_once(tmp_path, decoded):
    tree = grow(tmp_path / "tree")
    before = sorted(p for p in tree.rglob("*"))

    def start(size=4, **options):
        decoded.clear()
        images = folder.build(tmp_path, "train", path=tree, size=size, **options)
        assert not decoded, "build decodes nothing"
        return values(images), len(decoded)

    first, count = start()
    assert count == 18 and start() == (first, 0)
    assert sorted(p for p in tree.rglob("*")) == before, "nothing is written into the user's tree"
    for options in ({"size": 5}, {"channels": 1}, {"resize": "stretch"}):
        assert start(**options)[1] == 18
    changed = tree / f"{first[0]:03}.png"
    time_ = changed.stat().st_mtime_ns
    draw(changed, seed=200)
    os.utime(changed, ns=(time_ + 1, time_ + 1))
    assert start() == ([200, *first[1:]], 18), "a file's time counts"
    draw(changed, (40, 40), seed=201)
    os.utime(changed, ns=(time_ + 1, time_ + 1))
    assert start()[1] == 18, "a file's size counts"
    draw(tree / "new.png", seed=100)
    assert start()[1] == 18 + 1, "a new file counts"  # 21 images, 2 of them for test


def test_folder_caches_of_two_folders_are_apart(tmp_path):
    for name, seed in (("a", 10), ("b", 20)):  # as from an archive that sets every time to 0
        draw(tmp_path / name / "test" / "0.bmp", seed=seed)
        os.utime(tmp_path / name / "test" / "0.bmp", (0, 0))
        images = folder.build(tmp_path, "test", path=tmp_path / name, size=4)
        assert values(images) == [seed]


def caches():
    return list(Path(os.environ["FLOWTRAIN_CACHE"], "folder").iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: cut(c / "images.npy"),
        lambda c: (c / "images.npy").write_bytes(b""),
        lambda c: (c / "images.npy").unlink(),
        lambda c: (c / "index.json").write_text('{"count"'),
        lambda c: (c / "index.json").write_text('{"count": 5, "unreadable": {}}'),
        lambda c: (c / "index.json").unlink(),
    ],
)
def test_folder_rebuilds_a_damaged_cache(tmp_path, decoded, damage):
    tree = grow(tmp_path / "tree")
    images = folder.build(tmp_path, "train", path=tree, size=4)
    first = values(images)
    [cache] = caches()
    damage(cache)
    decoded.clear()
    assert values(images) == first and len(decoded) == 18
    assert values(images) == first and len(decoded) == 18, "the new one is used"
    assert caches() == [cache]


def test_folder_interrupted(tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(folder, "CHUNK", 4)
    images = folder.build(tmp_path, "train", path=grow(tmp_path / "tree"), size=4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            images.read()
    assert not caches()
    assert len(values(images)) == 18 and len(caches()) == 1


READER = """
import hashlib, sys, time
from pathlib import Path
from flowtrain.datasets import base, folder
decode = base.decode
def slow(*args):
    print("decoding", flush=True)
    time.sleep(float(sys.argv[2]))
    return decode(*args)
base.decode = slow
pixels = folder.build(Path(), "train", path=Path(sys.argv[1]), size=4).read()
print(hashlib.sha256(pixels.tobytes()).hexdigest())
"""


def reader(tree, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", READER, str(tree), str(seconds)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip


def test_folder_killed_midway_and_built_twice_at_once(tmp_path, decoded):
    tree = grow(tmp_path / "tree", 100)
    killed = reader(tree, 0.2)
    assert killed.stdout.readline() == "decoding\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    [left] = caches()
    assert left.name.endswith(".tmp")
    os.utime(left, (0, 0))
    for file in left.iterdir():
        os.utime(file, (0, 0))  # long ago: the next start removes it

    both = [reader(tree, 0.02) for _ in range(2)]
    ends = [process.communicate(timeout=30) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    sums = {out.split()[-1] for out, _ in ends}
    assert all(out.count("decoding") == 90 for out, _ in ends), "both found no cache"
    pixels = check(folder.build(tmp_path, "train", path=tree, size=4), 90)
    assert sums == {hashlib.sha256(pixels.tobytes()).hexdigest()}
    assert not decoded and len(caches()) == 1


def test_folder_full_disk(tmp_path, monkeypatch):
    images = folder.build(tmp_path, "train", path=grow(tmp_path / "tree"), size=4)

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        images.read()
    assert not caches()


def test_folder_cache_place(tmp_path, monkeypatch):
    images = folder.build(tmp_path, "train", path=grow(tmp_path / "tree"), size=4)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWTRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="FLOWTRAIN_CACHE"):
        images.read()
    monkeypatch.delenv("FLOWTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    images.read()
    assert list((tmp_path / "xdg" / "flowtrain").rglob("images.npy"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    images.read()
    assert list((tmp_path / "home" / ".cache" / "flowtrain").rglob("images.npy"))


def test_folder_a_failing_disk_is_not_an_unreadable_image(tmp_path, monkeypatch):
    def failing(*args):
        raise OSError(errno.EIO, "Input/output error")

    images = folder.build(tmp_path, "train", path=grow(tmp_path / "tree"), size=4)
    monkeypatch.setattr(base, "decode", failing)
    with pytest.raises(RunError, match="Input/output error"):
        images.read()


def test_folder_progress(tmp_path, monkeypatch, caplog, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    images = folder.build(tmp_path, "train", path=grow(tmp_path / "tree"), size=4)
    caplog.set_level(logging.INFO, "flowtrain")
    screen = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        images.read()
    assert "decoding" in screen.getvalue()
    shutil.rmtree(caches()[0])
    images.read()
    assert "decoding 18 images" in caplog.text
    assert capsys.readouterr() == ("", "")


def test_folder_follows_links_once(tmp_path):
    grow(tmp_path / "real" / "train", 3)
    draw(tmp_path / "tree" / "test" / "t.png")
    (tmp_path / "tree" / "train").symlink_to(tmp_path / "real" / "train")
    (tmp_path / "real" / "train" / "round").symlink_to(tmp_path / "real" / "train")
    assert values(folder.build(tmp_path, "train", path=tmp_path / "tree", size=4)) == [0, 1, 2]


@pytest.mark.parametrize(
    "make, size, message",
    [
        (lambda p: None, 4, r"data.path: .*tree is no folder"),
        (lambda p: p.write_text(""), 4, r"data.path: .*tree is not a folder"),
        (lambda p: p.mkdir(), 4, r"data.path: there is no image in .*tree \(looked for .png"),
        (lambda p: (p / "train").mkdir(parents=True), 4, r"no image in .*tree/train"),
        (lambda p: draw(p / "a.png"), 4, r"data.path: .*one image, which cannot be split"),
        (grow, 0, r"data.size is 0"),
    ],
)
def test_folder_refuses(tmp_path, make, size, message):
    make(tmp_path / "tree")
    with pytest.raises(UserError, match=message):
        folder.build(tmp_path, "train", path=tmp_path / "tree", size=size)

"""Tiny data sets of every kind, with the same images, and damage to their files."""

import gzip
import hashlib
import io
import itertools
import os
import pickle
import struct
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
from PIL import Image

from flowtrain.config import Data, component
from flowtrain.datasets import imagenet, npz, torchvision_source


def build(name, *arguments, **options):
    return component(Data, name).build(*arguments, **options)


def check(images, count=None):
    """What every data set promises about its pixels; returns those of this part."""
    pixels = images.read()
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert pixels.shape[1:] == images.shape and pixels.max() < images.num_bins
    pixels = pixels if images.rows is None else pixels[images.rows()]
    assert count is None or len(pixels) == count
    return pixels


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def corrupt(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def empty(path):
    path.write_bytes(b"")


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


EVIL = np.array([Evil()])


COUNTS = {"train": 23, "test": 6}
PIXELS = {part: noise(count, 3, 32, 32, seed=count) for part, count in COUNTS.items()}
LABELS = {part: np.arange(count) * 3 % 10 for part, count in COUNTS.items()}
ARRAYS = {f"x_{part}": pixels.transpose(0, 2, 3, 1) for part, pixels in PIXELS.items()}
ARRAYS |= {f"y_{part}": labels for part, labels in LABELS.items()}


def encoded(pixels, kind="PNG"):
    """The bytes of an image file with the pixels (C, H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, kind)
    return buffer.getvalue()


def an_npz(folder, monkeypatch, save=np.savez_compressed):
    monkeypatch.setattr(npz, "MAPPED", 0)
    save(folder / "a.npz", **ARRAYS)
    return {"name": "npz", "path": folder / "a.npz"}


def shards(folder, monkeypatch):
    """The parts of x_train are in order: 2 comes before 10."""
    monkeypatch.setattr(npz, "MAPPED", 0)
    for key, array in ARRAYS.items():
        parts = np.split(array, range(1, 13)) if key.endswith("train") else [array]
        for number, part in enumerate(parts):
            np.save(folder / (f"{key}-{number}.npy" if len(parts) > 1 else f"{key}.npy"), part)
    np.save(folder / "x_train_old.npy", ARRAYS["x_test"])  # no part
    return {"name": "npz", "path": folder}


def a_folder(folder, monkeypatch):
    for part, pixels in PIXELS.items():
        (folder / part).mkdir()
        for number, image in enumerate(pixels):
            (folder / part / f"{number:02}.png").write_bytes(encoded(image))
    return {"name": "folder", "path": folder, "size": 32}


def a_saved_data_set(folder, monkeypatch):
    """Of the package `datasets`."""
    import datasets

    features = {"image": datasets.Image(), "digit": datasets.ClassLabel(num_classes=10)}
    parts = datasets.DatasetDict()
    for part, pixels in PIXELS.items():
        images = [{"bytes": encoded(each), "path": None} for each in pixels]
        rows = {"image": images, "digit": LABELS[part].tolist()}
        parts[part] = datasets.Dataset.from_dict(rows, datasets.Features(features))
    parts.save_to_disk(folder)
    return {"name": "hub", "path": folder, "size": 32, "label": "digit"}


def npz_file(pixels, labels, save=np.savez):
    """A batch of ImageNet: flat images, channel by channel, labels from 1, and the mean image."""
    buffer = io.BytesIO()
    flat = pixels.reshape(len(pixels), -1)
    save(buffer, data=flat, labels=labels, mean=flat.mean(0))
    return buffer.getvalue()


def official(home, version, monkeypatch):
    """Makes the archives in `home` the official ones, by their counts, sizes and checksums."""
    edition = imagenet.EDITIONS[32, version]
    archives = {}
    for part, names in edition.archives.items():
        data = {name: (home / name).read_bytes() for name in names}
        archives[part] = {n: (len(d), hashlib.sha256(d).hexdigest()) for n, d in data.items()}
    small = replace(edition, counts=COUNTS, archives=archives)
    monkeypatch.setitem(imagenet.EDITIONS, (32, version), small)


def oord(folder, monkeypatch):
    home = folder / "imagenet32"
    home.mkdir(exist_ok=True)
    for part, name in (("train", "train_32x32"), ("test", "valid_32x32")):
        with tarfile.open(home / f"{name}.tar", "w") as tar:
            directory = tarfile.TarInfo(name)
            directory.type = tarfile.DIRTYPE
            tar.addfile(directory)
            for number, image in reversed(list(enumerate(PIXELS[part]))):
                info = tarfile.TarInfo(f"{name}/{number:05}.png")
                info.size = len(encoded(image))
                tar.addfile(info, io.BytesIO(encoded(image)))
    official(home, "oord2016", monkeypatch)
    return {"name": "imagenet32", "version": "oord2016"}


def chrabaszcz(folder, monkeypatch):
    home = folder / "imagenet32"
    home.mkdir(exist_ok=True)
    x, y = PIXELS["train"], LABELS["train"] + 1
    cuts = [0, 2, 3, 5, 7, 9, 11, 13, 15, 17, 23]  # ten batches, so that 10 comes after 9
    batches = {}
    for number, (a, b) in enumerate(itertools.pairwise(cuts), 1):
        batches[f"train_data_batch_{number}.npz"] = npz_file(x[a:b], y[a:b])
    whole = npz_file(PIXELS["test"], LABELS["test"] + 1, np.savez_compressed)
    for name, files in (("train", dict(sorted(batches.items()))), ("val", {"val_data.npz": whole})):
        path = home / f"Imagenet32_{name}_npz.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, data in files.items():
                archive.writestr(f"{path.stem}/{file}", data)
    official(home, "chrabaszcz2017", monkeypatch)
    return {"name": "imagenet32", "version": "chrabaszcz2017"}


TORCHVISION = {  # class, kind, and folder under data.root
    "mnist": ("MNIST", "IDX", "MNIST/raw"),
    "fashion_mnist": ("FashionMNIST", "IDX", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "CIFAR", ""),
    "cifar100": ("CIFAR100", "CIFAR", ""),
    "svhn": ("SVHN", "SVHN", ""),
}


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def downloads(name, site, monkeypatch):
    """Makes the files that torchvision downloads, and returns their few images by part."""
    from scipy.io import savemat
    from torchvision import datasets

    source, kind = getattr(datasets, TORCHVISION[name][0]), TORCHVISION[name][1]
    monkeypatch.setattr(torchvision_source, f"{kind}_COUNTS", COUNTS)
    site.mkdir()
    if kind == "IDX":
        grey = {part: pixels[:, :1, 2:30, 2:30] for part, pixels in PIXELS.items()}
        files = {}
        for part, prefix in (("train", "train"), ("test", "t10k")):
            head = struct.pack(">4i", 0x803, COUNTS[part], 28, 28)
            files[f"{prefix}-images-idx3-ubyte"] = head + grey[part].tobytes()
            labels = LABELS[part].astype(np.uint8).tobytes()
            files[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2i", 0x801, COUNTS[part]) + labels
        for file, data in files.items():
            (site / f"{file}.gz").write_bytes(gzip.compress(data))
        sums = [(f"{file}.gz", md5(site / f"{file}.gz")) for file in files]
        monkeypatch.setattr(source, "resources", sums)
        sizes = {file: len(data) for file, data in files.items()}
        monkeypatch.setattr(torchvision_source, "IDX_SIZES", sizes)
        return grey
    if kind == "SVHN":
        splits = {}
        for part, pixels in PIXELS.items():
            path = site / f"{part}_32x32.mat"
            savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": LABELS[part][:, None]})
            splits[part] = ["http://127.0.0.1:1/", path.name, md5(path)]
        monkeypatch.setattr(source, "split_list", splits)
        return PIXELS
    inside = site.with_name("inside")
    inside.mkdir()
    labels, meta = "labels" if name == "cifar10" else "fine_labels", source.meta
    for part, pixels in PIXELS.items():
        rows = {"data": pixels.reshape(len(pixels), -1), labels: LABELS[part].tolist()}
        (inside / part).write_bytes(pickle.dumps(rows))
        monkeypatch.setattr(source, f"{part}_list", [[part, md5(inside / part)]])
    (inside / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: ["cat"]}))
    monkeypatch.setattr(source, "meta", {**meta, "md5": md5(inside / meta["filename"])})
    with tarfile.open(site / source.filename, "w:gz") as archive:
        archive.add(inside, source.base_folder)
    monkeypatch.setattr(source, "tgz_md5", md5(site / source.filename))
    return PIXELS

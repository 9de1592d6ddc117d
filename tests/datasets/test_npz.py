"""A user's own arrays."""

import contextlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import check, corrupt, noise
from helpers import SHARED, shared

from flowtrain.datasets import npz
from flowtrain.errors import UserError
from flowtrain.system import capacity


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


def test_npz_keeps_equal_images_on_one_side(tmp_path):
    array = noise(50, 4, 4)
    labels = np.arange(50)
    path = saved(tmp_path / "a.npz", x_train=np.r_[array, array], y_train=np.r_[labels, labels])
    parts = {split: npz.build(tmp_path, split, path=path) for split in ("train", "test")}
    found = {split: {x.tobytes() for x in check(part)} for split, part in parts.items()}
    assert not found["train"] & found["test"]
    assert {split: len(check(part)) for split, part in parts.items()} == {"train": 90, "test": 10}
    for part in parts.values():
        assert np.array_equal(array[part.labels()[part.rows()]][:, None], check(part))


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


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_a_changed_byte_anywhere_is_one_error(tmp_path, method):
    """Whatever the codec raises."""
    path = tmp_path / "a.npz"
    buffer = io.BytesIO()
    np.save(buffer, noise(50, 4, 4))
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x_train.npy", buffer.getvalue())
    data = path.read_bytes()
    refused = 0
    for position in range(0, len(data), 3):
        for flip in (1, 128, 255):
            damaged = bytearray(data)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            try:
                npz.build(tmp_path, "train", path=path).read()
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 600
    assert refused > len(data) // 2


def test_npz_with_two_arrays_of_a_name(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for seed in (0, 1):
            buffer = io.BytesIO()
            np.save(buffer, noise(9, 4, 4))
            with pytest.warns(UserWarning, match="Duplicate") if seed else contextlib.nullcontext():
                archive.writestr("x_train.npy", buffer.getvalue())
    with pytest.raises(UserError, match=r"a.npz has 2 arrays x_train"):
        npz.build(tmp_path, "train", path=path)


def claiming(path: Path, size: int) -> Path:
    """A small .npz file whose directory and header say that x_train has `size` bytes."""
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (size // 100, 10, 10)}
    np.lib.format.write_array_header_1_0(buffer, header)
    start = buffer.tell()
    buffer.write(bytes(1000))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x_train.npy", "w", force_zip64=True) as file:
            file.write(buffer.getvalue())
        archive.filelist[0].file_size = start + size
    return path


@pytest.mark.parametrize("size", [10**11, 10**14])
def test_a_header_that_claims_more_than_the_memory(tmp_path, size, monkeypatch):
    path = claiming(tmp_path / "a.npz", size)
    wanted = rf"x_train in .*a.npz takes {size / 2**30:.1f} GiB, more than half of the memory"
    with pytest.raises(UserError, match=wanted):
        npz.build(tmp_path, "train", path=path)
    # On a machine that has so much, the array is not allocated, or the missing bytes are noticed.
    monkeypatch.setattr(capacity, "total", lambda: 2**60)
    with pytest.raises(UserError, match="x_train in .* (does not fit into memory|is damaged)"):
        npz.build(tmp_path, "train", path=path).read()


@pytest.mark.parametrize("layout, copies", [("nhwc", 2), ("nchw", 1)])
def test_the_copy_in_another_order_counts(tmp_path, layout, copies, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez(path, x_train=np.zeros((10, 3, 3, 3), np.uint8))
    monkeypatch.setattr(capacity, "total", lambda: 2 * copies * 270)
    npz.build(tmp_path, "train", path=path, layout=layout)
    monkeypatch.setattr(capacity, "total", lambda: 2 * copies * 270 - 1)
    with pytest.raises(UserError, match="more than half of the memory"):
        npz.build(tmp_path, "train", path=path, layout=layout)


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero"])
def test_npz_is_a_regular_file(tmp_path, kind):
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(UserError, match=r"cannot be opened \(.*not a regular file"):
        npz.build(tmp_path, "train", path=path)


@shared
def test_real_cifar10():
    images = npz.build(SHARED, "test", path=SHARED / "cifar10.npz")
    assert images.shape == (3, 32, 32)
    pixels = check(images, 10000)
    with np.load(SHARED / "cifar10.npz") as file:
        assert np.array_equal(pixels[7, 2], file["x_test"][7, :, :, 2])

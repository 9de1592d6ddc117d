"""A user's own arrays."""

import contextlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import check, corrupt, cut, noise
from helpers import SHARED, shared

from flowtrain.datasets import base, npz
from flowtrain.datasets.mapped import Mapped
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
        ({"x_train": GOOD / 255}, {}, r"a.npz: x_train has the type float64, not uint8"),
        ({"x_train": GOOD.astype(object)}, {}, r"x_train has the type object"),
        ({"x_train": GOOD, "x_test": GOOD / 255}, {}, r"x_test has the type float64"),
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
        ("missing", r"there is no such file"),
        ("folder", r"has no array x_train \(it has nothing\).*x_train.npy"),
        ("text", r"not an .npz or .npy file, or is cut short"),
        ("empty", r"not an .npz or .npy file, or is cut short"),
        ("cut", r"not an .npz or .npy file, or is cut short"),
        ("bytes", r"x_train is damaged .*CRC"),
        ("deflate", r"x_train is damaged"),
        ("short", r"x_train is damaged"),
        ("header", r"x_train is damaged or not a plain array"),
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
@pytest.mark.run  # takes long
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
    with pytest.raises(UserError, match=r"a.npz: two of its arrays have one name"):
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
    wanted = rf"a.npz: x_train takes {size / 2**30:.1f} GiB, more than half of the memory"
    with pytest.raises(UserError, match=wanted):
        npz.build(tmp_path, "train", path=path)
    # On a machine that has so much, the array is not allocated, or the missing bytes are noticed.
    monkeypatch.setattr(capacity, "total", lambda: 2**60)
    with pytest.raises(UserError, match="x_train (does not fit into memory|is damaged)"):
        npz.build(tmp_path, "train", path=path).read()


@pytest.mark.parametrize("layout, copies", [("nhwc", 2), ("nchw", 1)])
def test_the_copy_in_another_order_counts(tmp_path, layout, copies, monkeypatch):
    path = saved(tmp_path / "a.npz", x_train=np.zeros((10, 3, 3, 3), np.uint8))
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


# --- files that are not compressed ---------------------------------------------------------------


@pytest.fixture
def mapped(monkeypatch):
    """Arrays of any size are mapped, if they are not compressed."""
    monkeypatch.setattr(npz, "MAPPED", 0)


def forms(folder, x, x_test=None, y=None):
    """The same arrays in every form that is not compressed: paths by name."""
    named = {"x_train": x, "x_test": x_test, "y_train": y}
    arrays = {key: value for key, value in named.items() if value is not None}
    np.savez(folder / "a.npz", **arrays)
    found = {"npz": folder / "a.npz"}
    for form, cuts in {"folder": [], "shards": [1, *range(3, 13)]}.items():
        (folder / form).mkdir()
        for key, value in arrays.items():
            parts = np.split(value, cuts) if cuts and key[-5:] == "train" else [value]
            for number, part in enumerate(parts):
                name = f"{key}-{number}" if len(parts) > 1 else key
                np.save(folder / form / f"{name}.npy", part)
        found[form] = folder / form
    if len(arrays) == 1:
        np.save(folder / "a.npy", x)
        found["npy"] = folder / "a.npy"
    return found


@pytest.mark.parametrize("own_test", [True, False])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_every_form_has_the_same_images(tmp_path, mapped, own_test, layout):
    """Also the parts of an array are in order: 2 comes before 10."""
    x = noise(40, *((6, 5, 3) if layout == "nhwc" else (3, 6, 5)))
    x[7] = x[21]
    y = np.arange(40) if own_test else None
    arrays = {"x_train": x, "x_test": x[:5] if own_test else None, "y_train": y}
    compressed = saved(tmp_path / "c.npz", **{k: v for k, v in arrays.items() if v is not None})
    found = forms(tmp_path, *arrays.values())
    assert len(found) == (3 if own_test else 4)
    for form, path in found.items():
        for split in ("train", "test"):
            wanted = npz.build(tmp_path, split, path=compressed, layout=layout)
            images = npz.build(tmp_path, split, path=path, layout=layout)
            assert isinstance(images.read(), Mapped) and images.shape == wanted.shape, form
            assert np.array_equal(images.read()[:], wanted.read())
            assert np.array_equal(images.digests(), base.digests(wanted.read()))
            assert (images.rows is None) == (wanted.rows is None) == own_test
            assert own_test or np.array_equal(images.rows(), wanted.rows())
        images = npz.build(tmp_path, "train", path=path, layout=layout)
        assert (images.labels is not None) == own_test
        assert not own_test or np.array_equal(images.labels(), y)


def test_a_mapped_array_is_hashed_once(tmp_path, mapped, monkeypatch):
    path = forms(tmp_path, noise(40, 4, 4))["shards"]
    first = npz.build(tmp_path, "train", path=path).rows()
    with monkeypatch.context() as patch:
        patch.setattr(base, "digests", lambda *args: pytest.fail("hashed again"))
        again = npz.build(tmp_path, "train", path=path)
        assert np.array_equal(again.rows(), first) and len(again.read()) == 40
    changed = noise(1, 4, 4, seed=1)
    np.save(path / "x_train-0.npy", changed)
    os.utime(path / "x_train-0.npy", ns=(1, 1))  # of the same size
    images = npz.build(tmp_path, "train", path=path)
    assert np.array_equal(images.digests()[:1], base.digests(changed))


@pytest.mark.parametrize("damage", [corrupt, cut, lambda p: p.write_bytes(b""), Path.unlink])
def test_damaged_digests_are_computed_again(tmp_path, mapped, damage):
    path = forms(tmp_path, noise(40, 4, 4))["npy"]
    first = npz.build(tmp_path, "train", path=path).digests()
    [known] = Path(os.environ["FLOWTRAIN_CACHE"], "digests").iterdir()
    whole = known.read_bytes()
    damage(known)
    assert np.array_equal(npz.build(tmp_path, "train", path=path).digests(), first)
    assert known.read_bytes() == whole


def test_digests_that_cannot_be_remembered(tmp_path, mapped, monkeypatch):
    path = forms(tmp_path, noise(40, 4, 4))["npy"]
    monkeypatch.setenv("FLOWTRAIN_CACHE", str(path))  # a file, not a folder
    assert len(npz.build(tmp_path, "train", path=path).digests()) == 40


def test_a_mapped_array_may_be_larger_than_the_memory(tmp_path, mapped, monkeypatch):
    path = forms(tmp_path, noise(40, 4, 4))["npz"]
    monkeypatch.setattr(capacity, "total", lambda: 10)
    assert len(npz.build(tmp_path, "train", path=path).read()) == 40
    monkeypatch.setattr(npz, "MAPPED", 10**6)
    with pytest.raises(UserError, match="more than half of the memory .*: save it with np.savez"):
        npz.build(tmp_path, "train", path=path)


@pytest.mark.parametrize("form", ["npz", "npy", "shards"])
def test_a_mapped_array_that_is_damaged(tmp_path, mapped, form):
    """A file that is too short is noticed from its header, and a changed byte by the zip's own
    checksum. A .npy file has none.
    """
    x = noise(400, 8, 8)
    path = forms(tmp_path, x)[form]
    file = path / "x_train-11.npy" if form == "shards" else path
    if form == "npz":
        corrupt(file)
        with pytest.raises(UserError, match=r"a.npz: x_train is damaged .*bad CRC-32"):
            npz.build(tmp_path, "train", path=path).read()
        return
    corrupt(file)
    assert (npz.build(tmp_path, "train", path=path).read()[:] != x[:, None]).sum() == 1
    cut(file)
    with pytest.raises(UserError, match=rf"{file.name} is damaged: it has \d+ bytes"):
        npz.build(tmp_path, "train", path=path)


def test_a_changed_byte_of_a_mapped_file_is_one_error_at_most(tmp_path, mapped):
    """In the parts of a zip that `zipfile` does not look at, it may be none."""
    path = forms(tmp_path, noise(50, 4, 4))["npz"]
    data = path.read_bytes()
    refused = 0
    positions = range(0, len(data), 23)
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 255
        path.write_bytes(damaged)
        try:
            assert len(npz.build(tmp_path, "train", path=path).read()[:]) <= 50
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600
    assert refused > len(positions) // 2


@pytest.mark.parametrize(
    "name, array, message",
    [
        ("x_train-1.npy", noise(5, 8, 9, 3), r"x_train-1.npy has images of 8x9 .*-0.npy of 8x8"),
        ("x_train-1.npy", noise(5, 8, 8, 3) / 2, r"x_train-1.npy has the type float64"),
        ("x_test.npy", noise(5, 8, 7, 3), r"x_train are 8x8 .* x_test 8x7"),
        ("y_train.npy", np.arange(8), r"y_train in .* is int64 of shape \(8,\): .* 9 images"),
    ],
)
def test_a_folder_of_arrays_that_do_not_fit(tmp_path, name, array, message):
    np.save(tmp_path / "x_train-0.npy", GOOD)
    np.save(tmp_path / name, array)
    with pytest.raises(UserError, match=message):
        npz.build(tmp_path, "train", path=tmp_path).labels()


def test_a_folder_without_x_train(tmp_path):
    np.save(tmp_path / "images.npy", GOOD)
    (tmp_path / "x_train.txt").touch()
    with pytest.raises(UserError, match=r"no array x_train \(it has images.npy\): save it there"):
        npz.build(tmp_path, "train", path=tmp_path)


def test_an_array_of_objects_is_never_loaded(tmp_path, mapped):
    np.save(tmp_path / "x_train.npy", np.array([{}, {}], object))
    with pytest.raises(UserError, match="has the type object, not uint8"):
        npz.build(tmp_path, "train", path=tmp_path)
    np.save(tmp_path / "x_train.npy", GOOD)
    np.save(tmp_path / "y_train.npy", np.array([{}] * 9, object))
    with pytest.raises(UserError, match="y_train.npy is damaged or not a plain array .*Object"):
        npz.build(tmp_path, "train", path=tmp_path).labels()


@shared
@pytest.mark.run  # takes long
def test_real_cifar10():
    images = npz.build(SHARED, "test", path=SHARED / "cifar10.npz")
    assert images.shape == (3, 32, 32)
    pixels = check(images, 10000)
    with np.load(SHARED / "cifar10.npz") as file:
        assert np.array_equal(pixels[7, 2], file["x_test"][7, :, :, 2])

"""A user's own arrays."""

import functools
import io
import os
import zipfile

import numpy as np
import pytest
from dataset_helpers import corrupt, noise

from flowtrain.datasets import base, npz
from flowtrain.errors import UserError
from flowtrain.system import capacity

build = functools.partial(npz.build, None)
GOOD = noise(9, 8, 8, 3)


@pytest.mark.parametrize(
    "array, layout, axes",
    [
        (noise(9, 6, 5), "nhwc", None),
        (noise(9, 6, 5), "nchw", None),
        (noise(9, 6, 5, 1), "nhwc", (0, 3, 1, 2)),
        (noise(9, 6, 5, 3), "nhwc", (0, 3, 1, 2)),
        (noise(9, 3, 6, 5), "nchw", (0, 1, 2, 3)),
        (np.asfortranarray(noise(9, 6, 5, 3)), "nhwc", (0, 3, 1, 2)),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_layouts(tmp_path, monkeypatch, array, layout, axes, save):
    """The shape comes from the header."""
    monkeypatch.setattr(npz, "MAPPED", 0)
    wanted = array[:, None] if axes is None else array.transpose(axes)
    save(tmp_path / "a.npz", x_train=array, x_test=array[::-1][:4], y_train=np.zeros(9))
    for split, source in (("train", wanted), ("test", wanted[::-1][:4])):
        with monkeypatch.context() as patch:
            patch.setattr(np.lib.format, "read_array", lambda *a, **k: pytest.fail("pixels read"))
            images = build(split, path=tmp_path / "a.npz", layout=layout)
            assert (images.shape, images.num_bins, images.flip) == (wanted.shape[1:], 256, False)
        assert np.array_equal(images.read()[:], source)


def test_one_image_beside_a_test_split_and_an_array_without_a_name(tmp_path):
    for count, arrays in ((1, {"x_train": GOOD[:1], "x_test": GOOD}), (9, {"arr_0": GOOD})):
        np.savez(tmp_path / "a.npz", **arrays)
        assert len(build("train", path=tmp_path / "a.npz").read()) == count


@pytest.mark.parametrize(
    "arrays, options, message",
    [
        ({"x_test": GOOD}, {}, r"no array x_train \(it has x_test\).*np.savez"),
        ({"x_train": GOOD / 255}, {}, r"a.npz: x_train has the type float64, not uint8"),
        ({"x_train": GOOD.reshape(9, -1)}, {}, r"x_train .*shape \(9, 192\): images are"),
        ({"x_train": np.uint8(3)}, {}, r"x_train .*shape \(\): images are"),
        ({"x_train": noise(9, 8, 8, 4)}, {}, r"4 channels .*where 1 or 3 are allowed"),
        ({"x_train": noise(9, 3, 8, 8)}, {}, r"8 channels .*nhwc: set data.layout: nchw"),
        ({"x_train": GOOD}, {"layout": "nchw"}, r"8 channels .*nchw: set data.layout: nhwc"),
        ({"x_train": GOOD, "x_test": noise(9, 9, 8, 3)}, {}, r"8x8 with 3 .*x_test 9x8 with 3"),
        ({"x_train": GOOD[:0]}, {}, r"no pixels"),
        ({"x_train": GOOD[:1]}, {}, r"one image"),
        ({"x_train": GOOD, "y_train": np.arange(8)}, {}, r"y_train in .* int64 .*\(8,\): .* 9 im"),
        ({"x_train": GOOD, "y_train": GOOD[:, 0, 0, 0] / 2}, {}, r"y_train in .* is float64"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(tmp_path, monkeypatch, arrays, options, message):
    """The headers are enough, as the values may take any memory."""
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **k: pytest.fail("values read"))
    with pytest.raises(UserError, match=message) as raised:
        build("train", path=path, **options).labels()
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "name, array, message",
    [
        ("x_train-1.npy", noise(5, 8, 9, 3), r"x_train-1.npy has images of 8x9 .*-0.npy of 8x8"),
        ("x_train-2.npy", GOOD, "2 parts of x_train, numbered 0 to 2: one is missing"),
        ("y_train-3.npy", np.arange(9), "1 parts of y_train, numbered 3 to 3: one is missing"),
        ("x_train.npy", GOOD, "has x_train.npy and parts of it: remove either"),
        ("y_train.npy", np.array([{}] * 9), r"y_train in .* is object of shape \(9,\)"),
    ],
)
def test_a_folder_of_arrays_that_do_not_fit(tmp_path, name, array, message):
    (tmp_path / "x_train.txt").touch()
    np.save(tmp_path / "images.npy", GOOD)
    with pytest.raises(UserError, match=r"no array x_train \(it has images.npy\): save it there"):
        build("train", path=tmp_path)
    np.save(tmp_path / "x_train-0.npy", GOOD)
    np.save(tmp_path / name, array)
    with pytest.raises(UserError, match=message):
        build("train", path=tmp_path).labels()


@pytest.mark.parametrize("size", [10**11, 10**14])
def test_a_header_that_claims_more_than_the_memory(tmp_path, size, monkeypatch):
    path = tmp_path / "a.npz"
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (size // 100, 10, 10)}
    np.lib.format.write_array_header_1_0(buffer, header)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x_train.npy", "w", force_zip64=True) as file:
            file.write(buffer.getvalue() + bytes(1000))
        archive.filelist[0].file_size = len(buffer.getvalue()) + size
    wanted = rf"a.npz: x_train takes {size / 2**30:.1f} GiB, more than half of the memory"
    with pytest.raises(UserError, match=wanted):
        build("train", path=path)
    # On a machine that has so much, the array is not allocated, or the missing bytes are noticed.
    monkeypatch.setattr(capacity, "total", lambda: 2**60)
    with pytest.raises(UserError, match="x_train (does not fit into memory|is damaged)"):
        build("train", path=path).read()


@pytest.mark.parametrize(
    "shape, layout, copies",
    [((10, 3, 3, 3), "nhwc", 2), ((10, 3, 3, 3), "nchw", 1), ((10, 9, 3), "nhwc", 1)],
)
def test_memory_that_is_needed(tmp_path, shape, layout, copies, monkeypatch):
    """The copy in another order counts. A mapped array may be larger than the memory."""
    np.savez(tmp_path / "a.npz", x_train=np.zeros(shape, np.uint8))
    monkeypatch.setattr(capacity, "total", lambda: 2 * copies * 270)
    build("train", path=tmp_path / "a.npz", layout=layout)
    monkeypatch.setattr(capacity, "total", lambda: 2 * copies * 270 - 1)
    with pytest.raises(UserError, match="more than half of the memory .*: save it with np.savez"):
        build("train", path=tmp_path / "a.npz", layout=layout)
    monkeypatch.setattr(npz, "MAPPED", 270)
    assert len(build("train", path=tmp_path / "a.npz", layout=layout).read()) == 10


def test_a_changed_array_is_hashed_again(tmp_path, monkeypatch):
    """A .npy file has no checksum."""
    monkeypatch.setattr(npz, "MAPPED", 0)
    path = tmp_path / "a.npy"
    np.save(path, noise(40, 4, 4))
    for time in (0, 1):
        os.utime(path, ns=(time, time))  # of the same size
        found = build("train", path=path).digests()
        assert np.array_equal(found, base.digests(np.load(path)))
        corrupt(path)

"""Images in mapped files: the same values as those of an array, in every order of memory."""

import hashlib

import numpy as np
import pytest
from dataset_helpers import noise

from flowtrain.datasets.base import content, digests
from flowtrain.datasets.mapped import Mapped, channels_first, piece
from flowtrain.errors import RunError
from flowtrain.system.files import open_regular


def mapped(folder, arrays, layout):
    """The arrays as files without a header, mapped."""
    pieces = []
    for number, array in enumerate(arrays):
        path = folder / str(number)
        fortran = not array.flags.c_contiguous
        path.write_bytes(b"12345" + array.tobytes(order="F" if fortran else "C"))
        with open_regular(path) as file:
            pieces.append(piece(path, file, 5, array.shape, fortran, layout))
    return Mapped(pieces)


@pytest.mark.parametrize(
    "shape, layout", [((6, 5), "nhwc"), ((6, 5, 3), "nhwc"), ((3, 6, 5), "nchw")]
)
@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("counts", [[9], [4, 1, 7]])
def test_it_is_indexed_like_an_array(tmp_path, monkeypatch, shape, layout, order, counts):
    monkeypatch.setattr("flowtrain.datasets.mapped.COPIED", 200)  # two or three images
    arrays = [np.array(noise(n, *shape, seed=n), order=order) for n in counts]
    images = mapped(tmp_path, arrays, layout)
    wanted = np.concatenate([channels_first(array, layout) for array in arrays])
    assert images.shape == wanted.shape and len(images) == sum(counts)
    rows = np.random.default_rng(0).integers(0, len(wanted), 50)
    for which in (slice(None), slice(2, 7), slice(5, 5), rows, rows[:0]):
        found = images[which]
        assert np.array_equal(found, wanted[which])
        assert found.flags.c_contiguous and found.flags.writeable and found.dtype == np.uint8
    assert np.array_equal(digests(images, rows), digests(wanted, rows))
    assert content(images, rows) == content(wanted, rows)
    whole = hashlib.sha256(wanted.tobytes()).hexdigest()
    assert content(images) == content(np.asfortranarray(wanted)) == whole


def test_a_file_that_becomes_shorter_is_noticed_before_it_is_read(tmp_path):
    """Reading a page that is gone would end the process by a signal."""
    arrays = [noise(50, 32, 32, 3), noise(50, 32, 32, 3)]
    images = mapped(tmp_path, arrays, "nhwc")
    with (tmp_path / "1").open("rb+") as file:
        file.truncate(5 + arrays[1].nbytes - 1)
        assert np.array_equal(images[:50], channels_first(arrays[0], "nhwc"))
        with pytest.raises(RunError, match=r"1 became shorter while it was in use"):
            images[np.array([3, 70])]
        with pytest.raises(ValueError, match="cut short"):
            piece(tmp_path / "1", file, 5, arrays[1].shape, False, "nhwc")

"""Arrays in files from strangers: what is refused, and that nothing is unpickled or allocated."""

import io
import os
import warnings
import zipfile

import numpy as np
import pytest
from dataset_helpers import EVIL

from flowtrain.errors import UserError
from flowtrain.system import capacity
from flowtrain.system.arrays import ONLY, ArrayFile


def npy(array, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def a_file(path, members) -> ArrayFile:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return ArrayFile(path)


def test_arrays_are_read_as_they_were_saved(tmp_path):
    a, names = np.arange(6, dtype=np.float32).reshape(2, 3), np.array(["x", "ö"])
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", a=a, names=names, yes=np.array([True]), n=np.array(3))
        file = ArrayFile(tmp_path / "a.npz")
        assert file.names == ["a", "names", "yes", "n"]
        assert np.array_equal(file.read("a", "f", (None, 3)), a)
        assert file.read("names", "U", (2,)).tolist() == ["x", "ö"]
        assert file.read("yes", "b", (1,)).tolist() == [True]
        assert int(file.read("n", "iu", ())) == 3
    np.save(tmp_path / "a.npy", a)
    file = ArrayFile(tmp_path / "a.npy")
    found = file.header(ONLY)
    assert (found.shape, found.dtype, found.bytes) == ((2, 3), np.dtype("<f4"), 24)
    assert file.names == [ONLY] and np.array_equal(file.read(ONLY, "f", (2, 3)), a)
    # A header of Python 2 is read without a warning.
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2L,)}"
    start = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
    (tmp_path / "a.npy").write_bytes(start + np.array([1.0, 2.0]).tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ArrayFile(tmp_path / "a.npy").read(ONLY, "f", (2,)).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "kinds", "shape", "said"),
    [
        ("b", "f", (), "has no array b .it has a, l, n"),
        ("a", "iu", (2, 3), "a has the type float32, expected whole numbers"),
        ("a", "f", (3, 3), r"a has the shape \(2, 3\), expected 3 x 3"),
        ("a", "f", (None,), r"a has the shape \(2, 3\), expected N"),
        ("a", "f", (), "expected one value"),
        ("n", "U", (), "n has the type int64, expected texts"),
        ("o", "U", (1,), "o has the type object, expected texts"),
        ("u", "U", (None,), "u has the type <U0, expected texts"),
        # Whether the zip states the same size, which takes few bytes, or not.
        ("l", "f", (2, None), "l is damaged: it has 24 bytes, not 24000000000"),
        ("s", "f", (None, 3), "s is damaged: it has 24 bytes, not 12"),
    ],
)
def test_other_arrays_are_refused(tmp_path, monkeypatch, name, kinds, shape, said):
    monkeypatch.chdir(tmp_path)
    evil = npy(EVIL, allow_pickle=True)
    a = npy(np.zeros((2, 3), np.float32))
    n, u = npy(np.array(3)), npy(np.array([], "U1")).replace(b"<U1", b"<U0")
    u = u.replace(b"(0,)", b"(9,)")  # of no bytes, as many as it says
    lying = a.replace(b"(2, 3)", b"(2, 3000000000)")
    long = lying[:8] + a[8:10] + lying[10:].replace(b" " * 9, b"", 1)
    arrays = {"a": a, "n": n, "o": evil, "u": u, "l": long, "s": a.replace(b"(2, 3)", b"(1, 3)")}
    members = [(f"{key}.npy", data) for key, data in arrays.items()]
    file = a_file(tmp_path / "a.npz", members)
    with pytest.raises(UserError, match=f"a.npz: .*{said}"):
        file.read(name, kinds, shape)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("order", "<>")
def test_a_character_that_does_not_exist(tmp_path, order):
    """Python fails at it with a SystemError, so numpy's arrays of texts are looked at before."""
    texts = np.array(["ab", "c"], f"{order}U2")
    good = npy(texts)
    character = "c".encode(f"utf-32-{'le' if order == '<' else 'be'}")
    damaged = good.replace(character, (0x110000).to_bytes(4, "little" if order == "<" else "big"))
    file = a_file(tmp_path / "a.npz", [("good.npy", good), ("bad.npy", damaged)])
    assert file.read("good", "U", (2,)).tolist() == ["ab", "c"]
    with pytest.raises(UserError, match="bad is damaged: it has a character that does not exist"):
        file.read("bad", "U", (2,))


def test_a_large_array_is_refused_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(capacity, "available", lambda device: 2 * 20 * 3 * 4 - 1)
    file = a_file(tmp_path / "b.npz", [("a.npy", npy(np.zeros((20, 3), np.float32)))])
    with pytest.raises(UserError, match="b.npz: a needs at least"):
        file.read("a", "f", (20, 3))
    monkeypatch.setattr(capacity, "available", lambda device: 500)
    file = a_file(tmp_path / "c.npz", [("a.npy", npy(np.array(list("abcde"))))])
    with pytest.raises(UserError, match="c.npz: a needs at least"):  # as a list of Python
        file.read("a", "U", (5,))


def test_damaged_files_are_one_error(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.random.default_rng(0).random(100))
    good = path.read_bytes()
    for data in (b"", b"text", good[:-30], good[:100]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="a.npz: is not an .npz or .npy file, or is cut short"):
            ArrayFile(path)
    with pytest.raises(UserError, match="there is no such file"):
        ArrayFile(tmp_path / "none.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match="pipe.npz: cannot be opened .*not a regular file"):
        ArrayFile(tmp_path / "pipe.npz")
    with pytest.warns(UserWarning, match="Duplicate"):
        members = [("a.npy", npy(np.zeros(1))), ("a.npy", npy(np.ones(1)))]
        with pytest.raises(UserError, match="two of its arrays have one name"):
            a_file(path, members)
    with pytest.raises(UserError, match="a is damaged or not a plain array"):
        a_file(path, [("a", npy(np.zeros(1)))]).read("a", "f", (1,))

"""What all data sets promise: their description, images, classes, caches, and messages."""

import errno
import functools
import itertools
import pickle
import shutil
from pathlib import Path

import dataset_helpers as made
import numpy as np
import pytest
from catalogue import POINTS
from dataset_helpers import COUNTS, EVIL, LABELS, PIXELS, build, check, corrupt, cut, empty, pipe
from PIL import Image

from flowtrain.config import Data, component_names
from flowtrain.datasets import base, cache, imagenet
from flowtrain.datasets.mapped import Mapped
from flowtrain.errors import UserError

DOWNLOADED = dict.fromkeys(("mnist", "fashion_mnist"), ((1, 28, 28), False))  # shape, flip
DOWNLOADED |= dict.fromkeys(("cifar10", "cifar100"), ((3, 32, 32), True))
DOWNLOADED["svhn"] = (3, 32, 32), False
OTHERS = {"digits", "folder", "hub", "imagenet32", "imagenet64", "npz", "sphere", "vectors"}
DIGESTS = {part: base.digests(pixels) for part, pixels in PIXELS.items()}
FORMS = {  # of the images of `dataset_helpers`, and the type of the pixels
    "npz": (made.an_npz, np.ndarray),
    "mapped npz": (functools.partial(made.an_npz, save=np.savez), Mapped),
    "shards": (made.shards, Mapped),
    "folder": (made.a_folder, np.memmap),
    "hub": (made.a_saved_data_set, np.memmap),
    "oord2016": (made.oord, np.memmap),
    "chrabaszcz2017": (made.chrabaszcz, np.memmap),
}


def test_every_data_set_is_tested():
    why = "add it to DOWNLOADED or OTHERS here, or to POINTS of tests/catalogue.py"
    assert set(component_names(Data)) == {*DOWNLOADED, *OTHERS, *POINTS}, why


VERSIONS = [{"version": "oord2016"}, {"version": "chrabaszcz2017"}]


@pytest.mark.parametrize("name", [*DOWNLOADED, "imagenet32", "imagenet64"])
def test_described_before_anything_is_read(name, tmp_path):
    side = int(name[-2:]) if name not in DOWNLOADED else 0
    for split, options in itertools.product(COUNTS, VERSIONS if side else [{}]):
        images = build(name, tmp_path / "none", split, **options)
        assert (images.shape, images.flip) == DOWNLOADED.get(name, ((3, side, side), True))
        assert images.num_bins == 256 and images.key is None and not images.at_hand()
        assert not side or images.edition.startswith(f"{options['version']}: ImageNet {side}x")
    assert not (tmp_path / "none").exists()


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    train, test = (build("digits", tmp_path, part) for part in COUNTS)
    assert (train.shape, train.num_bins, train.flip) == ((1, 8, 8), 17, False)
    both = np.concatenate([check(train, 1617), check(test, 180)])
    every = load_digits()
    rows = np.concatenate([train.rows(), test.rows()])
    assert np.array_equal(both[:, 0], every.images[rows]) and sorted(rows) == list(range(1797))
    assert np.array_equal(train.labels(), every.target)
    assert not np.array_equal(build("digits", tmp_path, "test", seed=1).rows(), rows[1617:])


@pytest.fixture
def form(request, tmp_path, monkeypatch):
    """A data set of `FORMS`, as a function of the split and further options."""
    if request.param == "hub":
        # The folder of these tests has the same name, but no version.
        pytest.importorskip("datasets", "4", reason="the extra hub is not installed")
    (tmp_path / "data").mkdir()
    section = FORMS[request.param][0](tmp_path / "data", monkeypatch)
    monkeypatch.setattr(cache, "CHUNK", 4)
    monkeypatch.setattr(base, "HASHED", 2 * 3072)  # two images, so that one of 23 is left

    def images(split="train", **options):
        return build(root=tmp_path / "data", split=split, **{**section, **options})

    images.name, images.kind = request.param, FORMS[request.param][1]
    return images


def forms(*names):
    return pytest.mark.parametrize("form", names or FORMS, indirect=True)


def assert_whole(form, at_hand=False):
    for split, count in COUNTS.items():
        images = form(split)
        assert (images.shape, images.num_bins) == ((3, 32, 32), 256)
        assert images.at_hand() == (at_hand or form.kind is not np.memmap)
        pixels = images.read()
        assert isinstance(pixels, form.kind) and pixels.shape == (count, 3, 32, 32)
        assert np.array_equal(pixels[:], PIXELS[split]) and images.rows is None
        assert pixels[:].flags.c_contiguous
        assert not isinstance(pixels, np.memmap) or not pixels.flags.writeable
        assert images.at_hand()
        if images.digests is not None:
            assert np.array_equal(images.digests(), DIGESTS[split])
        assert (images.labels is None) == (form.name in ("folder", "oord2016"))
        assert images.labels is None or np.array_equal(images.labels(), LABELS[split])
        assert images.flip == (form.name in ("oord2016", "chrabaszcz2017"))
    assert not list(cache.place().rglob("*.tmp"))


@forms()
def test_images_and_classes(form, monkeypatch):
    assert_whole(form)
    monkeypatch.setattr(cache, "filled", lambda *args: pytest.fail("decoded again"))
    monkeypatch.setattr(base, "digests", lambda *args: pytest.fail("hashed again"))
    assert_whole(form, at_hand=True)


def unpack(home):
    """Replaces archives by what is in them."""
    for path in [*home.glob("*.tar"), *home.glob("*.zip")]:
        shutil.unpack_archive(path, home)
        path.unlink()


@pytest.mark.parametrize("folders", [True, False])
@forms("oord2016", "chrabaszcz2017")
def test_imagenet_that_a_user_has_unpacked(form, folders, tmp_path):
    home = tmp_path / "data" / "imagenet32"
    unpack(home)
    if not folders:
        for path in home.glob("*/*.npz"):
            path.rename(home / path.name)
    assert_whole(form)


def only_header(path):
    with path.open("wb") as file:
        cache._write_header(file, (10**6, 1, 10**6))


def replacing(old, new):
    def damage(path):
        data = path.read_bytes()
        assert old in data[:128]
        path.write_bytes(data.replace(old, new.ljust(len(old)), 1))

    return damage


def of_other_images(path):
    path.write_text('{"count": 22, "unreadable": {"other": "why"}}')
    np.save(path.with_name("images.npy"), PIXELS["train"][:22])


INDEX = ["[" * 100_000, '{"count"', '{"count": 5, "unreadable": {}}']
INDEX += ['{"count": 23, "unreadable": "text"}']


@pytest.mark.parametrize(
    "file, damage",
    [
        *[("images.npy", damage) for damage in (cut, empty, Path.unlink, pipe)],
        ("images.npy", only_header),
        ("images.npy", replacing(b"}", b"(")),
        ("images.npy", replacing(b"'fortran_order': False", b"'fortran_order': True")),
        ("images.npy", lambda path: np.save(path, PIXELS["test"])),
        *[("index.json", damage) for damage in (of_other_images, Path.unlink, pipe)],
        *[("index.json", lambda path, text=text: path.write_text(text)) for text in INDEX],
        *[("digests", damage) for damage in (corrupt, cut, empty, Path.unlink)],
        ("digests", lambda path: path.write_bytes(cache.sealed(bytes(16)))),  # of another count
        *[("labels", damage) for damage in (corrupt, cut, Path.unlink)],
    ],
)
@forms("folder", "chrabaszcz2017")
def test_a_damaged_cache_is_made_again(form, file, damage):
    if file == "labels" and form.name == "folder":
        return  # it has none
    images = form()
    images.read(), images.digests()
    [path] = cache.place().rglob(file)
    whole = path.read_bytes()
    damage(path)
    images = form()
    assert np.array_equal(images.read(), PIXELS["train"])
    assert np.array_equal(images.digests(), DIGESTS["train"])
    assert images.labels is None or np.array_equal(images.labels(), LABELS["train"])
    assert [path.read_bytes() for path in cache.place().rglob(file)] == [whole]


def test_keys_and_digests_that_cannot_be_stored(tmp_path, monkeypatch):
    keys = {cache.key_of(parts) for parts in (["a", "bc"], ["ab", "c"], ["c", "ab"], ["\udcff"])}
    assert len(keys) == 4
    section = made.shards(tmp_path, monkeypatch)
    monkeypatch.setenv("FLOWTRAIN_CACHE", str(tmp_path / "x_test.npy"))  # a file, not a folder
    images = build(root=tmp_path, split="train", **section)
    assert np.array_equal(images.digests(), DIGESTS["train"])


def arrays(pixels, labels):
    return lambda path: path.write_bytes(made.npz_file(pixels, labels))


X, Y = PIXELS["test"], LABELS["test"] + 1
VAL, TAR, PNG = "Imagenet32_val_npz/val_data.npz", "valid_32x32.tar", "valid_32x32/00003.png"
ARROW = ["test/data-00000-of-00001.arrow", "test/dataset_info.json", "test/state.json"]


@pytest.mark.parametrize(
    "form, file, damage, message",
    [
        ("npz", "a.npz", Path.unlink, "data.path: .*a.npz: there is no such file"),
        ("mapped npz", "a.npz", corrupt, r"a\.npz: x_train is damaged .*CRC"),
        ("shards", "x_train-11.npy", cut, r"x_train-11.npy is damaged: it has \d+ bytes"),
        ("hub", "test", shutil.rmtree, "data.test_split: .*|data.path: .* cannot be loaded"),
        *[("hub", name, damage, "data.path: .* cannot be loaded")
          for name in ARROW for damage in (cut, pipe)],
        ("oord2016", TAR, corrupt, f"{TAR} is not the official file .*SHA-256"),
        ("oord2016", TAR, cut, rf"{TAR} has \d+ bytes, not \d+: download"),
        ("oord2016", TAR, pipe, rf"{TAR} cannot be read \(.*not a regular file"),
        ("oord2016", TAR, Path.unlink, "imagenet32 of data.version oord2016 is not in .*: put "
         rf"{TAR} there .*, or valid_32x32 \(unpacked\)\. Source: image-net.org[^.]*right$"),
        ("oord2016", PNG, Path.unlink, "has 5 PNG files, not 6"),
        ("oord2016", PNG, corrupt, "00003.png cannot be read"),
        ("oord2016", PNG, lambda p: Image.new("RGB", (31, 32)).save(p), "00003.png .*31x32"),
        ("chrabaszcz2017", "Imagenet32_val_npz.zip", Path.unlink,
         r"put Imagenet32_val_npz.zip there .*, or val_data.npz \(unpacked\)"),
        ("chrabaszcz2017", VAL, arrays(X[:5], Y[:5]), "5 images, not 6: files are missing"),
        ("chrabaszcz2017", VAL, arrays(np.r_[X, X[:1]], np.r_[Y, 1]), "more than 6"),
        ("chrabaszcz2017", VAL, arrays(X, Y[:5]), r"\(6, 3072\)"),
        ("chrabaszcz2017", VAL, arrays(X / 2, Y), "float64"),
        *[("chrabaszcz2017", VAL, arrays(X, labels), r"1\.\.1000")
          for labels in (Y - 1, Y + 991, Y / 2)],
        ("chrabaszcz2017", VAL, corrupt, "val_data.npz cannot be read"),
        ("chrabaszcz2017", VAL, cut, "val_data.npz cannot be read"),
        ("chrabaszcz2017", VAL, lambda p: np.savez(p, data=EVIL, labels=EVIL), "Object arrays"),
    ],
    indirect=["form"],
)  # fmt: skip
def test_damage_is_one_message(form, file, damage, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "data"
    if form.name in ("oord2016", "chrabaszcz2017"):
        home = home / "imagenet32"
        if "/" in file:
            unpack(home)
    damage(home / file)
    with pytest.raises(UserError, match=message) as raised:
        form("test" if file[0] in "tvI" else "train").read()
    assert str(raised.value).startswith("data.") and "\n" not in str(raised.value)
    assert not list(cache.place().rglob("index.json")) and not Path("executed").exists()


@forms("oord2016")
def test_an_archive_that_fails_later_is_named(form, monkeypatch):
    """And not the cache, which may be on a sound disk."""
    opened, open_regular = [], imagenet.open_regular

    def failing(path):
        opened.append(path)
        if len(opened) > 2:  # after the checksum and the list of files
            raise OSError(errno.EIO, "Input/output error")
        return open_regular(path)

    monkeypatch.setattr(imagenet, "open_regular", failing)
    with pytest.raises(UserError, match=r"train_32x32.tar cannot be read \(.*Input/output error"):
        form().read()


def test_the_files_of_another_version_are_named(tmp_path, monkeypatch):
    home = tmp_path / "imagenet32"
    (home / "Imagenet32_train").mkdir(parents=True)
    (home / "Imagenet32_train" / "train_data_batch_1").write_bytes(pickle.dumps(EVIL))
    with pytest.raises(UserError, match="pickles there are never loaded.*: take npz files"):
        build("imagenet32", tmp_path, "train", version="chrabaszcz2017").read()
    made.oord(tmp_path, monkeypatch)
    for there, other in (("oord2016", "chrabaszcz2017"), ("chrabaszcz2017", "oord2016")):
        with pytest.raises(UserError, match=f"The files of data.version {there} are there"):
            build("imagenet32", tmp_path, "train", version=other).read()
        for path in home.glob("*.tar"):
            path.unlink()
        made.chrabaszcz(tmp_path, monkeypatch)

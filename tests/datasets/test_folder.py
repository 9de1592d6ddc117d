"""A user's own folder of images, and its cache."""

import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import check, corrupt, cut, noise
from helpers import REPOSITORY
from PIL import Image

from flowtrain.datasets import base, cache, folder
from flowtrain.errors import RunError, UserError
from flowtrain.system import distributed


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


def test_folder_keeps_equal_images_on_one_side(tmp_path, monkeypatch):
    """Also those of different files: every image is there as PNG, BMP and in another size."""
    tree = grow(tmp_path / "tree", 20)
    for i in range(20):
        draw(tree / "more" / f"{i}.bmp", seed=i)
        draw(tree / "more" / f"{i}.png", (30, 30), seed=i)
    (tree / "003.png").write_bytes(b"")
    build = functools.partial(folder.build, tmp_path, path=tree, size=4)
    test, train = values(build("test")), values(build("train"))
    assert len(test + train) == 59 and test and not set(test) & set(train)
    monkeypatch.setattr(base, "digests", lambda *args: pytest.fail("hashed again"))
    assert values(build("test")) == test


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


@pytest.mark.parametrize("resize", ["crop", "stretch", "exact"])
def test_images_that_are_enlarged_are_counted(resize, tmp_path, caplog):
    """In one warning each time, also where the cache is there. They are blurred."""
    sizes = [(8, 8)] * 3 if resize == "exact" else [(7, 20), (20, 7), (8, 20)]
    for index, size in enumerate(sizes):
        draw(tmp_path / f"{index}.png", size, seed=index)
    for _ in range(2):
        caplog.clear()
        folder.build(tmp_path, "train", path=tmp_path, size=8, resize=resize).read()
        warnings = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
        assert warnings == [
            f"data.size: 2 of 3 images in {tmp_path} have a side of less than 8 pixels and are "
            "enlarged"
        ] * (resize != "exact")


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
    assert (len(first), count) == (18, 20) and start() == (first, 0)
    assert sorted(p for p in tree.rglob("*")) == before, "nothing is written into the user's tree"
    for options in ({"size": 5}, {"channels": 1}, {"resize": "stretch"}):
        assert start(**options)[1] == 20
    changed = tree / f"{first[0]:03}.png"
    time_ = changed.stat().st_mtime_ns
    draw(changed, seed=200)
    os.utime(changed, ns=(time_ + 1, time_ + 1))
    assert start() == ([200, *first[1:]], 20), "a file's time counts"
    draw(changed, (40, 40), seed=201)
    os.utime(changed, ns=(time_ + 1, time_ + 1))
    assert start()[1] == 20, "a file's size counts"
    draw(tree / "new.png", seed=100)
    assert start()[1] == 20 + 1, "a new file counts"


def test_folder_caches_of_two_folders_are_apart(tmp_path):
    for name, seed in (("a", 10), ("b", 20)):  # as from an archive that sets every time to 0
        draw(tmp_path / name / "test" / "0.bmp", seed=seed)
        os.utime(tmp_path / name / "test" / "0.bmp", (0, 0))
        images = folder.build(tmp_path, "test", path=tmp_path / name, size=4)
        assert values(images) == [seed]


def caches():
    return list(Path(os.environ["FLOWTRAIN_CACHE"], "folder").iterdir())


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def npy_header(shape):
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: cut(c / "images.npy"),
        lambda c: (c / "images.npy").write_bytes(b""),
        lambda c: (c / "images.npy").unlink(),
        lambda c: (c / "index.json").write_text('{"count"'),
        lambda c: (c / "index.json").write_text('{"count": 5, "unreadable": {}}'),
        lambda c: (c / "index.json").write_text('{"count": 20, "unreadable": "text"}'),
        lambda c: (c / "index.json").write_text('{"count": 19, "unreadable": {"other": "why"}}'),
        lambda c: (c / "index.json").write_text("[" * 100_000),
        lambda c: (c / "images.npy").write_bytes(npy_header((10**6, 1, 10**6))),
        lambda c: pipe(c / "index.json"),
        lambda c: pipe(c / "images.npy"),
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
    assert values(images) == first and len(decoded) == 20
    assert values(images) == first and len(decoded) == 20, "the new one is used"
    assert caches() == [cache]


def test_folder_interrupted(tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(cache, "CHUNK", 4)
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
from flowtrain.datasets import base, cache, folder
decode = base.decode
def slow(*args):
    print("decoding", flush=True)
    time.sleep(float(sys.argv[2]))
    return decode(*args)
base.decode = slow
images = folder.build(Path(), "train", path=Path(sys.argv[1]), size=4)
pixels = images.read()[images.rows()]
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
    assert all(out.count("decoding") == 100 for out, _ in ends), "both found no cache"
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
    assert "decoding 20 images" in caplog.text
    assert capsys.readouterr() == ("", "")


def test_folder_follows_links_once(tmp_path):
    grow(tmp_path / "real" / "train", 3)
    draw(tmp_path / "tree" / "test" / "t.png")
    (tmp_path / "tree" / "train").symlink_to(tmp_path / "real" / "train")
    (tmp_path / "real" / "train" / "round").symlink_to(tmp_path / "real" / "train")
    assert values(folder.build(tmp_path, "train", path=tmp_path / "tree", size=4)) == [0, 1, 2]


# --- the list of a large tree ---------------------------------------------------------------------


def settle(tree):
    """Makes the last change of every folder one of long ago."""
    for here, _, _ in os.walk(tree):
        os.utime(here, (10**9, 10**9))


def lists():
    return list(Path(os.environ["FLOWTRAIN_CACHE"], "lists").glob("*"))


@pytest.fixture
def walks(monkeypatch):
    """How often a tree is listed. Trees of any size count as large."""
    monkeypatch.setattr(folder, "LARGE", 0)
    calls = []
    walk = os.walk

    def counted(*args, **options):
        calls.append(args)
        return walk(*args, **options)

    monkeypatch.setattr(folder.os, "walk", counted)
    return calls


def tree_of_two(tmp_path):
    """A tree with a folder in it, and a function that gives its images."""
    tree = grow(tmp_path / "tree", 5)
    grow(tree / "inner", 5)
    return tree, lambda: [file.name for file in folder.files_of(tree, "")]


def test_a_large_tree_is_listed_once(tmp_path, walks):
    tree, names = tree_of_two(tmp_path)
    settle(tree)
    walks.clear()
    first = names()
    assert len(first) == 10 and first == names() and len(walks) == 1
    images = folder.build(tmp_path, "train", path=tree, size=4)
    assert len(values(images)) == 8 and len(walks) == 1  # equal images are held out together


@pytest.mark.parametrize(
    "change",
    [
        lambda t: draw(t / "inner" / "new.png"),
        lambda t: (t / "inner" / "002.png").unlink(),
        lambda t: (t / "inner" / "002.png").rename(t / "inner" / "x.png"),
        lambda t: shutil.rmtree(t / "inner"),
        lambda t: draw(t / "another" / "new.png"),
        lambda t: draw(t / "inner" / "002.png", (30, 30)),  # the folder keeps its time
        lambda t: corrupt(lists()[0]),
        lambda t: cut(lists()[0]),
    ],
)
def test_a_changed_tree_is_listed_again(tmp_path, walks, change):
    tree, _ = tree_of_two(tmp_path)
    settle(tree)
    folder.files_of(tree, "")
    [remembered] = lists()
    change(tree)
    walks.clear()
    found = folder.files_of(tree, "")
    assert len(walks) == 1
    remembered.unlink(missing_ok=True)
    assert found == folder.files_of(tree, "")


def test_a_tree_that_has_just_changed_is_not_remembered(tmp_path, walks):
    """Its folders could change again without another time."""
    tree, names = tree_of_two(tmp_path)
    walks.clear()
    assert names() == names() and len(walks) == 2 and not lists()


def test_a_small_tree_is_not_remembered(tmp_path):
    tree, names = tree_of_two(tmp_path)
    settle(tree)
    assert names() and not lists()


def test_one_of_several_processes_lists_first(tmp_path, walks, monkeypatch):
    inside, stat = [], folder._file

    @contextlib.contextmanager
    def main_process_first():
        inside.append(True)
        yield
        assert lists(), "the others find the list"
        inside.pop()

    monkeypatch.setattr(distributed, "main_process_first", main_process_first)
    monkeypatch.setattr(folder, "_file", lambda *args: inside[0] and stat(*args))
    tree, names = tree_of_two(tmp_path)
    settle(tree)
    assert len(names()) == 10 and not inside


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


def test_a_tree_too_deep_for_this_python(tmp_path, monkeypatch):
    def walk(*args, **kwargs):
        raise RecursionError

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(UserError, match="data.path: .* has folders too deep to list"):
        folder.build(tmp_path, "train", path=tmp_path, size=4)


@pytest.mark.parametrize("policy", ["crop", "exact"])
def test_only_regular_files_are_read(tmp_path, caplog, policy):
    """A pipe or a device in the folder is left out, and not waited for."""
    tree = grow(tmp_path / "tree")
    os.mkfifo(tree / "pipe.png")
    (tree / "zero.png").symlink_to("/dev/zero")
    images = folder.build(tmp_path, "train", path=tree, size=12, channels=1, resize=policy)
    assert len(images.read()) >= 16
    test = folder.build(tmp_path, "test", path=tree, size=12, channels=1, resize=policy)
    test.read()
    assert caplog.text.count("not a regular file") == 2


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="cannot be read as an image .*not a regular file"):
        base.open_image(tmp_path / "pipe.png", (1, 8, 8), 256)

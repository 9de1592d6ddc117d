"""Both versions of ImageNet, from small archives of the official form."""

import dataclasses
import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_helpers import build, check, corrupt, cut, noise
from helpers import a_config
from PIL import Image
from typer.testing import CliRunner

from flowtrain.checkpoints.load import load_model
from flowtrain.cli.main import app
from flowtrain.datasets import base, cache, imagenet
from flowtrain.errors import UserError
from flowtrain.tools.report import report
from flowtrain.tools.report.compare import compare
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory

COUNTS = {"train": 23, "test": 6}
PIXELS = {part: noise(count, 32, 32, 3, seed=count) for part, count in COUNTS.items()}
LABELS = {part: np.arange(count) * 40 + 1 for part, count in COUNTS.items()}  # from 1
WANTED = {part: pixels.transpose(0, 3, 1, 2) for part, pixels in PIXELS.items()}


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def npz_file(pixels, labels, save=np.savez):
    """A batch: flat images, channel by channel, labels from 1, and the mean image."""
    buffer = io.BytesIO()
    flat = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    save(buffer, data=flat, labels=labels, mean=flat.mean(0))
    return buffer.getvalue()


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo(path.stem)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in files.items():
            info = tarfile.TarInfo(f"{path.stem}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def zip_of(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"{path.stem}/{name}", data)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with all archives of both versions, and `EDITIONS` of their counts and checksums."""
    home = tmp_path / "imagenet32"
    home.mkdir()
    for part, name in (("train", "train_32x32"), ("test", "valid_32x32")):
        files = {f"{i:05}.png": png(pixels) for i, pixels in enumerate(PIXELS[part])}
        tar_of(home / f"{name}.tar", dict(reversed(files.items())))
    cuts = [0, 2, 3, 5, 7, 9, 11, 13, 15, 17, 23]  # ten batches, so that 10 comes after 9
    batches = {
        f"train_data_batch_{i + 1}.npz": npz_file(PIXELS["train"][a:b], LABELS["train"][a:b])
        for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))
    }
    zip_of(home / "Imagenet32_train_npz.zip", dict(sorted(batches.items())))
    compressed = npz_file(PIXELS["test"], LABELS["test"], np.savez_compressed)
    zip_of(home / "Imagenet32_val_npz.zip", {"val_data.npz": compressed})
    for version in ("oord2016", "chrabaszcz2017"):
        edition = imagenet.EDITIONS[32, version]
        archives = {
            part: {name: facts(home / name) for name in names}
            for part, names in edition.archives.items()
        }
        small = dataclasses.replace(edition, counts=COUNTS, archives=archives)
        monkeypatch.setitem(imagenet.EDITIONS, (32, version), small)
    return home


def facts(path):
    data = path.read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


def in_32(home, split, version):
    return build("imagenet32", home.parent, split, version=version)


def unpack(home):
    """Replaces the archives by what is in them."""
    for path in [*home.glob("*.tar"), *home.glob("*.zip")]:
        shutil.unpack_archive(path, home)
        path.unlink()


@pytest.mark.parametrize("form", ["archives", "unpacked", "unpacked without folders"])
@pytest.mark.parametrize("version", ["oord2016", "chrabaszcz2017"])
def test_both_versions_in_both_forms(home, monkeypatch, version, form):
    monkeypatch.setattr(cache, "CHUNK", 4)
    if form != "archives":
        unpack(home)
    if form == "unpacked without folders":
        for path in home.glob("*/*.npz"):
            path.rename(home / path.name)
    for split, count in COUNTS.items():
        images = in_32(home, split, version)
        assert not images.at_hand()
        pixels = check(images, count)
        assert np.array_equal(pixels, WANTED[split]) and isinstance(pixels, np.memmap)
        assert images.at_hand() and images.flip and version in images.edition
        assert np.array_equal(images.digests(), base.digests(pixels))
        assert (images.labels is not None) == (version == "chrabaszcz2017")
        if images.labels is not None:
            assert np.array_equal(images.labels(), LABELS[split] - 1)
    assert not list(cache.place().rglob("*.tmp"))


@pytest.mark.parametrize("version", ["oord2016", "chrabaszcz2017"])
def test_it_is_decoded_once(home, monkeypatch, version):
    first = in_32(home, "train", version).read()
    monkeypatch.setattr(cache, "filled", lambda *args: pytest.fail("decoded again"))
    images = in_32(home, "train", version)
    assert np.array_equal(images.read(), first)


@pytest.mark.parametrize("damage", [corrupt, cut, Path.unlink])
def test_damaged_labels_in_the_cache(home, damage):
    in_32(home, "train", "chrabaszcz2017").read()
    [labels] = cache.place().rglob("labels")
    damage(labels)
    assert np.array_equal(in_32(home, "train", "chrabaszcz2017").labels(), LABELS["train"] - 1)


def test_an_archive_that_is_not_the_official_one(home):
    path = home / "train_32x32.tar"
    corrupt(path)
    with pytest.raises(UserError, match="train_32x32.tar is not the official file .*SHA-256"):
        in_32(home, "train", "oord2016").read()
    cut(path)
    with pytest.raises(UserError, match=r"train_32x32.tar has \d+ bytes, not \d+: download"):
        in_32(home, "train", "oord2016").read()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"train_32x32.tar cannot be read \(.*not a regular file"):
        in_32(home, "train", "oord2016").read()


def test_missing_files_are_named(home):
    for path in home.iterdir():
        path.unlink()
    with pytest.raises(UserError) as raised:
        in_32(home, "train", "oord2016").read()
    said = str(raised.value)
    assert "\n" not in said and said.startswith("data.root: imagenet32 of data.version oord2016")
    assert f"is not in {home}: put train_32x32.tar there" in said and "image-net.org" in said
    with pytest.raises(UserError, match=r"Imagenet32_val_npz.zip .*, or val_data.npz \(unpacked\)"):
        in_32(home, "test", "chrabaszcz2017").read()


def test_the_files_of_the_other_version_are_pointed_out(home):
    for path in home.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="The files of data.version chrabaszcz2017 are there"):
        in_32(home, "train", "oord2016").read()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_is_never_loaded(home, monkeypatch):
    monkeypatch.chdir(home)
    for path in home.iterdir():
        path.unlink()
    (home / "Imagenet32_train").mkdir()
    (home / "Imagenet32_train" / "train_data_batch_1").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="pickles there are never loaded.*: take npz files"):
        in_32(home, "train", "chrabaszcz2017").read()
    np.savez(home / "train_data_batch_1.npz", data=np.array([Evil()]), labels=np.array([Evil()]))
    with pytest.raises(UserError, match="train_data_batch_1.npz cannot be read .*Object arrays"):
        in_32(home, "train", "chrabaszcz2017").read()
    assert not (home / "executed").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.write_bytes(npz_file(PIXELS["test"][:5], LABELS["test"][:5])), "5 images"),
        (lambda p: p.write_bytes(npz_file(PIXELS["train"], LABELS["train"])), "more than 6"),
        (lambda p: p.write_bytes(npz_file(PIXELS["test"], LABELS["test"][:5])), r"\(6, 3072\)"),
        (lambda p: p.write_bytes(npz_file(PIXELS["test"] / 2, LABELS["test"])), "float64"),
        (lambda p: p.write_bytes(npz_file(PIXELS["test"], LABELS["test"] - 1)), r"1\.\.1000"),
        (lambda p: p.write_bytes(npz_file(PIXELS["test"], LABELS["test"] / 2)), r"1\.\.1000"),
        (corrupt, "val_data.npz cannot be read"),
        (cut, "val_data.npz cannot be read"),
    ],
)
def test_unpacked_arrays_that_are_not_right(home, change, message):
    unpack(home)
    change(home / "Imagenet32_val_npz" / "val_data.npz")
    with pytest.raises(UserError, match=message) as raised:
        in_32(home, "test", "chrabaszcz2017").read()
    assert str(raised.value).startswith("data.root: ")
    assert not list(cache.place().rglob("index.json"))


@pytest.mark.parametrize(
    "change, message",
    [
        (Path.unlink, "has 5 PNG files, not 6"),
        (corrupt, "00003.png cannot be read"),
        (lambda p: p.write_bytes(png(noise(32, 31, 3))), "00003.png cannot be read .*31x32"),
    ],
)
def test_unpacked_pictures_that_are_not_right(home, change, message):
    unpack(home)
    change(home / "valid_32x32" / "00003.png")
    with pytest.raises(UserError, match=message):
        in_32(home, "test", "oord2016").read()
    assert not list(cache.place().rglob("index.json"))


def test_what_is_known_before_anything_is_read(tmp_path):
    """And the numbers by which the versions are told apart."""
    for side in (32, 64):
        for version, counts in {
            "oord2016": (1_281_149, 49_999),
            "chrabaszcz2017": (1_281_167, 50_000),
        }.items():
            images = build(f"imagenet{side}", tmp_path / "none", "test", version=version)
            assert images.shape == (3, side, side) and images.levels == 256
            assert not images.at_hand() and f"{side}x{side}" in images.edition
            edition = imagenet.EDITIONS[side, version]
            assert tuple(edition.counts.values()) == counts
            for archives in edition.archives.values():
                for size, checksum in archives.values():
                    assert size > 10**8 and len(checksum) == 64
    assert not (tmp_path / "none").exists()


def test_the_version_is_said_beside_every_figure(home, capsys, monkeypatch):
    """In summary, evaluation, comparison and report, and where a run starts."""
    logger = logging.getLogger("flowtrain")  # the command changes it
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(logger, name, getattr(logger, name))
    section = {"name": "imagenet32", "root": str(home.parent), "validation": 0.2}
    paths = {}
    for version in ("oord2016", "chrabaszcz2017"):
        train = {"num_steps": 1, "batch_size": 8}
        config = a_config("nice", data={**section, "version": version}, train=train)
        run = RunDirectory(home / version)
        fit(config, run, torch.device("cpu"))
        said = f"{version}: ImageNet 32x32"
        assert said in capsys.readouterr().out
        assert said in json.loads((run.path / "summary.json").read_text())["edition"]
        printed = CliRunner().invoke(app, ["evaluate", str(run.path), "--device", "cpu"])
        assert said in " ".join(printed.output.replace("│", " ").split()), printed
        assert said in json.loads((run.path / "evaluate-test.json").read_text())["edition"]
        paths[version] = run.path
    model = load_model(str(run.path), torch.device("cpu"))
    page, _ = report.page(model, "no data here")
    assert page.count(said) == 2
    comparison = compare(list(paths.values()))
    notes = " ".join(comparison.notes)
    assert all(f"{version}: its data are {version}: ImageNet" in notes for version in paths)
    assert "chrabaszcz2017 and oord2016 have different data (data.version" in notes
    tests = [row["test"]["edition"] for row in comparison.content()["runs"]]
    assert [test.partition(":")[0] for test in tests] == list(paths)

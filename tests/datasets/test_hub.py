"""Data sets in the format of the package `datasets`, made on disk by that package."""

import functools
import io
import logging
import os
import sys

import numpy as np
import pytest
import torch
from dataset_helpers import check, corrupt, cut, noise
from helpers import a_config
from PIL import Image

from flowtrain.config import Data, component_schema
from flowtrain.data.splits import DataSet
from flowtrain.datasets import base, cache, hub
from flowtrain.errors import UserError

# The folder of these tests has the same name, but no version.
datasets = pytest.importorskip("datasets", "4", reason="the extra hub is not installed")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """The package shows no bars, and waits for no network."""
    datasets.disable_progress_bars()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield
    datasets.enable_progress_bars()


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def made(pixels, labels=None, column="image", **more):
    """A `datasets.Dataset` of images (N, H, W, 3) and, if there are labels, a column of classes."""
    columns = {column: [encoded(each) for each in pixels], **more}
    features = {column: datasets.Image()}
    features |= {name: datasets.Value("string") for name in more}
    if labels is not None:
        columns["digit"] = labels
        features["digit"] = datasets.ClassLabel(num_classes=10)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


PIXELS = {"train": noise(23, 8, 8, 3), "test": noise(6, 8, 8, 3, seed=1)}
LABELS = {part: np.arange(len(pixels)) % 10 for part, pixels in PIXELS.items()}


@pytest.fixture
def path(tmp_path):
    """A folder with a training split and a test split."""
    parts = {part: made(PIXELS[part], LABELS[part].tolist()) for part in PIXELS}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


build = functools.partial(hub.build, None, size=8)


@pytest.mark.parametrize("chunk", [4, 100])
def test_a_data_set_on_disk(path, monkeypatch, chunk):
    monkeypatch.setattr(cache, "CHUNK", chunk)
    for part in ("train", "test"):
        images = build(part, path=path, label="digit")
        assert images.shape == (3, 8, 8) and images.levels == 256 and not images.at_hand()
        pixels = check(images, len(PIXELS[part]))
        assert np.array_equal(pixels, PIXELS[part].transpose(0, 3, 1, 2))
        assert isinstance(pixels, np.memmap) and images.at_hand() and images.rows is None
        assert np.array_equal(images.labels(), LABELS[part])
        assert np.array_equal(images.digests(), base.digests(pixels))
    assert build("train", path=path).labels is None
    assert len(build("train", path=path, train_split="test").read()) == len(PIXELS["test"])


def test_images_get_the_size(path):
    for resize, side in (("crop", 4), ("stretch", 5)):
        images = build("train", path=path, size=side, channels=1, resize=resize)
        picture = Image.fromarray(PIXELS["train"][3])
        assert np.array_equal(images.read()[3], base.resize(picture, (1, side, side), resize))
    assert len(build("train", path=path, resize="exact").read()) == 23
    with pytest.raises(UserError, match="data.resize: exact, but an image .* 8x8 .*, not 9x9"):
        build("train", path=path, size=9, resize="exact").read()


def test_it_is_decoded_once(path, monkeypatch):
    first = build("train", path=path).read()
    with monkeypatch.context() as patch:
        patch.setattr(cache, "filled", lambda *args: pytest.fail("decoded again"))
        assert np.array_equal(build("train", path=path).read(), first)
    changed = PIXELS["train"][::-1]
    made(changed).save_to_disk(path.parent / "other")
    found = build("train", path=path.parent / "other", test_split=None).read()
    assert np.array_equal(found, changed.transpose(0, 3, 1, 2))


def test_without_a_test_split_a_tenth_is_held_out(tmp_path):
    pixels = np.concatenate([PIXELS["train"], PIXELS["train"][:7]])
    made(pixels, [5] * 30).save_to_disk(tmp_path / "saved")
    parts = {
        part: build(part, path=tmp_path / "saved", test_split=None, label="digit")
        for part in ("train", "test")
    }
    rows = {part: images.rows() for part, images in parts.items()}
    assert sorted(np.concatenate(list(rows.values()))) == list(range(30))
    assert len(rows["test"]) == 3
    found = {part: {x.tobytes() for x in check(images)} for part, images in parts.items()}
    assert not found["train"] & found["test"]
    with pytest.raises(UserError, match="data.test_split: .* has no splits; with null"):
        build("test", path=tmp_path / "saved").read()


def test_images_that_cannot_be_read_are_left_out(tmp_path, caplog):
    """With their labels. A file of another format, a damaged one and none at all are no error."""
    caplog.set_level(logging.WARNING, "flowtrain")
    rows = [encoded(each) for each in PIXELS["train"][:10]]
    rows[2] = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0", "path": None}
    rows[5] = {"bytes": rows[5]["bytes"][:-20], "path": None}
    rows[7] = None
    features = datasets.Features({"image": datasets.Image(), "digit": datasets.Value("int64")})
    columns = {"image": rows, "digit": list(range(10))}
    found = datasets.Dataset.from_dict(columns, features=features)
    found.save_to_disk(tmp_path / "saved")
    images = build("train", path=tmp_path / "saved", label="digit")
    assert images.labels().tolist() == [0, 1, 3, 4, 6, 8, 9] and len(images.read()) == 7
    assert "3 of 10 images of" in caplog.text and "  7: there is none" in caplog.text


def test_a_repository_is_loaded_without_its_code(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []
    made(PIXELS["test"]).save_to_disk(tmp_path / "saved")

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.load_from_disk(tmp_path / "saved")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"split": "test", "revision": "abc", "keep_in_memory": False}
    images = build("test", repository="somebody/images", subset="small", revision="abc")
    assert not calls, "nothing is loaded before it is read"
    assert np.array_equal(images.read(), PIXELS["test"].transpose(0, 3, 1, 2))
    assert calls == [(("somebody/images", "small"), options)]


def test_parts_of_the_same_files_are_cached_apart(monkeypatch, path):
    monkeypatch.chdir(path)
    rows = datasets.load_from_disk(path)["train"].select(range(22))
    parts = {"train[:50%]": range(11), "train[50%:]": range(11, 22)}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, split, **options: rows.select(parts[split])
    )
    splits = dict(zip(("train_split", "test_split"), parts, strict=True))
    for part, chosen in zip(("train", "test"), parts.values(), strict=True):
        images = build(part, repository="somebody/images", **splits)
        assert np.array_equal(images.read(), PIXELS["train"][list(chosen)].transpose(0, 3, 1, 2))


def test_images_that_are_files_of_their_own(monkeypatch, tmp_path):
    """As the package has them for a repository of image files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(PIXELS["test"]):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    load, place = datasets.load_dataset, str(tmp_path / "packages")

    def load_dataset(name, subset, **options):
        options["split"] = "train"
        return load("imagefolder", data_dir=str(tmp_path / "images"), cache_dir=place, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    images = build("test", repository="somebody/images")
    assert np.array_equal(images.read(), PIXELS["test"].transpose(0, 3, 1, 2))
    (tmp_path / "images" / "3.png").unlink()
    assert len(build("test", repository="somebody/images", channels=1).read()) == 5


def test_a_hub_that_cannot_be_reached_is_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"nobody/nothing \(split train\) cannot be loaded") as no:
        build("train", repository="nobody/nothing").read()
    assert "\n" not in str(no.value) and "save_to_disk elsewhere" in str(no.value)


def test_without_the_package(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match="needs the package datasets: .*pip install datasets"):
            build("train", path=path).read()
    with monkeypatch.context() as patch:  # a folder of this name is imported, too
        patch.delattr(datasets, "__version__")
        with pytest.raises(UserError, match="needs the package datasets: .*pip install datasets"):
            build("train", path=path).read()
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(
        UserError, match=r"needs version 4 .* 3.6.0 is installed: .*pip install --upgrade"
    ):
        build("train", path=path).read()


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "data.repository: give either this or data.path: neither"),
        ({"repository": "a/b", "path": "c"}, "data.repository: .*: both"),
        ({"repository": "../x"}, "data.repository: ../x is no name on the hub"),
        ({"repository": "https://x/y"}, "is no name on the hub"),
        ({"repository": "saved"}, "data.repository: saved is also a file or folder here"),
        ({"path": "none"}, "data.path: none cannot be loaded"),
        ({"path": "saved", "train_split": "dev"}, "data.train_split: .* no split dev, but train"),
        (
            {"path": "saved", "image": "img"},
            "data.image: .*no column of images img; there is image",
        ),
        ({"path": "saved", "image": "digit"}, "data.image: .*no column of images digit"),
        (
            {"path": "saved", "label": "y"},
            "data.label: y is no column of whole numbers; there is digit",
        ),
        ({"path": "saved", "label": "image"}, "data.label: image is no column of whole numbers"),
    ],
)
def test_what_does_not_fit(path, monkeypatch, options, message):
    monkeypatch.chdir(path.parent)
    with pytest.raises(UserError, match=message):
        build("train", **options).read()


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"])
@pytest.mark.parametrize("kind", ["cut", "corrupt", "pipe"])
def test_damaged_and_special_files(path, name, kind):
    file = path / "train" / name
    if kind == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        {"cut": cut, "corrupt": corrupt}[kind](file)
    try:
        assert len(build("train", path=path).read()) <= 23
    except UserError as error:
        assert "\n" not in str(error).partition("(")[0] and str(error).startswith("data.path: ")
    else:
        assert kind == "corrupt"


def test_a_run_finds_it_from_another_folder(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    section = {"name": "hub", "path": "saved", "size": 8, "label": "digit", "validation": 4}
    config = a_config("nice", data=section).data
    assert config.options()["path"] == path
    data = DataSet(config)
    split = data.split("train")
    assert len(split) == 19 and torch.equal(split.labels, torch.tensor(split.indices) % 10)
    assert data.fingerprint == DataSet(config).fingerprint
    assert component_schema(Data, "hub").model_fields["path"].default is None

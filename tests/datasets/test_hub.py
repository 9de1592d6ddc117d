"""Data sets in the format of the package `datasets`, made on disk by that package."""

import logging
from unittest import mock

import numpy as np
import pytest
from dataset_helpers import LABELS, PIXELS, a_saved_data_set, build, check, encoded
from helpers import a_config
from PIL import Image

from flowtrain.data.splits import DataSet
from flowtrain.datasets import base
from flowtrain.errors import UserError

# The folder of these tests has the same name, but no version.
datasets = pytest.importorskip("datasets", "4", reason="the extra hub is not installed")


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A folder with a training split and a test split. No network is waited for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return a_saved_data_set(tmp_path / "saved", monkeypatch)["path"]


def hub(part="train", size=32, **options):
    return build("hub", None, part, size=size, **options)


def test_splits_sizes_and_policies(path):
    assert hub(path=path).labels is None
    assert len(hub(path=path, train_split="test").read()) == 6
    for resize, side in (("crop", 4), ("stretch", 5)):
        images = hub(path=path, size=side, channels=1, resize=resize)
        picture = Image.fromarray(PIXELS["train"][3].transpose(1, 2, 0))
        assert np.array_equal(images.read()[3], base.resize(picture, (1, side, side), resize))
    assert len(hub(path=path, resize="exact").read()) == 23
    with pytest.raises(UserError, match="data.resize: exact, but the image is 32x32 .*, not 9x9"):
        hub(path=path, size=9, resize="exact").read()


def test_without_a_test_split_a_tenth_is_held_out(path):
    rows = datasets.load_from_disk(path)["train"]
    datasets.concatenate_datasets([rows, rows.select(range(7))]).save_to_disk("one")
    parts = [hub(part, path="one", test_split=None, label="digit") for part in ("train", "test")]
    found = [{image.tobytes() for image in check(images)} for images in parts]
    rows = [images.rows().tolist() for images in parts]
    assert sorted(sum(rows, [])) == list(range(30)) and len(rows[1]) == 3
    assert not found[0] & found[1]
    with pytest.raises(UserError, match="data.test_split: .* has no splits; with null"):
        hub("test", path="one").read()


def test_images_that_cannot_be_read_are_left_out(tmp_path, caplog):
    """With their labels. A file of another format, a damaged one and none at all are no error."""
    caplog.set_level(logging.WARNING, "flowtrain")
    rows = [{"bytes": encoded(each), "path": None} for each in PIXELS["train"][:10]]
    rows[2] = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0", "path": None}
    rows[5] = {"bytes": rows[5]["bytes"][:-20], "path": None}
    rows[7] = None
    features = datasets.Features({"image": datasets.Image(), "digit": datasets.Value("int64")})
    columns = {"image": rows, "digit": list(range(10))}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    images = hub(path=tmp_path / "saved", label="digit")
    kept = [0, 1, 3, 4, 6, 8, 9]
    assert images.labels().tolist() == kept and np.array_equal(images.read(), PIXELS["train"][kept])
    assert "3 of 10 images of" in caplog.text and "  7: there is none" in caplog.text


def test_a_repository_is_loaded_without_its_code(monkeypatch, path):
    """Parts of the same files have caches of their own. Images may be files of their own."""
    load, rows = datasets.load_dataset, datasets.load_from_disk(path)["train"]
    parts = {"train[:50%]": range(11), "train[50%:]": range(11, 22)}
    load_dataset = mock.Mock(side_effect=lambda *name, split, **_: rows.select(parts[split]))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = dict(zip(("train_split", "test_split"), parts, strict=True))
    for part, (name, chosen) in zip(("train", "test"), parts.items(), strict=True):
        load_dataset.reset_mock()
        images = hub(part, repository="some/images", subset="small", revision="abc", **splits)
        assert not load_dataset.called  # nothing is loaded before it is read
        assert np.array_equal(images.read(), PIXELS["train"][list(chosen)])
        options = {"revision": "abc", "keep_in_memory": False}
        load_dataset.assert_called_once_with("some/images", "small", split=name, **options)

    folder = path.parent / "files"
    folder.mkdir()
    for number, pixels in enumerate(PIXELS["test"]):
        (folder / f"{number}.png").write_bytes(encoded(pixels))

    def load_files(name, subset, **options):
        options |= {"split": "train", "cache_dir": str(path.parent / "packages")}
        return load("imagefolder", data_dir=str(folder), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_files)
    assert np.array_equal(hub(repository="some/images").read(), PIXELS["test"])
    (folder / "3.png").unlink()
    assert len(hub(repository="some/images", channels=1).read()) == 5


def test_without_the_package(path, monkeypatch):
    monkeypatch.delattr(datasets, "__version__")  # a folder of this name
    with pytest.raises(UserError, match="needs the package datasets .the extra hub.: "):
        hub(path=path).read()


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "data.repository: give either this or data.path: neither"),
        ({"repository": "a/b", "path": "c"}, "data.repository: .*: both"),
        ({"repository": "../x"}, "data.repository: ../x is not a hub name"),
        ({"repository": "saved"}, "data.repository: saved is also a file or folder here"),
        ({"repository": "no/thing"}, r"no/thing \(split train\) .*: .*save_to_disk elsewhere"),
        ({"path": "none"}, "data.path: none cannot be loaded"),
        ({"path": "saved", "train_split": "a"}, "data.train_split: .* no split a, but train"),
        ({"path": "saved", "image": "img"}, "data.image: img is not a column of images; .* image"),
        ({"path": "saved", "image": "digit"}, "data.image: digit is not a column of images"),
        ({"path": "saved", "label": "y"}, "data.label: y is not a column .*; there is digit"),
        ({"path": "saved", "label": "image"}, "data.label: image is not a column of whole numbers"),
    ],
)  # fmt: skip
def test_what_does_not_fit(path, options, message):
    with pytest.raises(UserError, match=message) as raised:
        hub(**options).read()
    assert "\n" not in str(raised.value)


def test_a_run_finds_it_from_another_folder(path):
    section = {"name": "hub", "path": "saved", "size": 32, "label": "digit", "validation": 4}
    config = a_config("nice", data=section).data
    split = DataSet(config).split("train")
    assert config.options()["path"] == path and len(split) == 19
    assert split.labels.tolist() == LABELS["train"][split.indices].tolist()

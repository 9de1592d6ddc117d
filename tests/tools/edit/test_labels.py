"""Images with and without attributes, from folders, tables and classes."""

from pathlib import Path

import pytest
import torch
from coding_helpers import loaded, picture
from helpers import a_config, memory_below, tiny_flow

from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.tools.edit import labels


@pytest.fixture(scope="module")
def model():
    return loaded(tiny_flow("nice", (1, 8, 8), 17), a_config("nice"))


@pytest.fixture
def photos(tmp_path):
    for name, value in (("a.png", 0), ("b.png", 120), ("sub/c.png", 255)):
        picture(tmp_path / "photos" / name, value=value)
    return tmp_path / "photos"


def test_folders(model, photos, tmp_path):
    found = labels.from_folders([photos], [photos / "sub"], "x", model, 3)
    assert found.attributes["x"].tolist() == [True, True, True, False]
    assert found.x[:, 0, 0, 0].tolist() == [0, 8, 16, 16]
    assert len(labels.from_folders([photos], [photos / "sub"], "x", model, 2).x) == 3
    picture(tmp_path / "more" / "a.png", value=255)  # the same name as in the other folder
    both = [photos, tmp_path / "more", tmp_path / "more"]
    assert len(labels.from_folders(both, [photos], "x", model, 9).x) == 4 + 3


def table(photos, text) -> Path:
    path = photos.parent / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_tables(model, photos):
    """As spreadsheets write them: with a mark of the encoding, spaces, quotes and empty lines."""
    text = '\ufefffile,dark, round\na.png,1,0\n\n"sub/c.png", 0 ,1\nb.png,1,1\n'
    found = labels.from_table(table(photos, text), photos, model, 10)
    assert {name: values.tolist() for name, values in found.attributes.items()} == {
        "dark": [True, False, True],
        "round": [False, True, True],
    }
    assert found.x[:, 0, 0, 0].tolist() == [0, 16, 8]
    assert len(labels.from_table(table(photos, text), photos, model, 2).x) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "its first line has to name the columns"),
        ("file\na.png\n", "its first line has to name the columns"),
        ("file,x\n", "it has no images"),
        ("file,x,x\na.png,0,1\n", "two columns are named x"),
        ("file,\na.png,0\n", "cannot be the name of an attribute"),
        ("file,x\na.png,0,1\n", "line 2: expected 2 values.*got 3"),
        ("file,x\n,1\n", "line 2: expected 2 values"),
        ("file,x\na.png,1\nb.png,2\n", "line 3: x is '2', expected 0 or 1"),
        ("file,x\n\nnone.png,1\n", "line 3: there is no image file .*none.png"),
        ('file,x\n"a.png,1\n', "is not a CSV table in UTF-8"),
        (b"\xff\xfefile", "is not a CSV table in UTF-8"),
        ("file" + "".join(f",{i}" for i in range(1001)), "it has 1,001 attributes, and at most"),
    ],
)
def test_tables_with_a_fault(model, photos, text, said):
    with pytest.raises(UserError, match=said):
        labels.from_table(table(photos, text), photos, model, 10)


def test_a_sorted_table_is_sampled_and_not_kept(model, photos):
    text = "file,x\n\n" + "a.png,1\n" * 20_000 + "b.png,0\n" * 20_000
    with memory_below(5e6):  # 9e6 as lists
        found = labels.from_table(table(photos, text), photos, model, 12)
    assert 0 < int(found.attributes["x"].sum()) < 12 and len(found.x) == 12


def test_classes(model):
    data = DataSet(a_config("glow").data)
    split = data.split("test")
    found = labels.from_classes(model, data, "test", 4, 9, "x", 5)
    assert found.attributes["x"].tolist() == [True] * 5 + [False] * 5
    for digit, part in ((9, found.x[:5]), (4, found.x[5:])):
        of_digit = split.at((split.labels == digit).nonzero().flatten().numpy())
        assert torch.equal(part, of_digit.sample(5).take(slice(None)))
    others = labels.from_classes(model, data, "test", None, 9, "x", 1000)
    assert int(others.attributes["x"].sum()) == int((split.labels == 9).sum())
    assert len(others.x) == len(split)
    with pytest.raises(UserError, match="--from-class 10: the test split has no images of it"):
        labels.from_classes(model, data, "test", 10, 9, "x", 5)
    with pytest.raises(UserError, match="--to-class 1000.*: the test split has no images"):
        labels.from_classes(model, data, "test", None, 10**30, "x", 5)

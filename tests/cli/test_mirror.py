"""The commands with the mixture of an image and its mirror image."""

import json

import numpy as np
import pytest
import torch
from catalogue import CAUSAL, SHORT, sets
from cli_helpers import FOLDER, begin, quick, trained, tree

import flowtrain
from flowtrain.checkpoints.load import load_model
from flowtrain.data.splits import DataSet

pytestmark = pytest.mark.run

MIXTURE = "the mean over the image and its mirror image"


@pytest.fixture(scope="module")
def folder():
    """A run with flips, evaluated without and with the mixture."""
    folder = FOLDER / "mirror"
    folder.mkdir()
    quick("train", *CAUSAL, *SHORT, *sets(data__flip=True), "--run-dir", "r", cwd=folder).ok()
    assert MIXTURE not in quick("evaluate", "r", cwd=folder).ok().out
    done = quick("evaluate", "r", "--mirror", cwd=folder).ok()
    assert f"any: {MIXTURE}" in " ".join(done.out.split())
    return folder


def test_evaluate_writes_a_file_of_its_own(folder):
    plain, both = (
        json.loads((folder / "r" / f"evaluate-{name}.json").read_text())
        for name in ("test", "mirror-test")
    )
    assert "sides" not in plain and both["sides"] == 2 and both["model"] == plain["model"]
    flow = flowtrain.load(folder / "r", "cpu", mirror=True)
    data = DataSet(load_model(str(folder / "r"), torch.device("cpu")).config.data)
    expected = flow.bits_per_dim(data.split("test").take(slice(None))).mean().item()
    assert both["bits_per_dim"] == pytest.approx(expected, abs=1e-5) != plain["bits_per_dim"]
    of_two = [
        p.result().ok() for p in begin(2, "evaluate", "r", "--mirror", "--json", "-", cwd=folder)
    ]
    assert json.loads(of_two[0].out)["bits_per_dim"] == pytest.approx(expected, abs=1e-5)


def test_other_commands_have_it(folder):
    out = quick("info", "r", cwd=folder).ok().out
    assert "digits, test, mirror" in out and f"exact, {MIXTURE})" in out
    quick("report", "r", "--num-images", 4, cwd=folder).ok()
    assert (folder / "r" / "report.html").read_text().count(f"<td>exact, {MIXTURE}</td>") == 1
    out = quick("ood", "r", "--data", "noise", "--num-images", 9, "--mirror", cwd=folder).ok().out
    assert f"p(x) is {MIXTURE}" in out and json.loads((folder / "r/ood.json").read_text())["sides"]
    for words in ([], ["--mirror"]):
        quick("sample", "r", *words, "--out", f"{len(words)}.npz", cwd=folder).ok()
    plain, both = (dict(np.load(folder / f"{i}.npz")) for i in (0, 1))
    assert both.pop("sides") == 2 and both.keys() == plain.keys()
    same = (both["images"] == plain["images"]).all(axis=(1, 2, 3))
    turned = (both["images"] == plain["images"][:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same | turned).all() and not same.all() and not turned.all()


def test_archives_come_back(folder):
    pytest.importorskip("constriction")
    words = ["--split", "test", "--num-images", 40]
    done = quick("compress", "r", *words, "--out", "a.fta", "--mirror", cwd=folder).ok()
    assert "each from the likeliest of its 2 sides" in done.out
    quick("decompress", "a.fta", "--out", "a", cwd=folder).ok()
    quick("compress", "r", *words, "--out", "b.fta", cwd=folder).ok()
    quick("decompress", "b.fta", "--out", "b", cwd=folder).ok()
    assert len(tree(folder / "a")) == 40
    for name in tree(folder / "a"):
        assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()


def test_a_model_without_flips_is_refused(tmp_path):
    said = "flowtrain: --mirror: the model was trained without mirror images"
    run = trained()["glow"]
    out = ["--out", tmp_path / "a"]
    for command, *words in (
        ["evaluate"],
        ["sample"],
        ["ood", "--data", "noise"],
        ["compress", "--split", "test", *out],
    ):
        quick(command, run, "--mirror", *words, cwd=tmp_path).failed(2, said)
    quick("evaluate", "two_moons", "--mirror", cwd=tmp_path).failed(2, "is of real values")
    assert tree(tmp_path) == []

"""The trained models that come with flowtrain: cards are true, and commands take their names."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from cli_helpers import quick
from helpers import CPU, REPOSITORY, SHARED, a_config, tiny_flow

from flowtrain import config as configuration
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints import zoo
from flowtrain.checkpoints.load import find, load_model, run_of
from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.evaluation.evaluate import evaluate
from flowtrain.evaluation.score import mean_loss
from flowtrain.tools.doctor.examine import examine
from flowtrain.tools.doctor.findings import overall

# Where the data of the tests lie, in place of a download.
ELSEWHERE = {
    "cifar10": {"name": "npz", "path": str(SHARED / "cifar10.npz")},
    "mnist": {"root": str(SHARED)},
}
every_model = pytest.mark.parametrize("name", zoo.names())


def data_of(model):
    values = dict(model.checkpoint.meta["config"])
    if moved := ELSEWHERE.get(values["data"]["name"]):
        if not SHARED.is_dir():
            pytest.skip(f"no real data in {SHARED}")
        values["data"] = {**values["data"], **moved}
    return DataSet(configuration.parse(values).data)


def test_they_are_small_and_each_has_a_card_and_a_picture():
    files = sorted(path.name for path in zoo.FOLDER.iterdir() if path.suffix != ".py")
    assert {path.partition(".")[0] for path in files} == set(zoo.names()) != set()
    assert len([name for name in files if name != "__pycache__"]) == 2 * len(zoo.names())
    assert sum(zoo.checkpoint_of(name).stat().st_size for name in zoo.names()) < 16e6
    for name in zoo.names():
        assert (REPOSITORY / "docs" / "models" / f"{name}.png").stat().st_size > 1000


@every_model
@pytest.mark.run
def test_a_card_is_true(name):
    card, file, model = zoo.card_of(name), zoo.checkpoint_of(name), load_model(name, CPU)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == card.sha256
    assert sum(p.numel() for p in model.flow.parameters()) == card.parameters
    assert model.flow.kind.unit == card.unit and model.flow.exact == (card.likelihood == "exact")
    assert model.checkpoint.meta["config"]["data"]["root"] == "data"  # no path of a machine
    shipped = load_config(find_config(card.command.removeprefix("flowtrain train --config ")))
    own, shipped = model.config.resolved(), shipped.resolved()
    for key in own["data"].keys() - {"name", "root", "path"}:  # the place of the data
        assert own["data"][key] == shipped["data"][key], key
    assert {**own, "data": None} == {**shipped, "data": None}
    assert model.checkpoint.meta["progress"] is None
    first = data_of(model).split("test").at(np.arange(card.first))
    loss = mean_loss(model.flow, first, seed=0)
    assert loss == pytest.approx(card.loss_of_first, abs=2e-4)


@every_model
@pytest.mark.slow
def test_a_figure_is_that_of_the_model_and_doctor_finds_no_fault(name):
    """Of all test images. Processors differ in rounding, by less than the last digit."""
    card, model = zoo.card_of(name), load_model(name, CPU)
    data = data_of(model)
    found = evaluate(model, data, "test")[0]
    assert (found.num_images, found.unit) == (card.images, card.unit)
    assert found.loss == pytest.approx(card.loss, abs=5e-4)
    assert found.loss_stderr == pytest.approx(card.error, abs=5e-4)
    assert overall(examine(model, data, num_images=16)) != "bad"


@pytest.mark.run
def test_they_are_listed(tmp_path):
    out = quick("list", cwd=tmp_path).ok().out
    assert all(zoo.card_of(name).title in out for name in zoo.names())


def test_a_file_of_the_same_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("glow_digits") == zoo.checkpoint_of("glow_digits")
    assert str(run_of(find("glow_digits"))) == "runs/zoo/glow_digits"
    (tmp_path / "glow_digits" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="glow_digits: has no checkpoint"):
        find("glow_digits")
    with pytest.raises(UserError, match="no such checkpoint.*did you mean glow_digits"):
        find("glow_digit")


def test_a_damaged_file_and_a_damaged_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo").mkdir()
    for source in zoo.FOLDER.glob("two_moons.*"):
        shutil.copy(source, tmp_path / "zoo")
    monkeypatch.setattr(zoo, "FOLDER", tmp_path / "zoo")
    file, card = zoo.checkpoint_of("two_moons"), tmp_path / "zoo" / "two_moons.yaml"
    assert find("two_moons") == file
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UserError, match="two_moons.safetensors: its SHA-256 differs from its"):
        find("two_moons")
    for text, said in (("title: a", "command: Field required"), ("a: [", "cannot be read as YAML")):
        card.write_text(text)
        with pytest.raises(UserError, match=f"two_moons.yaml: {said}"):
            zoo.card_of("two_moons")


def test_half_precision_is_for_models_alone(tmp_path):
    tensors = tiny_flow("glow").state_dict(prefix="model.")
    half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    meta = {"config": a_config("glow").resolved(), "shape": [1, 4, 4], "levels": 256, "step": 3}
    checkpoint_format.write(tmp_path / "whole.safetensors", meta, tensors)
    checkpoint_format.write(tmp_path / "half.safetensors", meta, half)
    progress = {"progress": {"step": 3}}
    checkpoint_format.write(tmp_path / "run.safetensors", {**meta, **progress}, half)
    whole, halved = (load_model(str(tmp_path / f"{n}.safetensors"), CPU) for n in ("whole", "half"))
    for own, other in zip(whole.flow.parameters(), halved.flow.parameters(), strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)
    with pytest.raises(UserError, match="does not fit this model: .* is torch.float16 there"):
        load_model(str(tmp_path / "run.safetensors"), CPU)

"""The table of a model, and its figures."""

import json

import pytest
from cli_helpers import copy_of, trained
from helpers import CPU
from run_files import TEST

from flowtrain.checkpoints import about, zoo
from flowtrain.checkpoints.load import load_model, model_hash


def evaluated(run, **changes):
    text = json.dumps({**TEST, "model": model_hash(load_model(str(run), CPU)), **changes})
    (run / "evaluate-test.json").write_text(text)


@pytest.mark.run
def test_figures_are_those_of_the_weights(run):
    raw, averaged = load_model(str(run), CPU, "raw"), load_model(str(run), CPU)
    assert model_hash(raw) != model_hash(averaged) and about.figures(averaged) == []
    evaluated(run, dataset="/home/me/photos")
    (figure,) = about.figures(load_model(str(run), CPU))
    assert str(figure) == "3.250 +- 0.013 bits/dim (180 images, a bound from one draw of noise)"
    assert figure.dataset == "photos"  # no folder of this machine
    evaluated(run, draws=16, bound="iwbo")
    (figure,) = about.figures(load_model(str(run), CPU))
    assert figure.likelihood == "an importance-weighted bound of 16 draws"
    for other in ({"model": "0" * 64}, {"model": None}, {"loss": None}):
        evaluated(run, **other)
        assert about.figures(load_model(str(run), CPU)) == []


@pytest.mark.run
def test_a_checkpoint_of_a_finished_run(run):
    """The best one is from before the end."""
    last = run / "checkpoints" / "last.safetensors"
    last.with_name("step-00000015.safetensors").rename(last.with_name("best.safetensors"))
    rows = about.table(load_model(str(run), CPU))
    assert rows["training"].startswith("step 15, 480 images, ")
    assert rows["run"].startswith("finished: 20 steps, ")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "finished": False}))
    assert about.table(load_model(str(last), CPU))["run"].startswith("not finished: 20 steps, ")


@pytest.mark.run
def test_a_trained_model_has_the_figure_of_its_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = zoo.card_of("glow_digits")
    model = load_model("glow_digits", CPU)
    (figure,) = about.figures(model)
    assert (figure.loss, figure.images, figure.unit) == (card.loss, card.images, card.unit)
    evaluated(copy_of(trained()["glow"], tmp_path / "runs" / "zoo" / "glow_digits"))
    assert about.figures(model) == [figure]  # evaluated again, perhaps on a few images
    assert card.command in about.table(model)["trained"]


def test_no_folder_of_this_machine_is_told():
    """Also of the options of a user's own data set."""
    model = load_model("glow_digits", CPU)
    given = {"root": "/data", "labels": ["/home/me/a.csv", 3], "of": "a/b"}
    given["at"] = {"x": "/home/me/b"}
    model.checkpoint.meta["config"]["data"] |= given
    found = model.alone()[0]["config"]["data"]
    told = {"root": "data", "labels": ["a.csv", 3], "at": {"x": "b"}, "of": "a/b"}
    assert {key: found[key] for key in given} == told

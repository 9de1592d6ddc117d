"""The files of a repository on the hub, and its page."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from cli_helpers import quick
from helpers import CPU
from PIL import Image
from run_files import TEST
from safetensors.torch import save_file

from flowtrain.checkpoints.load import load_model, model_hash
from flowtrain.tools.hub import page

pytestmark = pytest.mark.run


def test_the_page_as_the_hub_reads_it(run, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    push = ["push", "runs/glow_digits", "me/digits", "--dry-run", "--out", "folder"]
    done = quick(*push, cwd=tmp_path).ok()
    assert "no figure of the test split: flowtrain evaluate runs/glow_digits" in done.out
    readme = tmp_path / "folder" / "README.md"
    assert hub.ModelCard.load(readme).data.eval_results is None
    figures = {**TEST, "model": model_hash(load_model(str(run), CPU))}
    (run / "evaluate-test.json").write_text(json.dumps(figures))
    assert "no figure" not in quick(*push, "--licence", "cc0-1.0", cwd=tmp_path).ok().out
    card = hub.ModelCard.load(readme)
    (measured,) = card.data.eval_results
    assert (measured.metric_value, measured.dataset_name) == (3.25, "digits")
    assert measured.dataset_split == "test" and card.data.license == "cc0-1.0"
    assert "glow" in card.data.tags and "3.250 +- 0.013 bits/dim" in card.text
    assert "flowtrain sample hf://me/digits" in card.text and str(tmp_path) not in card.content
    for name in ("samples.png", "curves.png"):
        assert f"({name})" in card.text
        with Image.open(tmp_path / "folder" / name) as picture:
            assert picture.width >= 800
    assert "Points" not in card.text and "own module" not in card.text


def test_only_the_model_is_uploaded(run):
    model = load_model(str(run), CPU)
    files = dict(page.files(model, "me/digits", "mit", lambda: b"a picture"))
    assert files["samples.png"] == b"a picture"
    path = run / "alone.safetensors"
    path.write_bytes(files["model.safetensors"])
    alone = load_model(str(path), CPU)
    assert {name.partition(".")[0] for name in alone.checkpoint.tensors} == {"model"}
    meta = alone.checkpoint.meta
    assert not meta["data"] and meta["progress"] is None
    assert yaml.safe_load(files["config.yaml"]) == meta["config"]
    for name, value in model.flow.state_dict().items():
        assert torch.equal(alone.flow.state_dict()[name], value)
    halved = {name: tensor.half() for name, tensor in model.checkpoint.tensors.items()}
    half = replace(model, checkpoint=replace(model.checkpoint, tensors=halved))
    small = dict(page.files(half, "me/digits", "mit", bytes))  # half precision stays
    assert len(small["model.safetensors"]) < 0.9 * len(files["model.safetensors"])


def test_other_files_are_not_overwritten(run, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    push = ["push", "runs/glow_digits", "me/digits", "--dry-run", "--out", "mine"]
    for name in ("README.md", "config.yaml"):
        (folder / name).write_text("mine")
        done = quick(*push, cwd=tmp_path)
        done.failed(2, f"mine: holds {name}, which push has not written")
        assert (folder / name).read_text() == "mine" and len(list(folder.iterdir())) == 1
        (folder / name).unlink()
    foreign = folder / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, foreign)
    before = foreign.read_bytes()
    quick(*push, cwd=tmp_path).failed(2, "mine/model.safetensors")
    assert foreign.read_bytes() == before
    foreign.unlink()
    (folder / ".git").mkdir()
    for _ in range(2):
        quick(*push, cwd=tmp_path).ok()
    assert {path.name for path in folder.iterdir()} - {".git"} <= page.FILES
    (folder / "notes").touch()
    quick(*push, cwd=tmp_path).failed(2, "mine: holds notes")
    # By default the folder is in the run, which may be a stranger's.
    quick(*push[:-2], cwd=tmp_path).ok()
    link = run / "push" / "README.md"
    link.unlink()
    link.symlink_to(folder / "notes")
    quick(*push[:-2], cwd=tmp_path).ok()
    assert not link.is_symlink() and not (folder / "notes").read_text()

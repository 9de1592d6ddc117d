"""Models of other projects: their log-probabilities and images are the same. Fixtures are weights,
images and results of the projects' own code, by `make.py` of commit 08f3465 in this folder.
"""

import json
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from cli_helpers import quick
from dataset_helpers import Evil
from helpers import npz

from flowtrain import load
from flowtrain.errors import UserError
from flowtrain.tools.weights.command import Project
from flowtrain.tools.weights.convert import PROJECTS, convert
from flowtrain.tools.weights.tensors import Tensors, read

HERE = Path(__file__).parent
MODELS = [
    (p, m) for p in ("rosinality", "y0ast", "normflows") for m in ("random", "trained", "additive")
]
MODELS += [("y0ast", "classes"), ("normflows", "classes")]
MODELS += [(p, m) for p in ("chrischute", "tarflow") for m in ("random", "trained")]
SETTINGS = {
    ("rosinality", "random"): ["data.n_bits=5"],
    ("normflows", "additive"): ["dequantization.transform=logit"],
}


def fixture(project, name, folder):
    """The arrays of a model in a fixture, its weights, and settings for images like its own."""
    with np.load(HERE / f"{project}.npz") as file:
        arrays = {key.partition("/")[2]: file[key] for key in file if key.startswith(f"{name}/")}
    index = json.loads(str(arrays.pop("index")))
    arrays = {key: torch.from_numpy(each) for key, each in arrays.items()}
    rest, weights = arrays["weights"].float(), {}
    for key, shape, dtype, value in index:
        if value is None:
            values, rest = rest.tensor_split([math.prod(shape)])
        else:
            values = torch.tensor(value)
        weights[key] = values.view(shape).to(getattr(torch, dtype))
    channels, *size = arrays["x"].shape[1:]
    data = npz(folder / "data.npz", shape=(*size, channels))
    own = SETTINGS.get((project, name), [])
    return arrays, weights, ["data.name=npz", f"data.path={data['path']}", *own]


@pytest.mark.parametrize("project, name", MODELS)
def test_log_probabilities_and_samples(project, name, tmp_path, monkeypatch):
    monkeypatch.setattr("flowtrain.nets.transformer.HEAD", 8)
    arrays, weights, settings = fixture(project, name, tmp_path)
    _, flow = convert(Tensors("file", weights), project, settings)
    labels = torch.arange(4) % flow.classes if flow.classes else None
    with torch.no_grad():
        log_prob = flow(arrays["x"], arrays["u"].double() / 256, labels).total
        z, of_two = arrays["z"].double(), None if labels is None else labels[:2]
        latents = z if labels is None else flow.latents_of_classes(z, of_two)
        samples = flow.bijection.inverse(latents, flow.conditioning(2, of_two))[0]
    # Both are float64, but rosinality rounds log-determinants to float32, and chrischute 0.9.
    torch.testing.assert_close(log_prob, arrays["log_prob"], rtol=1e-8, atol=0)
    torch.testing.assert_close(samples, arrays["samples"], rtol=0, atol=1e-10)


def test_gaussian_noise_is_added_to_images_of_another_scale(tmp_path):
    """`x / 255` with Gaussian noise, and `(x + u) / 256` without, both from [0, 1] to [-1, 1]."""
    arrays, weights, settings = fixture("tarflow", "random", tmp_path)
    noise = ["dequantization.name=gaussian"]
    (_, uniform), (_, gaussian) = (
        convert(Tensors("file", weights), "tarflow", [*settings, *more]) for more in ([], noise)
    )
    x = arrays["x"].double()
    with torch.no_grad():
        z, _ = gaussian.bijection(gaussian.dequantizer.middle(x, torch.float64))
        expected, _ = uniform.bijection(x / 255 - 0.5)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)


def changed(name, change):
    return lambda weights: {**weights, name: change(weights[name])}


def filled(value):
    return lambda tensor: torch.full_like(tensor, value)


def without(part, **more):
    return lambda weights: {**{k: v for k, v in weights.items() if part not in k}, **more}


def narrower(part):
    return lambda weights: {
        name: each[(slice(5),) * each.ndim] if part in name else each
        for name, each in weights.items()
    }


LOC, ONE, FLOAT8 = "blocks.0.flows.0.actnorm.loc", torch.ones(1), torch.float8_e4m3fn
ENTRIES = {"q0.1.loc": torch.arange(32.0).view(1, 2, 4, 4)}
ENTRIES["q0.1.log_scale"] = torch.zeros(1, 2, 4, 4)
REFUSALS = [
    ("rosinality", without(LOC), "no tensor blocks.0.flows.0"),
    ("rosinality", changed(LOC, lambda t: t[:, :3]), "1x3x1x1, expected 1x4x1x1"),
    ("rosinality", changed(LOC, filled(math.nan)), "not finite reals"),
    ("rosinality", changed(LOC, torch.Tensor.int), "not finite reals"),
    ("rosinality", changed(LOC, lambda t: (t * math.nan).to(FLOAT8)), "not finite reals"),
    ("rosinality", changed(LOC[:-3] + "initialized", filled(0)), "never trained"),
    ("rosinality", without("nothing", **{"a.b": ONE}), "has no tensor a.b"),
    ("rosinality", changed("blocks.1.prior.conv.bias", filled(9.0)), "at most 7.92"),
    ("y0ast", without("", a=ONE), "it has no tensor flow.layers.1.block.4"),
    ("rosinality", without("", a=ONE), "it has no tensors blocks.0."),
    ("y0ast", without(".invconv."), "flow_permutation shuffle or reverse"),
    ("y0ast", narrower("flow.layers.2.block."), "networks of a level have different widths"),
    ("normflows", without("nothing", **{"q0.0.loc_cc": ONE}), "depends on the class"),
    ("normflows", without("q0.1.", **ENTRIES), "q0.1.loc is a mean for each entry"),
    ("tarflow", changed("var", filled(2.0)), "var is not 1"),
    ("tarflow", changed("blocks.0.proj_out.bias", lambda t: t[:4]), "volume-preserving"),
]


@pytest.mark.parametrize("project, change, said", REFUSALS)
def test_other_architectures_are_refused(project, change, said, tmp_path):
    _, weights, settings = fixture(project, "random", tmp_path)
    with pytest.raises(UserError, match=f"^file: .*{re.escape(said)}"):
        convert(Tensors("file", change(weights)), project, settings)


def compressed(path):
    torch.save({"a": torch.zeros(9)}, path)
    with zipfile.ZipFile(path) as stored:
        parts = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, part in parts.items():
            file.writestr(name, part)


def nested():
    return torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])


@pytest.mark.parametrize(
    "content, said",
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 damaged"), "not a file of torch.save"),
        (lambda path: path.write_bytes(pickle.dumps(print, 4)), "not a file of torch.save"),
        (lambda path: torch.save({"model": Evil()}, path), "not a file of torch.save"),
        (lambda path: torch.save({"a": bytearray(9)}, path), "not a file of torch.save"),
        (compressed, "not a file of torch.save"),
        (lambda path: torch.save([torch.ones(1)], path), "holds no state_dict"),
        (lambda path: torch.save({"a": 1}, path), "holds no state_dict"),
        (lambda path: torch.save({"a": torch.ones(1, device="meta")}, path), "holds no state_dict"),
        # The newest torch does not load it.
        (lambda path: torch.save({"a": nested()}, path), "(holds no state_dict|not a file of)"),
        (lambda path: torch.save({"a": torch.ones(1).expand(10**9)}, path), "larger than the file"),
    ],
)
def test_other_files_are_refused(content, said, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    content(path)
    with pytest.raises(UserError, match=f"{path}: .*{said}"):
        read(path, "a")
    assert not any("pickle protocol" in str(each.message) for each in recwarn)
    assert not (tmp_path / "executed").exists()


@pytest.mark.run
def test_an_imported_model_is_an_ordinary_checkpoint(tmp_path):
    """It has the likelihood of the project, and is evaluated, sampled and archived."""
    arrays, weights, settings = fixture("rosinality", "trained", tmp_path)
    # As `train.py` saves it, from DataParallel, and others beside an optimizer.
    named = {f"module.{name}": tensor.float() for name, tensor in weights.items()}
    torch.save({"model": named, "optimizer": {"step": 3}}, tmp_path / "a.pt")
    quick("import", "a.pt", "--from", "rosinality", *settings, cwd=tmp_path).ok()
    model = load(tmp_path / "a.safetensors")
    with torch.no_grad():
        log_prob = model(arrays["x"], arrays["u"].float() / 256).total
    torch.testing.assert_close(log_prob.double(), arrays["log_prob"], rtol=1e-5, atol=0)
    for words in (
        ["evaluate", "a.safetensors"],
        ["sample", "a.safetensors", "--num-images", "2"],
        ["compress", "a.safetensors", "--split", "test", "--out", "a.fta"],
        ["decompress", "a.fta", "--out", "back"],
    ):
        quick(*words, cwd=tmp_path).ok()
    again = quick("import", "a.pt", "--from", "rosinality", cwd=tmp_path)
    again.failed(2, "a.safetensors: is a checkpoint; give another name")
    (tmp_path / "a.safetensors").unlink()
    for wrong, said in (
        ("model.width=3", "--set model.width=3: only keys of data and deq"),
        ("data.name=two_moons", "models are of images"),
    ):
        quick("import", "a.pt", "--from", "rosinality", wrong, cwd=tmp_path).failed(2, said)


def test_the_command_offers_every_project():
    assert set(get_args(Project)) == set(PROJECTS)

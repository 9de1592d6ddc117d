"""The size of a model is known, and refused where it cannot fit, before the model is built."""

from contextlib import nullcontext

import pytest
from catalogue import SPHERE, TINY
from helpers import a_config

import flowtrain
from flowtrain.checkpoints import build
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.build import build_flow
from flowtrain.errors import UserError
from flowtrain.system import capacity, distributed

SHAPE = (1, 4, 4)
IMAGES = [{"name": name, **options} for name, options in TINY.items()]
IMAGES += [{"name": "glow", "permutation": "shuffle", "split": "mixed", "coupling": "mixture"}]


@pytest.mark.parametrize(
    "model, shape, levels, noise",
    [
        *((model, (1, 8, 8), 256, {}) for model in IMAGES),
        (IMAGES[0], (3, 8, 8), 256, {"name": "variational"}),
        (SPHERE, (3, 1, 1), None, {}),
    ],
)
def test_the_sizes_are_those_of_the_flow(model, shape, levels, noise, monkeypatch):
    config = a_config({**model, "classes": 3}, dequantization=noise)
    found = []
    assert build_flow(config, shape, levels, check=found.append) is found.pop()
    monkeypatch.setattr(build, "SMALL", 0)
    flow = build_flow(config, shape, levels, check=found.append)
    assert {tensor.device.type for tensor in found[0].state_dict().values()} == {"meta"}
    there = found[0].state_dict()
    here = {name: (tensor.shape, tensor.dtype) for name, tensor in flow.state_dict().items()}
    assert here == {name: (tensor.shape, tensor.dtype) for name, tensor in there.items()}


@pytest.mark.parametrize(
    "copies, processes, refused",
    [(1, 1, None), (3, 1, None), (4, 1, "and training needs 4 times that; "), (1, 4, "")],
)
def test_a_model_that_cannot_fit_is_refused_with_its_size(copies, processes, refused, monkeypatch):
    """The processes of a machine share its memory."""
    config = a_config({"name": "nice", "couplings": 4, "width": 1000, "hidden_layers": 1})
    flow = build_flow(config, SHAPE, 256)
    weights = sum(t.nbytes for t in (*flow.parameters(), *flow.buffers()))
    monkeypatch.setattr(capacity, "available", lambda device: 3.5 * weights)
    monkeypatch.setattr(distributed, "local_world", lambda: processes)
    error = pytest.raises(UserError, match=rf"weights take 0\.0 GiB, {refused}0\.0 GiB are avail")
    with nullcontext() if refused is None else error:
        build_flow(config, SHAPE, 256, copies)


@pytest.mark.run
def test_an_absurd_model_gets_no_memory():
    for model, message in (
        ({"name": "nice", "width": 2**20}, r"weights take [0-9,.]+ GiB"),
        ({"name": "planar", "layers": 2**20}, "too many layers"),
    ):
        with pytest.raises(UserError, match=message):
            build_flow(a_config(model), SHAPE, 256)


def test_a_model_that_its_file_does_not_hold_gets_no_memory(tmp_path, monkeypatch):
    config = a_config({"name": "nice", "width": 8})
    flow = build_flow(config, SHAPE, 256)
    wider = a_config({"name": "nice", "width": 9}).resolved()
    meta = {"config": wider, "shape": SHAPE, "levels": 256, "step": 0}
    checkpoint_format.write(tmp_path / "a.safetensors", meta, flow.state_dict(prefix="model."))
    built = []
    monkeypatch.setattr(build, "SMALL", 0)
    real = build._build
    monkeypatch.setattr(build, "_build", lambda *args: built.append(flow := real(*args)) or flow)
    with pytest.raises(UserError, match="does not fit this model: .* there and .* here"):
        flowtrain.load(str(tmp_path / "a.safetensors"))
    assert [next(flow.parameters()).device.type for flow in built] == ["meta"]


OWN = """
import torch
from flowtrain.models import nice
def build(shape):
    torch.zeros(1).item()
    bijection = nice.build(shape, width=4)
    for parameter in bijection.parameters():
        parameter.data = parameter.data.t().contiguous().t()  # matrices have their columns first
    return bijection
"""


def test_a_model_of_ones_own_may_need_the_values_of_tensors(tmp_path, monkeypatch):
    """Its weights are laid out as the optimizers need them."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "valued.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    flow = build_flow(a_config({"name": "own.valued"}), SHAPE, 256)
    assert {parameter.device.type for parameter in flow.parameters()} == {"cpu"}
    assert all(parameter.is_contiguous() for parameter in flow.parameters())

"""What a CUDA device must not change. Run with `-m gpu`."""

from pathlib import Path

import pytest
import torch

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.load import load_model
from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.data.splits import DataSet
from flowtrain.evaluation.score import score
from flowtrain.pictures.sample import sample
from flowtrain.system import device as devices
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SMALL = [
    "model.steps=2",
    "model.width=16",
    "train.num_steps=20",
    "train.log_every=5",
    "train.validate_every=10",
]


def train(path: Path, device: str, *overrides: str) -> checkpoint_format.Checkpoint:
    config = load_config(find_config("glow_digits.yaml"), [*SMALL, *overrides])
    fit(config, RunDirectory(path), devices.resolve(device))
    return checkpoint_format.read(path / "checkpoints" / "last.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_trains_as_on_the_cpu(tmp_path: Path, precision: str, memory: str) -> None:
    overrides = [f"train.precision={precision}", f"train.memory={memory}"]
    runs = {device: train(tmp_path / device, device, *overrides) for device in ("cpu", "cuda")}
    best = {device: run.meta["progress"]["best"] for device, run in runs.items()}
    assert best["cuda"] == pytest.approx(best["cpu"], abs=1e-2 if precision == "fp32" else 5e-2)


def test_scores_and_samples_as_on_the_cpu(tmp_path: Path) -> None:
    train(tmp_path / "run", "cuda")
    split = DataSet(load_config(find_config("glow_digits.yaml")).data).split("test")
    models = [load_model(str(tmp_path / "run"), devices.resolve(d)) for d in ("cpu", "cuda")]
    on_cpu, on_cuda = (score(model.flow, split).log_prob for model in models)
    torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-4, atol=1e-2)
    images = [sample(model.flow, 16, [1.0], seed=0) for model in models]
    # a rounding may fall to the other side of a bin
    assert (images[0] != images[1]).float().mean() < 0.01
    x = split.take(slice(0, 32)).cuda()
    assert torch.equal(models[1].flow.decode(models[1].flow.encode(x)), x)


def test_goes_on_from_a_run_on_the_cpu(tmp_path: Path) -> None:
    train(tmp_path / "run", "cpu")
    longer = load_config(find_config("glow_digits.yaml"), [*SMALL, "train.num_steps=30"])
    saved = str(tmp_path / "run" / "checkpoints" / "last.safetensors")
    fit(longer, RunDirectory(tmp_path / "more"), devices.resolve("cuda"), resume=saved)
    assert (
        checkpoint_format.read(tmp_path / "more" / "checkpoints" / "last.safetensors").meta["step"]
        == 30
    )

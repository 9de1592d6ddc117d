"""What a CUDA device must not change. Run with `-m gpu`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.background import Background
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.load import load_model
from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.data.batches import Batches
from flowtrain.data.splits import DataSet
from flowtrain.errors import RunError
from flowtrain.evaluation.score import score
from flowtrain.nets.dropout import Dropout
from flowtrain.pictures.sample import sample
from flowtrain.system import device as devices
from flowtrain.system import nvidia
from flowtrain.system.random import Stream, uniform
from flowtrain.training.delayed_metrics import DelayedMetrics
from flowtrain.training.loop import fit
from flowtrain.training.resume import start
from flowtrain.training.run_directory import RunDirectory
from flowtrain.training.step import optimizer_step, train_step
from flowtrain.training.stop import Clock, Stop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHORT = ["model.width=16", "train.num_steps=20", "train.log_every=5", "train.validate_every=10"]
SMALL = {
    "glow_digits.yaml": ["model.steps=2", *SHORT],
    # Every kind of block.
    "causal_digits.yaml": [
        *("model.blocks=2", "model.attention=1", "model.pixels=true"),
        *("model.downsample=1", "model.orders=8", "data.flip=false", *SHORT),
    ],
}
OF_DIGITS = ["data.name=digits", "model.patch=2", *SHORT]
SMALL["tarflow_mnist_small.yaml"] = OF_DIGITS
SMALL["jet_cifar_small.yaml"] = ["model.couplings=5", "data.flip=false", *OF_DIGITS]
GLOW, CAUSAL, TARFLOW, JET = SMALL


def train(path: Path, device: str, name: str, *overrides: str) -> checkpoint_format.Checkpoint:
    config = load_config(find_config(name), [*SMALL[name], *overrides])
    fit(config, RunDirectory(path), devices.resolve(device))
    return checkpoint_format.read(path / "checkpoints" / "last.safetensors")


def assert_alike(one, other, precision: str = "fp32") -> None:
    best = [run.meta["progress"]["best"] for run in (one, other)]
    assert best[1] == pytest.approx(best[0], abs=1e-2 if precision == "fp32" else 5e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name, memory",
    [(GLOW, mode) for mode in ("store", "checkpoint", "reversible")]
    + [(name, mode) for name in (CAUSAL, TARFLOW) for mode in ("store", "checkpoint")]
    + [(JET, mode) for mode in ("store", "reversible")],
)
def test_trains_as_on_the_cpu(tmp_path: Path, name: str, precision: str, memory: str) -> None:
    keys = [f"train.precision={precision}", f"train.memory={memory}"]
    runs = [train(tmp_path / device, device, name, *keys) for device in ("cpu", "cuda")]
    assert_alike(*runs, precision)


@pytest.mark.parametrize("compile", ["off", "layers", "step"])
@pytest.mark.parametrize("cuda_graph", ["false", "true"])
@pytest.mark.parametrize(
    "name, memory, precision",
    [
        (GLOW, "store", "fp32"),
        (GLOW, "store", "bf16"),
        (GLOW, "checkpoint", "fp32"),
        (GLOW, "reversible", "bf16"),
        (CAUSAL, "store", "bf16"),
        (TARFLOW, "checkpoint", "bf16"),
        (JET, "reversible", "fp32"),
    ],
)
def test_compiled_and_replayed_steps_train_alike(
    tmp_path: Path, name: str, memory: str, precision: str, compile: str, cuda_graph: str
) -> None:
    """With classes and two parts a step. The first batch of each is compared by the run itself."""
    same = [f"train.memory={memory}", f"train.precision={precision}", "model.classes=10"]
    same += ["train.batch_size=16", "train.accumulate=2"]
    same += ["model.orders=1"] * (name == CAUSAL)  # which go without classes
    plain = train(tmp_path / "plain", "cuda", name, *same)
    keys = [f"train.compile={compile}", f"train.cuda_graph={cuda_graph}"]
    assert_alike(plain, train(tmp_path / "other", "cuda", name, *same, *keys), precision)


def test_dropout_has_the_masks_of_the_cpu() -> None:
    example, x = torch.rand(7, 30), torch.ones(7, 5, 5, 9)
    masks = []
    for device in ("cpu", "cuda"):
        drop = Dropout(0.3, example.to(device))
        masks.append([drop(x.to(device)).cpu() for _ in range(3)])
    assert all(map(torch.equal, *masks))


@pytest.mark.parametrize("shape", [(300, 3, 32, 32), (7, 1, 3, 3)])
def test_noise_is_that_of_the_cpu(shape: tuple[int, ...]) -> None:
    """Bit for bit, and nothing waits for the device."""
    device = torch.device("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = [uniform(shape, 3, Stream.EVALUATION, first, 2, device) for first in (0, 2**40)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for first, noise in zip((0, 2**40), drawn, strict=True):
        assert torch.equal(noise.cpu(), uniform(shape, 3, Stream.EVALUATION, first, 2))


@pytest.mark.parametrize("optimizer", ["muon", "adamax"])
@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_a_step_waits_for_nothing(memory: str, optimizer: str) -> None:
    """From the images to the numbers on their way, except for the first step."""
    settings = [*SMALL[GLOW], f"train.memory={memory}", f"train.optimizer={optimizer}"]
    settings += ["train.precision=bf16", "data.flip=true", "data.shift=1", "train.clip_norm=1"]
    config = load_config(find_config(GLOW), settings)
    data, device = DataSet(config.data), devices.resolve("cuda")
    flow = build_flow(config, data.shape, data.num_bins).to(device)
    batches = Batches(data, config, 16, device)
    state = start(config, flow, data.fingerprint, None, None, batches)
    metrics = DelayedMetrics(state, Clock(state), Stop())
    try:
        for step in range(4):
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            loss, grad_norm = train_step(state, *batches.at(state.progress.images))
            optimizer_step(state, grad_norm)
            metrics.send(loss, grad_norm, 1e-3)
            state.progress.step += 1
            metrics.receive(leaving=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.close()
    metrics.receive(leaving=0)
    assert metrics.failed is None and state.progress.window_steps == 4


def test_a_step_that_is_not_finite_is_skipped_there(tmp_path: Path) -> None:
    """With the rate far too high, the run ends with evidence, and its checkpoint is sound."""
    with pytest.raises(RunError, match="steps not finite"):
        train(tmp_path / "run", "cuda", GLOW, "train.lr=1e30", "train.max_non_finite=1")
    last = checkpoint_format.read(tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert all(torch.isfinite(tensor.float()).all() for tensor in last.tensors.values())


def test_a_checkpoint_is_copied_without_waiting() -> None:
    weight = torch.arange(2**22, device="cuda", dtype=torch.float32)
    tensors = {"weight": weight, "step": torch.tensor(3.0)}
    found: list[torch.Tensor] = []
    background = Background()
    background.start(tensors, lambda copied: None)  # takes the memory
    background.finish()
    before = weight.cpu()
    torch.cuda.set_sync_debug_mode("error")
    try:
        background.start(tensors, lambda copied: found.append(copied["weight"].clone()))
        weight += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    background.finish()
    assert torch.equal(found[0], before)


@pytest.mark.parametrize("name", SMALL)
def test_scores_and_samples_as_on_the_cpu(tmp_path: Path, name: str) -> None:
    train(tmp_path / "run", "cuda", name)
    split = DataSet(load_config(find_config(name)).data).split("test")
    models = [load_model(str(tmp_path / "run"), devices.resolve(d)) for d in ("cpu", "cuda")]
    on_cpu, on_cuda = (score(model.flow, split).log_prob for model in models)
    torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-4, atol=1e-2)
    images = [sample(model.flow, 16, [1.0], seed=0) for model in models]
    # a rounding may fall to the other side of a bin
    assert (images[0] != images[1]).float().mean() < 0.01
    x = split.take(slice(0, 32)).cuda()
    assert torch.equal(models[1].flow.decode(models[1].flow.encode(x)), x)


def test_goes_on_from_a_run_on_the_cpu(tmp_path: Path) -> None:
    train(tmp_path / "run", "cpu", GLOW)
    longer = load_config(find_config(GLOW), [*SMALL[GLOW], "train.num_steps=30"])
    last = Path("checkpoints") / "last.safetensors"
    saved, more = str(tmp_path / "run" / last), tmp_path / "more"
    fit(longer, RunDirectory(more), devices.resolve("cuda"), resume=saved)
    assert checkpoint_format.read(more / last).meta["step"] == 30


def test_auto_is_the_gpu_and_its_driver_is_known() -> None:
    assert devices.resolve("auto").type == "cuda"
    found = nvidia.find()
    assert torch.version.cuda is None or (found is not None and found.driver)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_as_one(tmp_path: Path) -> None:
    one = train(tmp_path / "one", "cuda", GLOW, "train.batch_size=32")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [*SMALL[GLOW], "train.batch_size=16"]
    words = [word for each in settings for word in ("--set", each)]
    command = ["-m", "flowtrain", "train", "--config", GLOW, "--run-dir", "two", *words]
    subprocess.run([sys.executable, *launcher, *command], cwd=tmp_path, check=True)
    two = checkpoint_format.read(tmp_path / "two" / "checkpoints" / "last.safetensors")
    assert two.meta["processes"] == 2
    assert_alike(one, two)

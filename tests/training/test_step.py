"""Steps: a non-finite one changes nothing, none waits, and one that cannot fit is refused."""

import contextlib
from typing import get_args

import pytest
import torch
from catalogue import TINY
from fake_tensors import CPU, CUDA, Counting, fake_tensors, moved
from helpers import a_config, images, perturb, ready, tiny_flow

from flowtrain.bijections.base import DataDependentInit
from flowtrain.bijections.memory import Mode
from flowtrain.checkpoints.build import build_flow
from flowtrain.config import Train
from flowtrain.data.batches import augment
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow, initialize
from flowtrain.system import capacity, distributed
from flowtrain.training import state as states
from flowtrain.training.optim import EMA, build_optimizers
from flowtrain.training.state import State
from flowtrain.training.step import (
    activations_of_an_image,
    dequantization_noise,
    drop_labels,
    optimizer_step,
    reason_against,
    require_images_to_fit,
    require_trainable,
    train_step,
)

SHAPE = (1, 8, 8)


BF16, REVERSIBLE, STEP = {"precision": "bf16"}, {"memory": "reversible"}, {"compile": "step"}
GRAPH, LAYERS, TIME = {"cuda_graph": True}, {"compile": "layers"}, {"clock": "processor"}
LOOP = "is a loop whose length"


@pytest.mark.parametrize(
    "models, train, device, message",
    [
        # The inverse in float32 does not give back the input from which bf16 computed the output.
        ("maf iaf", {**REVERSIBLE, **BF16}, CPU, "train.memory: reversible computes"),
        ("maf iaf", BF16, CPU, None),
        ("maf iaf", REVERSIBLE, CPU, None),
        ("glow", {**REVERSIBLE, **BF16}, CPU, None),
        ("causal", REVERSIBLE, CPU, "train.memory: reversible saves nothing here"),
        ("causal", {"memory": "checkpoint"}, CPU, None),
        ("iaf cnf", STEP, CPU, f"train.compile: .* {LOOP}"),
        ("maf", {**REVERSIBLE, **STEP}, CPU, f"train.compile: .* {LOOP}"),
        ("iaf cnf", GRAPH, CUDA, f"train.cuda_graph: .* {LOOP}"),
        ("maf", {**REVERSIBLE, **GRAPH}, CUDA, f"train.cuda_graph: .* {LOOP}"),
        ("iaf cnf", LAYERS, CPU, None),
        ("maf", {**REVERSIBLE, **LAYERS}, CPU, None),
        ("glow", GRAPH, CPU, "train.cuda_graph: needs a CUDA device.*on cpu$"),
        ("glow", TIME, CPU, None),
        ("glow", TIME, CUDA, "train.clock: processor time does not measure"),
    ],
)
def test_keys_that_do_not_suit_the_model_or_the_device(models, train, device, message):
    for model in models.split():
        config = a_config(model, train={"memory": "store", **train})
        flow = build_flow(config, SHAPE, 256)
        refused = pytest.raises(UserError, match=f"^{message}")
        with refused if message else contextlib.nullcontext():
            require_trainable(flow, config, device)


def state_of(config, shape=SHAPE):
    return State(config, ready(build_flow(config, shape, 256)), [], None, {})


def trained_state(optimizer="adam", clip_norm=1.0):
    config = a_config(train={"optimizer": optimizer, "weight_decay": 0.1, "clip_norm": clip_norm})
    flow = tiny_flow(seed=1)
    state = State(config, flow, build_optimizers(flow, config.train), EMA(flow, 0.5), {})
    x = images(4, flow.shape)
    optimizer_step(state, train_step(state, x)[1])
    return state, x


def changed(state, before):
    after = state.tensors()
    assert after.keys() == before.keys()
    return {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}


@pytest.mark.run
@pytest.mark.parametrize("host_decides", [False, True])
@pytest.mark.parametrize("optimizer", get_args(Train.model_fields["optimizer"].annotation))
def test_a_non_finite_step_changes_nothing_nor_do_those_after_it(
    optimizer, host_decides, monkeypatch
):
    """Also on a device whose kernels do not read it."""
    if host_decides:
        monkeypatch.setattr(states, "HOST_DECIDES", ("cpu",))
    state, x = trained_state(optimizer)
    given = [state.unless, *(each.found_inf for each in state.optimizers)]
    assert {each is None for each in given} == {host_decides}
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    last = list(state.flow.parameters())[-1]
    for bad in (torch.nan, torch.inf):
        _, norm = train_step(state, x)
        last.grad[0] = bad
        optimizer_step(state, norm * bad)
        assert changed(state, before) == set()
    _, norm = train_step(state, x)
    optimizer_step(state, norm)
    assert changed(state, before) == set() and torch.isfinite(norm)
    state.found_inf.zero_()
    optimizer_step(state, norm)
    assert changed(state, before) == {"model", "ema", "optimizer"}


@pytest.mark.run
def test_a_non_finite_loss_has_no_finite_gradient(monkeypatch):
    """So all processes detect it by the norm, which they share."""
    state, x = trained_state()
    loss = Flow.loss
    monkeypatch.setattr(Flow, "loss", lambda flow, log_prob: loss(flow, log_prob) + torch.inf)
    found, norm = train_step(state, x)
    assert torch.isinf(found) and torch.isnan(norm)


@pytest.mark.run
def test_one_non_finite_weight_is_noticed():
    state, _ = trained_state()
    with Counting() as counting:
        assert state.weights_are_finite()
    assert counting.calls[torch.ops.aten._local_scalar_dense.default] == 1
    assert counting.calls.total() - counting.calls[torch.ops.aten.detach.default] < 20
    weight = list(state.flow.parameters())[3].data.view(-1)
    for value, finite in [(3e38, True), (-3e38, True), (torch.inf, False), (torch.nan, False)]:
        weight[-1] = value
        assert state.weights_are_finite() is finite


# As many passes as the numbers require: those of a solver, and of a search for an inverse.
SEARCHING = {"cnf": get_args(Mode), "planar": ["reversible"], "mixture": ["reversible"]}
CASES = [
    *((name, name, {}) for name in TINY),
    *((name, "glow", {"coupling": name}) for name in ("additive", "spline", "mixture")),
    ("conditional", "glow", {"classes": 3, "split": "mixed", "conditioner": "gated"}),
    # Autocast on CUDA gives some results another precision than on a CPU.
    ("attention", "causal", {"token": 1, "attention": 1, "pixels": True, "downsample": 2}),
]


def fake_step(monkeypatch, device, model, train, **sections):
    """A step on fake images: augmentation, noise, gradient, clipping, optimizer and average."""
    config = a_config(model, train={"batch_size": 4, **train}, **sections)
    flow = ready(build_flow(config, (1, 4, 4), 256))
    for layer in flow.modules():
        if isinstance(layer, DataDependentInit):
            layer.require_initialized()  # waits, once
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with fake_tensors(monkeypatch):
        moved(flow, device)
        state = State(config, flow, build_optimizers(flow, config.train), EMA(flow, 0.5), {})
        assert torch.backends.cudnn.benchmark == (device == CUDA)
        if device == CUDA:

            def backward(loss, gradient):
                for parameter in flow.parameters():
                    parameter.grad = torch.empty_like(parameter)

            monkeypatch.setattr(torch.Tensor, "backward", backward)
        x = torch.empty(4, *flow.shape, dtype=torch.uint8, device=device)
        x = augment(x, True, 1, seed=0)
        labels = torch.empty(4, dtype=torch.int64, device=device) if flow.classes else None
        _, norm = train_step(state, x, labels)
        optimizer_step(state, norm)
        return norm


@pytest.mark.run
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("memory", get_args(Mode))
@pytest.mark.parametrize("name, model, options", CASES)
def test_a_step_waits_for_nothing(name, model, options, memory, device, monkeypatch):
    """The CUDA part is without the backward pass, which needs a torch that was built for CUDA."""
    model = {"name": model, **TINY[model], **options}
    flow = build_flow(a_config(model), SHAPE, 256)
    possible = [p for p in ("bf16", "fp32") if reason_against(flow, memory, p) is None]
    if not possible:
        pytest.skip("no such mode")
    train = {"memory": memory, "precision": possible[0], "optimizer": "muon"}
    train |= {"clip_norm": 1.0, "weight_decay": 0.1}
    dequantization = {"name": "variational"} if name == "conditional" else {}
    waits = memory in SEARCHING.get(name, []) and (device == CPU or name == "cnf")
    with pytest.raises((AssertionError, RuntimeError)) if waits else contextlib.nullcontext():
        norm = fake_step(monkeypatch, device, model, train, dequantization=dequantization)
        assert norm.device == device


@pytest.mark.run
@pytest.mark.parametrize("memory", get_args(Mode))
@pytest.mark.parametrize("model", ["glow", "cnf"])
def test_the_activations_are_a_part_of_the_peak(model, memory, monkeypatch):
    config = a_config(model, train={"memory": memory, "batch_size": 64})
    state = state_of(config)
    before = {name: tensor.clone() for name, tensor in state.flow.state_dict().items()}
    found = activations_of_an_image(state.flow, config)
    after = state.flow.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    x = images(64, SHAPE)
    train_step(state, x)
    few, many = (max(capacity.moments(lambda n=n: train_step(state, x[:n]), CPU)) for n in (32, 64))
    of_an_image = (many - few) / 32
    assert 0 < found < 1.1 * of_an_image
    assert found > 0.8 * of_an_image or memory != "store" or model == "cnf"
    # A pass for which the memory is too short is stopped.
    monkeypatch.setattr("flowtrain.training.step.left", lambda device: found)
    if memory == "store":
        assert found // 2 < activations_of_an_image(state.flow, config) < found


def require(monkeypatch, free, batch_size, accumulate=1, activations=1000, processes=1, **train):
    config = a_config(train={**train, "batch_size": batch_size, "accumulate": accumulate})
    flow = build_flow(config, SHAPE, 256)
    with monkeypatch.context() as patch:
        patch.setattr(capacity, "available", lambda device: free)
        patch.setattr(distributed, "local_world", lambda: processes)
        require_images_to_fit(flow, config, CPU, activations)


@pytest.mark.parametrize("processes", [1, 3])
def test_the_largest_that_would_fit_does(processes, monkeypatch):
    """An image with its noise takes 64 * (1 + 8) bytes, and 1000 for its activations."""
    free = processes * 10 * (64 * 9 + 1000)
    held = free // processes - 10 * 64 * 9
    require(monkeypatch, free, 10, processes=processes, memory="reversible")
    require(monkeypatch, free, 1, 10, held, processes)
    for *step, memory, message in (
        (11, 1, 1000, "store", "^train.batch_size: a step of 11 x 1 .* at most 10 would"),
        (2**20, 1, 1000, "store", "^train.batch_size: .* use train.accumulate, or another"),
        (1, 11, held, "store", "^train.accumulate: .* at most 10 would fit"),
        (11, 2, 1000, "reversible", "^train.batch_size: .* at most 10 would fit; lower it$"),
    ):
        with pytest.raises(UserError, match=message):
            require(monkeypatch, free, *step, processes, memory=memory)
    with pytest.raises(UserError, match="^train.batch_size: .* at most 0 would fit; use smaller"):
        require(monkeypatch, 100, 1)


def test_the_noise_of_an_image_is_the_same_however_a_run_is_divided(monkeypatch):
    """Images 8 to 15 of a run: in one step, in two, by two processes, and in parts."""

    def noise(images_before, batch_size, rank=0, accumulate=1):
        state = state_of(a_config("nice", train={"batch_size": batch_size}))
        state.progress.images = images_before
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        seen = []
        flow = state.flow.forward
        state.flow.forward = lambda x, noise, *rest: seen.append(noise) or flow(x, noise, *rest)
        train_step(state, images(batch_size * accumulate, SHAPE))
        return torch.cat(seen)

    whole = noise(8, 8)
    assert len(whole) == 8
    assert torch.equal(torch.cat([noise(8, 4), noise(12, 4)]), whole)
    assert torch.equal(torch.cat([noise(8, 4, rank=0), noise(8, 4, rank=1)]), whole)
    assert torch.equal(noise(8, 2, accumulate=4), whole)
    assert torch.equal(torch.cat([noise(8, 2, 0, 2), noise(8, 2, 1, 2)]), whole)


def causal(classes, label_dropout):
    options = {"classes": classes, "label_dropout": label_dropout}
    return a_config({"name": "causal", **TINY["causal"], **options})


def test_dropped_labels_depend_on_seed_and_position_alone():
    config = causal(10, 0.3)
    labels = torch.arange(2000) % 10
    found = drop_labels(config, 500, labels)
    lost = found == 10
    # 0.04 is four standard deviations
    assert torch.equal(found[~lost], labels[~lost]) and abs(lost.float().mean() - 0.3) < 0.04
    parts = [drop_labels(config, 500 + at, labels[at : at + 7]) for at in range(0, 2000, 7)]
    assert torch.equal(torch.cat(parts), found)
    assert not torch.equal(drop_labels(config, 501, labels) == 10, lost)
    other = config.model_copy(update={"seed": 1})
    assert not torch.equal(drop_labels(other, 500, labels) == 10, lost)
    assert drop_labels(causal(10, 0.0), 500, labels) is labels


@pytest.mark.run
def test_a_dropped_label_trains_the_model_without_a_class():
    config = causal(3, 0.999999)
    state = state_of(config, (1, 4, 4))
    flow = perturb(state.flow)
    x, labels = images(8, (1, 4, 4)), torch.arange(8) % 3
    initialize(flow, x, torch.full(x.shape, 0.5))
    loss, _ = train_step(state, x, labels)
    with torch.no_grad():
        noise = dequantization_noise(config, 0, x)
        without = flow.loss(flow(x, noise, torch.full((8,), 3)).total).mean()
    torch.testing.assert_close(loss, without)
    assert not flow.bijection.conditioner.context.weight.grad.any()  # no class was seen


def test_a_step_is_averaged_and_clipped():
    state, _ = trained_state(clip_norm=0.01)
    norm = torch.nn.utils.get_total_norm([p.grad for p in state.flow.parameters()])
    assert norm.item() == pytest.approx(0.01, rel=1e-3)  # torch adds 1e-6 to the norm
    assert state.progress.averaged == 1

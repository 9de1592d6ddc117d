"""The learning rate, weight decay where it belongs, and the average of the weights."""

import math
from typing import get_args

import pytest
import torch
from catalogue import TINY
from helpers import a_config, images, perturb, ready, tiny_flow
from torch import nn

from flowtrain.bijections import ActNorm
from flowtrain.checkpoints.build import build_flow
from flowtrain.config import Train
from flowtrain.system.capacity import peak
from flowtrain.training.optim import (
    ADAM_AND_KIN,
    EMA,
    Muon,
    build_optimizers,
    learning_rate,
    parameters_of,
)

WITH_NETWORKS = [name for name in TINY if name != "planar"]  # It has no matrices.


def test_every_optimizer_of_the_configuration_can_be_built():
    assert {*get_args(Train.model_fields["optimizer"].annotation)} == {*ADAM_AND_KIN, "muon"}


def rates(steps, **options):
    config = Train(**{"lr": 0.1, "warmup_steps": 0, **options})
    return [learning_rate(config, step, 0.0) for step in steps]


@pytest.mark.parametrize(
    "options, steps, expected",
    [
        ({"schedule": "constant"}, [0, 50, 99, 200], [0.1, 0.1, 0.1, 0.1]),
        ({"schedule": "linear"}, [0, 25, 50, 99, 100, 500], [0.1, 0.075, 0.05, 0.001, 0, 0]),
        (
            {"schedule": "cosine"},
            [0, 25, 50, 75, 100, 500],
            [0.1, 0.05 + 0.05 / 2**0.5, 0.05, 0.05 - 0.05 / 2**0.5, 0, 0],
        ),
        (
            {"schedule": "constant", "warmup_steps": 10},
            [0, 1, 4, 8, 9, 10, 99],
            [0.01, 0.02, 0.05, 0.09, 0.1, 0.1, 0.1],
        ),
        (
            {"schedule": "linear", "warmup_steps": 20},
            [0, 9, 19, 20, 60, 100],
            [0.005, 0.05, 0.1, 0.1, 0.05, 0],
        ),
        (
            {"schedule": "cosine", "warmup_steps": 20},
            [0, 19, 20, 60, 100],
            [0.005, 0.1, 0.1, 0.05, 0],
        ),
        ({"schedule": "linear", "warmup_steps": 100}, [0, 49, 99], [0.001, 0.05, 0.1]),
        ({"schedule": "linear", "warmup_steps": 1000}, [0, 99], [0.0001, 0.01]),
    ],
)
def test_schedules_by_steps(options, steps, expected):
    assert rates(steps, num_steps=100, **options) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "schedule, expected",
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.5, 0, 0]), ("cosine", [1, 0.5, 0, 0])],
)
def test_schedules_by_budget(schedule, expected):
    config = Train(budget="1min", lr=1.0, schedule=schedule, warmup_steps=0)
    assert [learning_rate(config, 5, s) for s in (0, 30, 60, 90)] == pytest.approx(
        expected, abs=1e-12
    )
    warming = Train(budget=60, lr=1.0, schedule=schedule, warmup_steps=4)
    assert learning_rate(warming, 0, 0.0) == 0.25
    assert learning_rate(warming, 3, 30.0) == pytest.approx(expected[1])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_of_a_step_has_no_history(schedule):
    # The rate depends on the step only, so a resumed run does not warm up again.
    config = Train(num_steps=50, warmup_steps=10, schedule=schedule)
    assert all(
        learning_rate(config, step, 1.0) == learning_rate(config, step, 2.0) for step in range(50)
    )
    assert all(0 < learning_rate(config, step, 0.0) <= config.lr for step in range(50))


# ---------------------------------------------------------------- optimizers


# Which weights decay is a question to the model, so one optimizer is asked about all models. How
# Muon divides the weights of each is tested below.
@pytest.mark.parametrize(
    "model, name",
    [(model, "adamw") for model in WITH_NETWORKS]
    + [("glow", name) for name in ("adam", "adamax", "muon")],
)
def test_weight_decay_is_for_the_conditioners_weights_alone(model, name):
    flow = tiny_flow(model)
    config = a_config(model, train={"optimizer": name, "weight_decay": 0.1, "lr": 0.5}).train
    optimizers = build_optimizers(flow, config)
    names = {id(p): n for n, p in flow.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    by_decay = {0.1: set(), 0.0: set()}
    for group in groups:
        by_decay[group["weight_decay"]] |= {names[id(p)] for p in group["params"]}
    # By name: weights of convolutions and linear layers, which only conditioners have.
    decayed = {n for n, p in flow.named_parameters() if n.endswith(".weight") and p.ndim == 2}
    assert by_decay == {0.1: decayed, 0.0: set(names.values()) - decayed}
    assert sum(len(group["params"]) for group in groups) == len(names)  # each once
    assert decayed and all(".conditioner." in n or ".priors." in n for n in decayed)
    assert all(group["lr"] == 0.5 for group in groups)
    # By effect: without a gradient, only decay moves a weight.
    before = {n: p.detach().clone() for n, p in flow.named_parameters()}
    for parameter in flow.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    assert {n for n, p in flow.named_parameters() if not torch.equal(p, before[n])} == decayed


@pytest.mark.parametrize(
    "name, kind",
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("adamax", torch.optim.Adamax)],
)
def test_optimizers(name, kind):
    flow = tiny_flow("nice")
    (optimizer,) = build_optimizers(
        flow, a_config("nice", train={"optimizer": name, "lr": 0.01}).train
    )
    assert isinstance(optimizer, kind)
    before = [p.detach().clone() for p in flow.parameters()]
    flow.bits_per_dim(images(8, flow.shape)).mean().backward()
    optimizer.step()
    for parameter, old in zip(flow.parameters(), before, strict=True):
        # The first step of each of the three has the length of the rate.
        moved = parameter.grad.abs() > 1e-4
        expected = -0.01 * parameter.grad.sign()
        torch.testing.assert_close((parameter - old)[moved], expected[moved], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("model", WITH_NETWORKS)
def test_muon_takes_the_conditioners_and_adam_the_rest(model):
    flow = ready(build_flow(a_config(model), (1, 4, 4), 17))
    muon, adam = build_optimizers(
        flow, a_config(model, train={"optimizer": "muon", "lr": 0.01}).train
    )
    assert type(muon) is Muon and type(adam) is torch.optim.AdamW
    matrices = {p for group in muon.param_groups for p in group["params"]}
    # All weights count, also those that start at zero. Biases and gains have other names.
    assert matrices == {
        p
        for n, p in flow.named_parameters()
        if n.endswith(".weight") and p.ndim == 2 and p.shape[1] > 1
    }
    perturb(flow)
    before = {p: p.detach().clone() for p in matrices}
    flow.bits_per_dim(images(8, flow.shape, 17)).mean().backward()
    muon.step()
    for matrix in matrices:
        # The update is near a semi-orthogonal matrix, of the size of Adam's: singular values about
        # 0.2 sqrt(longest).
        update = (before[matrix] - matrix.detach()) / (0.01 * 0.2 * max(matrix.shape) ** 0.5)
        values = torch.linalg.svdvals(update)
        assert values.max() < 1.3
        rank = torch.linalg.matrix_rank(matrix.grad, rtol=1e-2)
        assert (values > 0.3).sum() >= rank


@pytest.mark.parametrize("together", [Muon.TOGETHER, 500, 1])
def test_muon_takes_the_steps_of_torchs(together, monkeypatch):
    monkeypatch.setattr(Muon, "TOGETHER", together)
    torch.manual_seed(0)
    shapes = [(6, 40), (40, 6), (6, 40), (12, 12), (1, 5), (6, 40), (12, 12)]
    ours = [torch.randn(shape).requires_grad_() for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    muon = Muon(ours, 0.02, 0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = None if (step, i) == (0, 2) else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        muon.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)
        momenta = [
            optimizer.state[x]["momentum_buffer"] for optimizer, x in ((muon, p), (reference, q))
        ]
        torch.testing.assert_close(*momenta)


@pytest.mark.run
def test_muons_memory_does_not_grow_with_the_number_of_matrices():
    def taken(count):
        weights = [torch.randn(512, 512).requires_grad_() for _ in range(count)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        muon = Muon(weights, 0.02, 0.0)
        muon.step()  # makes the optimizer state
        return peak(muon.step, torch.device("cpu"))

    assert taken(24) < 1.05 * taken(8)


def test_muon_for_models_without_matrices_or_with_nothing_else():
    """The default optimizer is for every model."""
    muon = Train(optimizer="muon")
    for layer, kind in ((nn.Conv2d(1, 1, 3), torch.optim.AdamW), (nn.Linear(2, 2, False), Muon)):
        (optimizer,) = build_optimizers(layer, muon)
        assert type(optimizer) is kind
        assert parameters_of(optimizer) == list(layer.parameters())


# ---------------------------------------------------------------- the average


@pytest.mark.parametrize("decay", [0.999, 0.5, 0.2])
def test_average_by_hand(decay):
    layer = nn.Linear(1, 1, bias=False)
    averaged = EMA(layer, decay)
    expected = None
    for n in range(30):
        value = math.sin(n)
        nn.init.constant_(layer.weight, value)
        averaged.update(n)
        # The first update copies. After n updates the decay is at most (1 + n) / (10 + n).
        keep = min(decay, (1 + n) / (10 + n))
        expected = value if n == 0 else keep * expected + (1 - keep) * value
        assert averaged.flow.weight.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("model", TINY)
def test_average_is_a_flow_of_its_own(model):
    flow = tiny_flow(model)
    start = {key: value.clone() for key, value in flow.state_dict().items()}
    averaged = EMA(flow, 0.9)
    averaged.update(0)
    perturb(flow, seed=5)
    averaged.update(1)
    state = averaged.flow.state_dict()
    assert list(state) == list(start)  # no prefix
    for name, parameter in flow.named_parameters():
        torch.testing.assert_close(
            state[name], torch.lerp(start[name], parameter.detach(), 1 - 2 / 11)
        )
    x = images(3, flow.shape)
    assert torch.isfinite(averaged.flow.log_prob(x)).all()
    assert not torch.equal(averaged.flow.encode(x), flow.encode(x))


def test_average_takes_the_flags_along():
    layer = ActNorm((2, 1, 1))
    averaged = EMA(ready(layer), 0.9)
    averaged.flow(torch.zeros(1, 2, 1, 1))

"""The learning rate, weight decay where it belongs, and the average of the weights."""

import math
from typing import get_args

import pytest
import torch
from catalogue import TINY
from helpers import a_config, tiny_flow
from torch import nn

from flowtrain.config import Train
from flowtrain.system.capacity import moments
from flowtrain.training.optim import EMA, Muon, build_optimizers, learning_rate, parameters_of

WITH_NETWORKS = [name for name in TINY if name != "planar"]  # It has no matrices.
OPTIMIZERS = get_args(Train.model_fields["optimizer"].annotation)


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("constant", 0, {0: 0.1, 50: 0.1, 99: 0.1, 200: 0.1}),
        ("cosine", 0, {0: 0.1, 25: 0.05 + 0.05 / 2**0.5, 50: 0.05, 75: 0.05 - 0.05 / 2**0.5}),
        ("cosine", 20, {0: 0.005, 19: 0.1, 20: 0.1, 60: 0.05, 100: 0, 500: 0}),
        ("constant", 10, {0: 0.01, 1: 0.02, 4: 0.05, 8: 0.09, 9: 0.1, 10: 0.1, 99: 0.1}),
        ("linear", 20, {0: 0.005, 9: 0.05, 19: 0.1, 20: 0.1, 60: 0.05, 100: 0}),
        ("linear", 1000, {0: 0.0001, 99: 0.01}),
    ],
)
def test_schedules_by_steps(schedule, warmup, expected):
    """The rate depends on the step alone, so a resumed run does not warm up again."""
    config = Train(num_steps=100, lr=0.1, warmup_steps=warmup, schedule=schedule)
    for seconds in (0.0, 7.0):
        rates = {step: learning_rate(config, step, seconds) for step in expected}
        assert rates == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "schedule, expected",
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.5, 0, 0]), ("cosine", [1, 0.5, 0, 0])],
)
def test_schedules_by_budget(schedule, expected):
    config = Train(budget="1min", lr=1.0, schedule=schedule, warmup_steps=4)
    rates = [learning_rate(config, 5, seconds) for seconds in (0, 30, 60, 90)]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert learning_rate(config, 0, 0.0) == 0.25
    assert learning_rate(config, 3, 30.0) == pytest.approx(expected[1])


# The model decides which weights decay, or are Muon's.
@pytest.mark.run
@pytest.mark.parametrize(
    "model, name",
    [(model, name) for model in WITH_NETWORKS for name in ("adamw", "muon")]
    + [("glow", name) for name in OPTIMIZERS if name not in ("adamw", "muon")],
)
def test_weight_decay_is_for_the_conditioners_weights_alone(model, name):
    flow = tiny_flow(model)
    config = a_config(model, train={"optimizer": name, "weight_decay": 0.1, "lr": 0.5}).train
    optimizers = build_optimizers(flow, config)
    assert type(optimizers[-1]).__name__.lower() == ("adamw" if name == "muon" else name)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len([*flow.parameters()])
    # By name: weights of convolutions and linear layers, which only conditioners have.
    decayed = {n for n, p in flow.named_parameters() if n.endswith(".weight") and p.ndim == 2}
    assert decayed and all(".conditioner." in n or ".priors." in n for n in decayed)
    assert all(group["lr"] == 0.5 for group in groups)
    # By effect: without a gradient, only decay moves a weight.
    before = {n: p.detach().clone() for n, p in flow.named_parameters()}
    for parameter in flow.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    assert {n for n, p in flow.named_parameters() if not torch.equal(p, before[n])} == decayed
    if name == "muon":
        own = {p for group in optimizers[0].param_groups for p in group["params"]}
        assert own == {p for n, p in flow.named_parameters() if n in decayed and p.shape[1] > 1}


@pytest.mark.parametrize("together", [Muon.TOGETHER, 500, 1])
def test_muon_takes_the_steps_of_torchs(together, monkeypatch):
    monkeypatch.setattr(Muon, "TOGETHER", together)
    torch.manual_seed(0)
    shapes = [(6, 40), (40, 6), (6, 40), (12, 12), (1, 5), (6, 40), (12, 12)]
    ours = [torch.randn(shape).requires_grad_() for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    muon = Muon(ours, 0.02, 0.1)
    reference = torch.optim.Muon(theirs, lr=0.02 * Muon.UNIT, weight_decay=0.1 / Muon.UNIT)
    for step in range(5):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = None if (step, i) == (0, 2) else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        muon.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)
        momenta = muon.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"]
        torch.testing.assert_close(*momenta)


@pytest.mark.run
def test_muons_memory_does_not_grow_with_the_number_of_matrices():
    def taken(count):
        weights = [torch.randn(512, 512).requires_grad_() for _ in range(count)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        muon = Muon(weights, 0.02, 0.0)
        muon.step()  # makes the optimizer state
        return max(moments(muon.step, torch.device("cpu")))

    assert taken(24) < 1.05 * taken(8)


def test_muon_for_models_without_matrices_or_with_nothing_else():
    """The default optimizer is for every model."""
    muon = Train(optimizer="muon")
    for layer, kind in ((nn.Conv2d(1, 1, 3), torch.optim.AdamW), (nn.Linear(2, 2, False), Muon)):
        (optimizer,) = build_optimizers(layer, muon)
        assert type(optimizer) is kind
        assert parameters_of(optimizer) == list(layer.parameters())


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

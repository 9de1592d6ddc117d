"""The loss of a step: one graph for every model, and the same gradient however computed."""

import functools

import pytest
import torch
import torch._dynamo
from catalogue import SPHERE, TINY, TORUS
from helpers import a_config, compiles, images, initialized, perturb, seeded

from flowtrain.checkpoints.build import build_flow
from flowtrain.errors import RunError, UserError
from flowtrain.system import distributed
from flowtrain.training import loss as losses
from flowtrain.training.loss import CudaGraphStep, Loss
from flowtrain.training.optim import build_optimizers
from flowtrain.training.state import State
from flowtrain.training.step import train_step

GLOW = {"name": "glow", "levels": 2, "steps": 1, "width": 4}
CAUSAL = {"name": "causal", **TINY["causal"]}
ATTENTION = {"attention": 1, "downsample": 1, "dropout": 0.2}
ADDITIVE = {"coupling": "additive", "permutation": "shuffle"}
SPLINE = {"coupling": "spline", "conditioner": "gated", "permutation": "conv1x1"}
MIXTURE = {"coupling": "mixture", "conditioner": "gated", "split": "mixed"}
VARIATIONAL = {"name": "variational", "steps": 2, "width": 4}
BOTH, NO_INVERSE = ["store", "checkpoint", "reversible"], ["store", "checkpoint"]

# The model, the side of an image, Q, dequantization, and the memory modes without loops.
MODELS = {
    "glow": (GLOW, 8, 256, {}, BOTH),
    "spline": ({**GLOW, **SPLINE}, 8, 256, {}, BOTH),
    "mixture": ({**GLOW, **MIXTURE}, 8, 256, {}, NO_INVERSE),
    "additive": ({**GLOW, **ADDITIVE}, 8, 256, {"transform": "logit"}, BOTH),
    "variational": (GLOW, 8, 256, VARIATIONAL, BOTH),
    "classes": ({**GLOW, "classes": 3}, 8, 256, {}, BOTH),
    "realnvp": ({"name": "realnvp", **TINY["realnvp"]}, 8, 256, {}, BOTH),
    "nice": ({"name": "nice", "couplings": 2, "width": 4, "hidden_layers": 1}, 4, 256, {}, BOTH),
    "planar": ({"name": "planar", **TINY["planar"]}, 2, 256, {}, NO_INVERSE),
    "maf": ({"name": "maf", **TINY["maf"]}, 2, 256, {}, NO_INVERSE),
    "causal": ({**CAUSAL, "classes": 3}, 4, 16, {}, NO_INVERSE),
    "attention": ({**CAUSAL, **ATTENTION}, 6, 16, {}, NO_INVERSE),
    "pixels": ({**CAUSAL, **ATTENTION, "pixels": True, "orders": 8}, *(6, 16, {}, NO_INVERSE)),
    "tarflow": ({"name": "tarflow", **TINY["tarflow"], "classes": 3}, 4, 16, {}, NO_INVERSE),
    "jet": ({"name": "jet", **TINY["jet"]}, 4, 16, {}, BOTH),
    "sphere": (SPHERE, None, None, {}, BOTH),
    "torus": (TORUS, None, None, {}, BOTH),
}
# Tracing takes seconds, so few of the combinations are tried each time.
OFTEN = {("nice", "reversible", "bf16"), ("glow", "reversible", "bf16"), ("jet", "store", "fp32")}
OFTEN |= {("causal", "checkpoint", "bf16"), ("pixels", "store", "bf16")}


def combinations():
    for model, (*_, modes) in MODELS.items():
        for mode in modes:
            for precision in ("fp32", "bf16"):
                case = model, mode, precision
                mark = pytest.mark.run if case in OFTEN else pytest.mark.slow
                yield pytest.param(*case, marks=mark)


def made(model, mode="store", precision="fp32", **train):
    """A flow, its configuration and a batch, in double precision unless that is bf16."""
    section, side, levels, dequantization, _ = MODELS[model]
    shape = (1, side, side) if side else (3, 1, 1)
    train = {"memory": mode, "precision": precision, **train}
    data = {"flip": False}  # for the orders
    config = a_config(section, data, train=train, dequantization=dequantization)
    flow = perturb(build_flow(config, shape, levels))
    x = flow.kind.random((16, *shape), seeded())
    initialized(flow, x, seed=1)
    if precision == "fp32":
        flow = flow.double()
    labels = torch.arange(4) % 3 if flow.classes else None
    return flow, config, (x[:4], torch.rand((4, *shape), generator=seeded(2)), labels)


def gradient(flow, loss, batch):
    flow.zero_grad()
    loss = loss(*batch)
    loss.backward()
    zero = torch.zeros(())
    return loss.detach(), [zero if p.grad is None else p.grad for p in flow.parameters()]


@compiles
@pytest.mark.parametrize("model, mode, precision", [*combinations()])
def test_a_step_is_one_graph(model, mode, precision):
    flow, config, batch = made(model, mode, precision)
    expected = gradient(flow, Loss(flow, config.train), batch)
    losses.configure_compiler()
    torch._dynamo.reset()
    loss = Loss(flow, config.train)
    loss.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    found = gradient(flow, loss, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if precision == "bf16":
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.run
def test_every_model_is_traced_or_has_loops():
    for name in TINY.keys() - {section["name"] for section, *_ in MODELS.values()}:
        flow = build_flow(a_config(name), (1, 4, 4), 256)
        assert "forward" in flow.bijection.untraceable_directions()
    for model, (*_, modes) in MODELS.items():
        loops = made(model)[0].bijection.untraceable_directions()
        assert "forward" not in loops and ("reversible" in modes) == ("inverse" not in loops)


# Layers of one shape share a graph. There are three kinds of couplings: two levels, and the prior
# of the first. The gradient of a layer is another graph. The prior is in no chain, so its input is
# kept.
@compiles
@pytest.mark.run
@pytest.mark.parametrize(
    "value, memory, graphs",
    [
        ("off", "store", 0),
        ("layers", "store", 3),
        ("layers", "reversible", 5),
        ("step", "store", 1),
    ],
)
def test_each_value_of_compile(value, memory, graphs, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = a_config({**GLOW, "steps": 3}, train={"compile": value, "memory": memory})
    x = images(8, (1, 8, 8))
    flow = initialized(perturb(build_flow(config, (1, 8, 8), 256)), x, seed=1)
    plain = config.model_copy(update={"train": config.train.model_copy(update={"compile": "off"})})
    found = []
    for each in (plain, config):
        state = State(each, flow, build_optimizers(flow, each.train), None, {})
        torch._dynamo.utils.counters.clear()
        found.append((train_step(state, x), [p.grad for p in flow.parameters()]))
    flow.load_state_dict(flow.state_dict())  # as in a rollback
    train_step(state, x)
    torch.testing.assert_close(found[0], found[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.fixture
def uncompiled(monkeypatch):
    """`train.compile: layers` compiles nothing."""
    monkeypatch.setattr(losses, "layer_compiler", lambda train: lambda function: function)


def a_state(model, **train):
    flow, config, (x, _, labels) = made(model, **train)
    return State(config, flow, build_optimizers(flow, config.train), None, {}), x, labels


@compiles
@pytest.mark.run
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_gradient_is_an_error(precision, uncompiled):
    def wrong(*part):
        right = loss(*part)
        return right + 0.2 * (right - right.detach())  # the value is right

    state, *batch = a_state("nice", precision=precision, compile="layers")
    loss, state.loss = state.loss, wrong
    with pytest.raises(RunError, match="gradient.*by 0.2 of its norm.*set train.compile=off"):
        train_step(state, *batch)
    state.loss = loss
    train_step(state, *batch)


@compiles
@pytest.mark.run
def test_the_first_finite_batch_is_checked_once(uncompiled):
    state, x, labels = a_state("sphere", compile="layers")
    train_step(state, x * torch.inf, labels)
    assert state.compile_seconds is None
    calls = []
    state.flow.register_forward_pre_hook(lambda *arguments: calls.append(1))
    found = []
    for expected in (3, 4):
        found.append(train_step(state, x, labels))
        assert len(calls) == expected
    assert found[0] == found[1] and state.compile_seconds > 0


@compiles
@pytest.mark.run
def test_a_compiler_that_fails_is_named(monkeypatch):
    def broken(function):
        def run(layer, *arguments):
            raise RuntimeError("no working C++ compiler\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

        return run

    monkeypatch.setattr(losses, "layer_compiler", lambda train: broken)
    state, *batch = a_state("nice", compile="layers")
    with pytest.raises(UserError) as raised:
        train_step(state, *batch)
    message = str(raised.value)
    assert "no working C++ compiler" in message and "set train.compile=off" in message
    assert len(message.splitlines()) == 2 and "TORCHDYNAMO" not in message


def run_again(run):
    """Stands for a CUDA graph: runs the computation, and again, with its result in one place."""
    result = run().clone()
    return lambda: result.copy_(run()), result


@pytest.mark.parametrize("model", ["nice", "classes"])
def test_a_replayed_loss_is_the_loss(model):
    flow, config, batch = made(model)
    loss = Loss(flow, config.train)
    replayed = CudaGraphStep(loss, run_again)
    for sizes in ([2, 2], [2, 2], [4], [3, 1]):
        parts = [[None] * len(sizes) if t is None else t.split(sizes) for t in batch]
        found = [replayed([*zip(*parts, strict=True)], 4), *(p.grad for p in flow.parameters())]
        assert all(p.grad.data_ptr() % 16 == 0 for p in flow.parameters())
        _, gradients = expected = gradient(flow, lambda *batch: loss(*batch) / 4, batch)
        torch.testing.assert_close(found, [expected[0], *gradients], rtol=1e-12, atol=1e-12)


@pytest.mark.run
def test_a_replayed_gradient_is_averaged_once_a_step(monkeypatch):
    averaged = []
    monkeypatch.setattr(distributed, "average", averaged.append)
    state, *batch = a_state("nice", batch_size=2, accumulate=2)
    expected = train_step(state, *batch), [p.grad for p in state.flow.parameters()]
    assert averaged == []
    state.cuda_graph = CudaGraphStep(state.loss, run_again)
    state.compile_seconds = None
    found = train_step(state, *batch), [p.grad for p in state.flow.parameters()]
    (piece,) = averaged
    assert sum(p.numel() for p in state.flow.parameters()) <= piece.numel()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

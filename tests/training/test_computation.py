"""The computation of a step: one graph for every model, and the same gradient however called."""

import functools

import pytest
import torch
import torch._dynamo
from catalogue import SPHERE, TINY
from helpers import a_config, images, perturb, seeded

from flowtrain.checkpoints.build import build_flow
from flowtrain.errors import RunError, UserError
from flowtrain.flow.flow import initialize
from flowtrain.training import computation
from flowtrain.training.computation import Called, Computation, Losses, Replayed, require_possible

CPU = torch.device("cpu")
GLOW = {"name": "glow", "levels": 2, "steps": 1, "width": 4}
VARIATIONAL = {"dequantization": {"name": "variational", "steps": 2, "width": 4}}
BOTH, NO_INVERSE = ["store", "checkpoint", "reversible"], ["store", "checkpoint"]

# The model, the shape of an image, Q, other sections, and the memory modes without loops.
MODELS = {
    "glow": (GLOW, (1, 8, 8), 256, {}, BOTH),
    "spline": (
        {**GLOW, "coupling": "spline", "conditioner": "depthwise", "permutation": "conv1x1"},
        *((1, 8, 8), 256, {}, BOTH),
    ),
    "mixture": (
        {**GLOW, "coupling": "mixture", "conditioner": "gated", "split": "mixed"},
        *((1, 8, 8), 256, {}, NO_INVERSE),
    ),
    "additive": (
        {**GLOW, "coupling": "additive", "permutation": "shuffle"},
        *((1, 8, 8), 256, {"dequantization": {"transform": "logit"}}, BOTH),
    ),
    "variational": (GLOW, (1, 8, 8), 256, VARIATIONAL, BOTH),
    "classes": ({**GLOW, "classes": 3}, (1, 8, 8), 256, {}, BOTH),
    "realnvp": ({"name": "realnvp", **TINY["realnvp"]}, (1, 8, 8), 256, {}, BOTH),
    "nice": (
        {"name": "nice", "couplings": 2, "width": 4, "hidden_layers": 1},
        (1, 4, 4),
        256,
        {},
        BOTH,
    ),
    "planar": ({"name": "planar", **TINY["planar"]}, (1, 2, 2), 256, {}, NO_INVERSE),
    "maf": ({"name": "maf", **TINY["maf"]}, (1, 2, 2), 256, {}, NO_INVERSE),
    "causal": ({"name": "causal", **TINY["causal"], "classes": 3}, (1, 4, 4), 16, {}, NO_INVERSE),
    "attention": (
        {"name": "causal", **TINY["causal"], "attention": 1, "downsample": 1, "dropout": 0.2},
        *((1, 6, 6), 16, {}, NO_INVERSE),
    ),
    "tarflow": (
        {"name": "tarflow", **TINY["tarflow"], "classes": 3},
        *((1, 4, 4), 16, {}, NO_INVERSE),
    ),
    "jet": ({"name": "jet", **TINY["jet"]}, (1, 4, 4), 16, {}, BOTH),
    "sphere": (SPHERE, (3, 1, 1), None, {}, BOTH),
}
# Tracing takes seconds, so few of the combinations are tried each time.
OFTEN = {
    ("nice", "reversible", "bf16"),
    ("glow", "reversible", "bf16"),
    ("causal", "checkpoint", "bf16"),
    ("jet", "store", "fp32"),
}


def combinations():
    for model, (*_, modes) in MODELS.items():
        for mode in modes:
            for precision in ("fp32", "bf16"):
                case = model, mode, precision
                mark = pytest.mark.run if case in OFTEN else pytest.mark.slow
                yield pytest.param(*case, marks=mark)


def made(model, mode="store", precision="fp32", **train):
    """A flow, its configuration and a batch, in double precision unless that is bf16."""
    section, shape, levels, sections, _ = MODELS[model]
    train = {"memory": mode, "precision": precision, **train}
    config = a_config(section, train=train, **sections)
    flow = perturb(build_flow(config, shape, levels))
    x = flow.kind.random((16, *shape), seeded())
    initialize(flow, x, torch.rand(x.shape, generator=seeded(1)))
    if precision == "fp32":
        flow = flow.double()
    labels = torch.arange(4) % 3 if flow.classes else None
    return flow, config.train, (x[:4], torch.rand((4, *shape), generator=seeded(2)), labels)


def gradient(flow, losses, batch):
    flow.zero_grad()
    loss = losses(*batch)
    loss.backward()
    zero = torch.zeros(())
    return loss.detach(), [zero if p.grad is None else p.grad for p in flow.parameters()]


@pytest.mark.parametrize("model, mode, precision", [*combinations()])
def test_a_step_is_one_graph(model, mode, precision):
    """Forward and backward pass are traced without a break, and give the same gradient."""
    flow, train, batch = made(model, mode, precision)
    expected = gradient(flow, Losses(flow, train, computation.executor_of(mode)), batch)
    computation.configure_compiler()
    torch._dynamo.reset()
    losses = Losses(flow, train, computation.executor_of(mode))
    losses.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    found = gradient(flow, losses, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if precision == "bf16":
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.run  # takes long
def test_every_model_is_traced_or_has_loops():
    traced = {section["name"] for section, *_ in MODELS.values()}
    for name in [*TINY, "sphere"]:
        section, shape, levels = (
            (name, (1, 4, 4), 256) if name in TINY else (SPHERE, (3, 1, 1), None)
        )
        flow = build_flow(a_config(section), shape, levels)
        assert (name in traced) == ("forward" not in flow.bijection.untraceable_directions())
    for model, (*_, modes) in MODELS.items():
        flow, *_ = made(model)
        assert ("reversible" in modes) == ("inverse" not in flow.bijection.untraceable_directions())


@pytest.fixture
def traced_only(monkeypatch):
    """Traces, but compiles nothing."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.run
@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_layers_of_one_shape_share_a_graph(memory, traced_only):
    """Three kinds of couplings: two levels, and the prior of the first."""
    config = a_config({**GLOW, "steps": 3}, train={"compile": "layers", "memory": memory})
    flow = perturb(build_flow(config, (1, 8, 8), 256))
    x = images(8, (1, 8, 8))
    initialize(flow, x, torch.rand(x.shape, generator=seeded(1)))
    batch = x, torch.rand(x.shape, generator=seeded(2)), None
    plain = Computation(flow, config.train.model_copy(update={"compile": "off"}))
    expected = plain(*batch, 8, more=False), [p.grad for p in flow.parameters()]
    flow.zero_grad()
    torch._dynamo.utils.counters.clear()
    found = Computation(flow, config.train)(*batch, 8, more=False)
    torch.testing.assert_close((found, [p.grad for p in flow.parameters()]), expected)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # The gradient of a layer is another graph. The prior is in no chain, so its input is kept.
    assert graphs == (3 if memory == "store" else 5)


# --- errors instead of wrong runs -----------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_gradient_is_an_error(precision, monkeypatch):
    def wrong(self, batch, images, more):
        loss = self.parallel(*batch) / images
        (1.2 * loss).backward()
        return loss.detach()

    flow, train, batch = made("nice", precision=precision)
    train = train.model_copy(update={"compile": "layers"})
    monkeypatch.setattr(computation, "compiler", lambda train: lambda function: function)
    Computation(flow, train)(*batch, 4, more=False)
    flow.zero_grad()
    monkeypatch.setattr(Called, "__call__", wrong)
    with pytest.raises(RunError, match="gradient.*by 0.2 of its norm.*set train.compile=off"):
        Computation(flow, train)(*batch, 4, more=False)


def test_the_first_batch_is_checked_once(monkeypatch):
    flow, train, batch = made("nice", compile="layers")
    monkeypatch.setattr(computation, "compiler", lambda train: lambda function: function)
    steps = Computation(flow, train)
    calls = []
    flow.register_forward_pre_hook(lambda *arguments: calls.append(1))
    losses = []
    for expected in (3, 4):
        flow.zero_grad()
        losses.append(steps(*batch, 4, more=False))
        assert len(calls) == expected
    assert losses[0] == losses[1] and steps.seconds is not None


def test_a_batch_that_is_not_finite_shows_nothing(monkeypatch):
    flow, train, batch = made("sphere", compile="layers")
    monkeypatch.setattr(computation, "compiler", lambda train: lambda function: function)
    steps = Computation(flow, train)
    steps(batch[0] * torch.inf, *batch[1:], 4, more=False)
    assert steps.seconds is None
    flow.zero_grad()
    steps(*batch, 4, more=False)
    assert steps.seconds is not None


def test_a_compiler_that_fails_is_named(monkeypatch):
    def broken(function):
        def run(layer, *arguments):
            raise RuntimeError("no working C++ compiler\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

        return run

    flow, train, batch = made("nice", compile="layers")
    monkeypatch.setattr(computation, "compiler", lambda train: broken)
    with pytest.raises(UserError) as raised:
        Computation(flow, train)(*batch, 4, more=False)
    message = str(raised.value)
    assert "no working C++ compiler" in message and "set train.compile=off" in message
    assert len(message.splitlines()) == 2 and "TORCHDYNAMO" not in message


@pytest.mark.parametrize("key", ["compile", "cuda_graph"])
def test_loops_are_refused(key):
    train = {"compile": "step"} if key == "compile" else {"cuda_graph": True}
    device = torch.device("cuda") if key == "cuda_graph" else CPU
    for model, options in (("iaf", {}), ("maf", {"memory": "reversible"}), ("cnf", {})):
        config = a_config(model, train={**train, **options})
        flow = build_flow(config, (1, 2, 2), 256)
        with pytest.raises(UserError, match=f"^train.{key}: .* is a loop whose length"):
            require_possible(flow, config.train, device)
        config = a_config(model, train={**options, "compile": "layers"})
        require_possible(flow, config.train, CPU)


def test_a_cuda_graph_needs_a_cuda_device():
    flow, train, _ = made("nice", cuda_graph=True)
    with pytest.raises(UserError, match="^train.cuda_graph: needs a CUDA device.*on cpu$"):
        require_possible(flow, train, CPU)


# --- CUDA graphs, without CUDA --------------------------------------------------------------------


def run_again(run):
    """Stands for a CUDA graph: runs the computation, and again, with its result in one place."""
    result = run().clone()
    return lambda: result.copy_(run()), result


@pytest.mark.parametrize("model", ["nice", "classes"])
def test_a_replayed_computation_is_the_computation(model):
    """Over several parts of a batch, several steps, and parts of several sizes."""
    flow, train, (x, noise, labels) = made(model)
    losses = Losses(flow, train, computation.executor_of("store"))
    replayed = Replayed(losses, run_again)
    for sizes in ([2, 2], [2, 2], [4], [3, 1]):
        found = []
        for add in (Called(losses), replayed):
            flow.zero_grad(set_to_none=True)
            parts = [
                [None] * len(sizes) if t is None else t.split(sizes) for t in (x, noise, labels)
            ]
            total = sum(
                add(part, len(x), more=i + 1 < len(sizes))
                for i, part in enumerate(zip(*parts, strict=True))
            )
            found.append([total, *(p.grad.clone() for p in flow.parameters())])
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert all(p.grad.data_ptr() % 16 == 0 for p in flow.parameters())


def test_a_replayed_gradient_is_averaged_once_a_step(monkeypatch):
    averaged = []
    monkeypatch.setattr(computation.distributed, "average", averaged.append)
    flow, train, batch = made("nice")
    replayed = Replayed(Losses(flow, train, computation.executor_of("store")), run_again)
    for more in (True, True, False):
        replayed(batch, 12, more)
    (piece,) = averaged
    assert sum(p.numel() for p in flow.parameters()) <= piece.numel()

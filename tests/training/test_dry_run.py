"""The measurements of `train --dry-run`, against the sizes of layers and a real step."""

import itertools
import re
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from catalogue import SMALL, TINY
from cli_helpers import quick
from helpers import CPU, a_config, compiles, images, ready

from flowtrain.bijections.conv1x1 import LinearChannels
from flowtrain.bijections.memory import Mode
from flowtrain.checkpoints.build import build_flow
from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.flow.passes import watch_modules
from flowtrain.nets.convolution import Conv2d
from flowtrain.system import capacity
from flowtrain.training import dry_run as module
from flowtrain.training.dry_run import dry_run
from flowtrain.training.optim import build_optimizers, matrices
from flowtrain.training.state import State
from flowtrain.training.step import reason_against, train_step

MARGIN = 0.05  # of the memory of a batch, from smaller ones


def small(*overrides):
    """A new run of a tiny model."""
    config = load_config(find_config("glow_digits.yaml"), [*SMALL[1::2], *overrides])
    flow = ready(build_flow(config, (1, 8, 8), 17))
    return State(config, flow, build_optimizers(flow, config.train), None, {})


@pytest.mark.run
@pytest.mark.parametrize("conditioner", ["glow", "gated"])
def test_operations(conditioner):
    """Against the sizes of the layers; a step is about three times the likelihood of its images."""
    words = (f"model.conditioner={conditioner}", "model.width=32", "train.memory=reversible")
    state = small(*words)
    operations = {True: 0, False: 0}  # of conditioners, of 1x1 convolutions

    def count(name, module, outputs):
        if isinstance(module, Conv2d):
            operations[".conditioner." in name] += 2 * module.weight.numel() * outputs[0, 0].numel()
        elif isinstance(module, LinearChannels):
            operations[False] += 2 * module.mixing_matrix().numel() * outputs[0][0, 0].numel()

    pixel = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    watch_modules(state.flow, pixel, torch.rand(1, 1, 8, 8), count)
    total = sum(operations.values())
    found = dry_run(state.config, CPU).compute
    assert found.image_flops == pytest.approx(total, rel=0.02)
    assert found.conditioners == pytest.approx(operations[True] / total, abs=0.02)
    of_images = found.image_flops * state.config.train.batch_size
    assert found.step_flops == pytest.approx(3 * of_images, rel=0.15)


def test_operations_of_attention():
    """Of its four linear maps, and of all pairs of tokens: two products, and five for gradients."""

    def compute(attention):
        model = {"name": "causal", **TINY["causal"], "token": 1, "attention": attention}
        return dry_run(a_config(model, train={"batch_size": 4}), CPU).compute

    one, none = compute(1), compute(0)
    tokens, width = 64, TINY["causal"]["width"]
    maps, pairs = 2 * tokens * 4 * width**2, 2 * tokens**2 * width
    assert one.image_flops - none.image_flops == maps + 2 * pairs
    assert (one.step_flops - none.step_flops) / 4 == 3 * maps + 7 * pairs


def test_a_step_computes_the_class_of_each_image_alone():
    """Where networks see the class, evaluation takes a pass for each of them."""

    def cost(classes):
        model = {"name": "causal", **TINY["causal"], "classes": classes}
        return dry_run(a_config(model), CPU)

    some, none = cost(10), cost(0)
    assert some.memory.modes[0].needed_bytes < 2 * none.memory.modes[0].needed_bytes
    some, none = some.compute, none.compute
    assert some.image_flops < 1.1 * none.image_flops  # beside the first layer nothing is added
    assert some.step_flops < 1.1 * none.step_flops


@pytest.mark.run
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_memory_of_optimizer_and_copy(optimizer):
    state = small("model.width=64", f"train.optimizer={optimizer}")
    count = sum(p.numel() for p in state.flow.parameters())
    # The weights, their gradients, their average, and two averages of Adam, of which Muon has one.
    of_muon = sum(p.numel() for p in matrices(state.flow)) if optimizer == "muon" else 0
    numbers, memory = 5 * count - of_muon, dry_run(state.config, CPU).memory
    assert memory.fixed_bytes == pytest.approx(4 * numbers, rel=1e-3)
    assert memory.copy_bytes == pytest.approx(4 * (numbers - count), rel=0.05)  # no gradients


@pytest.mark.run
@pytest.mark.parametrize("mode", ["store", "reversible"])
def test_the_memory_of_a_step(mode):
    """From a few images, of a model whose gradients are larger than those."""
    words = ("model.steps=4", "model.width=128", "train.batch_size=512", f"train.memory={mode}")
    state = small(*words)
    said = {each.mode: each.needed_bytes for each in dry_run(state.config, CPU).memory.modes}[mode]
    x = images(512, (1, 8, 8), 17)
    train_step(state, x)  # creates what later steps reuse
    state.zero_grad()
    assert said == pytest.approx(max(capacity.moments(lambda: train_step(state, x), CPU)), rel=0.1)


ATTENTION = {**TINY["causal"], "width": 32, "token": 1, "attention": 1, "pixels": True}
GROWING = {
    # Gradients that are larger than the activations of a few images.
    "glow": ("glow", "bf16", {"levels": 2, "steps": 2, "width": 64}),
    "mixture": ("glow", "fp32", {"levels": 1, "steps": 1, "width": 16, "coupling": "mixture"}),
    "realnvp": ("realnvp", "fp32", {"levels": 2, "width": 16, "blocks": 1}),
    "maf": ("maf", "fp32", {"layers": 2, "width": 64, "hidden_layers": 1}),
    "tarflow": ("tarflow", "fp32", {"patch": 2, "width": 64, "blocks": 2, "layers": 1}),
    "attention": ("causal", "bf16", ATTENTION),
    "jet": ("jet", "fp32", {"patch": 2, "width": 32, "couplings": 5, "layers": 1}),
    "cnf": ("cnf", "fp32", {"blocks": 1, "width": 16, "hidden_layers": 1}),
}


@pytest.mark.run
@pytest.mark.parametrize("name", GROWING)
def test_the_memory_of_many_images_follows_from_few(name):
    """Also if the configured batch is so small that gradients take most of the memory."""
    model, precision, options = GROWING[name]
    config = a_config({"name": model, **options}, train={"precision": precision})
    state = State(config, ready(build_flow(config, (1, 8, 8), 17)), [], None, {})
    for mode in get_args(Mode):
        if reason_against(state.flow, mode, precision) is None:
            growth = module._growth(state, mode, 8, CPU, free=2**40)
            found = max(module._moments_of_a_step(state, mode, 128, CPU))
            assert growth.of(128) == pytest.approx(found, rel=MARGIN), mode
            assert growth.largest(found) == pytest.approx(128, rel=MARGIN)


@pytest.mark.run
def test_only_peaks_are_known(monkeypatch):
    """As on a GPU: the number of images doubles until it decides."""
    state = small("model.width=64")

    def peak(*run):
        return [max(capacity.moments(*run))]

    monkeypatch.setattr(module, "moments", peak)
    growth = module._growth(state, "reversible", 4, CPU, free=2**40)
    (found,) = module._moments_of_a_step(state, "reversible", 512, CPU)
    assert growth.of(512) == pytest.approx(found, rel=MARGIN)
    tried = []  # no more images if they might not fit
    monkeypatch.setattr(module, "moments", lambda *run: (tried.append(1), peak(*run))[1])
    module._growth(state, "reversible", 4, CPU, free=1000)
    assert len(tried) == 1


def test_the_largest_batch():
    growth = module.Growth.between([[0, 110, 20], [0, 120, 40]], 10)
    assert [growth.of(images) for images in (0, 10, 100, 200)] == [100, 110, 200, 400]
    fitting = {99: 0, 100: 0, 120: 20, 200: 100, 201: 100, 400: 200}
    assert {free: growth.largest(free) for free in fitting} == fitting
    # A kernel's scratch memory, 100 bytes and then 300, beside 10 for each image.
    scratch = [[0, 10 * n, 10 * n + more] for n, more in ((10, 100), (20, 300), (40, 300))]
    assert module.Growth.between(scratch, 10).of(400) == 4300


@pytest.mark.run
def test_a_batch_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(module, "left", lambda device: 3 * 2**20)
    cost = dry_run(small("train.batch_size=4096").config, CPU)
    assert cost.memory.available_bytes == 3 * 2**20 and cost.step_seconds is None
    (few,) = [each.largest_batch for each in cost.memory.modes if each.mode == "store"]
    assert 1 <= few < 4096
    assert dry_run(small(f"train.batch_size={few}").config, CPU).step_seconds > 0


@pytest.mark.parametrize(
    "length, clock, seconds",
    [("budget=1h", "wall", 2), ("budget=1h", "processor", 7), ("num_steps=9", "processor", 2)],
)
@pytest.mark.run
def test_a_step_is_timed_by_the_clock_of_the_budget(length, clock, seconds, monkeypatch):
    """Several threads use more time of the processor than passes."""
    clocks = {"perf_counter": itertools.count(0, 2), "process_time": itertools.count(0, 7)}
    nows = {name: clock.__next__ for name, clock in clocks.items()}
    monkeypatch.setattr(module, "time", SimpleNamespace(**nows))
    config = small(f"train.{length}", f"train.clock={clock}").config
    assert dry_run(config, CPU).step_seconds == seconds


@compiles
@pytest.mark.run
def test_the_time_for_compiling(tmp_path):
    """Printed if something is compiled. The compiler here only traces."""
    words = ["train", *SMALL, "model.levels=1", "--dry-run"]
    assert "compiling" not in quick(*words, cwd=tmp_path).ok().out
    first = "import functools, torch; torch.compile = functools.partial(torch.compile, "
    first += "backend='aot_eager')"
    done = quick(*words, "train.compile=layers", cwd=tmp_path, first=first).ok()
    assert re.search(r"before the first step: \d+:\d\d for compiling, .*compile=layers", done.out)

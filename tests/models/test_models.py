"""Every model: its size, its geometry, its start, and the losses of five steps.

`PYTHONPATH=tests python tests/models/test_models.py` prints the golden losses anew.
"""

import inspect
import json
import re
from typing import get_args

import pytest
import torch
import yaml
from catalogue import TINY
from helpers import a_config, images, perturb, seeded, tiny_flow

from flowtrain import bijections as b
from flowtrain import config as configuration
from flowtrain.bijections.execution import call
from flowtrain.checkpoints.build import build_flow
from flowtrain.errors import UserError
from flowtrain.evaluation.layers import Watching, layers_of
from flowtrain.flow.dequantize import draw_noise
from flowtrain.flow.flow import initialize
from flowtrain.models import base, glow, jet, nice, realnvp, tarflow
from flowtrain.training.optim import build_optimizers
from flowtrain.training.state import State
from flowtrain.training.step import train_step

# The layers that learn, apart from ActNorm and matrices.
LEARNED = (b.CheckerboardCoupling, b.Continuous, b.Coupling)
LEARNED += (b.MaskedAutoregressive, b.Planar, b.TokenAutoregressive)
CNF = pytest.param("cnf", marks=pytest.mark.run)  # takes long


def test_every_model_is_tested():
    found = set(configuration.component_names(configuration.Model))
    found -= {"sphere", "torus"}  # They fit no image: see test_sphere.py and test_torus.py.
    assert found == set(TINY) == {name for name, *_ in GOLDEN}


def test_every_elementwise_transform_can_be_chosen():
    assert set(get_args(base.AnyTransform)) == set(base.TRANSFORMS)
    assert set(get_args(base.Elementwise)) == set(base.TRANSFORMS) - {"additive", "tanh"}


@pytest.mark.parametrize("name", configuration.component_names(configuration.Model))
def test_a_model_names_its_paper_and_the_differences(name):
    text = inspect.getmodule(configuration.component(configuration.Model, name).build).__doc__
    assert "arXiv" in text and "differences" in text


PLAIN = {"mixing": "none", "bounded": False}
OF_IMAGENET64 = {"patch": 2, "width": 768, "blocks": 8, "layers": 8, **PLAIN}


@pytest.mark.run  # takes long
@pytest.mark.parametrize(
    "build, shape, options, expected",
    [
        # Kingma & Dhariwal 2018, section 6: K = 32, L = 3, 512 channels on CIFAR-10.
        (glow.build, (3, 32, 32), {}, pytest.approx(44e6, abs=0.5e6)),
        # Section 5.1: four couplings, each of five hidden layers of 1000, on 784 entries.
        (nice.build, (1, 28, 28), {}, 4 * (5 * 1000 + 4 * 1000**2 + 2 * 392_000 + 392) + 2 * 784),
        (tarflow.build, (3, 64, 64), OF_IMAGENET64, 460_142_784),
        (tarflow.build, (3, 64, 64), {**OF_IMAGENET64, "classes": 10}, 460_142_784 + 61_440),
        (jet.build, (3, 64, 64), {"mixing": "permutation"}, 207_177_216),
    ],
)
def test_the_size_is_that_of_the_paper(build, shape, options, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(shape, **options).parameters()) == expected


@pytest.mark.parametrize(
    "model, shape, value, message",
    [
        (tarflow, (1, 28, 28), 8, "model.patch: patches of 8x8 pixels do not fill images of 28x28"),
        (jet, (3, 4, 6), 4, "model.patch: patches of 4x4 pixels do not fill images of 4x6"),
        (tarflow, (1, 8, 8), 8, "tarflow needs at least two patches, and 8x8 has one of 8x8"),
        (jet, (1, 28, 28), 4, "28x28 has 49 of 4x4, an odd number: choose another patch"),
        (glow, (1, 28, 28), 3, "squeezed twice (28 -> 14 -> 7); levels: 3 needs a multiple of 8"),
        (glow, (1, 8, 8), 4, "8x8 can be squeezed 3 times (8 -> 4 -> 2 -> 1); levels: 4 needs a"),
        (glow, (3, 30, 32), 2, "30x32 can be squeezed once (30x32 -> 15x16); levels: 2 needs a"),
        (glow, (1, 7, 7), 1, "7x7 cannot be squeezed; levels: 1 needs a multiple of 2"),
        (glow, (1, 2, 8), 2, "2x8 can be squeezed once (2x8 -> 1x4); levels: 2 needs a multiple"),
        (realnvp, (1, 28, 28), 4, "twice (28 -> 14 -> 7); levels: 4 needs a multiple of 8"),
    ],
)
def test_impossible_geometry(model, shape, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        model.build(shape, **{"patch" if model in (tarflow, jet) else "levels": value})


@pytest.mark.parametrize(
    "name, said", [("realnvp", "at least two values per example"), ("glow", "levels: 1x1 cannot")]
)
def test_a_single_value_is_too_few_for_couplings(name, said):
    with pytest.raises(UserError, match=said):
        build_flow(a_config(name), (1, 1, 1), 256)


@pytest.mark.parametrize("name", ["maf", CNF, "causal"])
def test_a_single_value_is_enough_for(name):
    flow = tiny_flow(name, shape=(1, 1, 1))
    assert flow.bits_per_dim(images(8, flow.shape)).isfinite().all()


@pytest.mark.parametrize("split", ["channel", "checkerboard", "mixed"])
def test_glow_learns_at_a_single_pixel_too(split):
    """A checkerboard would not change a single pixel, or not see it."""
    flow = tiny_flow("glow", split=split, width=16)  # of 4x4 images, in two levels
    flow.bits_per_dim(images(8, flow.shape)).mean().backward()
    assert [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.any()] == []


# A causal model maps data to normal numbers.
@pytest.mark.parametrize("name", [*sorted(TINY.keys() - {"causal", "cnf"}), CNF])
def test_layers_start_as_the_identity(name):
    flow = build_flow(a_config(name), (1, 4, 4), 256)
    x = images(16, (1, 4, 4))
    initialize(flow, x, draw_noise(x.shape, seeded(), x.device))
    seen = []

    def around(name, layer, direction, given, context):
        result, log_det = call(layer, direction, given, context)
        if isinstance(layer, LEARNED):
            assert torch.equal(result, given) and log_det.count_nonzero() == 0
            seen.append(layer)
        return result, log_det

    flow(x, torch.rand(x.shape), executor=Watching(flow, around))
    learned = [layer for layer in layers_of(flow).values() if isinstance(layer, LEARNED)]
    assert len(seen) == len(learned) >= 2 and set(seen) == set(learned)


@pytest.mark.parametrize(
    "model, part",
    [("glow", "conditioner"), ({"name": "jet", **TINY["jet"], "mixing": "permutation"}, ".order")],
)
def test_weights_and_permutations_are_a_function_of_the_seed(model, part):
    def built(seed):
        found = build_flow(a_config(model, seed=seed), (1, 4, 4), 256).state_dict()
        return {name: value.tolist() for name, value in found.items() if part in name}

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = built(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == built(3) != built(4)
    assert list(first.values())[0] != list(first.values())[1]


@pytest.mark.parametrize("key", ["steps", "width"])
def test_numbers_for_each_level(key):
    with pytest.raises(UserError, match=rf"model.{key}: \[3, 4\] has 2 numbers, for 3 levels"):
        glow.build((1, 8, 8), levels=3, **{key: [3, 4]})


def test_realnvp_of_vectors_may_have_no_hidden_layers():
    config = a_config({"name": "realnvp", "levels": 1, "blocks": 0})
    flow = perturb(build_flow(config, (2, 1, 1), None))
    x = torch.randn(64, 2, 1, 1, generator=seeded())
    initialize(flow, x, torch.zeros_like(x))
    torch.testing.assert_close(flow.decode(flow.encode(x)), x)


# {(model, transform, options): bits/dim of five steps}, on fixed images, noise, weights and rates.
# Options change the layers, of which one step is enough.
GOLDEN = {
    ("glow", "center", ""): [4.391193, 4.260745, 4.182455, 4.115993, 4.060753],
    ("realnvp", "logit", ""): [4.248842, 4.07444, 3.847991, 3.725912, 3.533388],
    ("nice", "center", ""): [4.637265, 4.629665, 4.617047, 4.60226, 4.583975],
    ("planar", "center", ""): [4.348976, 4.349448, 4.345428, 4.336526, 4.320923],
    ("maf", "logit", ""): [4.17041, 4.144823, 4.110533, 4.089016, 4.067691],
    ("cnf", "center", ""): [4.356643, 4.34722, 4.334869, 4.317419, 4.294961],
    ("iaf", "center", ""): [4.354898, 4.330153, 4.308249, 4.282404, 4.251452],
    ("tarflow", "center", ""): [4.310452, 4.227404, 4.172088, 4.108107, 4.060031],
    ("jet", "center", ""): [4.260336, 4.272494, 4.146126, 4.022169, 3.98238],
    ("causal", "center", ""): [3.803679, 3.672404, 3.582726, 3.518047, 3.467457],
    ("glow", "center", "coupling=additive permutation=reverse steps=[1,2]"): [4.427021],
    ("glow", "center", "coupling=spline bins=5 permutation=shuffle width=[6,4]"): [4.549824],
    ("glow", "center", "split=checkerboard permutation=conv1x1 conditioner=gated"): [4.344663],
    ("glow", "center", "split=mixed steps=5 initialization=whitening prior=spline"): [4.281816],
    ("glow", "center", "conditioner=gated blocks=2 prior=mixture components=3"): [4.504602],
    ("realnvp", "center", "levels=3 blocks=2"): [4.593109],
    ("realnvp", "center", "transform=spline"): [4.558935],
    ("nice", "center", "prior=gaussian couplings=3"): [4.348085],
    ("maf", "center", "order=random transform=spline layers=3"): [4.391038],
    ("iaf", "center", "order=random transform=mixture layers=3"): [4.38284],
    ("tarflow", "center", "mixing=none bounded=false blocks=3"): [5.606771],
    ("jet", "center", "mixing=permutation bounded=false couplings=11"): [5.422601],
    ("jet", "center", "couplings=31"): [4.87267],
    ("causal", "center", "token=4 attention=1 blocks=2"): [2.958334],
    ("causal", "center", "token=1 attention=1 pixels=true blocks=2"): [4.110974],
}


def losses_of(name, transform, options, steps):
    train = {"num_steps": 5, "batch_size": 8, "accumulate": 2, "lr": 0.01, "weight_decay": 0.1}
    train["optimizer"] = "adamw"
    given = (word.partition("=") for word in options.split())
    model = {"name": name, **TINY[name], **{key: yaml.safe_load(text) for key, _, text in given}}
    config = a_config(model, train=train, dequantization={"transform": transform}, seed=1)
    flow = build_flow(config, (1, 4, 4), 17)
    with torch.no_grad():
        for i, parameter in enumerate(flow.parameters()):
            parameter += 0.1 * torch.sin(torch.arange(parameter.numel()) + i).view_as(parameter)
    rows, columns = torch.arange(4)[:, None], torch.arange(4)
    numbers = torch.arange(16)[:, None, None]
    x = ((numbers * 3 + rows * (numbers % 5) + columns * columns) % 17).to(torch.uint8)[:, None]
    initialize(flow, x, draw_noise(x.shape, seeded(), x.device))
    state = State(config, flow, build_optimizers(flow, config.train), None, {})
    losses = []
    for _ in range(steps):
        losses.append(train_step(state, x)[0].item())
        [optimizer.step() for optimizer in state.optimizers]
        state.progress.step += 1
        state.progress.images += len(x)
    return losses


@pytest.mark.run
@pytest.mark.parametrize("name, transform, options", GOLDEN)
def test_golden_losses(name, transform, options):
    expected = GOLDEN[name, transform, options]
    found = losses_of(name, transform, options, len(expected))
    assert found == pytest.approx(expected, abs=1e-4)


if __name__ == "__main__":
    for key in GOLDEN:
        losses = losses_of(*key, 1 if key[2] else 5)
        print(f"    ({json.dumps(key)[1:-1]}): {[round(loss, 6) for loss in losses]},")

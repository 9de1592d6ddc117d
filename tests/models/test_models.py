"""Every model: its size, its geometry and options, its start, and the losses of five steps.

`PYTHONPATH=tests python tests/models/test_models.py` prints the golden losses anew.
"""

import inspect
import json
import re
from typing import get_args

import pytest
import torch
import yaml
from catalogue import SPHERE, TINY, TORUS
from helpers import CNF, a_config, images, initialized, tiny_flow

from flowtrain import bijections as b
from flowtrain import config as configuration
from flowtrain.bijections.execution import call
from flowtrain.checkpoints.build import build_flow
from flowtrain.errors import UserError
from flowtrain.evaluation.layers import Watching, layers_of
from flowtrain.models import base, causal, glow, jet, nice, realnvp, sphere, tarflow, torus
from flowtrain.training.optim import build_optimizers
from flowtrain.training.state import State
from flowtrain.training.step import train_step

# The layers that learn, apart from ActNorm and matrices.
LEARNED = (b.CheckerboardCoupling, b.Continuous, b.Coupling)
LEARNED += (b.MaskedAutoregressive, b.Planar, b.TokenAutoregressive)


def test_every_model_is_tested():
    found = set(configuration.component_names(configuration.Model))
    # The last two fit no image: see test_sphere.py and test_torus.py.
    assert found == {*TINY, "sphere", "torus"} == {name for name, *_ in GOLDEN}


def test_every_elementwise_transform_can_be_chosen():
    assert set(get_args(base.AnyTransform)) == set(base.TRANSFORMS)
    assert set(get_args(base.Elementwise)) == set(base.TRANSFORMS) - {"additive", "tanh"}


@pytest.mark.parametrize("name", configuration.component_names(configuration.Model))
def test_a_model_names_its_paper_and_the_differences(name):
    text = inspect.getmodule(configuration.component(configuration.Model, name).build).__doc__
    assert "arXiv" in text and "differences" in text


def given(options):
    """The options of a model from words `KEY=VALUE`."""
    words = (word.partition("=") for word in options.split())
    return {key: yaml.safe_load(text) for key, _, text in words}


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
    "model, shape, options, message",
    [
        (tarflow, (1, 28, 28), "patch=8", "model.patch: patches of 8x8 pixels do not fill images"),
        (jet, (3, 4, 6), "patch=4", "model.patch: patches of 4x4 pixels do not fill images of 4x6"),
        (tarflow, (1, 8, 8), "patch=8", "at least two patches, and 8x8 has one of 8x8"),
        (jet, (1, 28, 28), "patch=4", "28x28 has 49 of 4x4, an odd number: choose another patch"),
        (glow, (1, 28, 28), "", "squeezed twice (28 -> 14 -> 7); levels: 3 needs a multiple of 8"),
        (glow, (1, 8, 8), "levels=4", "squeezed 3 times (8 -> 4 -> 2 -> 1); levels: 4 needs a"),
        (glow, (3, 30, 32), "levels=2", "30x32 can be squeezed once (30x32 -> 15x16); levels: 2"),
        (glow, (1, 7, 7), "levels=1", "7x7 cannot be squeezed; levels: 1 needs a multiple of 2"),
        (glow, (1, 8, 8), "steps=[3,4]", "model.steps: [3, 4] has 2 numbers, for 3 levels"),
        (glow, (1, 8, 8), "width=[3,4]", "model.width: [3, 4] has 2 numbers, for 3 levels"),
        (realnvp, (1, 28, 28), "levels=4", "twice (28 -> 14 -> 7); levels: 4 needs a multiple"),
        (realnvp, (1, 1, 1), "", "couplings need at least two values per example"),
        (causal, (1, 4, 6), "num_bins=9 orders=8", "model.orders: 8 has transposed images, and"),
        (causal, (1, 4, 9), "num_bins=9 downsample=2", "model.downsample: 2 needs at least 3 rows"),
        (sphere, (2, 1, 1), "", "sphere is for points of the unit sphere, 3x1x1; got 2x1x1"),
        (torus, (1, 4, 4), "", "model.name: torus is for angles, Cx1x1; got 1x4x4"),
        (torus, (1, 1, 1), "", "couplings need at least two values per example"),
    ],
)
def test_impossible_geometry(model, shape, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        model.build(shape, **given(options))


@pytest.mark.parametrize(
    "model, noise, shape, levels, message",
    [
        ("causal", "", (1, 4, 4), None, "model.name: causal is a model of the levels of images"),
        ("sphere", "", (3, 1, 1), 256, "model.name: sphere is for real-valued data, these have"),
        # noise
        ("causal", "name=variational", (1, 4, 4), 256, "name: variational, but the likelihood of"),
        ("causal", "name=gaussian", (1, 4, 4), 256, "gaussian, but the likelihood of causal"),
        ("causal", "transform=logit", (1, 4, 4), 256, "transform: logit, but causal reads the"),
        ("nice", "name=gaussian transform=logit", (1, 4, 4), 256, "transform: logit, but Ga"),
        ("nice", "name=gaussian", (2, 1, 1), None, "real-valued data have no levels"),
        ("nice", "transform=logit", (2, 1, 1), None, "dequantization: real-valued"),
        # a part of the image, and its class
        ("glow levels=1 context=grey", "", (1, 8, 8), 256, "grey needs images with 3 channels"),
        ("glow levels=1 context=grey classes=3", "", (3, 8, 8), 256, "grey, and model.classes"),
        ("glow levels=1 context=grey", "", (2, 1, 1), None, "model.context: grey is of images"),
        ("glow levels=1 context=downsample context_factor=4", "", (3, 8, 6), 256, "4 does not"),
        ("nice context=grey", "", (3, 8, 8), 256, "for causal, glow, realnvp"),
        ("causal token=4 context=grey", "", (3, 8, 6), 256, "4, but with model.context both sides"),
        ("glow classes=3 label_dropout=0.1", "", (1, 4, 4), 256, "networks of glow do not see the"),
        ("causal label_dropout=0.1", "", (1, 4, 4), 256, "label_dropout: 0.1, but .*set model.cl"),
    ],
)
def test_options_that_do_not_fit(model, noise, shape, levels, message):
    name, _, options = model.partition(" ")
    with pytest.raises(UserError, match=message):
        section = {"name": name, **TINY.get(name, {}), **given(options)}
        build_flow(a_config(section, dequantization=given(noise)), shape, levels)


@pytest.mark.parametrize("split", ["channel", "checkerboard", "mixed"])
def test_glow_learns_at_a_single_pixel_too(split):
    """A checkerboard would not change a single pixel, or not see it."""
    flow = tiny_flow("glow", split=split, width=16)  # of 4x4 images, in two levels
    flow.bits_per_dim(images(8, flow.shape)).mean().backward()
    assert [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.any()] == []


# A causal model maps data to normal numbers.
@pytest.mark.parametrize("name", [*sorted(TINY.keys() - {"causal", "cnf"}), CNF])
def test_layers_start_as_the_identity(name):
    x = images(16, (1, 4, 4))
    flow = initialized(build_flow(a_config(name), (1, 4, 4), 256), x)
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
    "model, noise, part",
    [
        ("glow", "uniform", "conditioner"),
        ({"name": "jet", **TINY["jet"], "mixing": "permutation"}, "uniform", ".order"),
        ("nice", "variational", "noise_model.context"),
    ],
)
def test_weights_and_permutations_are_a_function_of_the_seed(model, noise, part, monkeypatch):
    def built(seed):
        config = a_config(model, dequantization={"name": noise}, seed=seed)
        found = build_flow(config, (1, 4, 4), 256).state_dict()
        return {name: value.tolist() for name, value in found.items() if part in name}

    torch.manual_seed(1)
    state = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds all GPUs"))
        first = built(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == built(3) != built(4)
    assert list(first.values())[0] != list(first.values())[1]


# {(model, transform, options): losses of five steps}, on fixed data, noise, weights and rates: in
# bits/dim, or in nats of points. Options change the layers, of which one step is enough. A chain of
# whitening layers is short: white inputs have equal eigenvalues, whose directions are rounding.
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
    ("sphere", "center", ""): [2.238278, 2.012574, 1.839528, 1.716053, 1.625248],
    ("torus", "center", ""): [3.986513, 3.766242, 3.573386, 3.389004, 3.20848],
    ("glow", "center", "coupling=additive permutation=reverse steps=[1,2]"): [4.427021],
    ("glow", "center", "coupling=spline bins=5 permutation=shuffle width=[6,4]"): [4.549824],
    ("glow", "center", "split=checkerboard permutation=conv1x1 conditioner=gated"): [4.344663],
    ("glow", "center", "split=mixed steps=5 prior=spline"): [4.394624],
    ("glow", "center", "steps=1 initialization=whitening"): [4.23712],
    ("glow", "center", "conditioner=gated blocks=2 prior=mixture components=3"): [4.504602],
    ("realnvp", "center", "levels=3 blocks=2"): [4.593109],
    ("realnvp", "center", "transform=spline"): [4.558935],
    ("nice", "center", "prior=gaussian couplings=3"): [4.348085],
    ("maf", "center", "order=random transform=spline layers=3"): [4.391038],
    ("iaf", "center", "order=random transform=mixture layers=3"): [4.38284],
    ("tarflow", "center", "mixing=none bounded=false blocks=3"): [5.606771],
    ("jet", "center", "mixing=permutation bounded=false couplings=11"): [5.422601],
    ("jet", "center", "mixing=permutation couplings=31"): [13.011815],
    ("causal", "center", "token=4 attention=1 blocks=2"): [2.958334],
    ("causal", "center", "token=1 attention=1 pixels=true blocks=2"): [4.110974],
}


ROWS, COLUMNS, NUMBERS = torch.arange(4)[:, None], torch.arange(4), torch.arange(16)[:, None, None]
IMAGES = ((NUMBERS * 3 + ROWS * (NUMBERS % 5) + COLUMNS * COLUMNS) % 17).to(torch.uint8)[:, None]
ANGLES = torch.stack([torch.linspace(-3, 3, 16), torch.linspace(0.2, 1.2, 16)], dim=1)
OF_POINTS = {
    "sphere": (SPHERE, b.SphereToAngles().inverse(ANGLES)[0], None),
    "torus": (TORUS, ANGLES[:, :, None, None], None),
}


def losses_of(name, transform, options, steps):
    train = {"num_steps": 5, "batch_size": 8, "accumulate": 2, "lr": 0.01, "weight_decay": 0.1}
    train["optimizer"] = "adamw"
    model, x, levels = OF_POINTS.get(name) or ({"name": name, **TINY[name]}, IMAGES, 17)
    noise = {"transform": transform}
    config = a_config({**model, **given(options)}, train=train, dequantization=noise, seed=1)
    flow = build_flow(config, tuple(x.shape[1:]), levels)
    with torch.no_grad():
        for i, parameter in enumerate(flow.parameters()):
            parameter += 0.1 * torch.sin(torch.arange(parameter.numel()) + i).view_as(parameter)
    initialized(flow, x)
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

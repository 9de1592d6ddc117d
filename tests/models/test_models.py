"""Every model: its size, its geometry, its start, and the losses of five steps.

`PYTHONPATH=tests python tests/models/test_models.py` prints the golden losses anew.
"""

import inspect
import json
import math
from typing import get_args

import pytest
import torch
from catalogue import TINY
from helpers import a_config, images, perturb, seeded, tiny_flow

from flowtrain import config as configuration
from flowtrain.bijections import (
    ActNorm,
    CheckerboardCoupling,
    Continuous,
    Coupling,
    HalvePixels,
    MaskedAutoregressive,
    Permute,
    Planar,
    Sequential,
    TokenAutoregressive,
)
from flowtrain.bijections.execution import call
from flowtrain.checkpoints.build import build_flow
from flowtrain.errors import UserError
from flowtrain.evaluation.layers import Watching, layers_of
from flowtrain.flow.dequantize import draw_noise
from flowtrain.flow.flow import initialize
from flowtrain.models import base, glow, iaf, jet, maf, nice, planar, realnvp, tarflow
from flowtrain.training.optim import build_optimizers
from flowtrain.training.state import State
from flowtrain.training.step import train_step

# The layers that learn, apart from ActNorm and matrices.
LEARNED = (
    *(CheckerboardCoupling, Continuous, Coupling),
    *(MaskedAutoregressive, Planar, TokenAutoregressive),
)


@pytest.mark.parametrize("split", ["channel", "checkerboard", "mixed"])
def test_glow_learns_at_a_single_pixel_too(split):
    """A checkerboard would not change a single pixel, or not see it."""
    flow = tiny_flow("glow", split=split, width=16)  # of 4x4 images, in two levels
    flow.bits_per_dim(images(8, flow.shape)).mean().backward()
    assert [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow"])
def test_a_single_value_is_too_few_for_couplings(name):
    said = "model.levels: 1x1 cannot" if name == "glow" else "at least two values per example"
    with pytest.raises(UserError, match=said):
        build_flow(a_config(name), (1, 1, 1), 256)


@pytest.mark.parametrize("name", ["maf", "cnf", "causal"])
def test_a_single_value_is_enough_for(name):
    flow = tiny_flow(name, shape=(1, 1, 1))
    assert flow.bits_per_dim(images(8, flow.shape)).isfinite().all()


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_every_model_is_tested():
    found = set(configuration.component_names(configuration.Model))
    found -= {"sphere"}  # It fits no image: see test_sphere.py.
    assert found == set(TINY) == {name for name, _ in GOLDEN}


def test_every_elementwise_transform_can_be_chosen():
    assert set(get_args(base.AnyTransform)) == set(base.TRANSFORMS)
    assert set(get_args(base.Elementwise)) == set(base.TRANSFORMS) - {"additive"}


@pytest.mark.parametrize("name", configuration.component_names(configuration.Model))
def test_a_model_names_its_paper_and_the_differences(name):
    text = inspect.getmodule(configuration.component(configuration.Model, name).build).__doc__
    assert "arXiv" in text and "differences" in text


# ---------------------------------------------------------------- size


@pytest.mark.run  # takes long
def test_glow_of_the_paper_has_44_million_parameters():
    # Kingma & Dhariwal 2018, section 6: K = 32, L = 3, 512 channels on CIFAR-10.
    with torch.device("meta"):
        assert 43.5e6 < count(glow.build((3, 32, 32), levels=3, steps=32, width=512)) < 44.5e6


@pytest.mark.run  # takes long
def test_the_defaults_are_the_papers():
    with torch.device("meta"):
        assert count(glow.build((3, 32, 32))) == count(
            glow.build((3, 32, 32), levels=3, steps=32, width=512)
        )


def test_glow_size_by_hand():
    # Two steps on 4 channels: ActNorm 8; LU 16 + 16 + 4; 3x3 from 2 to 5, 1x1 from 5 to 5, 3x3 from
    # 5 to 4 with a gain.
    step = 8 + 36 + (2 * 9 * 5 + 5) + (5 * 5 + 5) + (5 * 9 * 4 + 4 + 4)
    # The last 8 belong to the top prior.
    assert count(glow.build((1, 2, 2), levels=1, steps=2, width=5)) == 2 * step + 8


def test_nice_of_the_paper():
    # Section 5.1: four couplings, each of five hidden layers of 1000, on 784 entries.
    coupling = 392 * 1000 + 1000 + 4 * (1000 * 1000 + 1000) + 1000 * 392 + 392
    with torch.device("meta"):
        assert count(nice.build((1, 28, 28))) == 4 * coupling + 2 * 784


@pytest.mark.parametrize("build", [maf.build, iaf.build])
def test_maf_size_by_hand(build):
    # ActNorm; a hidden layer, another, and shift and log-scale.
    layer = 2 * 12 + (12 * 7 + 7) + (7 * 7 + 7) + (7 * 24 + 24)
    assert count(build((3, 2, 2), layers=4, width=7, hidden_layers=2)) == 4 * layer


def test_planar_size_by_hand():
    assert count(planar.build((3, 2, 2), layers=5)) == 2 * 12 + 5 * (12 + 12 + 1)


def transformer(entries, outputs, tokens, width, layers):
    """Parameters of a transformer, from the linear layers and norms of the papers' code."""
    attention = 2 * width + (width * 3 * width + 3 * width) + (width * width + width)
    mlp = 2 * width + (width * 4 * width + 4 * width) + (4 * width * width + width)
    ends = (entries * width + width) + tokens * width + (width * outputs + outputs)
    return ends + layers * (attention + mlp)


@pytest.mark.parametrize(
    "shape, patch, width, blocks, layers, expected",
    [
        ((3, 64, 64), 2, 768, 8, 8, 460_142_784),  # the likelihood of ImageNet64
        ((3, 64, 64), 4, 1024, 8, 8, 809_444_096),  # samples of ImageNet64
        ((1, 28, 28), 4, 20, 3, 2, None),
    ],
)
@pytest.mark.run  # takes long
def test_tarflow_of_the_paper(shape, patch, width, blocks, layers, expected):
    entries, tokens = shape[0] * patch**2, shape[1] * shape[2] // patch**2
    by_hand = blocks * transformer(entries, 2 * entries, tokens, width, layers)
    options = {"patch": patch, "width": width, "blocks": blocks, "layers": layers}
    with torch.device("meta"):
        plain = tarflow.build(shape, **options, mixing="none", bounded=False)
        with_classes = tarflow.build(shape, 10, **options, mixing="none")
    assert count(plain) == by_hand and expected in (by_hand, None)
    assert count(with_classes) == by_hand + blocks * 10 * width


@pytest.mark.parametrize(
    "shape, couplings, layers, width, expected",
    [
        ((3, 64, 64), 32, 2, 512, 207_177_216),
        ((3, 64, 64), 64, 5, 512, 1_019_612_160),
        ((1, 8, 8), 6, 1, 12, None),
    ],
)
@pytest.mark.run  # takes long
def test_jet_of_the_paper(shape, couplings, layers, width, expected):
    entries, tokens = shape[0] * 16, shape[1] * shape[2] // 16
    half = entries // 2
    by_hand = couplings * (transformer(half, entries, tokens, width, layers) + 2 * width)
    with torch.device("meta"):
        plain = jet.build(
            shape, width=width, couplings=couplings, layers=layers, mixing="permutation"
        )
    assert count(plain) == by_hand and expected in (by_hand, None)


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    "build, shape, options, message",
    [
        (
            tarflow,
            (1, 28, 28),
            {"patch": 8},
            "model.patch: patches of 8x8 pixels do not fill images of 28x28: choose a patch whose "
            "side divides both",
        ),
        (jet, (3, 4, 6), {"patch": 4}, "model.patch: patches of 4x4 pixels do not fill images of"),
        (
            tarflow,
            (1, 8, 8),
            {"patch": 8},
            "model.name: tarflow needs at least two patches, and 8x8 has one of 8x8 (model.patch)",
        ),
        (
            jet,
            (1, 28, 28),
            {"patch": 4},
            "model.patch: jet halves the patches of an image, and 28x28 has 49 of 4x4, an odd "
            "number: choose another patch",
        ),
    ],
)
def test_impossible_patches(build, shape, options, message):
    with pytest.raises(UserError) as error:
        build.build(shape, **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "build, shape, options, message",
    [
        (
            glow,
            (1, 28, 28),
            3,
            "28x28 can be squeezed twice (28 -> 14 -> 7); levels: 3 needs a multiple of 8",
        ),
        (
            glow,
            (1, 8, 8),
            4,
            "8x8 can be squeezed 3 times (8 -> 4 -> 2 -> 1); levels: 4 needs a multiple of 16",
        ),
        (
            glow,
            (3, 30, 32),
            2,
            "30x32 can be squeezed once (30x32 -> 15x16); levels: 2 needs a multiple of 4",
        ),
        (glow, (1, 7, 7), 1, "7x7 cannot be squeezed; levels: 1 needs a multiple of 2"),
        (
            glow,
            (1, 2, 8),
            2,
            "2x8 can be squeezed once (2x8 -> 1x4); levels: 2 needs a multiple of 4",
        ),
        (
            realnvp,
            (1, 28, 28),
            4,
            "28x28 can be squeezed twice (28 -> 14 -> 7); levels: 4 needs a multiple of 8",
        ),
        (realnvp, (1, 5, 5), 2, "5x5 cannot be squeezed; levels: 2 needs a multiple of 2"),
    ],
)
def test_impossible_geometry(build, shape, options, message):
    with pytest.raises(UserError) as error:
        build.build(shape, levels=options)
    assert str(error.value) == f"model.levels: {message}"


def test_possible_geometry():
    for shape, squeezes in (((1, 28, 28), 2), ((3, 32, 32), 5), ((1, 7, 7), 0), ((1, 12, 8), 2)):
        base.check_squeezes(shape, squeezes, squeezes)


def test_geometry_comes_before_any_data():
    config = a_config({"name": "glow", "levels": 3}, data={"name": "mnist", "root": "/nowhere"})
    with pytest.raises(UserError, match="can be squeezed twice"):
        build_flow(config, (1, 28, 28), 256)


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("name", sorted(TINY.keys() - {"causal"}))  # this maps data to normal
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


def test_the_weights_are_a_function_of_the_seed():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (build_flow(a_config(seed=seed), (1, 4, 4), 256) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not all(
        torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("key", ["steps", "width"])
def test_numbers_for_each_level(key):
    with pytest.raises(UserError, match=rf"model.{key}: \[3, 4\] has 2 numbers, for 3 levels"):
        glow.build((1, 8, 8), levels=3, **{"steps": 1, "width": 4, key: [3, 4]})
    flow = glow.build((1, 8, 8), levels=2, **{"steps": 1, "width": 4, key: [3, 5]})
    couplings = [[m for m in level.layers if isinstance(m, Coupling)] for level in flow.levels]
    assert [len(level) for level in couplings] == ([3, 5] if key == "steps" else [1, 1])
    widths = [level[0].conditioner.layers[0].out_features for level in couplings]
    assert widths == ([3, 5] if key == "width" else [4, 4])


@pytest.mark.parametrize(
    "split, expected",
    [
        ("channel", ["channel"] * 4),
        ("checkerboard", [0, 1, 0, 1]),
        ("mixed", ["channel", 0, "channel", 1]),
    ],
)
def test_splits(split, expected):
    """A checkerboard is written as the parity of the pixels that it keeps."""
    (level,) = glow.build((1, 4, 4), levels=1, steps=4, width=2, split=split).levels
    kinds = [
        (0 if m.keep[0, 0] else 1) if isinstance(m, CheckerboardCoupling) else "channel"
        for m in level.layers
        if isinstance(m, Coupling | CheckerboardCoupling)
    ]
    assert kinds == expected


@pytest.mark.parametrize(
    "name, shape",
    [
        *[("glow", (1, 4, 4)), ("realnvp", (1, 4, 4)), ("nice", (1, 3, 3))],
        *[("planar", (1, 3, 3)), ("maf", (1, 3, 3)), ("iaf", (1, 3, 3)), ("cnf", (1, 3, 3))],
    ],
)
def test_every_entry_of_the_image_is_transformed(name, shape):
    flow = tiny_flow(name, shape).double()
    x = torch.rand(1, *shape, generator=seeded(), dtype=torch.float64) - 0.5
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.bijection(v)[0], x).reshape(
        x.numel(), -1
    )
    # Each latent depends on several pixels, and several latents depend on each pixel.
    assert (jacobian.abs() > 1e-9).sum(0).min() > 1 and (jacobian.abs() > 1e-9).sum(1).min() > 1


def test_glow_is_as_the_paper_says():
    bijection = glow.build((1, 4, 4), levels=2, steps=3, width=4)
    kinds = [type(layer).__name__ for layer in bijection.levels[0].layers]
    assert kinds == ["Squeeze", *["ActNorm", "Conv1x1LU", "Coupling"] * 3]
    assert [type(prior).__name__ for prior in bijection.priors] == ["Coupling", "DiagonalAffine"]


@pytest.mark.parametrize(
    "options, kinds, couplings",
    [
        ({}, {"Conv1x1LU"}, {"AffineTransform"}),
        ({"coupling": "additive"}, {"Conv1x1LU"}, {"AdditiveTransform"}),
        ({"permutation": "conv1x1"}, {"Conv1x1"}, {"AffineTransform"}),
        ({"permutation": "shuffle"}, {"Permute"}, {"AffineTransform"}),
        ({"permutation": "reverse", "coupling": "additive"}, {"Permute"}, {"AdditiveTransform"}),
    ],
)
def test_options_of_glow(options, kinds, couplings):
    layers = glow.build((1, 4, 4), levels=1, steps=2, width=4, **options).levels[0].layers
    assert {type(layer).__name__ for layer in layers} == {"Squeeze", "ActNorm", "Coupling"} | kinds
    assert {type(m.transform).__name__ for m in layers if isinstance(m, Coupling)} == couplings
    orders = [m.order.tolist() for m in layers if isinstance(m, Permute)]
    assert "reverse" not in options.values() or orders == [[3, 2, 1, 0]] * 2


def test_realnvp_of_vectors_may_have_no_hidden_layers():
    config = a_config({"name": "realnvp", "levels": 1, "blocks": 0})
    flow = perturb(build_flow(config, (2, 1, 1), None))
    x = torch.randn(64, 2, 1, 1, generator=seeded())
    initialize(flow, x, torch.zeros_like(x))
    torch.testing.assert_close(flow.decode(flow.encode(x)), x)


def test_realnvp_is_as_the_paper_says():
    bijection = realnvp.build((1, 4, 4), levels=2, width=4, blocks=1)
    first, last = (
        [m for m in level.layers if not isinstance(m, ActNorm)] for level in bijection.levels
    )
    assert [type(m).__name__ for m in first] == [
        *["CheckerboardCoupling"] * 3,
        "Squeeze",
        *["Coupling"] * 3,
    ]
    assert [type(m).__name__ for m in last] == ["CheckerboardCoupling"] * 4
    for a, b in zip(last, last[1:], strict=False):
        assert (a.keep ^ b.keep).all()
    assert [m.swap for m in first[4:]] == [False, True, False]
    assert all(type(prior) is Sequential and not len(prior.layers) for prior in bijection.priors)


def test_nice_is_as_the_paper_says():
    # Section 3.4: a factorial logistic, or Gaussian, on the output of couplings and scaling.
    x, noise = images(5, (1, 4, 4)), torch.rand(5, 1, 4, 4, generator=seeded())
    flow = tiny_flow("nice")
    h, log_det = flow.dequantizer(x, noise)[0], 0
    for layer in flow.bijection.layers[:-1]:
        h, term = layer(h)
        log_det = log_det + term
    assert [type(m).__name__ for m in flow.bijection.layers[2:]] == [
        *["Coupling"] * 4,
        "ActNorm",
        "LogisticToNormal",
    ]
    assert [m.swap for m in flow.bijection.layers[2:6]] == [False, True, False, True]
    density = (-h - 2 * torch.nn.functional.softplus(-h)).sum(1)
    expected = density + log_det - 16 * math.log(256)
    torch.testing.assert_close(flow(x, noise).total, expected, rtol=1e-5, atol=1e-3)
    gaussian = tiny_flow("nice", prior="gaussian")
    assert type(gaussian.bijection.layers[-1]) is ActNorm


@pytest.mark.parametrize(
    "build, kind", [(maf.build, "MaskedAutoregressive"), (iaf.build, "Inverse")]
)
def test_maf_is_as_the_paper_says(build, kind):
    def layers(**options):
        return build((1, 2, 3), layers=3, width=4, **options).layers

    assert [type(m).__name__ for m in layers()] == [
        "Flatten",
        *["ActNorm", kind, "Permute"] * 2,
        "ActNorm",
        kind,
    ]
    assert [m.order.tolist() for m in layers() if isinstance(m, Permute)] == [
        [5, 4, 3, 2, 1, 0]
    ] * 2
    orders = [tuple(m.order.tolist()) for m in layers(order="random") if isinstance(m, Permute)]
    assert (
        all(sorted(order) == list(range(6)) for order in orders)
        and len({*orders, (5, 4, 3, 2, 1, 0)}) == 3
    )


@pytest.mark.parametrize(
    "options, before",
    [({}, ["ActNorm", "Conv1x1LU"]), ({"mixing": "none", "bounded": False}, [])],
)
def test_tarflow_is_as_the_paper_says(options, before):
    layers = tarflow.build((1, 4, 4), patch=2, width=4, blocks=3, layers=1, **options).layers
    block = [*before, "TokenAutoregressive"]
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["Squeeze", *block, *["Reverse", *block] * 2, "Flatten"]
    transforms = {type(m.transform).__name__ for m in layers if isinstance(m, TokenAutoregressive)}
    assert transforms == {"AffineTransform" if before else "ExponentialTransform"}


@pytest.mark.parametrize(
    "options, before",
    [({}, ["ActNorm", "Conv1x1LU"]), ({"mixing": "permutation", "bounded": False}, ["Permute"])],
)
@pytest.mark.run  # takes long
def test_jet_is_as_the_paper_says(options, before):
    layers = jet.build((1, 4, 8), patch=2, width=4, couplings=35, layers=1, **options).layers
    cycle = [*before, "Coupling"] * 4 + ["HalvePixels", "Coupling", "Inverse"]
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["Squeeze", *cycle * 7, "Flatten"]
    transforms = {type(m.transform).__name__ for m in layers if isinstance(m, Coupling)}
    assert transforms == {"AffineTransform" if before[1:] else "SigmoidTransform"}
    kept = [sorted(m.order[:4].tolist()) for m in layers if isinstance(m, HalvePixels)]
    # A checkerboard, vertical stripes and horizontal ones, of 2x4 patches, and what they leave.
    board, vertical, horizontal = [0, 2, 5, 7], [0, 2, 4, 6], [0, 1, 2, 3]
    others = [sorted({*range(8)} - {*part}) for part in (board, vertical, horizontal)]
    assert kept == [board, others[0], vertical, others[1], horizontal, others[2], board]


def test_the_permutations_of_jet_are_a_function_of_the_seed():
    def orders(seed):
        config = a_config({"name": "jet", **TINY["jet"], "mixing": "permutation"}, seed=seed)
        flow = build_flow(config, (1, 4, 4), 256)
        return [v.tolist() for name, v in flow.state_dict().items() if name.endswith(".order")]

    assert orders(3) == orders(3) != orders(4)
    assert len({*map(tuple, orders(3)[:4])}) > 1


# ---------------------------------------------------------------- golden losses

# {(model, transform): bits/dim of five steps}, on fixed images, noise, weights and rates.
GOLDEN = {
    ("glow", "center"): [4.391193, 4.260745, 4.182455, 4.115993, 4.060753],
    ("realnvp", "logit"): [4.248842, 4.07444, 3.847991, 3.725912, 3.533388],
    ("nice", "center"): [4.637265, 4.629665, 4.617047, 4.60226, 4.583975],
    ("planar", "center"): [4.348976, 4.349448, 4.345428, 4.336526, 4.320923],
    ("maf", "logit"): [4.17041, 4.144823, 4.110533, 4.089016, 4.067691],
    ("cnf", "center"): [4.356643, 4.34722, 4.334869, 4.317419, 4.294961],
    ("iaf", "center"): [4.354898, 4.330153, 4.308249, 4.282404, 4.251452],
    ("tarflow", "center"): [4.310452, 4.227404, 4.172088, 4.108107, 4.060031],
    ("jet", "center"): [4.260336, 4.272494, 4.146126, 4.022169, 3.98238],
    ("causal", "center"): [3.803679, 3.672404, 3.582726, 3.518047, 3.467457],
}


def five_steps(name, transform):
    train = {
        "num_steps": 5,
        "batch_size": 8,
        "accumulate": 2,
        "lr": 0.01,
        "weight_decay": 0.1,
        "optimizer": "adamw",
    }
    config = a_config(name, train=train, dequantization={"transform": transform}, seed=1)
    flow = build_flow(config, (1, 4, 4), 17)
    with torch.no_grad():
        for i, parameter in enumerate(flow.parameters()):
            parameter += 0.1 * torch.sin(torch.arange(parameter.numel()) + i).reshape(
                parameter.shape
            )
    rows, columns = torch.arange(4)[:, None], torch.arange(4)
    numbers = torch.arange(16)[:, None, None]
    x = ((numbers * 3 + rows * (numbers % 5) + columns * columns) % 17).to(torch.uint8)[:, None]
    initialize(flow, x, draw_noise(x.shape, seeded(), x.device))
    state = State(config, flow, build_optimizers(flow, config.train), None, {})
    losses = []
    for _ in range(5):
        losses.append(train_step(state, x)[0].item())
        [optimizer.step() for optimizer in state.optimizers]
        state.progress.step += 1
        state.progress.images += len(x)
    return losses


@pytest.mark.parametrize("name, transform", GOLDEN)
def test_golden_losses(name, transform):
    assert five_steps(name, transform) == pytest.approx(GOLDEN[name, transform], abs=1e-4)


if __name__ == "__main__":
    for key in GOLDEN:
        print(f"    ({json.dumps(key)[1:-1]}): {[round(loss, 6) for loss in five_steps(*key)]},")

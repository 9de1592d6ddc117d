"""Samples by either way of a sequential flow, and how far they are."""

import io

import numpy as np
import pytest
import torch
from helpers import perturb, tiny_flow

from flowtrain.errors import UserError
from flowtrain.pictures.sample import npz, sample


@pytest.mark.parametrize("model", ["tarflow", "maf"])
def test_iteration_gives_the_same_samples(model):
    flow = tiny_flow(model).double()
    drawn = sample(flow, 5, [0.5, 1.0], seed=1)
    assert torch.equal(sample(flow, 5, [0.5, 1.0], seed=1, iterate=True), drawn)


@pytest.mark.parametrize("iterate", [False, True])
def test_progress_counts_all_sequential_layers(iterate):
    shares = []
    sample(tiny_flow("tarflow"), 4, [1.0], 0, lambda done, total: shares.append(done), (), iterate)
    assert shares == sorted(shares) and shares[-1] == 4
    assert len({*shares}) > (3 if iterate else 6)  # of two blocks of four tokens


def test_each_class_has_the_same_latents():
    flow = tiny_flow("glow", classes=3)
    perturb(flow.class_prior, 0.5)
    drawn = sample(flow, 5, [0.5, 1.0], seed=1, classes=[2, 0])
    assert torch.equal(sample(flow, 5, [1.0], seed=1, classes=[0]), drawn[15:])
    assert not torch.equal(drawn[15:], drawn[10:15])
    arrays = np.load(io.BytesIO(npz(flow, drawn, [0.5, 1.0], 1, [2, 0], sigma=0.5)))
    assert np.array_equal(arrays["images"], drawn.movedim(1, -1))
    assert arrays["classes"].tolist() == ([2] * 5 + [0] * 5) * 2
    assert arrays["temperature"].tolist() == [0.5] * 10 + [1.0] * 10
    assert (arrays["seed"], arrays["levels"], arrays["sigma"]) == (1, 256, 0.5)


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("causal", {"iterate": True}, "--method jacobi: .*only entry by entry"),
        ("glow", {"classes": [1]}, "--classes 1: the model is not class-conditional"),
        ("glow", {"guidance": 1.0}, "--guidance 1: the model is not class-conditional"),
        ("glow", {"denoise": True}, "--denoise: the model was not trained with Gaussian noise"),
    ],
)
def test_options_that_do_not_fit_the_model(model, options, message):
    with pytest.raises(UserError, match=message):
        sample(tiny_flow(model), 1, [1.0], 0, **options)

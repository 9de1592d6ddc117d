"""Samples by either way of a sequential flow, and how far they are."""

import pytest
import torch
from helpers import tiny_flow

from flowtrain.errors import UserError
from flowtrain.pictures.sample import sample


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


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("glow", {"iterate": True}, "--method jacobi: .*its samples take one pass"),
        ("causal", {"iterate": True}, "--method jacobi: .*only one entry after"),
    ],
)
def test_options_that_do_not_fit_the_model(model, options, message):
    with pytest.raises(UserError, match=message):
        sample(tiny_flow(model), 1, [1.0], 0, **options)

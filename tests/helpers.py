"""Tiny flows with every parameter moved off its start, and tiny files of data."""

import contextlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue import TINY

from flowtrain import config as configuration
from flowtrain.bijections.base import DataDependentInit
from flowtrain.checkpoints.build import build_flow
from flowtrain.flow.flow import initialize
from flowtrain.tools.inpaint.constraints import Pixels

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data in {SHARED}")
CPU = torch.device("cpu")
CNF = pytest.param("cnf", marks=pytest.mark.run)  # takes long
compiles = pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch is too old to compile")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def perturb(module, scale=0.2, seed=0):
    """Moves every parameter: a coupling that starts as the identity would pass any test."""
    generator = seeded(seed)
    for parameter in module.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def ready(module):
    """Calls every layer initialized as it stands, where no data are at hand to do it."""
    for layer in module.modules():
        if isinstance(layer, DataDependentInit):
            layer.initialized.fill_(True)
    return module


def initialized(flow, x, seed=0):
    initialize(flow, x, torch.rand(x.shape, generator=seeded(seed)))
    return flow


def jacobians(function, x):
    """Those of the first result for each example of `x`, `(B, outputs, inputs)`."""
    full = torch.autograd.functional.jacobian(lambda v: function(v)[0].flatten(1).sum(dim=0), x)
    return full.reshape(full.shape[0], len(x), -1).movedim(1, 0)


@contextlib.contextmanager
def memory_below(most):
    """At its peak, in bytes that Python allocates."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def images(count, shape, levels=256, seed=0):
    return torch.randint(levels, (count, *shape), generator=seeded(seed), dtype=torch.uint8)


def agrees(constraint, x):
    """Which of the images of integers `(B, C, H, W)` agree with a constraint, bool `(B,)`."""
    if isinstance(constraint, Pixels):
        same = (x == constraint.x) | ~constraint.known
    else:
        context = constraint.context
        same = (context.of(x).float() + 0.5) / context.num_bins == constraint.mean
    return same.flatten(1).all(dim=1)


# The simplest training, so that a test of one key is a test of nothing else.
PLAIN = {"optimizer": "adam", "lr": 1e-3, "warmup_steps": 0, "schedule": "constant", "clip_norm": 0}


def a_config(model="glow", data=None, train=None, **sections):
    """A checked configuration of a tiny model."""
    return configuration.parse(
        {
            "data": data or {},
            "model": {"name": model, **TINY[model]} if isinstance(model, str) else model,
            "train": {"num_steps": 5, **PLAIN, **(train or {})},
            **sections,
        },
        trust_code=True,  # of the tests' own modules
    )


def tiny_flow(
    model="glow",
    shape=(1, 4, 4),
    q=256,
    transform="center",
    alpha=0.05,
    seed=0,
    scale=0.2,
    noise=None,
    **options,
):
    """A tiny flow for images of q levels: parameters moved, then initialized on random images."""
    named = {"name": model, **TINY[model], **options}
    noise = {"transform": transform, "alpha": alpha, **(noise or {})}
    config = a_config(named, dequantization=noise, data={"flip": False}, seed=seed)
    flow = perturb(build_flow(config, shape, q), scale, seed)
    return initialized(flow, images(64, shape, q, seed), seed)


def npz(path, train=20, test=4, shape=(8, 8, 1), seed=0, **options):
    """Saves random images (NHWC), and gives the `data` section that reads them."""
    rng = np.random.default_rng(seed)
    counts = {"x_train": train, "x_test": test}
    np.savez(path, **{k: rng.integers(0, 256, (n, *shape), "u1") for k, n in counts.items()})
    return {"name": "npz", "path": str(path), **options}

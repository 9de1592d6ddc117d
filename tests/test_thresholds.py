"""Models that are trained until they must reach a figure: minutes, so run with `-m slow`."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from flowtrain.checkpoints.load import load_model
from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.data.splits import DataSet
from flowtrain.evaluation.evaluate import evaluate
from flowtrain.results import Evaluation
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory

pytestmark = pytest.mark.slow

HISTOGRAM = 2.42  # bits/dim of the digits when every pixel is coded by its own histogram


def trained(tmp_path: Path, config: str, *overrides: str) -> Evaluation:
    """Trains a shipped configuration and evaluates its best checkpoint on the test split."""
    settings = load_config(find_config(config), overrides)
    run = RunDirectory(tmp_path / "run")
    fit(settings, run, torch.device("cpu"))
    model = load_model(str(run.path), torch.device("cpu"))
    result, _ = evaluate(model, DataSet(settings.data), "test")
    assert json.loads((run.path / "summary.json").read_text())["finished"]
    return result


@pytest.mark.parametrize(
    ("config", "limit"),
    [("glow_digits.yaml", 2.20), ("realnvp_digits.yaml", HISTOGRAM), ("nice_digits.yaml", 4.09)],
)
def test_digits(tmp_path, config, limit):
    assert trained(tmp_path, config).bits_per_dim < limit


def correlated_gaussians(count: int, seed: int) -> tuple[np.ndarray, float]:
    """8x8 images of quantized Gaussian pixels, and their entropy in bits/dim.

    Pixels at distance d (|rows| + |columns|) have correlation 0.9**d. With a standard deviation of
    20 levels, the entropy of the integers is the differential one to four digits, and none is
    clipped (6 sigma).
    """
    rows, columns = np.divmod(np.arange(64), 8)
    distance = np.abs(rows[:, None] - rows) + np.abs(columns[:, None] - columns)
    covariance = 20.0**2 * 0.9**distance
    pixels = np.random.default_rng(seed).multivariate_normal(
        np.full(64, 128.0), covariance, size=count, method="cholesky"
    )
    nats = (math.log(2 * math.pi * math.e) + np.linalg.slogdet(covariance)[1] / 64) / 2
    images = np.clip(np.round(pixels), 0, 255).astype(np.uint8).reshape(-1, 8, 8)
    return images, nats / math.log(2)


def test_known_entropy(tmp_path):
    x_train, entropy = correlated_gaussians(20_000, seed=1)
    x_test, _ = correlated_gaussians(5_000, seed=2)
    np.savez(tmp_path / "gaussians.npz", x_train=x_train, x_test=x_test)
    data = ["data.name=npz", f"data.path={tmp_path / 'gaussians.npz'}"]
    result = trained(tmp_path, "glow_digits.yaml", *data, "train.batch_size=128")
    # Never below the entropy: the mean over test images of a bound, less four standard errors.
    assert entropy - 4 * result.bits_per_dim_stderr < result.bits_per_dim < entropy + 0.1

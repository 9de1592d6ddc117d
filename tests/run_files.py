"""A run directory as `train` and `evaluate` write it, without training."""

import json

from helpers import a_config


def row(step, bits, seconds, split):
    times = {"step": step, "images": 10 * step, "seconds": seconds, "split": split}
    return {**times, "loss": bits, "bits_per_dim": bits}


def train_row(step, bits, **changes):
    figures = {"grad_norm": 1.0, "lr": 0.1, "images_per_second": 5.0 + step}
    return {**row(step, bits, 2.0 * step, "train"), **figures, **changes}


def validation_row(step, bits, **changes):
    return {**row(step, bits, 2.0 * step + 1, "validation"), **changes}


ROWS = [
    train_row(1, 5.0),
    train_row(2, 4.0),
    validation_row(2, 4.2),
    train_row(4, 3.0),
    validation_row(4, 3.125),
]
SUMMARY = {"step": 4, "images": 40, "seconds": 9.5, "finished": True, "unit": "bits/dim"}
SUMMARY |= {"best_validation_loss": 3.125, "best_validation_bits_per_dim": 3.125, "best_step": 4}
SUMMARY |= {"parameters": 12345, "non_finite_steps": 0, "versions": {}, "device": "cpu"}
TEST = {"unit": "bits/dim", "loss": 3.25, "loss_stderr": 0.0125, "bits_per_dim": 3.25}
TEST |= {"bits_per_dim_stderr": 0.0125, "nats_per_image": 100.0, "bound": "elbo", "draws": 1}
TEST |= {"num_images": 180, "split": "test", "dataset": "digits", "weights": "ema"}
TEST |= {"step": 4, "dims": 64}


def a_run(path, rows=ROWS, test=TEST, data=None, train=None, model="glow", **summary):
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(a_config(model, data, train).yaml())
    (path / "summary.json").write_text(json.dumps({**SUMMARY, **summary}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if test is not None:
        (path / "evaluate-test.json").write_text(json.dumps(test))
    return path

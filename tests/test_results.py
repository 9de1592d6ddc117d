"""The keys of a run's files, in their order: other programs read them."""

import json

import pytest
from catalogue import sets
from cli_helpers import metrics, quick
from run_files import SUMMARY, TEST, train_row

from flowtrain.results import Evaluation, Row, Summary

SHORT = sets(train__num_steps=4, train__log_every=4, train__validate_every=4)
AT = ["step", "images", "seconds"]
TRAINING = ["grad_norm", "lr", "images_per_second"]
REST = [
    "best_step",
    "parameters",
    "non_finite_steps",
    "duplicates",
    "versions",
    "device",
    "machine",
]
BITS, STDERR = "bits_per_dim", "bits_per_dim_stderr"
NATS = ["nats_per_image", "nats_per_image_stderr"]
DESCRIPTION = ["num_images", "duplicates", "duplicates_of_training", "dims", "levels"]
DESCRIPTION += ["sampling", "split", "dataset", "weights", "step", "seed"]
DESCRIPTION += ["non_finite_images", "non_finite_indices", "max_reconstruction_error", "checkpoint"]
DESCRIPTION += ["model"]
OF_CLASSES = ["loss_given_class", "classes", "accuracy", "accuracy_stderr"]
LOSS = ["loss", "loss_stderr"]
BEST = "best_validation_"
OF_IMAGES = [
    *("bound", "draws", "unit", *LOSS, "loss_stderr_draws", BITS, STDERR),
    *(f"elbo_{key}" for key in (BITS, STDERR, f"{STDERR}_draws")),
    *NATS,
]


@pytest.mark.run
@pytest.mark.parametrize(
    "config, figures",
    [
        ("glow_digits", [*OF_IMAGES, *OF_CLASSES]),
        ("realnvp_two_moons", ["bound", "draws", "unit", *LOSS, BITS, STDERR, *NATS]),
    ],
)
def test_the_keys_of_files(config, figures, tmp_path):
    losses = ["loss", BITS]
    small = sets(model__width=8)
    if config == "glow_digits":
        small += sets(model__steps=1, model__classes=10)
    command = ["train", "--config", f"{config}.yaml", *SHORT, *small, "--run-dir", "r"]
    quick(*command, cwd=tmp_path).ok()
    quick("evaluate", "r", "--num-images", 8, cwd=tmp_path).ok()
    run = tmp_path / "r"
    common = [*AT, "split", *losses]
    assert [list(row) for row in metrics(run)] == [[*common, *TRAINING], common]
    best = [f"{BEST}{loss}" for loss in losses]
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary) == [*AT, "finished", "unit", *best, *REST]
    evaluation = json.loads((run / "evaluate-test.json").read_text())
    assert list(evaluation) == [*figures, *DESCRIPTION]


def test_files_of_an_earlier_version_are_read():
    """Its losses are keyed by their unit, which its summary does not name."""
    summary = {key: value for key, value in SUMMARY.items() if key not in ("unit", f"{BEST}loss")}
    assert Summary.model_validate(summary).best_validation_loss == 3.125
    summary |= {f"{BEST}bits_per_dim": None, f"{BEST}nats": 0.5}
    assert Summary.model_validate(summary).best_validation_loss == 0.5
    row = train_row(1, None) | {"nats_per_dim": 0.25}
    del row["loss"]
    assert Row.model_validate(row).loss == 0.25
    test = {key: value for key, value in TEST.items() if key not in ("unit", "loss", "draws")}
    found = Evaluation.model_validate(test | {"samples": 8})
    assert (found.loss, found.unit, found.draws) == (3.25, "?", 8)

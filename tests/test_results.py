"""The keys of a run's files, in their order: other programs read them."""

import json

import pytest
from catalogue import sets
from cli_helpers import metrics, quick, summary
from run_files import SUMMARY, TEST, train_row

from flowtrain.results import Evaluation, Row, Summary

SHORT = sets(train__num_steps=4, train__log_every=4, train__validate_every=4)
ROW = "step images seconds split loss bits_per_dim"
OF_TRAINING = f"{ROW} grad_norm lr images_per_second"
OF_SUMMARY = """step images seconds finished unit best_validation_loss best_validation_bits_per_dim
    best_step parameters non_finite_steps duplicates versions device machine"""
OF_POINTS = """bound draws unit loss loss_stderr bits_per_dim bits_per_dim_stderr nats_per_image
    nats_per_image_stderr"""
OF_IMAGES = """bound draws unit loss loss_stderr loss_stderr_draws bits_per_dim bits_per_dim_stderr
    elbo_bits_per_dim elbo_bits_per_dim_stderr elbo_bits_per_dim_stderr_draws nats_per_image
    nats_per_image_stderr loss_given_class classes accuracy accuracy_stderr"""
OF_EVALUATION = """num_images duplicates duplicates_of_training dims levels sampling split dataset
    weights step seed non_finite_images non_finite_indices max_reconstruction_error checkpoint
    model"""


@pytest.mark.run
@pytest.mark.parametrize(
    "config, figures", [("glow_digits", OF_IMAGES), ("realnvp_two_moons", OF_POINTS)]
)
def test_the_keys_of_files(config, figures, tmp_path):
    small = sets(model__width=8)
    if config == "glow_digits":
        small += sets(model__steps=1, model__classes=10)
    command = ["train", "--config", f"{config}.yaml", *SHORT, *small, "--run-dir", "r"]
    quick(*command, cwd=tmp_path).ok()
    quick("evaluate", "r", "--num-images", 8, cwd=tmp_path).ok()
    run = tmp_path / "r"
    assert [list(row) for row in metrics(run)] == [OF_TRAINING.split(), ROW.split()]
    assert list(summary(run)) == OF_SUMMARY.split()
    evaluation = json.loads((run / "evaluate-test.json").read_text())
    assert list(evaluation) == figures.split() + OF_EVALUATION.split()


def test_files_of_an_earlier_version_are_read():
    """Its losses are keyed by their unit, which its summary does not name."""
    lacking = ("unit", "best_validation_loss")
    values = {key: value for key, value in SUMMARY.items() if key not in lacking}
    assert Summary.model_validate(values).best_validation_loss == 3.125
    values |= {"best_validation_bits_per_dim": None, "best_validation_nats": 0.5}
    assert Summary.model_validate(values).best_validation_loss == 0.5
    row = train_row(1, None) | {"nats_per_dim": 0.25}
    del row["loss"]
    assert Row.model_validate(row).loss == 0.25
    test = {key: value for key, value in TEST.items() if key not in ("unit", "loss", "draws")}
    found = Evaluation.model_validate(test | {"samples": 8})
    assert (found.loss, found.unit, found.draws) == (3.25, "?", 8)

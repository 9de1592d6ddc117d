"""The keys of a run's files, in their order: other programs read them."""

import json

import pytest
from catalogue import sets
from cli_helpers import metrics, quick

SHORT = sets(train__num_steps=4, train__log_every=4, train__validate_every=4)
AT = ["step", "images", "seconds"]
TRAINING = ["grad_norm", "lr", "images_per_second"]
REST = ["best_step", "parameters", "non_finite_steps", "duplicates", "versions", "device"]
BITS, STDERR = "bits_per_dim", "bits_per_dim_stderr"
NATS = ["nats_per_image", "nats_per_image_stderr"]
DESCRIPTION = ["num_images", "duplicates", "duplicates_of_training", "dims", "levels"]
DESCRIPTION += ["sampling", "split", "dataset", "weights", "step", "seed"]
DESCRIPTION += ["non_finite_images", "non_finite_indices", "max_reconstruction_error", "checkpoint"]
DESCRIPTION += ["model"]
OF_CLASSES = ["bits_per_dim_given_class", "classes", "accuracy", "accuracy_stderr"]
OF_IMAGES = [
    *("bound", "samples", BITS, STDERR, f"{STDERR}_draws"),
    *(f"elbo_{key}" for key in (BITS, STDERR, f"{STDERR}_draws")),
    *NATS,
]


@pytest.mark.parametrize(
    "config, losses, figures",
    [
        ("glow_digits", [BITS], [*OF_IMAGES, *OF_CLASSES]),
        ("realnvp_two_moons", [BITS, "nats"], [BITS, STDERR, "bound", "samples", *NATS]),
    ],
)
def test_the_keys_of_files(config, losses, figures, tmp_path):
    small = sets(model__width=8)
    if config == "glow_digits":
        small += sets(model__steps=1, model__classes=10)
    command = ["train", "--config", f"{config}.yaml", *SHORT, *small, "--run-dir", "r"]
    quick(*command, cwd=tmp_path).ok()
    quick("evaluate", "r", "--num-images", 8, cwd=tmp_path).ok()
    run = tmp_path / "r"
    assert [list(row) for row in metrics(run)] == [
        [*AT, "split", *losses, *TRAINING],
        [*AT, "split", *losses],
    ]
    best = [f"best_validation_{loss}" for loss in losses]
    assert list(json.loads((run / "summary.json").read_text())) == [*AT, "finished", *best, *REST]
    evaluation = json.loads((run / "evaluate-test.json").read_text())
    assert list(evaluation) == [*figures, *DESCRIPTION]

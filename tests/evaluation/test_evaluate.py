"""What `evaluate` reports: the bound, its draws, and images whose likelihood is not finite."""

import csv
import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from catalogue import TINY
from coding_helpers import Spoiled, loaded
from helpers import a_config, images, npz, perturb, tiny_flow

from flowtrain.data.named import undivided
from flowtrain.data.splits import DataSet, Split, fingerprint_of, sampled
from flowtrain.errors import UserError
from flowtrain.evaluation.evaluate import evaluate, reconstruction_error, scores_csv
from flowtrain.evaluation.score import mean_loss


@pytest.fixture(scope="module")
def flow():
    return tiny_flow("glow").eval().requires_grad_(False)


def evaluated(tmp_path, flow, split="test", shape=(4, 4, 1), validation=4, **options):
    """Of 20 images for training and 30 for the test."""
    section = npz(tmp_path / "a.npz", 20, 30, shape=shape, validation=validation)
    config = a_config("glow", data=section)
    return evaluate(loaded(flow, config, step=12), DataSet(config.data), split, **options)


@pytest.mark.parametrize(
    "model, draws, bound, sampling",
    [
        ("glow", 1, "elbo", "one pass"),
        ("glow", 4, "iwbo", "one pass"),
        ("causal", 1, "exact", "sequential"),
    ],
)
def test_the_result_states_what_was_measured(tmp_path, model, draws, bound, sampling):
    flow = tiny_flow(model)
    result, scores = evaluated(tmp_path, flow, draws=draws, seed=3, batch_size=8)
    content = result.content()
    bits = -scores.log_prob / (16 * math.log(2))
    expected = {
        "bits_per_dim": bits.mean().item(),
        "bits_per_dim_stderr": bits.std(correction=1).item() / math.sqrt(30),
        "nats_per_image": -scores.log_prob.mean().item(),
    }
    assert {key: content[key] for key in expected} == pytest.approx(expected)
    rest = {"bound": bound, "draws": draws, "num_images": 30, "dims": 16, "levels": 256}
    rest |= {"sampling": sampling, "split": "test", "dataset": "npz", "weights": "raw"}
    rest |= {"step": 12, "seed": 3, "non_finite_images": 0, "unit": "bits/dim"}
    assert {key: content[key] for key in rest} == rest
    assert (result.loss, result.loss_stderr) == (result.bits_per_dim, result.bits_per_dim_stderr)
    if bound != "exact":
        assert 0 <= result.max_reconstruction_error < 0.5
        return
    assert not [key for key in content if "elbo" in key or key.endswith("_draws")]
    assert content["max_reconstruction_error"] is None
    with pytest.raises(UserError, match="--draws 2: the likelihood of glow is exact"):
        evaluated(tmp_path, flow, draws=2)  # `evaluated` calls its model so


def test_equal_images_are_counted(tmp_path, flow):
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), "u1")
    np.savez(tmp_path / "a.npz", x_train=x, x_test=np.concatenate([x[:8], x[:4]]))
    config = a_config("glow", data={"name": "npz", "path": str(tmp_path / "a.npz")})
    model, data = loaded(flow, config), DataSet(config.data)

    def counts(split, **options):
        content = evaluate(model, data, split, **options)[0].content()
        return content["duplicates"], content.get("duplicates_of_training", "nothing")

    shared = data.equal_to_training(data.split("test"))
    assert counts("test") == (4, shared) and shared > 8
    few = sampled(12, 8).tolist()
    assert counts("test", num_images=8)[0] == sum(i - 8 in few for i in few)
    assert counts("validation") == (0, 0)
    assert counts("train") == (0, "nothing")


CASES = ["a copy", "other labels", "other images", "no test split", "changed"]


@pytest.mark.parametrize("case", CASES)
def test_other_data_are_told_by_their_content(tmp_path, case, caplog):
    section = npz(tmp_path / "own.npz", 20, 20, (4, 4, 1), validation=5)
    labels = dict.fromkeys(("y_train", "y_test"), np.arange(20) % 3)
    own = {**np.load(tmp_path / "own.npz"), **labels}
    np.savez(tmp_path / "own.npz", **own)
    config = a_config({"name": "glow", "classes": 3, **TINY["glow"]}, data=section)
    data = DataSet(config.data)
    train = data.split("train")
    known = data.fingerprint | {"labels": fingerprint_of(train.labels)}
    model = loaded(tiny_flow("glow", classes=3).eval(), config, data=known)
    trained = own["x_train"][train.indices]
    other = {
        "a copy": own,
        "other labels": {**own, "y_train": (own["y_train"] + 1) % 3},
        "other images": {**own, "x_train": own["x_test"], "x_test": trained},
        "no test split": {"x_train": trained, "y_train": np.zeros(15, int)},
        "changed": {"x_train": own["x_test"], "x_test": trained},
    }[case]
    path = tmp_path / ("own.npz" if case == "changed" else "other.npz")
    np.savez(path, **other)
    of_other = config.data.model_copy(update={"path": path})
    data = DataSet(of_other, undivided(of_other, config.data))
    content = evaluate(model, data, "all" if data.undivided else "test")[0].content()
    shared = {"other images": 15, "no test split": 15, "changed": None}.get(case, 0)
    assert content["duplicates_of_training"] == shared
    assert ("accuracy" in content) == (case == "a copy")
    assert ("changed since the training" in caplog.text) == (case == "changed")


def test_every_split_and_data_of_another_shape(tmp_path, flow):
    for split, count in (("train", 16), ("validation", 4)):
        assert evaluated(tmp_path, flow, split)[0].num_images == count
    result, _ = evaluated(tmp_path, flow, num_images=1)  # of which there is no standard error
    assert result.bits_per_dim_stderr is None and math.isfinite(result.bits_per_dim)
    with pytest.raises(UserError, match=r"\(1, 6, 4\) with 256 levels cannot be evaluated"):
        evaluated(tmp_path, flow, shape=(6, 4, 1))
    with pytest.raises(UserError, match="17 levels"):
        evaluated(tmp_path, tiny_flow("glow", q=17))
    with pytest.raises(UserError, match="--split validation: it is empty"):
        evaluated(tmp_path, flow, "validation", validation=0)


@pytest.mark.parametrize("value, draws", [(math.nan, 1), (math.inf, 1), (-math.inf, 2)])
def test_images_that_are_not_finite_are_counted_and_named(tmp_path, value, draws):
    flow = tiny_flow("glow")
    flow.bijection = Spoiled(flow.bijection, lambda pixel: 256 * pixel % 1 < 0.3, value)  # by noise
    result, scores = evaluated(tmp_path, flow, draws=draws)
    with np.load(tmp_path / "a.npz") as arrays:
        pixels = arrays["x_test"].transpose(0, 3, 1, 2)
    bad = (~scores.draws.isfinite()).any(dim=0).nonzero().flatten().tolist()
    assert 0 < len(bad) < 30
    assert result.non_finite_indices == bad and result.non_finite_images == len(bad)
    assert result.bits_per_dim is None and result.nats_per_image is None
    assert result.num_images == len(scores.log_prob) == 30
    assert not math.isfinite(mean_loss(flow, Split(pixels, np.arange(30))))


def test_the_accuracy_is_that_of_the_most_probable_class(tmp_path):
    flow = tiny_flow("glow", classes=3)
    perturb(flow.class_prior, 0.5)
    np.savez(tmp_path / "a.npz", x_train=images(90, (4, 4, 1)), y_train=np.arange(90) % 3)
    section = {"name": "npz", "path": str(tmp_path / "a.npz"), "validation": 0}
    config = a_config({"name": "glow", "classes": 3, **TINY["glow"]}, data=section)
    model, data = loaded(flow, config), DataSet(config.data)
    result, scores = evaluate(model, data, "train", draws=2)
    labels = data.split("train").labels
    predicted = scores.log_prob_by_class.argmax(dim=0)
    accuracy = (predicted == labels).double().mean().item()
    assert 0.1 < accuracy < 0.9 and result.accuracy == accuracy and result.classes == 3
    error = math.sqrt(accuracy * (1 - accuracy) / len(labels))
    assert result.accuracy_stderr == pytest.approx(error)
    given = scores.log_prob_by_class[labels, range(len(labels))].mean().item()
    assert result.loss_given_class == pytest.approx(-given / (16 * math.log(2)))
    rows = [row["predicted_class"] for row in rows_of(scores, flow)]
    assert rows == [str(label) for label in predicted.tolist()]
    with torch.no_grad():
        flow.class_prior.mean[1] = math.nan
    result, scores = evaluate(model, data, "train")
    assert result.non_finite_images == result.num_images
    assert result.accuracy is result.accuracy_stderr is result.loss_given_class is None
    assert {row["predicted_class"] for row in rows_of(scores, flow)} == {""}


def test_reconstruction_error():
    flow, x = tiny_flow("glow"), images(100, (1, 4, 4))
    assert reconstruction_error(flow, x) < 0.5
    flow.bijection = Spoiled(flow.bijection, torch.isnan, off=0.25)  # 64 of 256 levels
    assert reconstruction_error(flow, x) == pytest.approx(64, abs=1)


def rows_of(scores, flow):
    return list(csv.DictReader(io.StringIO(scores_csv(scores, flow).decode())))


@pytest.mark.parametrize("count", [30, 8])
def test_scores_as_csv(tmp_path, flow, count):
    """In order of the split, also of a sample."""
    _, scores = evaluated(tmp_path, flow, num_images=count)
    rows = rows_of(scores, flow)
    assert list(rows[0]) == ["index", "bits_per_dim", "log_prob", "log_prob_base", "log_det"]
    index, bits, log_prob, base, log_det = np.array([[*row.values()] for row in rows], float).T
    places = sampled(30, count, 0).tolist()
    assert index.tolist() == places and (places == [*range(count)]) == (count == 30)
    assert log_prob.tolist() == scores.log_prob.tolist()
    named = dataclasses.replace(scores, names=["\udcff.png"] * count)  # a byte that is no text
    assert rows_of(named, flow)[0]["file"] == r"\udcff.png"
    assert base.tolist() == scores.base.tolist()
    np.testing.assert_allclose(base + log_det, log_prob, atol=1e-9)
    np.testing.assert_allclose(bits, -log_prob / (16 * math.log(2)))

"""Verdicts: p-values, thresholds, the measured rate of false positives, and the command."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from cli_helpers import copy_of, quick, trained, tree
from helpers import images, perturb, ready, tiny_flow
from PIL import Image
from scipy.stats import binomtest
from sklearn.datasets import load_digits

from flowtrain.checkpoints.build import build_flow
from flowtrain.config import parse
from flowtrain.data.splits import Split
from flowtrain.errors import UserError
from flowtrain.evaluation.heat import HeatMaps
from flowtrain.evaluation.score import score
from flowtrain.tools.ood.command import percentage
from flowtrain.tools.ood.detector import Detector
from flowtrain.tools.ood.images import Collection
from flowtrain.tools.ood.results import pictures
from flowtrain.tools.ood.scores import Comparison, Scored
from flowtrain.tools.ood.verdict import p_values, rate, threshold


def test_p_values():
    held_out = np.array([3.0, 1, 2, 2])
    found = p_values(held_out, np.array([0.5, 2, 2.5, 3, 4, np.inf, np.nan]))
    assert (5 * found).tolist() == [5, 4, 2, 2, 1, 1, 1]
    # A held-out score that is not finite is as far out as any.
    assert (3 * p_values(np.array([1, np.nan]), np.array([2, np.inf]))).tolist() == [2, 2]


@pytest.mark.parametrize("ties", [False, True])
def test_false_positives_are_no_more_frequent_than_promised(ties):
    """Each of 100 exchangeable scores in turn is the new one."""
    scores = np.random.default_rng(0).normal(size=100).round(1 if ties else 9)
    found = np.array([p_values(np.delete(scores, i), scores[i : i + 1])[0] for i in range(100)])
    if not ties:
        assert sorted(found) == [k / 100 for k in range(1, 101)]
    for alpha in (0.01, 0.05, 0.29, 0.5):
        assert (found <= alpha).mean() <= alpha
        held_out = np.delete(scores, 7)
        above = scores > threshold(held_out, alpha)
        assert above.tolist() == (p_values(held_out, scores) <= alpha).tolist()


def test_a_percentage_is_the_nearest_number():
    """A p-value equal to it is an outlier: there are rates of k / 1000."""
    assert all(percentage(f"{k / 10}%") == k / 1000 for k in range(1, 1000))


def test_a_threshold_needs_enough_images():
    threshold(np.arange(99.0), 0.01)
    with pytest.raises(UserError, match="0.01: 99 held-out images are needed, there are 98"):
        threshold(np.arange(98.0), 0.01)


@pytest.mark.parametrize("count, of", [(0, 40), (3, 500), (7, 7), (1, 1)])
def test_the_interval_of_a_rate(count, of):
    found = rate(np.arange(of) < count)
    expected = binomtest(count, of).proportion_ci(0.95, method="wilson")
    assert found == pytest.approx((count / of, expected.low, expected.high), abs=1e-6)


def test_the_detector():
    flow, x = tiny_flow("glow", (1, 4, 4)), images(60, (1, 4, 4))
    held_out, training = x[:19], x[20:40].numpy()
    detector = Detector(flow, held_out, training, score="local", seed=3)
    maps = HeatMaps(flow, training, 3)
    assert np.array_equal(detector.heat(x[40:]), maps(x[40:].numpy()))
    largest = [maps(part.numpy()).max(axis=(1, 2)) for part in (held_out, x[40:])]
    assert np.array_equal(detector.p_values(x[40:]), p_values(*largest))
    wide = Detector(flow, held_out.int())  # the complexity is of bytes
    assert np.array_equal(wide.p_values(x[40:].long()), Detector(flow, held_out).p_values(x[40:]))
    typical = Detector(flow, held_out, score="typicality")
    parts = (Split(part.numpy(), np.arange(len(part))) for part in (held_out, x[40:]))
    loss = [-score(flow, part).log_prob for part in parts]
    distances = [abs(each - loss[0].mean()).numpy() for each in loss]
    assert np.array_equal(typical.p_values(x[40:]), p_values(*distances))
    with pytest.raises(ValueError, match="training: heat maps need training images"):
        typical.heat(x)
    with pytest.raises(ValueError, match="score: local, expected likelihood, typicality, complex"):
        Detector(flow, held_out, score="local")


def test_a_detector_of_real_values():
    config = parse({"data": {"name": "two_moons"}, "model": {"name": "maf", "width": 8}})
    flow = ready(perturb(build_flow(config, (2, 1, 1), None))).requires_grad_(False)
    x = flow.sample(40)
    detector = Detector(flow, x)
    expected = p_values(-flow.log_prob(x).numpy(), -flow.log_prob(x / 2).numpy())
    assert np.array_equal(detector.p_values(x / 2), expected)
    with pytest.raises(ValueError, match="expected likelihood, typicality$"):
        Detector(flow, x, score="complexity_corrected")


@pytest.mark.run
def test_the_command(tmp_path):
    """Digits with a noisy corner: verdicts on the screen, in JSON and CSV, and pictures."""
    run = copy_of(trained()["glow"], tmp_path / "run")
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(load_digits().images[:25].astype(int)):
        if i % 5 == 0:
            image[:4, :4] = np.random.default_rng(i).integers(17, size=(4, 4))
        pixels = (image * 255 // 16).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i:02}.png")
    before = set(tree(tmp_path))
    words = ["ood", "run", "photos", "--false-positives", "5%", "--score", "local"]
    done = quick(*words, "--maps", "heat", "--scores", "s.csv", cwd=tmp_path).ok()
    new = {"run/ood.json", "run/ood.png", "s.csv", "heat"}
    pictures = {f"heat/photos-{i:02}.png" for i in range(25)}
    assert set(tree(tmp_path)) - before == new | pictures
    assert Image.open(tmp_path / "heat" / "photos-07.png").width > 500
    outcome = json.loads((run / "ood.json").read_text())
    verdict, (out,) = outcome["verdict"], outcome["out"]
    expected = {"score": "local", "false_positives": 0.05, "held_out_split": "validation"}
    assert expected.items() <= verdict.items() and verdict["held_out_images"] == 162
    rows = [*csv.DictReader((tmp_path / "s.csv").open())]
    assert len(rows) == 180 + 25
    for row, image in zip(rows, outcome["in"]["images"] + out["images"], strict=True):
        assert image["image"] == (row["file"] or row["index"])
        assert image["p_value"] == float(row["p_value"])
        assert image["outlier"] == (float(row["local"]) > verdict["threshold"])
        assert image["outlier"] == (image["p_value"] <= 0.05)
    flagged = {image["image"] for image in out["images"] if image["outlier"]}
    assert out["outliers"] == len(flagged) and out["auroc"]["local"] is not None
    inside = outcome["in"]
    low, high = inside["outlier_rate_interval"]
    assert low <= inside["outlier_rate"] == inside["outliers"] / 180 <= high
    loss = f"{inside['loss']:.3f} +- {inside['loss_stderr']:.3f}"
    line = f"{inside['outliers']} of 180 are false positives, {inside['outlier_rate']:.2%}"
    assert line in done.out and "and 5 more (--json, --scores)" in done.out
    assert loss in done.out and "AUROC" in done.out
    assert all(image in done.out for image in flagged)
    # Other images of the test split by another seed; no pictures or verdicts.
    few = ["ood", "run", "photos", "--num-images", 50]
    more = ["data.split_seed=0", "--seed", 1, "--weights", "raw", "--json", "o.json", "--out"]
    quick(*few, *more, "o.png", cwd=tmp_path).ok()
    other = json.loads((tmp_path / "o.json").read_text())
    assert "verdict" not in other and (other["seed"], other["weights"]) == (1, "raw")
    assert Image.open(tmp_path / "o.png").format == "PNG"
    seen = "The model has seen these, so p-values are too small"
    more = ["--false-positives", "5%", "data.validation=0"]
    assert seen in quick(*few, *more, cwd=tmp_path).ok().out
    of_seed_0 = json.loads((run / "ood.json").read_text())
    assert of_seed_0["in"]["complexity"] != other["in"]["complexity"]
    assert seen not in done.out


def test_the_names_of_heat_maps_differ():
    names = ["a b.png", "a_b-3.png", "a_b.png", "a/b.png", 80 * "x" + ".png"]
    collection = Collection("photos", images(5, (1, 4, 4)).numpy(), np.arange(5), names=names)
    flow = tiny_flow("glow", (1, 4, 4))
    scored = Scored(collection, np.zeros(5), 0.0, flow.kind, np.zeros((5, 4, 4)))
    model = SimpleNamespace(flow=flow)
    found = [name for name, _ in pictures(Comparison(model, 0, scored, scored, [scored], "local"))]
    expected = [f"photos-a_b{end}.png" for end in ("", "-3", "-2", "-3-3")]
    assert found == [*expected, 60 * "x" + ".png"]  # the end of a long one


@pytest.mark.run
def test_the_command_for_vectors(tmp_path):
    """Of 200 rows, 40 are far from a Gaussian of three dimensions."""
    random = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", random.normal(size=(1000, 3)) @ [[1, 1, 0], [0, 1, 0], [0, 0, 9]])
    far = np.array([[6.0, -6, 0]]) * (np.arange(200) % 5 == 0)[:, None]
    rows = random.normal(size=(200, 3)) + far
    np.savetxt(tmp_path / "y.csv", rows, delimiter=",", header="a,b,c", comments="")
    words = ["model.width=16", "model.layers=2", "train.num_steps=300", "--run-dir", "run"]
    vectors = ["data.name=vectors", "data.path=x.npy"]
    quick("train", "--config", "maf_checkerboard", *vectors, *words, cwd=tmp_path).ok()
    words = ["ood", "run", "y.csv", "--false-positives", "2%", "--scores", "s.csv"]
    out = quick(*words, cwd=tmp_path).ok().out
    assert "Complexity" not in out and " of 200 are outliers" in out
    outcome = json.loads((tmp_path / "run" / "ood.json").read_text())
    assert outcome["verdict"]["score"] == "likelihood" and outcome["unit"] == "nats"
    (out,) = outcome["out"]
    assert out["complexity"] is None and set(out["auroc"]) == {"likelihood", "typicality"}
    assert all(image["outlier"] for image in out["images"][::5])
    header = (tmp_path / "s.csv").read_text().splitlines()[0]
    assert header == "dataset,index,loss,log_prob,typicality,p_value"
    for words, said in (
        (["y.csv", "--maps", "m"], "--maps: for models of images, and run/"),
        (["y.csv", "--score", "local"], "--score local: for models of images"),
        (["digits"], "data of shape (1, 8, 8) with 17 levels cannot be evaluated by run/"),
    ):
        quick("ood", "run", *words, cwd=tmp_path).failed(2, said)

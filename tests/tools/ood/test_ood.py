"""`flowtrain ood`: the scores, the areas, the images that are compared, and the output files."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from cli_helpers import quick, trained
from coding_helpers import Spoiled, loaded
from helpers import a_config, images, npz, tiny_flow
from PIL import Image

from flowtrain.data.splits import DataSet
from flowtrain.datasets.base import resize
from flowtrain.errors import RunError, UserError
from flowtrain.evaluation.score import score
from flowtrain.flow.kinds import NoisyImages
from flowtrain.pictures.lossless import complexity
from flowtrain.tools.ood import images as collecting
from flowtrain.tools.ood import results
from flowtrain.tools.ood import scores as scoring
from flowtrain.tools.ood.auroc import auroc
from flowtrain.tools.ood.histograms import draw


def a_model(tmp_path, shape=(1, 4, 4), levels=256, **data):
    """A tiny model of random images; `own` are its data."""
    size = (*shape[1:], shape[0])
    section = npz(tmp_path / "own.npz", train=40, test=30, shape=size, validation=10, **data)
    config = a_config("glow", data=section)
    return loaded(tiny_flow("glow", shape, levels), config, tmp_path / "model")


@pytest.mark.parametrize("ties", [False, True])
def test_auroc(ties):
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(0, 1, 40), rng.normal(0.7, 2, 25)
    if ties:
        inside, outside = inside.round(), outside.round()
    area, error = auroc(inside, outside)
    # DeLong et al. 1988, equations 3 to 5, as they stand.
    wins = (outside[:, None] > inside) + 0.5 * (outside[:, None] == inside)
    expected = wins.mean(axis=1).var(ddof=1) / 25 + wins.mean(axis=0).var(ddof=1) / 40
    assert (area, error) == pytest.approx((wins.mean(), math.sqrt(expected)))
    assert auroc(np.array([1.0, 2.0]), np.array([1.5])) == (0.5, None)


def test_made_images():
    like = collecting.Collection("like", images(20, (3, 6, 5), 17).numpy(), np.arange(5, 25))
    few = collecting.Collection("few", like.images[:5], np.arange(5))
    for name in collecting.MADE:
        made = collecting.made(name, like, 17, 0)
        x = made.images
        assert (made.name, made.split, made.positions.tolist()) == (name, None, [*range(20)])
        assert x.dtype == np.uint8 and x.shape == (20, 3, 6, 5) and x.max() < 17
        assert np.array_equal(x, collecting.made(name, like, 17, 0).images)
        assert np.array_equal(x[:5], collecting.made(name, few, 17, 0).images)
        assert not np.array_equal(x, collecting.made(name, like, 17, 1).images)
        assert not np.array_equal(x[0], x[1])
    x = collecting.made("constant", like, 256, 0).images
    assert (x == x[:, :, :1, :1]).all() and x[0].max() > x[0].min()  # of three channels
    # Noise takes all levels equally often, and its pixels are independent.
    counts = np.bincount(collecting.noise(200, (3, 8, 8), 17, 0).ravel(), minlength=17)
    assert counts.shape == (17,) and abs(counts / counts.mean() - 1).max() < 0.1
    x = collecting.noise(500, (1, 2, 2), 256, 0).reshape(500, 4).astype(float)
    assert abs(np.corrcoef(x.T) - np.eye(4)).max() < 0.15
    # Shuffled images have the same pixels, each in an order of its own.
    for a, b in zip(like.images, collecting.shuffled(like.images, 0), strict=True):
        colours = [sorted(map(tuple, y.reshape(3, -1).T.tolist())) for y in (a, b)]
        assert colours[0] == colours[1] and not np.array_equal(a, b)
    first, second = collecting.shuffled(np.stack([like.images[0]] * 2), 0)
    assert not np.array_equal(first, second)


def test_images_are_converted():
    """To the model's shape, as `resize` does, after 8 bits."""
    x = images(3, (1, 8, 8), 17).numpy()
    assert collecting.convert(x, 17, (1, 8, 8), 17) is x
    for shape, to_shape, levels, first in (
        ((1, 28, 28), (3, 32, 32), 256, lambda x: x[0]),
        ((3, 32, 32), (1, 28, 28), 256, lambda x: x.transpose(1, 2, 0)),
    ):
        x = images(3, shape).numpy()
        found = collecting.convert(x, levels, to_shape, levels)
        expected = [resize(Image.fromarray(first(each)), to_shape, "crop") for each in x]
        assert found.dtype == np.uint8 and np.array_equal(found, np.stack(expected))
    x = np.zeros((1, 1, 8, 16), "u1")
    x[..., :4] = x[..., 12:] = 255  # only in the part that `crop` cuts off
    assert collecting.convert(x, 256, (1, 8, 8), 256, "crop").max() == 0
    assert collecting.convert(x, 256, (1, 8, 8), 256, "stretch").max() == 255


@pytest.mark.parametrize(
    "levels, to_levels, expected",
    [
        (256, 32, {0: 0, 7: 0, 8: 1, 255: 31}),
        (256, 17, {0: 0, 7: 0, 8: 1, 128: 8, 255: 16}),
        (17, 32, {0: 0, 8: 15, 16: 31}),
        (2, 256, {0: 0, 1: 255}),
    ],
)
def test_levels(levels, to_levels, expected):
    x = np.array(list(expected), "u1").reshape(1, 1, 1, -1)
    found = collecting.convert(x, levels, x.shape[1:], to_levels)
    assert found.ravel().tolist() == list(expected.values())


@pytest.mark.parametrize("levels", [2, 4, 16, 17, 32, 100, 128])
def test_levels_there_and_back(levels):
    x = np.arange(levels, dtype="u1").reshape(1, 1, 1, -1)
    there = collecting.convert(x, levels, x.shape[1:], 256)
    assert np.array_equal(collecting.convert(there, 256, x.shape[1:], levels), x)


def test_other_data_are_brought_to_the_models_shape_and_levels(tmp_path):
    model = a_model(tmp_path, shape=(3, 8, 8), levels=32, n_bits=5, shift=5, flip=True)
    own = DataSet(model.config.data)
    digits = collecting.named("digits", "--data", model, own, 20)
    assert digits.images.shape == (20, 3, 8, 8) and digits.images.max() == 31
    assert digits.stored == ((1, 8, 8), 17) and digits.split == "test"
    all_digits = DataSet(a_config("glow", data={"name": "digits"}).data).split("test")
    stored = all_digits.take(digits.positions).numpy()
    assert np.array_equal(digits.images, collecting.convert(stored, 17, (3, 8, 8), 32))
    assert digits.positions.max() > 100  # 20 images of all, which may be sorted by class
    inside = collecting.own_split("test", model, own, 100)
    assert inside.stored is None and inside.images.shape == (30, 3, 8, 8)
    assert inside.images.max() < 32
    named = collecting.named("npz", "--in", model, own, 100)
    assert np.array_equal(named.images, inside.images) and named.stored is None
    Image.fromarray(np.full((20, 10), 255, "u1")).save(tmp_path / "one.png")
    one = collecting.named(str(tmp_path / "one.png"), "--data", model, own, 20)
    assert one.images.shape == (1, 3, 8, 8) and one.images.min() == 31 and one.split == "all"


def test_wrong_names(tmp_path):
    model = a_model(tmp_path)
    data = DataSet(model.config.data)
    for inside, outside, message in (
        (None, ["mnits"], "--data mnits: neither a data set .*noise"),
        (None, ["two_moons"], "--data two_moons: real"),
        ("digits", ["noise", "digits"], "--data digits: it is named twice"),
        (None, ["noise", "noise"], "--data noise: it is named twice"),
        (None, ["npz"], "--data npz: it is named twice"),
    ):
        with pytest.raises(UserError, match=message):
            collecting.collect(model, data, inside, outside, num_images=5)


@pytest.mark.run  # takes long
def test_the_comparison_against_a_direct_computation(tmp_path):
    model = a_model(tmp_path)
    data, steps = DataSet(model.config.data), []
    options = {"seed": 5, "batch_size": 7, "progress": lambda *step: steps.append(step)}
    made = ["noise", "shuffled"]
    collections = collecting.collect(model, data, None, made, num_images=30, seed=2)
    comparison = scoring.score_all(model, collections, **options)
    nats = {n: score(model.flow, data.split(n), seed=5).log_prob for n in ("validation", "test")}
    bits = {name: -each.numpy() / (16 * math.log(2)) for name, each in nats.items()}
    entropy = bits["validation"].mean()
    inside, test = comparison.inside, bits["test"]
    assert comparison.reference.entropy == pytest.approx(entropy)
    length = complexity(data.split("test").take(slice(None)).numpy())
    names = scoring.SCORES[:3]  # without heat maps, there is no local one
    expected = dict(zip(names, (test, abs(test - entropy), test - length), strict=True))
    for name in names:
        assert inside.scores[name] == pytest.approx(expected[name], abs=1e-4)
    noise, shuffled = comparison.outside
    assert np.array_equal(noise.collection.images, collecting.noise(30, (1, 4, 4), 256, 2))
    assert steps[-1] == (100, 100) and steps == sorted(steps) and steps[0] == (7, 100)

    outcome = results.as_json(comparison)
    for out, made in zip(outcome["out"], (noise, shuffled), strict=True):
        for name in inside.scores:
            area = auroc(inside.scores[name], made.scores[name])
            assert (out["auroc"][name], out["auroc_stderr"][name]) == area
        assert out["split"] is None
    expected = {"unit": "bits/dim", "entropy": comparison.reference.entropy}
    expected |= {"entropy_split": "validation", "entropy_images": 10, "coders": ["PNG", "WEBP"]}
    expected |= {"dims": 16, "levels": 256, "weights": "raw", "step": 3, "seed": 5}
    expected |= {"checkpoint": str(tmp_path / "model")}
    assert expected.items() <= outcome.items()
    described = outcome["in"]
    stderr = test.std(ddof=1) / math.sqrt(30)
    figures = {"loss": test.mean(), "loss_stderr": stderr, "loss_median": np.median(test)}
    figures |= {"bits_per_dim": test.mean(), "bits_per_dim_stderr": stderr}
    figures |= {"complexity": length.mean(), "complexity_median": np.median(length)}
    figures |= {"complexity_stderr": length.std(ddof=1) / math.sqrt(30)}
    assert {key: described[key] for key in figures} == pytest.approx(figures, rel=1e-4)
    rest = {"dataset": "npz", "split": "test", "num_images": 30, "non_finite_images": 0}
    rest |= {"stored_shape": None, "stored_levels": None}
    assert described.keys() == {*figures, *rest} and rest.items() <= described.items()

    text = io.BytesIO(results.scores_csv(comparison))
    rows = np.genfromtxt(text, None, delimiter=",", names=True, encoding="utf-8")
    assert ",".join(rows.dtype.names) == (
        "dataset,index,loss,log_prob,typicality,complexity,complexity_corrected,p_value"
    )
    assert rows["dataset"].tolist() == np.repeat(["npz", "noise", "shuffled"], 30).tolist()
    assert rows["index"].tolist() == 3 * [*range(30)]
    loss, corrected = rows["loss"], rows["complexity_corrected"]
    assert loss == pytest.approx(-rows["log_prob"] / (16 * math.log(2)))
    assert rows["typicality"] == pytest.approx(abs(loss - comparison.reference.entropy))
    assert corrected == pytest.approx(loss - rows["complexity"])
    held_out = comparison.reference.scores["complexity_corrected"]
    assert rows["p_value"] == pytest.approx((1 + (held_out >= corrected[:, None]).sum(1)) / 11)
    assert rows["complexity"][0] == length[0]
    with Image.open(io.BytesIO(draw(comparison))) as picture:
        assert picture.format == "PNG" and picture.width > 1000
        assert len(picture.convert("RGB").getcolors(10**6)) > 10


def test_a_density_has_no_bits():
    collection = collecting.Collection("a", images(3, (1, 4, 4)).numpy(), np.arange(3))
    log_prob = np.array([16.0, 32, 48])
    scored = scoring.Scored(collection, log_prob, -2.0, NoisyImages(256, 0.1))
    assert scored.loss.tolist() == [-1, -2, -3]
    assert scored.scores["typicality"].tolist() == [1, 0, 1]
    nats = complexity(collection.images) * math.log(2)
    assert scored.scores["complexity_corrected"] == pytest.approx(scored.loss - nats)
    described = results._described(scored)
    assert described["loss"] == -2 and described["loss_stderr"] == pytest.approx(1 / math.sqrt(3))
    assert described["bits_per_dim"] is described["bits_per_dim_stderr"] is None


@pytest.mark.run  # takes long
@pytest.mark.parametrize("black", ["outside", "inside", "reference"])
def test_likelihoods_that_are_not_finite(tmp_path, black):
    model = a_model(tmp_path)
    model.flow.bijection = Spoiled(model.flow.bijection, lambda pixel: pixel < -0.5 + 1 / 256)
    x = images(6, (1, 4, 4)).numpy() // 2 + 1
    splits = {"reference": "validation", "inside": "test", "outside": None}
    collections = {
        name: collecting.Collection(name, x.copy(), 5 + np.arange(6), split)
        for name, split in splits.items()
    }
    collections[black].images[[2, 4], 0, 0, 0] = 0
    odd = ["\udcff.png"] * 6  # a byte that is no text
    outside = [dataclasses.replace(collections.pop("outside"), names=odd)]
    comparison = scoring.score_all(model, [*collections.values(), *outside])
    outcome = results.as_json(comparison)
    json.dumps(outcome, allow_nan=False)  # fails if there is one
    (out,) = outcome["out"]
    assert out["auroc"]["typicality"] is None and out["auroc_stderr"]["typicality"] is None
    assert (out["auroc"]["likelihood"] is None) == (black != "reference")
    assert (outcome["entropy"] is None) == (black == "reference")
    assert outcome["in"]["non_finite_images"] == (2 if black == "inside" else 0)
    assert (outcome["in"]["loss"] is None) == (black == "inside")
    rows = results.scores_csv(comparison).decode().splitlines()[1:]
    assert [int(row.split(",")[1]) for row in rows] == 2 * [*range(5, 11)] and draw(comparison)
    where = rf"2 of 6 images of {black} \({splits[black] or 'made'}\) have .* likelihood: indices"
    with pytest.raises(RunError, match=rf"{where} 7, 9$"):
        comparison.check_finite()


@pytest.mark.run
def test_other_images_and_a_model_without_validation_images(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3), "u1")
    np.savez(tmp_path / "a.npz", x_train=x)
    words = ["--in", "a.npz", "--data", "digits", "--data", "shuffled", "--num-images", 10]
    words += ["--json", "-", "--out", "o.png", "data.validation=0"]
    first = (  # one image of the digits is not finite
        "import torch, flowtrain.tools.ood.scores as e; score = e.score; calls = []\n"
        "def bad(*a, **k):\n"
        "    scores = score(*a, **k); calls.append(1)\n"
        "    if len(calls) == 3: scores.log_prob[1] = torch.nan\n"
        "    return scores\n"
        "e.score = bad"
    )
    found = quick("ood", trained()["glow"], *words, cwd=tmp_path, first=first)
    found.failed(1, "1 of 10 images of digits (test) have a non-finite likelihood")
    outcome = json.loads(found.out)
    inside = outcome["in"]
    assert outcome["entropy_split"] == "train"
    assert (inside["dataset"], inside["split"], inside["num_images"]) == ("a.npz", "all", 10)
    assert (inside["stored_shape"], inside["stored_levels"]) == ([3, 9, 9], 256)
    assert [row["stored_shape"] for row in outcome["out"]] == [None, None]
    assert "a.npz: 3x9x9 with 256 levels, brought to the model's" in found.err

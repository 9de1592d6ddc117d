"""`flowtrain ood`: the scores, the areas, the images that are compared, and what the command
writes.
"""

import csv
import functools
import io
import json
import math

import numpy as np
import pytest
import torch
from catalogue import TINY_RUN, sets
from cli_helpers import FOLDER, quick, tree
from helpers import a_config, images, npz, tiny_flow
from PIL import Image
from sklearn.metrics import roc_auc_score

from flowtrain.bijections import Bijection
from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet
from flowtrain.datasets.base import resize
from flowtrain.errors import RunError, UserError
from flowtrain.evaluation.score import score
from flowtrain.pictures.lossless import complexity
from flowtrain.tools.ood import images as sets_of_images
from flowtrain.tools.ood import results
from flowtrain.tools.ood import scores as scoring
from flowtrain.tools.ood.auroc import auroc
from flowtrain.tools.ood.histograms import draw


def a_model(tmp_path, shape=(1, 4, 4), levels=256, **data):
    """A tiny model of random images; `own` are its data."""
    channels, *size = shape
    section = npz(
        tmp_path / "own.npz", train=40, test=30, shape=(*size, channels), validation=10, **data
    )
    config = a_config("glow", data=section)
    return LoadedModel(
        tiny_flow("glow", shape, levels),
        config,
        "raw",
        Checkpoint(tmp_path / "model", {"step": 3}, {}),
    )


def compared(model, outside, count=30, **options):
    data = DataSet(model.config.data)
    inside = sets_of_images.own_split("test", model, data, count)
    reference = sets_of_images.own_split("validation", model, data, count)
    return scoring.score_all(
        model, sets_of_images.Collections(reference, inside, outside(inside)), **options
    )


# ---------------------------------------------------------------- the scores


def test_typicality():
    assert scoring.typicality(np.array([1.0, 3.0, 3.5]), 3.0).tolist() == [2.0, 0.0, 0.5]


def test_complexity_corrected():
    assert scoring.complexity_corrected(np.array([4.0, 1.0]), np.array([3.5, 1.5])).tolist() == [
        0.5,
        -0.5,
    ]


# ---------------------------------------------------------------- AUROC


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_that_of_scikit_learn(ties):
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(0, 1, 40), rng.normal(0.7, 2, 25)
    if ties:
        inside, outside = inside.round(), outside.round()
    area, error = auroc(inside, outside)
    assert area == pytest.approx(roc_auc_score([0] * 40 + [1] * 25, [*inside, *outside]))
    # DeLong et al. 1988, equations 3 to 5, as they stand.
    wins = (outside[:, None] > inside) + 0.5 * (outside[:, None] == inside)
    assert area == pytest.approx(wins.mean())
    expected = wins.mean(axis=1).var(ddof=1) / 25 + wins.mean(axis=0).var(ddof=1) / 40
    assert error == pytest.approx(math.sqrt(expected))


@pytest.mark.run  # takes long
def test_the_error_of_auroc_is_its_spread():
    rng = np.random.default_rng(0)
    areas, errors = zip(
        *(auroc(rng.normal(0, 1, 60), rng.normal(0.8, 1, 40)) for _ in range(300)), strict=True
    )
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.15)


def test_the_larger_score_is_further_out():
    assert auroc(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == (1.0, 0.0)
    assert auroc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == (0.0, 0.0)
    assert auroc(np.array([1.0, 2.0]), np.array([1.5])) == (0.5, None)


# ---------------------------------------------------------------- images that are made


@pytest.mark.parametrize("make", [sets_of_images.noise, sets_of_images.constant])
@pytest.mark.parametrize("levels", [256, 17, 2])
def test_made_images_are_a_function_of_the_seed(make, levels):
    x = make(20, (3, 6, 5), levels, 0)
    assert x.dtype == np.uint8 and x.shape == (20, 3, 6, 5) and x.max() < levels
    assert np.array_equal(x, make(20, (3, 6, 5), levels, 0))
    assert np.array_equal(x[:5], make(5, (3, 6, 5), levels, 0))
    assert not np.array_equal(x, make(20, (3, 6, 5), levels, 1))
    assert not np.array_equal(x[0], x[1]) or levels == 2


def test_noise_takes_all_levels_equally_often():
    counts = np.bincount(sets_of_images.noise(200, (3, 8, 8), 17, 0).ravel(), minlength=17)
    assert counts.shape == (17,) and abs(counts / counts.mean() - 1).max() < 0.1
    x = sets_of_images.noise(500, (1, 2, 2), 256, 0).reshape(500, 4).astype(float)
    assert abs(np.corrcoef(x.T) - np.eye(4)).max() < 0.15


def test_constant_images_have_one_colour_each():
    x = sets_of_images.constant(300, (3, 4, 5), 256, 0)
    assert (x == x[:, :, :1, :1]).all()
    assert len({tuple(colour) for colour in x[:, :, 0, 0]}) > 290
    assert abs(x.mean() - 127.5) < 10


def test_shuffled_images_have_the_same_pixels():
    x = images(4, (3, 6, 5)).numpy()
    mixed = sets_of_images.shuffled(x, 0)
    assert np.array_equal(mixed, sets_of_images.shuffled(x, 0)) and not np.array_equal(
        mixed, sets_of_images.shuffled(x, 1)
    )
    for a, b in zip(x, mixed, strict=True):
        colours = [sorted(map(tuple, y.reshape(3, -1).T.tolist())) for y in (a, b)]
        assert colours[0] == colours[1] and not np.array_equal(a, b)
    same = np.stack([x[0], x[0]])
    first, second = sets_of_images.shuffled(same, 0)
    assert not np.array_equal(first, second)


# ---------------------------------------------------------------- conversion


def test_what_is_the_models_stays_as_it_is():
    x = images(3, (1, 8, 8), 17).numpy()
    assert sets_of_images.convert(x, 17, (1, 8, 8), 17) is x


def test_grey_digits_for_a_colour_model_and_back():
    grey = images(3, (1, 28, 28)).numpy()
    colour = sets_of_images.convert(grey, 256, (3, 32, 32), 256)
    assert colour.shape == (3, 3, 32, 32) and colour.dtype == np.uint8
    assert (colour == colour[:, :1]).all()
    for x, y in zip(grey, colour, strict=True):
        assert np.array_equal(y, resize(Image.fromarray(x[0]), (3, 32, 32), "crop"))
    x = images(3, (3, 32, 32)).numpy()
    back = sets_of_images.convert(x, 256, (1, 28, 28), 256)
    assert np.array_equal(
        back[0], resize(Image.fromarray(x[0].transpose(1, 2, 0)), (1, 28, 28), "crop")
    )


def test_the_resize_policy():
    x = np.zeros((1, 1, 8, 16), "u1")
    x[..., :4] = x[..., 12:] = 255  # only in what `crop` cuts off
    assert sets_of_images.convert(x, 256, (1, 8, 8), 256, "crop").max() == 0
    assert sets_of_images.convert(x, 256, (1, 8, 8), 256, "stretch").max() == 255


@pytest.mark.parametrize(
    "levels, to_levels, expected",
    [
        (256, 32, {0: 0, 7: 0, 8: 1, 255: 31}),
        (256, 17, {0: 0, 7: 0, 8: 1, 128: 8, 255: 16}),
        (17, 256, {0: 0, 8: 127, 16: 255}),
        (17, 32, {0: 0, 8: 15, 16: 31}),
        (32, 17, {0: 0, 31: 16}),
        (2, 256, {0: 0, 1: 255}),
    ],
)
def test_levels(levels, to_levels, expected):
    x = np.array(list(expected), "u1").reshape(1, 1, 1, -1)
    assert sets_of_images.convert(x, levels, x.shape[1:], to_levels).ravel().tolist() == list(
        expected.values()
    )


@pytest.mark.parametrize("levels", [2, 4, 16, 17, 32, 100, 128])
def test_levels_there_and_back(levels):
    x = np.arange(levels, dtype="u1").reshape(1, 1, 1, -1)
    assert np.array_equal(
        sets_of_images.convert(
            sets_of_images.convert(x, levels, x.shape[1:], 256), 256, x.shape[1:], levels
        ),
        x,
    )


# ---------------------------------------------------------------- the comparison


def test_the_comparison_against_a_direct_computation(tmp_path):
    model = a_model(tmp_path)
    seen = []
    comparison = compared(
        model,
        lambda inside: [sets_of_images.made("noise", inside, 256, seed=2)],
        seed=5,
        batch_size=7,
        progress=lambda done, total: seen.append((done, total)),
    )
    data = DataSet(model.config.data)
    bits = {
        name: -score(model.flow, data.split(name), seed=5).log_prob.numpy() / (16 * math.log(2))
        for name in ("validation", "test")
    }
    entropy = bits["validation"].mean()
    inside = comparison.inside
    assert (
        comparison.entropy == pytest.approx(entropy) and abs(entropy - bits["test"].mean()) > 1e-3
    )
    assert inside.likelihood == pytest.approx(bits["test"], rel=1e-5)
    assert inside.typicality == pytest.approx(abs(bits["test"] - entropy), abs=1e-4)
    length = complexity(data.split("test").take(slice(None)).numpy())
    assert inside.complexity_corrected == pytest.approx(bits["test"] - length, abs=1e-4)
    (made,) = comparison.outside
    assert np.array_equal(made.collection.images, sets_of_images.noise(30, (1, 4, 4), 256, 2))
    assert seen[-1] == (70, 70) and seen == sorted(seen) and seen[0] == (7, 70)
    outcome = results.as_json(comparison)
    (out,) = outcome["out"]
    for name in scoring.SCORES:
        expected = auroc(getattr(inside, name), getattr(made, name))
        assert (out["auroc"][name], out["auroc_stderr"][name]) == expected
    expected = {
        **{
            "entropy_bits_per_dim": comparison.entropy,
            "entropy_split": "validation",
            "entropy_images": 10,
        },
        **{
            "coders": ["PNG", "WEBP"],
            "dims": 16,
            "levels": 256,
            "weights": "raw",
            "step": 3,
            "seed": 5,
        },
    }
    assert {key: outcome[key] for key in expected} == expected
    described = outcome["in"]
    assert (described["dataset"], described["split"], described["num_images"]) == (
        "npz",
        "test",
        30,
    )
    assert described["bits_per_dim"] == pytest.approx(bits["test"].mean())
    assert described["bits_per_dim_stderr"] == pytest.approx(
        bits["test"].std(ddof=1) / math.sqrt(30), rel=1e-4
    )
    assert described["bits_per_dim_median"] == pytest.approx(np.median(bits["test"]))
    assert described["complexity_bits_per_dim"] == pytest.approx(length.mean())
    assert described["stored_shape"] is None and out["split"] is None


@pytest.mark.run  # takes long
def test_rows_and_picture(tmp_path):
    model = a_model(tmp_path)
    comparison = compared(
        model,
        lambda i: [
            sets_of_images.made("constant", i, 256, 0),
            sets_of_images.made("shuffled", i, 256, 0),
        ],
    )
    rows = list(csv.DictReader(io.StringIO(results.scores_csv(comparison).decode())))
    assert ",".join(rows[0]) == (
        "dataset,index,bits_per_dim,log_prob,typicality,complexity_bits_per_dim,complexity_corrected"
    )
    assert [(row["dataset"], int(row["index"])) for row in rows] == [
        (name, index) for name in ("npz", "constant", "shuffled") for index in range(30)
    ]
    for row in rows:
        bits = float(row["bits_per_dim"])
        assert bits == pytest.approx(-float(row["log_prob"]) / (16 * math.log(2)))
        assert float(row["typicality"]) == pytest.approx(abs(bits - comparison.entropy))
        assert float(row["complexity_corrected"]) == pytest.approx(
            bits - float(row["complexity_bits_per_dim"])
        )
    assert float(rows[0]["log_prob"]) == comparison.inside.log_prob[0]
    with Image.open(io.BytesIO(draw(comparison))) as picture:
        assert picture.format == "PNG" and picture.width > 1000
        assert len(picture.convert("RGB").getcolors(10**6)) > 10


def test_other_data_are_brought_to_the_models_shape_and_levels(tmp_path):
    model = a_model(tmp_path, shape=(3, 8, 8), levels=32, n_bits=5, shift=5, flip=True)
    own = model.config.data
    digits = sets_of_images.named("digits", "--data", model, DataSet(own), 20)
    assert digits.images.shape == (20, 3, 8, 8) and digits.images.max() == 31
    assert digits.stored == ((1, 8, 8), 17) and digits.split == "test"
    stored = (
        DataSet(a_config("glow", data={"name": "digits"}).data)
        .split("test")
        .take(digits.positions)
        .numpy()
    )
    assert np.array_equal(digits.images, sets_of_images.convert(stored, 17, (3, 8, 8), 32))
    assert digits.positions.max() > 100  # 20 images of all, which may be sorted by class
    inside = sets_of_images.own_split("test", model, DataSet(own), 100)
    assert (
        inside.stored is None and inside.images.shape == (30, 3, 8, 8) and inside.images.max() < 32
    )
    named = sets_of_images.named("npz", "--in", model, DataSet(own), 100)
    assert np.array_equal(named.images, inside.images) and named.stored is None
    Image.fromarray(np.full((20, 10), 255, "u1")).save(tmp_path / "one.png")
    one = sets_of_images.named(str(tmp_path / "one.png"), "--data", model, DataSet(own), 20)
    assert one.images.shape == (1, 3, 8, 8) and one.images.min() == 31 and one.split == "all"


@pytest.mark.parametrize(
    "name, fragment",
    [
        ("mnits", "--data mnits: neither a data set .*noise"),
        ("two_moons", "--data two_moons: real"),
    ],
)
def test_names_that_are_no_images(tmp_path, name, fragment):
    model = a_model(tmp_path)
    with pytest.raises(UserError, match=fragment):
        sets_of_images.named(name, "--data", model, DataSet(model.config.data), 5)


class Spoiled(Bijection):
    """Not finite where the first pixel is black."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, context=None):
        z, log_det = self.inner(x)
        return z, torch.where(x[:, 0, 0, 0] < -0.5 + 1 / 256, torch.nan, log_det)


@pytest.mark.run  # takes long
@pytest.mark.parametrize("black", ["outside", "inside", "reference"])
def test_likelihoods_that_are_not_finite(tmp_path, black):
    model = a_model(tmp_path)
    model.flow.bijection = Spoiled(model.flow.bijection)
    collections = {
        name: sets_of_images.Collection(
            name, images(6, (1, 4, 4)).numpy() // 2 + 1, 5 + np.arange(6), split
        )
        for name, split in (("reference", "validation"), ("inside", "test"), ("outside", None))
    }
    for index in (2, 4):
        collections[black].images[index, 0, 0, 0] = 0
    outside = [collections.pop("outside")]
    comparison = scoring.score_all(
        model, sets_of_images.Collections(**collections, outside=outside)
    )
    outcome = results.as_json(comparison)
    text = json.dumps(outcome, allow_nan=False)  # fails where there is one
    (out,) = outcome["out"]
    assert out["auroc"]["typicality"] is None and out["auroc_stderr"]["typicality"] is None
    assert (out["auroc"]["likelihood"] is None) == (black != "reference"), text
    assert (outcome["entropy_bits_per_dim"] is None) == (black == "reference")
    assert outcome["in"]["non_finite_images"] == (2 if black == "inside" else 0)
    assert (outcome["in"]["bits_per_dim"] is None) == (black == "inside")
    rows = results.scores_csv(comparison).decode().splitlines()[1:]
    assert [int(row.split(",")[1]) for row in rows] == 2 * [*range(5, 11)] and draw(comparison)
    split = {"outside": "made", "inside": "test", "reference": "validation"}[black]
    with pytest.raises(
        RunError, match=rf"2 of 6 images of {black} \({split}\) have .* not finite: those at 7, 9$"
    ):
        comparison.check_finite()


# ---------------------------------------------------------------- the command


@functools.cache
def digits_run():
    quick("train", *TINY_RUN, "--run-dir", "ood-digits", cwd=FOLDER).ok()
    return FOLDER / "ood-digits"


def command(tmp_path, *words):
    return quick("ood", digits_run(), *words, cwd=tmp_path)


def test_command(tmp_path):
    words = [
        "--data",
        "noise",
        "--data",
        "constant",
        "--num-images",
        40,
        "--scores",
        "a/s.csv",
        "--out",
        "b/o.png",
    ]
    found = command(tmp_path, *words, "--json", "c/o.json").ok()
    for file in ("a/s.csv", "b/o.png", "c/o.json"):
        assert f"wrote {file}" in found.out
    outcome = json.loads((tmp_path / "c/o.json").read_text())
    assert outcome["in"]["dataset"] == "digits" and outcome["in"]["num_images"] == 40
    assert outcome["entropy_split"] == "validation" and outcome["entropy_images"] == 40
    assert [row["dataset"] for row in outcome["out"]] == ["noise", "constant"]
    assert outcome["out"][0]["auroc"]["likelihood"] > 0.95  # even 20 steps tell noise from digits
    assert f"{outcome['in']['bits_per_dim']:.3f}" in found.out and "AUROC" in found.out
    assert len((tmp_path / "a/s.csv").read_text().splitlines()) == 121
    assert Image.open(tmp_path / "b/o.png").format == "PNG"
    again = command(tmp_path, *words[:6], "--json", "-", "--out", "o.png", "--batch-size", 3).ok()
    repeated = json.loads(again.out)
    assert repeated["in"]["bits_per_dim"] == pytest.approx(outcome["in"]["bits_per_dim"], abs=1e-4)
    assert repeated["out"][0]["auroc"] == pytest.approx(outcome["out"][0]["auroc"], abs=1e-3)
    other = command(
        tmp_path, *words[:6], "--json", "-", "--out", "o.png", "--seed", 1, "--weights", "raw"
    ).ok()
    assert json.loads(other.out)["weights"] == "raw"
    assert json.loads(other.out)["out"][0]["bits_per_dim"] != repeated["out"][0]["bits_per_dim"]


def test_the_model_without_validation_images_and_data_that_it_did_not_see(tmp_path):
    np.savez(
        tmp_path / "a.npz", x_train=np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3), "u1")
    )
    words = [
        "--in",
        "a.npz",
        "--data",
        "digits",
        "--data",
        "shuffled",
        "--num-images",
        10,
        "--json",
        "-",
    ]
    found = command(tmp_path, *words, "--out", "o.png", *sets(data__validation=0)).ok()
    outcome = json.loads(found.out)
    assert outcome["entropy_split"] == "train"
    assert (outcome["in"]["dataset"], outcome["in"]["split"], outcome["in"]["num_images"]) == (
        "a.npz",
        "all",
        10,
    )
    assert (outcome["in"]["stored_shape"], outcome["in"]["stored_levels"]) == ([3, 9, 9], 256)
    assert [row["stored_shape"] for row in outcome["out"]] == [None, None]
    assert "a.npz: 3x9x9 with 256 levels, brought to the model's" in found.err


def test_outputs_lie_in_the_run_by_default(tmp_path):
    before = tree(digits_run())
    command(tmp_path, "--data", "noise", "--num-images", 2).ok()
    assert set(tree(digits_run())) - set(before) == {"ood.json", "ood.png"}
    assert tree(tmp_path) == []


def test_a_damaged_model_ends_with_exit_code_1_and_says_where(tmp_path):
    first = (
        "import torch, flowtrain.tools.ood.scores as e; score = e.score\n"
        "def bad(*a, **k):\n"
        "    scores = score(*a, **k); scores.log_prob[1] = torch.nan; return scores\n"
        "e.score = bad"
    )
    found = quick(
        "ood", digits_run(), "--data", "noise", "--num-images", 3, cwd=tmp_path, first=first
    )
    found.failed(
        1, "1 of 3 images of noise (made) have a likelihood that is not finite: those at 1"
    )
    assert "wrote" in found.out


def test_the_help_says_that_the_likelihood_fails(tmp_path):
    words = " ".join(quick("ood", "--help", cwd=tmp_path).ok().out.split())
    assert (
        "known to fail (Nalisnick et al. 2019)" in words
        and "bits/dim" in words
        and "Serra et al. 2020" in words
    )
    for option in ("--in", "--data", "--num-images", "--scores", "--out", "--json", "--set"):
        assert option in words

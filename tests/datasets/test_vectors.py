"""Vectors: files, refused columns, splits, and the entropy of a known Gaussian."""

import json
import math

import numpy as np
import pytest
import torch
from catalogue import sets
from cli_helpers import quick, summary
from dataset_helpers import build, pipe
from helpers import a_config, perturb

import flowtrain
from flowtrain.checkpoints.build import build_flow
from flowtrain.config import parse
from flowtrain.data.named import undivided
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.flow.flow import initialize

VALUES = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)


def written(folder, form):
    path = folder / f"v.{form[:3]}"
    if form == "npz":
        np.savez(path, x_train=VALUES[:50].astype(np.float64), x_test=VALUES[50:])
    elif form == "npy":
        np.save(path, VALUES)
    else:
        header = '\n# a,"power, in W",c\n'
        lines = "\n\n".join(",".join(map(repr, row.tolist())) for row in VALUES)
        path.write_text(("\ufeff" + header if form == "csv with names" else "") + lines)
    return path


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["npz", "npy", "csv", "csv with names"])
def test_the_same_vectors_in_every_form(form, tmp_path):
    path = written(tmp_path, form)
    parts = {part: build("vectors", "", part, path=path) for part in ("train", "test")}
    assert (parts["train"].shape, parts["train"].num_bins) == ((3, 1, 1), None)
    found = []
    for images in parts.values():
        x = images.read()
        assert x.dtype == np.float32 and x.flags.c_contiguous and x.shape[1:] == (3, 1, 1)
        found.append(x if images.rows is None else x[images.rows()])
    assert [len(each) for each in found] == ([50, 10] if form == "npz" else [54, 6])
    both = np.concatenate(found)[:, :, 0, 0]
    assert np.array_equal(np.sort(both, axis=0), np.sort(VALUES, axis=0))
    if form != "npz":
        other = build("vectors", "", "test", seed=1, path=path)
        assert not np.array_equal(other.rows(), parts["test"].rows())


def saved(**changes):
    def save(path):
        x = VALUES.astype(np.float64)
        for column, values in changes.items():
            x[: np.size(values), int(column[1:])] = values
        np.save(path, x)

    return save


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("a.npy", saved(c1=[0, np.nan, np.inf], c2=1e300), "missing values, texts or infinite "
         r"values in column 1 \(2\), column 2 \(1\), the first in row 1: leave out"),
        ("a.npy", saved(c0=np.full(60, 3.0)), "how these columns vary: column 0: leave them"),
        ("a.npy", saved(c2=1e9 + np.arange(60)), "vary: column 2: leave them"),
        ("a.npy", lambda path: np.save(path, np.zeros((3, 9))), "0, .*column 4 and 4 more:"),
        ("a.npy", lambda path: np.save(path, VALUES.astype(int)), "type int64, expected real"),
        ("a.npy", lambda path: np.save(path, VALUES[0]), r"shape \(3,\): expected \(N, D\)"),
        ("a.npy", lambda path: np.save(path, VALUES[:0]), r"shape \(0, 3\): expected \(N, D\)"),
        ("a.csv", lambda path: path.write_text("t,volt\n1,2\n3,\n4,?\n"), r"in volt \(2\), .* 2:"),
        ("a.csv", lambda path: path.write_text("nan,nan\n1,2\n3,4\n"), r"column 1 \(1\), .* 1:"),
        ("a.csv", lambda path: path.write_text('"1","2"\n"3","4"\n'), r"column 1 \(2\), .* 1:"),
        ("a.csv", lambda path: path.write_text("1,2\n3,4\n5\n"),
         r"cannot be read \(.*Line #3 .got 1 columns instead of 2"),
        ("a.csv", lambda path: path.write_text("a,b\n1,2,3\n4,5,6\n"),
         "its first line has 2 columns, and its rows have 3"),
        ("a.csv", lambda path: path.write_text("a;b\n1;2\n"), "expected commas between the val"),
        ("a.csv", lambda path: path.write_text(""), "it has no rows"),
        ("a.csv", lambda path: path.write_bytes(b"\xff\xfe1"), r"a.csv cannot be read \(.*codec"),
        ("a.csv", pipe, "a.csv cannot be read .*not a regular file"),
    ],
)  # fmt: skip
def test_what_is_refused(name, make, message, tmp_path):
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"^data.path: .*{message}"):
        images = build("vectors", "", "train", path=tmp_path / name)
        assert message != "it has no rows", "before a model is built"
        images.read()


def test_vectors_to_be_scored_may_have_a_constant_column(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=VALUES, x_test=VALUES[:1])
    assert len(build("vectors", "", "test", path=tmp_path / "a.npz").read()) == 1
    np.save(tmp_path / "b.npy", VALUES[:1])
    sections = [{"name": "vectors", "path": str(tmp_path / name)} for name in ("a.npz", "b.npy")]
    own, other = (parse({"data": section}).data for section in sections)
    images = undivided(other, own)
    assert np.array_equal(images.read()[:, :, 0, 0], VALUES[:1]) and images.rows is None


SPLINE = {"name": "realnvp", "levels": 1, "width": 8, "blocks": 1, "transform": "spline"}


@pytest.mark.parametrize("model", ["maf", SPLINE, "nice", "cnf"])
def test_the_density_is_that_of_the_original_units(model, tmp_path):
    """Columns in other units change the density by the Jacobian alone."""
    units, log_probs = np.array([1e-9, 1.0, 1e12]), []
    for scale in (np.ones(3), units):
        np.save(tmp_path / "a.npy", VALUES * scale)
        data = {"name": "vectors", "path": str(tmp_path / "a.npy"), "validation": 0}
        config = a_config(model, data=data)
        flow = perturb(build_flow(config, (3, 1, 1), None))
        x = DataSet(config.data).split("train").take(slice(None))
        initialize(flow, x, torch.zeros_like(x))
        log_probs.append(flow.log_prob(x).detach())
        back = flow.decode(flow.encode(x))
        torch.testing.assert_close(back, x, rtol=1e-3, atol=0.01 * scale.min())
    expected = log_probs[0] - np.log(units).sum()
    torch.testing.assert_close(log_probs[1], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["torus", "sphere"])
def test_angles_and_unit_vectors_are_not_standardized(name, tmp_path):
    model = {"name": name, "width": 8}
    own = a_config(model, data={"name": name})
    x = DataSet(own.data).split("test").take(slice(0, 50))
    np.save(tmp_path / "a.npy", x.flatten(1).numpy())
    vectors = a_config(model, data={"name": "vectors", "path": str(tmp_path / "a.npy")})
    flows = [perturb(build_flow(config, tuple(x.shape[1:]), None)) for config in (own, vectors)]
    assert torch.equal(flows[0].log_prob(x), flows[1].log_prob(x))


def gaussian(dims, count):
    """Draws of a Gaussian in odd units, with their log-densities, and its entropy in nats."""
    rng = np.random.default_rng(dims)
    units = 10.0 ** rng.integers(-4, 5, dims)
    root = np.tril(rng.normal(size=(dims, dims)), -1) / math.sqrt(dims) + np.eye(dims)
    z = rng.normal(size=(count, dims))
    log_det = np.log(units).sum() + np.linalg.slogdet(root)[1]
    entropy = dims / 2 * math.log(2 * math.pi * math.e) + log_det
    log_prob = -0.5 * (z**2).sum(axis=1) - dims / 2 * math.log(2 * math.pi) - log_det
    return (3 + z @ root.T) * units, log_prob, entropy


MODELS = {
    "maf": sets(model__name="maf", model__layers=2, model__width=32),
    "realnvp": sets(model__name="realnvp", model__levels=2, model__width=32, model__blocks=1),
}


@pytest.mark.run
@pytest.mark.parametrize("dims, model", [(6, "maf"), (8, "realnvp")])  # of POWER and of GAS
def test_the_entropy_of_a_gaussian_is_reached(dims, model, tmp_path):
    x, log_prob, entropy = gaussian(dims, 12_000)
    np.savez(tmp_path / "a.npz", x_train=x[:8000], x_test=x[8000:])
    np.save(tmp_path / "more.npy", x[8000:9000])
    words = [*MODELS[model], *sets(data__name="vectors", data__path="a.npz")]
    words += sets(train__num_steps=300, train__batch_size=256, train__lr=1e-2, train__ema=0.98)
    words += sets(train__weight_decay=0, train__warmup_steps=20, train__schedule="cosine")
    words += sets(train__log_every=100, train__validate_every=300, train__sample_every=300)
    done = quick("train", *words, "--run-dir", "r", cwd=tmp_path).ok()
    assert f"7,200 images to train on, 800 to validate, {dims}x1x1, real values" in done.out
    assert summary(tmp_path / "r")["finished"]
    words = ["evaluate", "r", "--json", "-"]
    result = json.loads(quick(*words, cwd=tmp_path).ok().out)
    assert (result["unit"], result["bound"], result["num_images"]) == ("nats", "exact", 4000)
    # The mean over test vectors differs from the entropy by its error, and by the distance of the
    # model from the Gaussian, which the same vectors give.
    assert abs(result["loss"] - entropy) < 3 * result["loss_stderr"] + 0.05
    assert -0.01 < result["loss"] + log_prob[8000:].mean() < 0.05
    other = json.loads(quick(*words, "--data", "more.npy", cwd=tmp_path).ok().out)
    assert (other["split"], other["num_images"]) == ("all", 1000)
    assert other["loss"] == pytest.approx(-log_prob[8000:9000].mean(), abs=0.1)
    drawn = flowtrain.load(str(tmp_path / "r"), device="cpu").sample(2000).numpy()[:, :, 0, 0]
    np.testing.assert_allclose(drawn.std(axis=0), x.std(axis=0), rtol=0.1)  # 4 errors are 0.06

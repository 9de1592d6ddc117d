"""Points: data sets, the likelihood in nats, commands."""

import json

import numpy as np
import pytest
import torch
from catalogue import POINTS, sets
from cli_helpers import metrics, quick, summary
from dataset_helpers import build
from helpers import a_config, perturb, ready, seeded
from PIL import Image

from flowtrain.checkpoints.build import build_flow


@pytest.mark.parametrize("name", [*POINTS, "sphere"])
def test_any_number_of_points_by_seed(name):
    def drawn(split="train", **options):
        return build(name, "", split, count=300, test_count=200, **options).read()

    images, dims = build(name, "", "train"), 3 if name == "sphere" else 2
    assert (images.shape, images.num_bins, images.flip) == ((dims, 1, 1), None, False)
    assert images.labels is None
    pixels = drawn()
    assert pixels.dtype == np.float32 and pixels.shape == (300, dims, 1, 1)
    assert pixels.flags.c_contiguous and np.array_equal(pixels, drawn())
    assert len(drawn("test")) == 200 and not np.isin(drawn("test"), pixels).any()
    assert not np.isin(drawn(seed=1), pixels).any()


@pytest.mark.parametrize(
    "name, options, first, mean, std",
    [
        ("two_moons", {}, (-0.94646, 0.68113), (-0.00018, -0.00091), (0.86757, 0.49648)),
        ("two_moons", {"noise": 0}, (-0.88341, 0.67358), (0, 0), (0.8666, 0.49379)),
        ("rings", {}, (-2.42892, 0.33665), (-0.04149, 0.01353), (1.17766, 1.16775)),
        ("spiral", {}, (2.01342, -0.46954), (0.00379, 0.04954), (1.59519, 1.54069)),
        ("eight_gaussians", {}, (-1.69971, -0.4755), (-0.01251, -0.08114), (1.43974, 1.43073)),
        ("pinwheel", {}, (-0.16927, 0.66472), (0.00147, -0.0361), (1.1096, 1.11755)),
        ("pinwheel", {"arms": 3}, (-0.60725, 0.31899), (-0.0056, 0.00157), (1.11725, 1.11048)),
        ("checkerboard", {}, (-0.08271, -0.50747), (-0.01474, -0.02241), (1.14243, 1.15903)),
    ],
)
def test_points_are_as_ever(name, options, first, mean, std):
    """First point, mean and standard deviation of densities that were looked at."""
    found = build(name, "", "train", count=1000, **options).read().reshape(-1, 2)
    for value, expected in ((found[0], first), (found.mean(0), mean), (found.std(0), std)):
        np.testing.assert_allclose(value, expected, atol=2e-5)  # five decimals, float32


def test_a_density_has_no_noise_and_no_bits():
    flow = ready(perturb(build_flow(a_config("realnvp"), (2, 1, 1), None)))
    x = torch.randn(20, 2, 1, 1, generator=seeded())
    assert torch.equal(flow.log_prob(x), flow.log_prob(x, seeded(1)))
    for use, wrong, message in (
        (flow.log_prob, x.to(torch.uint8), "real numbers"),
        (flow.bits_per_dim, x, "no bits per dimension"),
    ):
        with pytest.raises(ValueError, match=message):
            use(wrong)


MODEL = sets(model__name="realnvp", model__levels=1, model__width=16, model__blocks=1)
MODELS = {"two_moons": MODEL, "sphere": sets(model__name="sphere", model__layers=1)}


@pytest.mark.run
@pytest.mark.parametrize("name, dims", [("two_moons", 2), ("sphere", 3)])
def test_commands_on_points(name, dims, tmp_path):
    def run(*words):
        return quick(*words, cwd=tmp_path).ok()

    training = sets(data__name=name, data__count=600, data__test_count=300, train__num_steps=20)
    training += sets(train__log_every=20, train__validate_every=20, train__sample_every=20)
    done = run("train", *MODELS[name], *training, "--run-dir", "r")
    assert f"540 images to train on, 60 to validate, {dims}x1x1, real values" in done.out
    assert "nats" in done.out
    rows, written = metrics(tmp_path / "r"), summary(tmp_path / "r")
    assert {row["bits_per_dim"] for row in rows} == {written["best_validation_bits_per_dim"]}
    (picture,) = (tmp_path / "r" / "samples").iterdir()
    assert Image.open(picture).size[0] > 600

    result = json.loads(run("evaluate", "r", "--json", "-").out)
    assert result["levels"] is None and result["bits_per_dim"] is None
    assert result["num_images"] == 300 and result["max_reconstruction_error"] < 1e-4

    temperatures = ["--temperature", 0.5, "--temperature", 1]
    run("sample", "r", "--num-images", 50, *temperatures, "--out", "s.npz")
    drawn = np.load(tmp_path / "s.npz")
    x = drawn["images"]
    assert (x.shape, x.dtype) == ((100, 1, 1, dims), np.float32) and "levels" not in drawn
    assert x[:50].std(axis=0).mean() < x[50:].std(axis=0).mean()
    for command, file in [("sample", "s.png"), ("interpolate", "i.png"), ("interpolate", "i.gif")]:
        run(command, "r", "--out", file)
        with Image.open(tmp_path / file) as picture:
            assert min(picture.size) > 500 and getattr(picture, "n_frames", 1) in (1, 14)


OWN_DATA = """
import numpy as np
from flowtrain.datasets.base import Images

def build(root, split, *, seed: int = 0, dims: int = 5):
    read = lambda: np.random.default_rng(0).normal(size=(40, dims, 1, 1)).astype("f4")
    return Images(shape=(dims, 1, 1), num_bins=None, read=read)
"""


@pytest.mark.run
@pytest.mark.parametrize("dims", [3, 5])
def test_data_of_ones_own_without_a_picture(dims, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "points.py").write_text(OWN_DATA)
    options = [*sets(data__name="own.points", data__dims=dims), *MODEL]
    options += sets(train__num_steps=2, train__batch_size=8, train__sample_every=1)
    options += sets(data__validation=0)  # so no loss is measured on the way
    done = quick("train", *options, "--run-dir", "r", cwd=tmp_path).ok()
    assert done.out.count("no picture of samples") == 2 and summary(tmp_path / "r")["finished"]
    quick("sample", "r", "--trust-code", cwd=tmp_path).failed(2, "only .npz files")
    quick("sample", "r", "--trust-code", "--out", "s.npz", cwd=tmp_path).ok()

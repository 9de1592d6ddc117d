"""`flowtrain quality`: the figures against closed forms, samples, features."""

import json
from unittest.mock import Mock

import cli_helpers
import numpy as np
import pytest
import torch
import torch_fidelity
from catalogue import sets
from cli_helpers import quick
from coding_helpers import loaded
from fake_device import device_without_float64
from helpers import CPU, images, npz, seeded, tiny_flow
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import flowtrain
from flowtrain.bijections.precision import default_dtype
from flowtrain.errors import UserError
from flowtrain.pictures.sample import decode, sample
from flowtrain.system import capacity
from flowtrain.system.random import Stream, generator
from flowtrain.tools.quality import features as networks
from flowtrain.tools.quality import figures, samples
from flowtrain.tools.quality.figures import Statistics, density_and_coverage, statistics_of


def with_moments(mean, covariance, count=200):
    """Features whose mean and covariance are exactly these."""
    x = torch.randn(count, len(mean), generator=seeded(), dtype=torch.float64).numpy()
    x = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T)).T)
    return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)


def compare(x, y):
    return figures.compare(statistics_of(x, "x"), statistics_of(y, "x"), "x")


def test_fid_of_gaussians_is_the_closed_form():
    """In one basis, |m|^2 + sum (s - t)^2 for standard deviations s and t; the basis is turned."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    one, other = (turn @ np.diag(each) @ turn.T for each in ([1.0, 4.0, 9.0], [4.0, 4.0, 1.0]))
    x, y = with_moments([0, 0, 0], one), with_moments([1, 2, 0], other, 300)
    assert compare(x, y).fid == pytest.approx(5 + 1 + 0 + 4, rel=1e-9)


@pytest.mark.parametrize("pairs", [False, True])
def test_kid_of_gaussians_is_the_closed_form_within_its_error(pairs):
    """E (xy + 1)^3 from the moments of N(0, 1) and N(m, 1), the same images in two versions or not.
    Errors have 9 degrees of freedom.
    """
    m, found = 0.3, []
    within = 1 + 3 * m**2 + 3 * (1 + m**2) ** 2 + (m**3 + 3 * m) ** 2
    expected = 4 + within - 2 * (4 + 3 * m**2)
    for seed in range(40):
        x, y = torch.randn(2, 500, 1, generator=seeded(seed), dtype=torch.float64)
        result = compare(x, (x if pairs else y) + m)
        found.append((result.kid, result.kid_stderr))
    values, errors = np.transpose(found)
    spread = values.std(ddof=1)
    assert abs(values.mean() - expected) < 4 * spread / 40**0.5
    # The error of pairs is smaller.
    assert pairs or np.sqrt((errors**2).mean()) == pytest.approx(spread, rel=0.4)


def test_neighbours_are_those_of_the_papers():
    x, y = torch.randn(2, 60, 2, generator=seeded(), dtype=torch.float64)
    x = x[:40] + 1
    between, own = torch.cdist(y, x), torch.cdist(y, y).sort(dim=1).values
    density = sum((between[j] < own[j, 5]).sum().item() for j in range(60)) / (5 * 40)
    coverage = sum((between[j] < own[j, 5]).any().item() for j in range(60)) / 60
    assert density_and_coverage(x, y) == pytest.approx((density, coverage))
    z = torch.randn(2000, 2, generator=seeded(1), dtype=torch.float64)
    density, coverage = density_and_coverage(z[:1000], z[1000:])
    # Of equal distributions, coverage is 1 - (M - 1)...(M - k)/((M + N - 1)...), nearly 1 - 2^-5
    # (Naeem et al. 2020, eq. 9).
    assert (density, coverage) == pytest.approx((1, 1 - 2**-5), abs=0.05)


@pytest.mark.run
def test_figures_become_worse_with_the_images():
    """Digits with noise, blur and fewer classes. Other images of the set are the floor."""
    data = load_digits()
    small = torch.from_numpy(data.images * 255 / 16)[:, None]
    x = nn.functional.interpolate(small, size=28, mode="bicubic").clamp(0, 255).round().byte()
    x, y, classes = x[::2], x[1::2], torch.from_numpy(data.target)[::2]
    noise = torch.randn(x.shape, generator=seeded())
    series = {
        "noise": [(x + sigma * noise).clamp(0, 255) for sigma in (15, 40, 80)],
        "blur": [nn.functional.avg_pool2d(x.float(), k, 1, k // 2) for k in (3, 5, 7)],
        "modes": [x[classes < count] for count in (8, 5, 2)],
    }
    for name, worse in series.items():
        found = [flowtrain.quality(each.to(torch.uint8), y, device="cpu") for each in (x, *worse)]
        for key in ("fid", "kid", *(["coverage"] if name == "modes" else [])):
            values = [getattr(each, key) for each in found]
            assert values == sorted(values, reverse=key == "coverage"), (name, key, values)
        assert found[-1].fid > 10 * found[0].fid, name
    assert found[0].recall > found[-1].recall + 0.3  # of the classes
    assert found[0].precision == pytest.approx(found[-1].precision, abs=0.2)


def test_images_in_any_form_and_statistics():
    x, y = images(70, (1, 28, 28)), images(80, (1, 28, 28), seed=1)
    expected = flowtrain.quality(x, y, device="cpu")
    assert flowtrain.quality(x[:, 0].numpy(), y.movedim(1, -1).numpy(), device="cpu") == expected
    features = networks.features_of(y, networks.load("mnist-cnn", (1, 28, 28), CPU), CPU)
    known = Statistics(features.mean(dim=0).numpy(), np.cov(features.T.numpy()))
    found = flowtrain.quality(x, known, device="cpu")
    assert (found.num_reference, found.kid, found.coverage) == (None, None, None)
    assert found.fid == pytest.approx(expected.fid, rel=1e-9)
    with device_without_float64() as there:
        assert flowtrain.quality(x.to(there), y, device="cpu") == expected
    colour = images(70, (3, 32, 32))
    assert flowtrain.quality(colour, colour, device="cpu").features == "cifar-cnn"
    pictures = [Image.fromarray(image) for image in colour.movedim(1, -1).numpy()]
    for first in (pictures[0].quantize(256), pictures[0].convert("RGBA")):  # no three channels
        found = flowtrain.quality([first, *pictures[1:]], colour, device=CPU)
        assert found.features == "cifar-cnn"
    with default_dtype(torch.float64):
        assert flowtrain.quality(x, y, device="cpu") == expected
    for wrong, message in (
        ((x[:64], y), "mnist-cnn needs more images than the 64 features, and there are 64"),
        ((x, y / 255), "uint8 images"),
        (([], y), "there are none"),
        ((x, Statistics(np.zeros(2), np.eye(2))), "the reference has 2 features"),
        ((x, y, "cifar-cnn"), "cifar-cnn are of images of shape .3, 32, 32., not .1, 28, 28."),
        ((x, y, "vgg"), "features vgg: expected inception, mnist-cnn, cifar-cnn"),
    ):
        with pytest.raises(UserError, match=message):
            flowtrain.quality(*wrong, device="cpu")
    features[3, 5] = torch.nan
    with pytest.raises(UserError, match="the features x of an image are not finite"):
        statistics_of(features, "x")


def test_statistics_in_a_file(tmp_path):
    file, mu, sigma = tmp_path / "s.npz", np.ones(3, np.float32), np.eye(3)
    np.savez(file, mu=mu, sigma=sigma)
    assert figures.statistics_in(file).mu.dtype == np.float64
    np.savez(file, mu=mu, sigma=sigma[:2])
    with pytest.raises(UserError, match="sigma has the shape .2, 3., expected 3 x 3"):
        figures.statistics_in(file)
    for wrong in (-sigma, sigma + sigma.cumsum(axis=1)):
        np.savez(file, mu=mu, sigma=wrong)
        with pytest.raises(UserError, match="sigma is no covariance"):
            figures.statistics_in(file)


class Stub(nn.Module):
    """In the place of torch-fidelity's network."""

    def __init__(self, name, layers, weights):
        super().__init__()
        self.scale = torch.load(weights, weights_only=False)["scale"]

    def forward(self, x):
        return (self.scale * x.float().mean(dim=(2, 3)),)


def test_the_weights_of_inception(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch_fidelity, "FeatureExtractorInceptionV3", Stub)
    file = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    x = images(9, (1, 6, 5))
    offline = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=f"no network.: put the file https.*{file.name} at {file}"):
        networks.load("inception", (1, 6, 5), CPU)
    torch.save({"scale": torch.tensor(2.0)}, file)
    network = networks.load("inception", (1, 6, 5), CPU)
    found = networks.features_of(x, network, CPU)  # grey images become RGB
    assert torch.equal(found, 2 * x.float().mean(dim=(2, 3)).double().expand(-1, 3))
    torch.save({"scale": Stub}, file)  # a pickle of anything
    with pytest.raises(UserError, match=f"{file.name} cannot be read"):
        networks.load("inception", (1, 6, 5), CPU)


def a_model(tmp_path, **options):
    return loaded(tiny_flow("glow", (1, 4, 4), **options), path=tmp_path / "model")


def test_samples_depend_on_the_seed_and_their_position(tmp_path, monkeypatch):
    """They are the same in another number, and where a job was stopped."""
    monkeypatch.setattr(samples, "PART", 4)
    model = a_model(tmp_path, classes=3)
    whole = samples.draw(model, 10, tmp_path / "whole", 7)
    assert torch.equal(whole[:4], sample(model.flow, 4, [1.0], 7))
    z = model.flow.draw_latents(4, generator(7, Stream.LATENTS, 4))
    labels = torch.tensor([1, 2, 0, 1])  # the classes go on in turn
    assert torch.equal(whole[4:8], decode(model.flow, model.flow.latents_of_classes(z, labels)))
    assert len({image.numpy().tobytes() for image in whole}) == 10
    assert torch.equal(samples.draw(model, 7, tmp_path / "less", 7), whole[:7])
    drawn = []

    def stopped(flow, num, temperatures, seed, progress, first):
        drawn.append(first)
        if first == 4 and drawn.count(4) == 1:
            raise KeyboardInterrupt
        return sample(flow, num, temperatures, seed, progress, first=first)

    monkeypatch.setattr(samples, "sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        samples.draw(model, 10, tmp_path / "again", 7)
    assert torch.equal(samples.draw(model, 10, tmp_path / "again", 7), whole)
    assert drawn == [0, 4, 4, 8]

    def beside_another(flow, num, temperatures, seed, progress, first):
        if first == 8:  # an equal command ends
            samples.remove(tmp_path / "shared")
        return sample(flow, num, temperatures, seed, progress, first=first)

    monkeypatch.setattr(samples, "sample", beside_another)
    assert torch.equal(samples.draw(model, 10, tmp_path / "shared", 7), whole)
    folders = {
        samples.folder_of(each, seed, **options)
        for each in (model, a_model(tmp_path))
        for seed, options in ((0, {}), (1, {}), (0, {"temperature": 0.5}))
    }
    assert len(folders) == 6
    monkeypatch.setattr(capacity, "left", lambda device: 1500)  # bytes, for 10 x 160
    with pytest.raises(UserError, match="--num-images 10: the samples need"):
        samples.draw(model, 10, tmp_path / "many", 7)


@pytest.mark.run
def test_the_command_with_one_process_and_with_two(tmp_path):
    data = npz(tmp_path / "x.npz", train=90, test=80, shape=(28, 28, 1))
    own = sets(**{f"data__{key}": value for key, value in data.items()})
    tiny = sets(model__levels=2, model__steps=1, model__width=4, train__num_steps=1)
    quick("train", *own, *tiny, "--run-dir", "run", cwd=tmp_path).ok()
    words = ["quality", "run", "--num-images", 120, "--temperature", 0.5, "--out", "a.npz"]
    done = quick(*words, cwd=tmp_path).ok()
    assert "FID of features mnist-cnn" in done.out and "never with the usual FID" in done.out
    with np.load(tmp_path / "a.npz") as file:
        (alone,) = file.values()
        assert file.files == ["arr_0"] and (alone.shape, alone.dtype) == ((120, 28, 28, 1), "u1")
    result = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert (result["features"], result["num_images"]) == ("mnist-cnn", 120)
    assert (result["num_reference"], result["temperature"]) == (80, 0.5)
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(np.load(tmp_path / "x.npz")["x_test"]):
        Image.fromarray(image[..., 0]).save(tmp_path / "pictures" / f"{number}.png")
    words += ["--against", "pictures"]  # which process 0 alone reads
    both = [each.result().ok() for each in cli_helpers.begin(2, *words, cwd=tmp_path)]
    assert both[1].out == ""
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], alone)
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    for more, *said in (
        (["--guidance", 1], "--guidance 1: "),
        (["--images", "a.npz", "--num-images", 9], "and there are 9"),
        (["--against", "s.npz"], "the reference has 2 features, and mnist-cnn has 64"),
    ):
        quick("quality", "run", *more, cwd=tmp_path).failed(2, *said)
    assert not list(tmp_path.glob("run/quality-*"))
    words = ["quality", "run", "--images", "a.npz", "--num-images", 100, "--against", "train"]
    words += sets(data__path=tmp_path / "x.npz")  # of the model's own data
    quick(*words, "--json", "b.json", cwd=tmp_path).ok()
    result = json.loads((tmp_path / "b.json").read_text())
    assert (result["images"], result["num_images"], result["num_reference"]) == ("a.npz", 100, 81)
    quick(*words, "--seed", 1, "--json", "c.json", cwd=tmp_path).ok()
    other = json.loads((tmp_path / "c.json").read_text())  # of another sample
    assert (result["seed"], other["seed"]) == (0, 1) and other["fid"] != result["fid"]
    # Where both are named, the model's own data need not be there.
    (tmp_path / "x.npz").rename(tmp_path / "y.npz")
    words = ["quality", "run", "--images", "a.npz", "--against", "y.npz"]
    quick(*words, cwd=tmp_path).ok()
    small = "from flowtrain.system import capacity; capacity.left = lambda device: 10**5"
    quick(*words, cwd=tmp_path, first=small).failed(2, "--against y.npz: 80 images need")
    hidden = "import sys; sys.modules['torch_fidelity'] = None"
    done = quick(*words, cwd=tmp_path, first=hidden)
    done.failed(2, "quality needs the package torch_fidelity", "the extra quality")

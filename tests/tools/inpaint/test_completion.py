"""Files with a part of an image, and files with the images that complete it."""

import io
import json
import math
import re

import numpy as np
import pytest
import torch
import typer
from cli_helpers import quick, trained
from helpers import a_config, agrees, images, tiny_flow
from PIL import Image

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet
from flowtrain.latents import paths
from flowtrain.tools.inpaint import completion
from flowtrain.tools.inpaint.command import inpaint
from flowtrain.tools.inpaint.posterior import Posterior


def model_of(shape, levels):
    return LoadedModel(tiny_flow("nice", shape, levels).eval(), a_config(), "raw", None)


def saved(path, x):
    Image.fromarray(x.movedim(0, -1).squeeze(-1).numpy()).save(path)
    return path


def test_white_pixels_of_the_mask_are_missing(tmp_path):
    x, mask = images(1, (3, 4, 6))[0], torch.zeros(1, 4, 6, dtype=torch.uint8)
    mask[:, 1:3, 2:5] = 255
    files = saved(tmp_path / "x.png", x), saved(tmp_path / "m.png", mask)
    given = completion.of_mask(*files, model_of((3, 4, 6), 256))
    assert given.words == "6 of 24 pixels are missing"
    assert torch.equal(given.constraint.known, (mask == 0).expand(3, -1, -1))
    assert given.constraint.moves.all()  # the noise of known pixels, too
    assert torch.equal(given.constraint.x, x)
    assert torch.equal(given.shown[:, mask[0] == 0], x[:, mask[0] == 0])
    assert (given.shown[:, mask[0] > 0] == 128).all()


def test_a_small_image_is_one_of_averages(tmp_path):
    x = images(1, (1, 2, 3), 17)[0]
    file = saved(tmp_path / "x.png", (x.int() * 255 // 16).to(torch.uint8))
    given = completion.of_averages(file, 2, model_of((1, 4, 6), 17))
    assert torch.equal(given.constraint.mean, (x + 0.5) / 17)
    assert torch.equal(given.shown[:, ::2, 1::2], x)
    assert agrees(given.constraint, given.shown[None]).all()


def test_the_written_files(tmp_path):
    model, x = model_of((1, 4, 4), 17), images(3, (1, 4, 4), 17)
    given = completion.Given(completion.Pixels(x[0], x[0] > 5, 17), x[0], "")
    found = Posterior(x, 0.8, 3.0, 10)
    completion.write_folder(tmp_path, model, given, found, {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(completion.names(3))
    for name, image in (("sample-01", x[1]), ("mean", x.float().mean(0).round())):
        picture = np.array(Image.open(tmp_path / f"{name}.png"))
        assert np.array_equal(picture, image[0].numpy().astype(int) * 255 // 16)
    arrays = np.load(io.BytesIO(completion.npz(model, given, found, [1.0, 2.0, 3.0], seed=4)))
    assert np.array_equal(arrays["images"], x.movedim(1, -1).numpy())
    assert np.array_equal(arrays["known"], given.constraint.known[0].numpy())
    assert arrays["mean"].shape == arrays["given"].shape == (4, 4, 1) and arrays["seed"] == 4
    assert arrays["bits_per_dim"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.slow
def test_the_default_steps_suffice_for_digits(tmp_path):
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    x = DataSet(a_config().data).split("test").take(slice(1))[0] * 15
    mask[:, 2:6, 2:6] = 255
    line = ["--image", saved(tmp_path / "x.png", x), "--mask", saved(tmp_path / "m.png", mask)]
    done = quick("inpaint", "glow_digits", *line, "--out", "a.npz", cwd=tmp_path).ok()
    assert "accepted" in done.out and "may not have converged" not in done.out


@pytest.mark.run
def test_the_command(tmp_path):
    x, mask = images(1, (1, 8, 8), 17)[0] * 15, torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, 4:] = 255
    saved(tmp_path / "x.png", x)
    saved(tmp_path / "m.png", mask)
    line = ["inpaint", trained()["glow"], "--image", "x.png", "--num-images", 2, "--steps", 8]
    done = quick(*line, "--mask", "m.png", "--out", "a", cwd=tmp_path).ok()
    assert "x.png with the 17 levels of the model: 32 of 64 pixels are missing" in done.out
    assert "accepted" in done.out
    assert re.search(r"\nabout \d+:\d\d for 2 chains of 8 moves; .*\n.* 2 samples", done.out)
    result = json.loads((tmp_path / "a" / "inpaint.json").read_text())
    assert np.isfinite(result["bits_per_dim"]).tolist() == [True, True]
    assert 0 <= result["accepted"] <= 1
    kept = [np.array(Image.open(tmp_path / "a" / f"sample-0{i}.png")) for i in (0, 1)]
    expected = completion.open_image(tmp_path / "x.png", (1, 8, 8), 17)[0, :4].astype(int)
    assert all(np.array_equal(each[:4], expected * 255 // 16) for each in kept)
    assert not np.array_equal(*kept)
    quick(*line, "--mask", "m.png", "--out", "b.npz", cwd=tmp_path).ok()
    again = np.load(tmp_path / "b.npz")["images"][..., 0].astype(int) * 255 // 16
    assert np.array_equal(again, kept)
    line[3] = saved(tmp_path / "small.png", x[:, ::2, ::2])
    done = quick(*line, "--factor", 2, "--out", "c", cwd=tmp_path).ok()
    assert "the means of patches of 2x2 pixels are known" in done.out


@pytest.mark.run
@pytest.mark.parametrize("out", ["a", "a.npz"])
def test_samples_without_a_finite_likelihood_are_an_error(out, tmp_path, monkeypatch, capsys):
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, 4:] = 255
    x, mask = saved(tmp_path / "x.png", images(1, (1, 8, 8))[0]), saved(tmp_path / "m.png", mask)
    monkeypatch.setattr(paths, "log_probs", lambda flow, x: torch.full((len(x),), -math.inf))
    options = {"model": "glow_digits", "num_images": 1, "steps": 8}
    with pytest.raises(typer.Exit) as ended:
        inpaint(image=x, mask=mask, out=tmp_path / out, **options)
    assert ended.value.exit_code == 1 and not (tmp_path / out).exists()
    assert "the likelihood of a sample is not finite" in capsys.readouterr().err

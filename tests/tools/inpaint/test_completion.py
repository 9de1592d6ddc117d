"""Files that say what is known of an image, and files with what completes it."""

import io
import json

import numpy as np
import pytest
import torch
from catalogue import TINY_RUN, sets
from cli_helpers import FOLDER, quick
from helpers import agrees, images, tiny_flow
from PIL import Image

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.tools.inpaint import completion
from flowtrain.tools.inpaint.posterior import Posterior


def model_of(shape, levels):
    """What these functions ask of a model: its flow."""
    loaded = LoadedModel.__new__(LoadedModel)
    object.__setattr__(loaded, "flow", tiny_flow("nice", shape, levels).eval())
    return loaded


def saved(path, x):
    Image.fromarray(x.movedim(0, -1).squeeze(-1).numpy()).save(path)


def test_white_pixels_of_the_mask_are_missing(tmp_path):
    x, mask = images(1, (3, 4, 6))[0], torch.zeros(1, 4, 6, dtype=torch.uint8)
    mask[:, 1:3, 2:5] = 255
    saved(tmp_path / "x.png", x)
    saved(tmp_path / "m.png", mask)
    given = completion.of_mask(tmp_path / "x.png", tmp_path / "m.png", model_of((3, 4, 6), 256))
    assert given.words == "6 of 24 pixels are missing"
    assert torch.equal(given.constraint.known, (mask == 0).expand(3, -1, -1))
    assert torch.equal(given.constraint.x, x)
    assert torch.equal(given.shown[:, mask[0] == 0], x[:, mask[0] == 0])
    assert (given.shown[:, mask[0] > 0] == 128).all()


def test_a_small_image_is_one_of_averages(tmp_path):
    x = images(1, (1, 2, 3), 17)[0]
    saved(tmp_path / "x.png", (x.int() * 255 // 16).to(torch.uint8))
    given = completion.of_averages(tmp_path / "x.png", 2, model_of((1, 4, 6), 17))
    assert torch.equal(given.constraint.mean, (x + 0.5) / 17)
    assert torch.equal(given.shown[:, ::2, 1::2], x)
    assert agrees(given.constraint, given.shown[None]).all()


def test_what_is_written(tmp_path):
    model, x = model_of((1, 4, 4), 17), images(3, (1, 4, 4), 17)
    constraint = completion.Pixels(x[0], x[0] > 5, 17)
    given = completion.Given(constraint, x[0], "")
    found = Posterior(x, 0.8, 3.0, 10)
    losses = completion.bits_per_dim(model, found)
    assert len(losses) == 3 and np.isfinite(losses).all()
    completion.write_folder(tmp_path, model, given, found, {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(completion.names(3))
    assert json.loads((tmp_path / "inpaint.json").read_text()) == {"a": 1}
    picture = np.array(Image.open(tmp_path / "sample-01.png"))
    assert np.array_equal(picture, x[1, 0].numpy().astype(int) * 255 // 16)
    arrays = np.load(io.BytesIO(completion.npz(model, given, found, losses, seed=4)))
    assert np.array_equal(arrays["images"], x.movedim(1, -1).numpy())
    assert np.array_equal(arrays["known"], constraint.known[0].numpy())
    assert arrays["mean"].shape == arrays["given"].shape == (4, 4, 1) and arrays["seed"] == 4


@pytest.mark.run
def test_the_command():
    folder = FOLDER / "inpaint"
    folder.mkdir()
    options = [*TINY_RUN, *sets(train__num_steps=1, train__sample_every=9)]
    quick("train", *options, "--run-dir", "run", cwd=folder).ok()
    x, mask = images(1, (1, 8, 8), 17)[0] * 15, torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, 4:] = 255
    saved(folder / "x.png", x)
    saved(folder / "m.png", mask)
    line = ["inpaint", "run", "--image", "x.png", "--num-images", 2, "--steps", 8]
    done = quick(*line, "--mask", "m.png", "--out", "a", cwd=folder).ok()
    assert "32 of 64 pixels are missing" in done.out and "accepted" in done.out
    result = json.loads((folder / "a" / "inpaint.json").read_text())
    assert len(result["bits_per_dim"]) == 2 and 0 <= result["accepted"] <= 1
    kept = [np.array(Image.open(folder / "a" / f"sample-0{i}.png")) for i in (0, 1)]
    expected = completion.open_image(folder / "x.png", (1, 8, 8), 17)[0, :4].astype(int)
    assert all(np.array_equal(each[:4], expected * 255 // 16) for each in kept)
    assert not np.array_equal(*kept)
    quick(*line, "--mask", "m.png", "--out", "b.npz", cwd=folder).ok()
    again = np.load(folder / "b.npz")["images"][..., 0].astype(int) * 255 // 16
    assert np.array_equal(again, kept)
    Image.fromarray(x[0, ::2, ::2].numpy()).save(folder / "small.png")
    line[3] = "small.png"
    done = quick(*line, "--factor", 2, "--out", "c", cwd=folder).ok()
    assert "the means of patches of 2x2 pixels are known" in done.out

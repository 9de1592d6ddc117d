"""What samples of images given a part of them are given, and their pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import a_config, images, tiny_flow
from PIL import Image

from flowtrain.data.splits import Split
from flowtrain.errors import UserError
from flowtrain.pictures.conditional import of_file, of_split, rows
from flowtrain.pictures.sample import npz, sample

SHAPE = (3, 8, 8)


def a_model(kind):
    """What `of_file` needs of a loaded model."""
    flow = tiny_flow("glow", SHAPE, context=kind)
    return SimpleNamespace(flow=flow, config=a_config())


@pytest.fixture
def image(tmp_path):
    pixels = images(1, SHAPE)
    path = tmp_path / "image.png"
    Image.fromarray(pixels[0].movedim(0, -1).numpy()).save(path)
    return pixels, path


@pytest.mark.parametrize("kind", ["downsample", "grey"])
def test_a_file_of_the_size_of_the_images_is_reduced(kind, image):
    model, (pixels, path) = a_model(kind), image
    context, how = of_file(path, model)
    assert torch.equal(context, model.flow.context_of(pixels))
    made = {"downsample": "reduced to 4x4", "grey": "grey"}
    assert how == f"{path} at 8x8, {made[kind]}"


def test_a_file_of_the_size_of_a_small_context_is_one(image):
    model, (pixels, path) = a_model("downsample"), image
    small = model.flow.context_of(pixels)
    Image.fromarray(small[0].movedim(0, -1).numpy()).save(path)
    context, how = of_file(path, model)
    assert torch.equal(context, small) and how == f"{path} as it is, 4x4"


def test_a_grey_file_is_a_grey_context(image):
    model, (pixels, path) = a_model("grey"), image
    grey = model.flow.context_of(pixels)
    Image.fromarray(grey[0, 0].numpy()).save(path)
    assert torch.equal(of_file(path, model)[0], grey)


@pytest.mark.parametrize("kind, size", [("downsample", (30, 40)), ("grey", (4, 4))])
def test_a_file_of_another_size_becomes_an_image_first(kind, size, image):
    model, path = a_model(kind), image[1]
    Image.new("RGB", size, (200, 0, 0)).save(path)
    context, how = of_file(path, model)
    red = torch.tensor([200, 0, 0], dtype=torch.uint8)[None, :, None, None].expand(1, *SHAPE)
    assert torch.equal(context, model.flow.context_of(red)) and f"{path} at 8x8, " in how


def test_files_that_are_no_context(image):
    model, path = a_model("downsample"), image[1]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="image.png cannot be read as an image"):
        of_file(path, model)
    with pytest.raises(UserError, match="no.png: there is no such image file"):
        of_file(path.with_name("no.png"), model)
    model.flow = tiny_flow("glow", SHAPE)
    with pytest.raises(UserError, match="--image .*: the model is not given an image"):
        of_file(path, model)


def test_the_contexts_of_a_split_in_turn():
    flow, x = tiny_flow("glow", SHAPE, context="grey"), images(3, SHAPE)
    split = Split(x.numpy(), np.arange(3), 0)
    expected = flow.context_of(x)[[0, 1, 2, 0, 1]]
    assert torch.equal(of_split(flow, split, 5), expected)
    assert of_split(tiny_flow("glow", SHAPE), split, 5) is None


def test_each_context_has_the_same_latents_and_a_row():
    flow, contexts = tiny_flow("glow", SHAPE, context="grey"), images(2, (1, 8, 8))
    drawn = sample(flow, 3, [0.5, 1.0], seed=4, contexts=contexts)
    assert drawn.shape == (12, *SHAPE)
    alone = sample(flow, 3, [1.0], seed=4, contexts=contexts[1:])
    assert torch.equal(drawn[9:], alone) and not torch.equal(drawn[6:9], alone)
    shown = rows(flow, contexts, drawn, 2).unflatten(0, (4, 4))
    assert torch.equal(shown[:, 1:].flatten(0, 1), drawn)
    assert torch.equal(shown[:, 0], contexts[[0, 1, 0, 1]].expand(-1, 3, -1, -1))


def test_the_contexts_are_in_the_file_of_arrays(tmp_path):
    flow, contexts = tiny_flow("glow", SHAPE, context="grey"), images(2, (1, 8, 8))
    drawn = sample(flow, 3, [0.5, 1.0], seed=4, contexts=contexts)
    (tmp_path / "s.npz").write_bytes(npz(flow, drawn, [0.5, 1.0], 4, contexts=contexts))
    arrays = np.load(tmp_path / "s.npz")
    assert arrays["images"].shape == (12, 8, 8, 3)
    expected = contexts[[0, 0, 0, 1, 1, 1] * 2].movedim(1, -1).numpy()
    assert np.array_equal(arrays["context"], expected)

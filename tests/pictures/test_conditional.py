"""What samples of images given a part of them are given, and their pictures."""

from types import SimpleNamespace

import numpy as np
import torch
from helpers import a_config, images, tiny_flow
from PIL import Image

from flowtrain.data.splits import Split
from flowtrain.pictures.conditional import of_file, of_split, rows
from flowtrain.pictures.sample import npz, sample

SHAPE = (3, 8, 8)


def a_model(kind):
    """What `of_file` needs of a loaded model."""
    return SimpleNamespace(flow=tiny_flow("glow", SHAPE, context=kind), config=a_config())


def test_a_file_is_the_context_or_becomes_an_image_first(tmp_path):
    path, x = tmp_path / "image.png", images(1, SHAPE)
    red = torch.tensor([200, 0, 0]).view(1, 3, 1, 1).expand(1, *SHAPE).to(torch.uint8)
    for kind, pixels, how in (
        ("downsample", x, "at 8x8, reduced to 4x4"),
        ("downsample", "context", "as it is, 4x4"),
        ("downsample", (30, 40), "at 8x8, reduced to 4x4"),
        ("grey", x, "at 8x8, grey"),
        ("grey", (4, 4), "at 8x8, grey"),
    ):
        model, resized = a_model(kind), isinstance(pixels, tuple)
        shown = model.flow.context_of(x) if isinstance(pixels, str) else x
        picture = Image.fromarray(shown[0].movedim(0, -1).numpy())
        (Image.new("RGB", pixels, (200, 0, 0)) if resized else picture).save(path)
        context, said = of_file(path, model)
        assert torch.equal(context, model.flow.context_of(red if resized else x))
        assert said == f"{path} {how}"
    grey = images(1, (8, 8))
    Image.fromarray(grey[0].numpy()).save(path)
    assert torch.equal(of_file(path, a_model("grey"))[0], grey[None])


def test_the_contexts_of_a_split_in_turn():
    flow, x = tiny_flow("glow", SHAPE, context="grey"), images(3, SHAPE)
    split = Split(x.numpy(), np.arange(3))
    assert torch.equal(of_split(flow, split, 5), flow.context_of(x)[[0, 1, 2, 0, 1]])
    assert of_split(tiny_flow("glow", SHAPE), split, 5) is None


def test_each_context_has_the_same_latents_and_a_row(tmp_path):
    flow, contexts = tiny_flow("glow", SHAPE, context="grey"), images(2, (1, 8, 8))
    drawn = sample(flow, 3, [0.5, 1.0], seed=4, contexts=contexts)
    assert drawn.shape == (12, *SHAPE)
    alone = sample(flow, 3, [1.0], seed=4, contexts=contexts[1:])
    assert torch.equal(drawn[9:], alone) and not torch.equal(drawn[6:9], alone)
    shown = rows(flow, contexts, drawn, 2).unflatten(0, (4, 4))
    assert torch.equal(shown[:, 1:].flatten(0, 1), drawn)
    assert torch.equal(shown[:, 0], contexts[[0, 1, 0, 1]].expand(-1, 3, -1, -1))
    (tmp_path / "s.npz").write_bytes(npz(flow, drawn, [0.5, 1.0], 4, contexts=contexts))
    arrays = np.load(tmp_path / "s.npz")
    assert np.array_equal(arrays["images"], drawn.movedim(1, -1))
    assert np.array_equal(arrays["context"], contexts[[0, 0, 0, 1, 1, 1] * 2].movedim(1, -1))

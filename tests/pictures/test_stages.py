"""Stages between latents and data: where they put each entry, and the picture of both ways."""

import pytest
import torch
from helpers import images, perturb, seeded, tiny_flow

from flowtrain.bijections import Multiscale, Sequential, Squeeze
from flowtrain.errors import UserError
from flowtrain.pictures import grid, stages
from flowtrain.pictures.sample import sample
from flowtrain.system import capacity


def test_latents_wait_where_they_will_be_in_the_image():
    """Levels that only move entries: all stages are the same image, once it has its size."""
    shapes = [(2, 4, 4), (4, 2, 2), (16, 1, 1)]
    levels = [Sequential(Squeeze()) for _ in shapes]
    layer = Multiscale(levels, [Sequential() for _ in shapes], shapes)
    z = torch.randn(3, 64, generator=seeded())
    x, _ = layer.inverse(z)
    found = stages.stages_of(layer, z)
    assert len(found) == 1 + 3
    assert all(torch.equal(stages._unsqueezed(stage, 8), x) for stage in found)


@pytest.mark.parametrize("model", ["glow", "realnvp"])
def test_every_layer_is_a_stage(model):
    layer = tiny_flow(model).bijection
    z = torch.randn(3, 16, generator=seeded())
    found = stages.stages_of(layer, z)
    layers = [each for part in layer.inner_layers() for each in getattr(part, "layers", [part])]
    assert len(found) == 1 + len(layers)
    torch.testing.assert_close(found[-1], layer.inverse(z)[0], rtol=0, atol=1e-5)
    assert not found[-1].requires_grad and all(stage[0].numel() == 16 for stage in found)


OPTIONS = [
    ("glow", {}),  # two levels
    ("glow", {"classes": 3}),
    ("tarflow", {"classes": 3}),  # one level; its networks see the class
    ("tarflow", {"classes": 3, "label_dropout": 0.5}),
    ("glow", {"context": "downsample"}),
    ("causal", {}),  # one layer
]


@pytest.mark.parametrize("model, options", OPTIONS)
def test_both_ways_are_those_of_the_flow(model, options, monkeypatch):
    flow = tiny_flow(model, (1, 4, 4), 17, **options).eval()
    if flow.classes:
        perturb(flow.class_prior, 0.5)
    x = images(3, (1, 4, 4), 17)
    drawn = []
    monkeypatch.setattr(grid, "grid", lambda found, *rest: drawn.append(found) or rest)
    assert stages.picture(flow, x, 7) == (256, 9)
    down, up = drawn[0].unflatten(0, (2, 3, 9))
    assert torch.equal(down[:, 0], grid.to_8bit(x, 17))
    # An image ends in its latent. A causal flow has no other stage, so the rest of the row is grey.
    count = 2 if model == "causal" else 9
    assert (down[:, count:] == grid.GREY).all()
    noise = stages.uniform(x.shape, 7, stages.Stream.DEQUANTIZATION)
    z, _ = flow.to_latents(x, noise)
    latent = stages._scaled(flow, z).flatten(1).sort()[0].int()
    end = down[:, count - 1].flatten(1).sort()[0].int()
    assert (end - latent).abs().max() <= 1  # by the order in which mean and deviation are summed
    # A sample begins at the mode of the base; in the middle it has its coarse level alone.
    given = {"contexts": flow.context_of(x)} if "context" in options else {}
    num = 1 if given else 3
    for column, temperature in ((0, 0.0), (8, 1.0)):
        expected = sample(flow, num, [temperature], 7, **given)
        assert torch.equal(up[:num, column], grid.to_8bit(expected[:num], 17))
    fine, *coarse = flow.split_latents(flow.draw_latents(3, stages.generator(7, 4)))
    if coarse and not options:
        z = torch.cat([torch.zeros_like(fine).flatten(1), coarse[0].flatten(1)], dim=1)
        assert torch.equal(up[:, 4], grid.to_8bit(flow.decode(z), 17))


def test_halves_of_a_single_row_of_patches_are_shown():
    x = images(2, (1, 2, 4), 17)
    assert stages.picture(tiny_flow("jet", x.shape[1:], 17).eval(), x, 0).shape[0] == 3


def test_a_picture_without_room_is_refused(monkeypatch):
    flow = tiny_flow()
    monkeypatch.setattr(capacity, "available", lambda device: 10_000)
    with pytest.raises(UserError, match="--num-images 2: a picture of 36 stages needs at least"):
        stages.picture(flow, images(2, (1, 4, 4)), 0)

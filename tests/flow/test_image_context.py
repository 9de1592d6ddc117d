"""Models of images given a part of them: the part, and the likelihoods, latents and samples."""

import numpy as np
import pytest
import torch
from helpers import images, seeded, tiny_flow
from PIL import Image

from flowtrain.bijections.execution import call
from flowtrain.evaluation.layers import Watching
from flowtrain.flow.flow import Flow
from flowtrain.flow.image_context import ImageContext
from flowtrain.nets.convolution import channels_of, resized

SHAPE = (3, 8, 8)
every_model = pytest.mark.parametrize("model", ["glow", "realnvp", "causal"])


def conditional(model="glow", kind="downsample", factor=2, shape=SHAPE, q=256, **options) -> Flow:
    return tiny_flow(model, shape, q, context=kind, context_factor=factor, **options).eval()


@pytest.mark.parametrize("factor", [2, 4])
def test_a_small_image_is_the_rounded_mean_of_patches(factor):
    context = ImageContext("downsample", factor, (2, 4, 8), 256)
    x = images(5, (2, 4, 8))
    found = context.of(x)
    assert found.dtype == torch.uint8 and found.shape[1:] == context.shape
    means = torch.nn.functional.avg_pool2d(x.double(), factor)
    assert torch.equal(found.double(), (means + 0.5).floor())
    assert torch.equal(context.of(torch.full_like(x, 255)), torch.full_like(found, 255))
    shown = context.shown(found)
    assert shown.shape == x.shape and torch.equal(context.of(shown), found)


def test_a_grey_image_is_that_of_pillow():
    x = images(40, SHAPE)
    x[0], x[1] = 0, 255
    context = ImageContext("grey", 2, SHAPE, 256)
    found = context.of(x)
    for image, grey in zip(x.movedim(1, -1).numpy(), found, strict=True):
        assert np.array_equal(np.asarray(Image.fromarray(image).convert("L")), grey[0].numpy())
    assert torch.equal(context.shown(found), found.expand_as(x))
    ends = context.scaled(torch.tensor([0, 255], dtype=torch.uint8), torch.float64)
    assert ends.tolist() == [-0.5 + 0.5 / 256, 0.5 - 0.5 / 256]


@pytest.mark.parametrize("size", [(16, 8), (8, 4), (4, 2), (2, 1)])
def test_at_each_resolution_all_of_a_context_is_there(size):
    context = images(2, (3, 8, 4)).float()
    found = resized(context, size)
    assert found.shape == (2, channels_of((3, 8, 4), size), *size)
    repeated = max(1, size[0] // 8) ** 2
    assert torch.equal(found.flatten().sort()[0][::repeated], context.flatten().sort()[0])
    assert found.numel() == repeated * context.numel() and channels_of(None, size) == 0
    # Each place has what lies at that place.
    by_place = resized(torch.arange(8.0)[None, None, :, None].expand(1, 1, 8, 4), size)
    rows = torch.arange(size[0]) * 8 // size[0]
    assert torch.equal(by_place[0].amin(dim=(0, 2)), rows.float())


@every_model
@pytest.mark.parametrize("kind, factor", [("downsample", 2), ("downsample", 4), ("grey", 2)])
@pytest.mark.run  # takes long
def test_an_image_is_scored_and_comes_back_given_its_own_context(model, kind, factor):
    flow, x = conditional(model, kind, factor, scale=0.1), images(4, SHAPE)
    context = flow.context_of(x)
    own = flow.log_prob(x, seeded())
    torch.testing.assert_close(flow.log_prob(x, seeded(), context=context), own, rtol=0, atol=0)
    other = flow.log_prob(x, seeded(), context=context.flip(0))
    assert (other - own).abs().min() > 1e-4
    # At y = (x + u) / Q, the density is log P(x) by the noise u.
    u = torch.full(x.shape, 0.5)
    of_noise = flow(x, u, context=context).total
    torch.testing.assert_close(flow.log_density((x + u) / flow.num_bins, context=context), of_noise)
    with pytest.raises(ValueError, match="expected a context of shape"):
        flow.log_density((x + u) / flow.num_bins)
    z = flow.encode(x)
    assert torch.equal(flow.decode(z, context=context.numpy()), x)
    assert not torch.equal(flow.decode(z, context=context.flip(0)), x)


@pytest.mark.parametrize("conditioner", ["glow", "gated"])
@pytest.mark.parametrize("kind", ["downsample", "grey"])
def test_every_network_sees_the_context(conditioner, kind):
    flow = conditional("glow", kind, conditioner=conditioner)
    x = images(2, SHAPE)
    seen = flow.conditioning(2, context=flow.context_of(x)).requires_grad_()
    changed = []

    def around(name, layer, direction, given, context):
        if layer.has_network:
            parameters = layer.predict(given.detach(), context)  # layers before it see it, too
            (gradient,) = torch.autograd.grad(parameters.sum(), context, retain_graph=True)
            changed.append(bool(gradient.any()))
        return call(layer, direction, given, context)

    flow.bijection.run(Watching(flow, around), "forward", flow.dequantizer.middle(x), seen)
    assert changed == [True] * 5  # two steps in each of two levels, and the prior between them


def test_a_causal_network_sees_the_context_on_all_sides():
    """Unlike the levels: those of the context after a token are known, too."""
    flow = conditional("causal", "downsample", 2, (1, 8, 8), token=2)
    net = flow.bijection.conditioner
    image = torch.zeros(1, 1, 4, 4, requires_grad=True)
    seen = torch.autograd.grad(net.added(image)[0, 1, 1].sum(), image)[0][0, 0] != 0
    assert seen.all(), "two convolutions of 3x3"


@every_model
@pytest.mark.run  # takes long
def test_samples_are_of_their_context(model):
    flow, context = conditional(model), images(2, (3, 4, 4))
    context[1] = context[0]
    first = flow.sample(2, generator=seeded(), context=context)
    context[1] = images(1, (3, 4, 4), seed=1)[0]
    random = seeded()
    second = flow.sample(2, generator=random, context=context)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    # The likelihood is that given what the sample was drawn given, not given its own context.
    again, log_prob = flow.sample_with_log_prob(2, generator=seeded(), context=context)
    assert torch.equal(again, second) and not torch.equal(flow.context_of(second), context)
    torch.testing.assert_close(log_prob, flow.log_prob(second, random, context=context).detach())


@pytest.mark.parametrize(
    "context, said",
    [
        (None, "got none"),
        (images(1, (3, 4, 4)), r"of shape \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"),
        (images(2, (3, 4, 4)).float(), "integers in 0..16"),
        (images(2, (3, 4, 4)).bool(), "integers in 0..16"),
        ((images(2, (3, 4, 4), 2) + 17).to(torch.uint16), "integers in 0..16"),
        (images(2, (3, 4, 4), 17) + 1, "integers in 0..16"),
        (images(2, (3, 4, 4), 17).int() - 1, "integers in 0..16"),
    ],
)
def test_another_context_is_refused(context, said):
    flow = conditional(q=17)
    with pytest.raises(ValueError, match=said):
        flow.sample(2, context=context)
    if context is not None:
        with pytest.raises(ValueError, match=said):
            flow.log_prob(images(2, SHAPE, 17), context=context)
        with pytest.raises(ValueError, match="of images by themselves"):
            tiny_flow("nice").sample(2, context=context)

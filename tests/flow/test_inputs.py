"""Images as tensors, arrays and PIL images."""

import numpy as np
import pytest
import torch
from helpers import images, seeded, tiny_flow
from PIL import Image

from flowtrain.flow.inputs import as_tensor

RGB, GREY = (3, 4, 6), (1, 4, 6)


@pytest.mark.parametrize("shape", [RGB, GREY])
def test_an_array_in_any_usual_order(shape):
    x = images(5, shape, 256)
    channels_last = x.permute(0, 2, 3, 1).numpy()
    assert torch.equal(as_tensor(x.numpy(), shape, 256), x)
    assert torch.equal(as_tensor(channels_last, shape, 256), x)
    if shape == GREY:
        assert torch.equal(as_tensor(x[:, 0].numpy(), shape, 256), x)
    assert as_tensor(x, shape, 256) is x


@pytest.mark.parametrize("shape, mode", [(RGB, "RGB"), (GREY, "L")])
def test_pil_images(shape, mode):
    x = images(2, shape, 256)
    pictures = [Image.fromarray(image.permute(1, 2, 0).squeeze().numpy(), mode) for image in x]
    assert torch.equal(as_tensor(pictures, shape, 256), x)
    assert torch.equal(as_tensor(pictures, shape, 8), x >> 5)
    five = as_tensor(pictures, shape, 17)
    assert torch.equal(five, (x / 255 * 16).round().to(torch.uint8))
    with pytest.raises(ValueError, match="expected images of 6x4 pixels, got 4x6"):
        as_tensor([pictures[0].transpose(Image.Transpose.ROTATE_90)], shape, 256)
    with pytest.raises(ValueError, match="of points"):
        as_tensor(pictures, shape, None)


def test_lists_of_arrays_and_a_single_image():
    x = images(2, GREY, 256)
    assert torch.equal(as_tensor([image[0].numpy() for image in x], GREY, 256), x)
    assert torch.equal(as_tensor(list(x.numpy()), GREY, 256), x)
    with pytest.raises(ValueError, match=r"expected several images, got one: give a list"):
        as_tensor(Image.new("L", (6, 4)), GREY, 256)


def test_points_as_a_table():
    x = torch.randn(5, 2, generator=seeded(0))
    for given in (x, x.numpy(), list(x.numpy()), x[:, :, None, None]):
        assert torch.equal(as_tensor(given, (2, 1, 1), None), x[:, :, None, None])
    assert as_tensor(x, (3, 1, 1), None) is x  # the flow says what is wrong


def test_a_flow_takes_all_of_them():
    flow = tiny_flow("glow")
    x = images(3, flow.shape, flow.levels)
    expected = flow.log_prob(x, seeded(0))
    assert torch.equal(flow.log_prob(x.numpy(), seeded(0)), expected)
    assert torch.equal(flow.encode(x.numpy()), flow.encode(x))
    with pytest.raises(ValueError, match="expected images of shape"):
        flow.log_prob(np.zeros((2, 3, 3), np.uint8))


def test_labels_and_latents_as_lists_and_arrays():
    flow = tiny_flow("glow", classes=3)
    x = images(3, flow.shape, flow.levels)
    labels, z = torch.tensor([2, 0, 1]), flow.encode(x)
    for given in ([2, 0, 1], labels.numpy()):
        for ask in (
            lambda labels: flow.log_prob(x, seeded(0), labels),
            lambda labels: flow.sample(3, 1.0, seeded(0), labels),
            lambda labels: flow.sample_with_log_prob(3, 1.0, seeded(0), labels)[1],
        ):
            assert torch.equal(ask(given), ask(labels))
    assert torch.equal(flow.decode(z.double().numpy()), x)

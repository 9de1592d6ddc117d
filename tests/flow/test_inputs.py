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
    assert as_tensor(x, shape, 256) is x
    constant = x.clone().numpy()
    constant.flags.writeable = False
    assert not np.shares_memory(as_tensor(constant, shape, 256), constant)
    usual = [x.numpy(), list(x.numpy()), x.permute(0, 2, 3, 1).numpy(), constant]
    if shape == GREY:
        usual += [x[:, 0].numpy(), list(x[:, 0].numpy())]
    for given in usual:
        assert torch.equal(as_tensor(given, shape, 256), x)


@pytest.mark.parametrize("shape, mode", [(RGB, "RGB"), (GREY, "L")])
def test_pil_images(shape, mode):
    x = images(2, shape, 256)
    pictures = [Image.fromarray(image.permute(1, 2, 0).squeeze().numpy(), mode) for image in x]
    assert torch.equal(as_tensor(pictures, shape, 256), x)
    assert torch.equal(as_tensor(pictures, shape, 8), x >> 5)
    assert torch.equal(as_tensor(pictures, shape, 17), (x / 255 * 16).round().to(torch.uint8))
    with pytest.raises(ValueError, match="expected images of 6x4 pixels, got 4x6"):
        as_tensor([pictures[0].transpose(Image.Transpose.ROTATE_90)], shape, 256)
    with pytest.raises(ValueError, match="of points"):
        as_tensor(pictures, shape, None)
    with pytest.raises(ValueError, match=r"expected several images, got one: give a list"):
        as_tensor(pictures[0], shape, 256)
    with pytest.raises(ValueError, match="floating-point pixels"):
        as_tensor([Image.new("F", (6, 4))], shape, 256)
    # As the pixels of files: see `test_modes` in `tests/datasets/test_base.py`.
    turned = Image.fromarray(np.full((6, 4), 0x8001, np.uint16))
    turned.getexif()[0x0112] = 6
    assert as_tensor([turned], shape, 256).unique().tolist() == [0x80]
    points = torch.randn(5, 2, generator=seeded(0))  # as a table
    for given in (points, points.numpy(), list(points.numpy()), points[:, :, None, None]):
        assert torch.equal(as_tensor(given, (2, 1, 1), None), points[:, :, None, None])


def test_a_flow_takes_arrays_and_lists():
    flow = tiny_flow("glow", classes=3)
    x = images(3, flow.shape, flow.num_bins)
    labels, z = torch.tensor([2, 0, 1]), flow.encode(x)
    assert torch.equal(flow.log_prob(x.numpy(), seeded(0)), flow.log_prob(x, seeded(0)))
    assert torch.equal(flow.encode(x.numpy()), z)
    assert all(torch.equal(flow.decode(each), x) for each in (z.double(), z.double().numpy()))
    with pytest.raises(ValueError, match="expected images of shape"):
        flow.log_prob(np.zeros((2, 3, 3), np.uint8))
    for use in (
        lambda labels: flow.log_prob(x, seeded(0), labels),
        lambda labels: flow.sample(3, 1.0, seeded(0), labels),
        lambda labels: flow.sample_with_log_prob(3, 1.0, seeded(0), labels)[1],
    ):
        # The last would be a mask of the three classes.
        for given in ([2, 0, 1], labels.numpy(), labels.to(torch.uint16), labels.byte()):
            assert torch.equal(use(given), use(labels))

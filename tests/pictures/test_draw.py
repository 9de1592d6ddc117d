"""Grids of images, pictures of points, and the choice between them by the kind of data."""

import math

import pytest
import torch
from helpers import a_config, images, seeded, tiny_flow
from torchvision.utils import make_grid

from flowtrain.checkpoints.build import build_flow
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.flow import initialize
from flowtrain.latents.paths import interpolate
from flowtrain.pictures import draw, grid
from flowtrain.pictures.sample import decode, sample
from flowtrain.system import capacity

POINTS = {"data": {"name": "eight_gaussians", "count": 50, "test_count": 50}}


def a_flow(shape=(2, 1, 1)):
    flow = build_flow(a_config("nice", **POINTS), (2, 1, 1), None)
    initialize(flow, torch.randn(50, 2, 1, 1, generator=seeded(0)), torch.zeros(50, 2, 1, 1))
    flow.shape = shape
    return flow


def unneeded():
    raise AssertionError("images are drawn without the data")


def test_images_are_grids():
    drawing, x = draw.drawing(tiny_flow(shape=(1, 4, 4), q=17), unneeded), images(6, (1, 4, 4), 17)
    rows = x.unflatten(0, (2, 3))
    for found in (drawing.samples(x, 3, 0), drawing.paths(rows)):
        assert torch.equal(found, grid.grid(x, 17, 3))
    frames = drawing.path_frames(rows)
    assert len(frames) == 3 and torch.equal(frames[2], grid.grid(x[[2, 5]], 17, 2))


def test_each_temperature_has_a_titled_block():
    x, temperatures = images(15, (1, 4, 4), 17), [0.5, 0.7, 0.9, 1, 1.1]
    found = draw.ImageGrids(17).samples(x, 2, 0, temperatures)
    blocks = [grid.grid(part, 17, 2, beside=4) for part in x.split(3)]
    _, height, width = blocks[0].shape
    line, step = grid.LINE, (found.shape[2] + grid.LINE) // 4
    assert found.shape == (3, 2 * (line + height), 4 * step - line) and found.shape[2] > 800
    titles = []
    for index, block in enumerate(blocks):
        part = found[:, index // 4 * (line + height) :, index % 4 * step :]
        assert torch.equal(part[:, line : line + height, :width], block)
        titles.append(part[:, :line, :width].amin(dim=0))
    assert all(title.min() < 64 for title in titles)  # black on white
    assert not any(map(torch.equal, titles, titles[1:]))


@pytest.mark.filterwarnings("error")  # also of a single point
def test_points_are_drawn_beside_the_data(monkeypatch):
    monkeypatch.setattr(draw, "MESH", 8)
    split = DataSet(a_config("nice", **POINTS).data).split("test")
    drawing = draw.drawing(a_flow(), lambda: split)
    rows = torch.randn(2, 3, 2, 1, 1, generator=seeded(0))
    frames = drawing.path_frames(rows)
    assert len(frames) == 3 and torch.equal(frames[-1], drawing.paths(rows))
    assert torch.equal(frames[0], drawing.paths(rows[:, :1]))
    assert not torch.equal(frames[0], frames[1])
    for few in (rows[0], rows[0, :1]):
        assert drawing.samples(few, 8, 0).shape[0] == 3
    taken, stages_of = [], draw.stages_of
    monkeypatch.setattr(
        draw, "stages_of", lambda layer, z: (taken.append(len(z)), stages_of(layer, z))[1]
    )
    monkeypatch.setattr(draw, "POINTS", 2)
    drawing.samples(rows[0], 8, 0)
    assert taken == [2]  # as many as are shown


def test_the_mesh_of_the_plane_and_the_sphere():
    cells, area = draw.mesh(a_flow(), (-1, 3, 0, 2), 4)
    assert cells.shape == (16, 2, 1, 1) and area == 0.5
    assert cells[[0, 1, 4]].flatten(1).tolist() == [[-0.5, 0.25], [0.5, 0.25], [-0.5, 0.75]]
    cells, area = draw.mesh(a_flow((3, 1, 1)), (-math.pi, math.pi, -1, 1), 50)
    torch.testing.assert_close(cells.norm(dim=1).flatten(), torch.ones(2500))
    assert area * 2500 == pytest.approx(4 * math.pi)
    places = draw.coordinates(cells)
    again = torch.stack([places[:, 0].cos(), places[:, 0].sin()], dim=1)
    expected = torch.nn.functional.normalize(cells[:, :2, 0, 0].double())
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


def test_no_line_across_the_picture():
    def at(longitudes):
        angles = torch.tensor(longitudes)
        return torch.stack([angles.cos(), angles.sin(), torch.zeros(4)], dim=1)

    for longitudes in ([2.9, 3.1, -3.1, -2.9], [-2.9, -3.1, 3.1, 2.9]):
        path = at(longitudes)
        places = draw._line(path, True)
        assert places[:, 0].isnan().tolist() == [False, False, True, False, False]
        torch.testing.assert_close(places[[0, 1, 3, 4]], draw.coordinates(path))
    assert not draw._line(at([3.1, 1.0, -1.0, -3.1]), True).isnan().any()
    for angles in (False, True):  # in the plane, or on a torus
        found = draw._line(torch.tensor([[3.0, 0], [3, -3], [3, 3]]), angles)
        assert found[:, 0].isnan().nonzero().flatten().tolist() == [2] * angles


@pytest.mark.parametrize("dims", [1, 3])  # points in space are not on a sphere
def test_other_dimensions_have_no_picture(dims):
    drawing, x = draw.drawing(a_flow((dims, 1, 1)), unneeded), torch.zeros(4, dims, 1, 1)
    for use in (lambda: drawing.samples(x, 8, 0), lambda: drawing.paths(x[None])):
        with pytest.raises(UserError, match=f"no pictures of real-valued data of {dims} dim"):
            use()


def test_a_picture_without_room_is_refused(monkeypatch):
    """Three images of 4 x 4 in a row are enlarged 67 times, to 804 pixels. They and the picture
    take a byte for each value. A latent has 16 numbers of 4 bytes, and is there twice.
    """
    flow, x = tiny_flow(shape=(1, 4, 4), q=17), images(2, (1, 4, 4), 17)
    monkeypatch.setattr(capacity, "available", lambda device: 6 * 268 * 268 * 4)
    draw.drawing(flow, unneeded).require_room(6, flow.shape, 3, "six")
    with pytest.raises(UserError, match="^seven: at least 0.0 GiB, and 0.0 GiB are available"):
        draw.drawing(flow, unneeded).require_room(7, flow.shape, 3, "seven:")
    draw.drawing(a_flow(), unneeded).require_room(10**12, (2, 1, 1), 3, "points")
    monkeypatch.setattr(capacity, "available", lambda device: 5 * 2 * (64 + 16))
    assert len(sample(flow, 5, [1.0], 0)) == 5
    assert interpolate(flow, x[:1], x[1:], 5).shape == (1, 5, 1, 4, 4)
    for message, use in (
        ("--num-images 6: 6 samples need", lambda: sample(flow, 6, [1.0], 0)),
        ("--num-images 3: 15 samples need", lambda: sample(flow, 3, [1.0] * 5, 0)),
        ("--num-images 4: 8 samples need", lambda: sample(flow, 4, [1.0], 0, classes=[0, 1])),
        ("--steps 6: 1 paths of 6 images need", lambda: interpolate(flow, x[:1], x[1:], 6)),
    ):
        with pytest.raises(UserError, match=f"^{message} at least"):
            use()


@pytest.mark.parametrize("size, expected", [(64, [37]), (16, [16, 32, 37])])
def test_latents_are_decoded_as_many_at_a_time_as_fit(size, expected, monkeypatch):
    flow, done = tiny_flow(shape=(1, 4, 4), q=17), []
    z = flow.draw_latents(37, seeded(3))
    monkeypatch.setattr("flowtrain.pictures.sample.sampling_batch_size", lambda flow: size)
    assert torch.equal(decode(flow, z, done.append), flow.decode(z)) and done == expected


@pytest.mark.parametrize(
    "count, channels, columns", [(64, 3, 8), (7, 1, 3), (2, 3, 5), (5, 1, 1), (1, 1, 4), (1, 3, 1)]
)
def test_a_grid_is_that_of_torchvision(count, channels, columns):
    x = torch.randint(0, 256, (count, channels, 40, 33), dtype=torch.uint8)
    picture = grid.grid(x, 256, columns)
    factor = 1 if count == 1 else -(-800 // (33 * min(columns, count)))
    assert count == 1 or picture.shape[2] >= 800
    enlarged = x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    assert torch.equal(picture, make_grid(enlarged, nrow=columns, padding=2, pad_value=64))

"""Training batches: the order, streaming and augmentation."""

import contextlib
import itertools
import threading
import time

import dataset_helpers as made
import numpy as np
import pytest
import torch
from helpers import CPU, a_config, npz, seeded

from flowtrain.data.batches import Batches, ReadAhead, augment
from flowtrain.data.splits import DataSet
from flowtrain.datasets.mapped import Mapped
from flowtrain.errors import UserError
from flowtrain.system import capacity, distributed


def batches(section, batch_size=6, seed=0):
    config = a_config("nice", data=section, seed=seed)
    return Batches(DataSet(config.data), config, batch_size, CPU)


def first(source, count, start=0):
    return [source.at(step * source.all_processes)[0] for step in range(start, start + count)]


@pytest.fixture
def numbered(tmp_path):
    """20 training images: i has the value i, and i + 100 on its left half. No label is a class."""
    pixels = np.arange(20, dtype="u1")[:, None, None, None].repeat(8, 1).repeat(8, 2)
    pixels[:, :, :4] += 100
    arrays = {"x_train": pixels, "x_test": pixels[:4], "y_train": np.zeros((20, 2))}
    np.savez(tmp_path / "numbered.npz", **arrays)
    return {"name": "npz", "path": str(tmp_path / "numbered.npz"), "validation": 0}


def ids(x):
    return x.flatten(1).min(dim=1).values.tolist()


def test_every_image_once_an_epoch_by_seed(numbered):
    # 20 images in batches of 6: batches 3 and 6 straddle two epochs.
    order, again, other = (
        [i for x in first(batches(numbered, seed=seed), 10) for i in ids(x)] for seed in (0, 0, 1)
    )
    assert len(order) == 60 and order == again != other
    epochs = [order[i : i + 20] for i in range(0, 60, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(20))
    large = first(batches(numbered, batch_size=50), 2)[1]
    counts = np.bincount(ids(large), minlength=20)
    assert len(large) == 50 and counts.min() >= 2 and counts.max() <= 3


@pytest.mark.parametrize("batch_size, count", [(6, 20), (50, 50), (3000, 1024)])
def test_the_images_for_initialization(numbered, batch_size, count):
    """As many as a step has, but not so few that they say little, nor more than help."""
    source = batches({**numbered, "shift": 1}, batch_size)
    found = source.first_of_all(64)
    assert len(found) == count
    assert batch_size != 50 or torch.equal(found, first(source, 1)[0])


@pytest.fixture
def as_process(monkeypatch):
    """Makes this process one of several, as far as its share is concerned."""
    return lambda *place: monkeypatch.setattr(distributed, "group", distributed.Group(None, *place))


@pytest.mark.parametrize("streamed", [{}, {"max_in_memory": 0, "workers": 1}])
def test_a_batch_is_divided_among_the_processes(as_process, tmp_path, streamed):
    section = npz(tmp_path / "a.npz", train=50, validation=0, shift=2, flip=True)

    def batch(rank, world, used, size=24, options=streamed):
        as_process(rank, world)
        source = batches({**section, **options}, size // world)
        found = source.at(used)[0], source.first_of_all(8)
        source.close()
        return found

    for used in (0, 48, 31):  # the last two span two epochs
        whole, initial = batch(0, 1, used, options={})
        for world in (2, 3):
            parts = [batch(rank, world, used) for rank in range(world)]
            assert torch.equal(whole, torch.cat([part for part, _ in parts]))
            assert all(torch.equal(part, initial) for _, part in parts)
        # What happens to an image does not depend on the number of images in a step.
        halves = [batch(0, 1, used + start, size=12)[0] for start in (0, 12)]
        assert torch.equal(torch.cat(halves), whole)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "make, kind", [(made.an_npz, np.ndarray), (made.a_folder, np.memmap), (made.shards, Mapped)]
)
def test_streaming_or_resuming_changes_nothing(tmp_path, monkeypatch, make, kind, workers):
    """From any step, by new batches, and by those that have gone further."""
    monkeypatch.setenv("FLOWTRAIN_CACHE", str(tmp_path / "cache"))
    options = {"validation": 4, "shift": 1, "flip": True, "n_bits": 6}
    resident = batches({**made.an_npz(tmp_path, monkeypatch), **options})
    (tmp_path / "data").mkdir()
    options |= {"max_in_memory": 0, "workers": workers}
    section = {**make(tmp_path / "data", monkeypatch), **options}
    before = set(threading.enumerate())
    with contextlib.closing(batches(section)) as streamed:
        assert type(streamed.source.pixels) is kind and streamed.streams and not resident.streams
        every = first(resident, 10)
        for source, start in ((streamed, 2), (streamed, 1), (resident, 1)):
            assert all(map(torch.equal, first(source, 8, start), every[start:]))
        assert len(set(threading.enumerate()) - before) == workers


def test_what_fits_is_held_in_memory(tmp_path, monkeypatch):
    section = npz(tmp_path / "a.npz", train=40, validation=8)  # 32 * 64 bytes
    size = 32 * 64 / 2**30
    assert not batches({**section, "max_in_memory": size}).streams
    assert batches({**section, "max_in_memory": 0.99 * size}).streams
    section |= {"max_in_memory": 0, "workers": 3}  # 7 batches of 6 x 64 B
    monkeypatch.setattr(capacity, "available", lambda device: 7 * 6 * 64)
    batches(section).close()
    with pytest.raises(UserError, match="^data.workers: 3 threads hold 7 batches of 7 images, wh"):
        batches(section, batch_size=7)
    batches({**section, "max_in_memory": 1}, batch_size=7).close()
    monkeypatch.setattr(capacity, "available", lambda device: 32 * 64 - 1)
    with pytest.raises(UserError, match="^data.max_in_memory: 1, and the 32 images to train on ta"):
        batches({**section, "max_in_memory": 1})


def test_reading_ahead_is_in_order_and_ends_when_closed():
    """However long each takes; and the error of a thread is that of its reader."""
    before = set(threading.enumerate())

    def function(n):
        time.sleep(0.01 * (n % 3 == 0))
        if n == 20:
            raise OSError("the disk is gone")
        return torch.tensor(n)

    with contextlib.closing(ReadAhead(function, 2, 3)) as read:
        assert [int(read(n)) for n in range(2, 20, 2)] == list(range(2, 20, 2))
        assert len(set(threading.enumerate()) - before) == 3
        with pytest.raises(OSError, match="the disk is gone"):
            read(20)
    assert set(threading.enumerate()) <= before
    # A reader may ask for any position, as a run does that goes back to a checkpoint.
    with contextlib.closing(ReadAhead(torch.tensor, 3, 2)) as read:
        for position in (30, 33, 36, 6, 9, 30, 30, 33):
            assert int(read(position)) == position
        assert read.results.keys() == {36, 39, 42, 45}


def test_flips():
    x = torch.randint(256, (400, 3, 4, 6), generator=seeded(1), dtype=torch.uint8)
    before = x.clone()
    y = augment(x, True, 0, 0)
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    assert (mirrored | (y == x).flatten(1).all(1)).all()
    assert 150 < mirrored.sum() < 250
    assert torch.equal(x, before) and y.dtype == torch.uint8
    assert torch.equal(y, augment(x, True, 0, 0)) and not torch.equal(y, augment(x, True, 0, 2))
    assert torch.equal(augment(x, False, 0, 0), x)


def test_shifts():
    x = torch.randint(256, (200, 2, 6, 7), generator=seeded(1), dtype=torch.uint8)
    before = x.clone()
    y = augment(x, False, 2, 0)
    assert y.shape == x.shape and y.dtype == torch.uint8 and torch.equal(x, before)
    padded = torch.nn.functional.pad(x.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    moves = {}
    for down, right in itertools.product(range(5), repeat=2):
        window = padded[:, :, down : down + 6, right : right + 7]
        for i in (y == window).flatten(1).all(1).nonzero().flatten().tolist():
            moves[i] = (down, right)
    assert len(moves) == 200  # each image is moved as a whole, by no more than 2
    assert len(set(moves.values())) == 25  # in every way there is
    assert torch.equal(augment(x[7:12], False, 2, 0, 7), y[7:12])

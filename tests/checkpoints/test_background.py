"""Tensors that a thread writes while they change."""

import threading

import pytest
import torch

from flowtrain.checkpoints import background as module
from flowtrain.checkpoints.background import THREAD, Background, memory_of_copy
from flowtrain.errors import RunError

WAIT = 30  # seconds after which a test fails


def tensors():
    return {
        "weight": torch.arange(12.0).view(3, 4).t(),  # not contiguous
        "order": torch.arange(5),
        "flag": torch.tensor(True),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
    }


class Writes:
    """A function that writes: it keeps what it was given, when it may go on."""

    def __init__(self):
        self.begun, self.may = threading.Event(), threading.Event()
        self.found, self.addresses, self.threads = [], [], []

    def __call__(self, given):
        self.threads.append(threading.current_thread().name)
        self.begun.set()
        assert self.may.wait(WAIT)
        self.found.append({name: tensor.clone() for name, tensor in given.items()})
        self.addresses.append([tensor.data_ptr() for tensor in given.values()])


def test_what_is_written_is_what_was_there():
    background, write, changing = Background(), Writes(), tensors()
    for number in range(2):
        before = {name: tensor.clone() for name, tensor in changing.items()}
        write.may.clear()
        background.start(changing, write)
        assert write.begun.wait(WAIT)
        for name in ("weight", "order", "half"):
            changing[name] += 1
        write.may.set()
        background.finish()
        found = write.found[number]
        assert found.keys() == before.keys()
        for name, tensor in before.items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    assert all(name.startswith(THREAD) for name in write.threads)
    assert write.addresses[0] == write.addresses[1]  # the memory was kept


def test_other_tensors_get_other_memory():
    background, write = Background(), Writes()
    write.may.set()
    for given in (tensors(), {"other": torch.ones(7)}, tensors()):
        background.start(given, write)
    background.finish()
    assert [[*found] for found in write.found] == [[*tensors()], ["other"], [*tensors()]]


def test_one_after_the_other():
    background, first, second = Background(), Writes(), Writes()
    background.start(tensors(), first)
    releasing = threading.Timer(0.05, first.may.set)
    releasing.start()
    background.start(tensors(), second)
    assert len(first.found) == 1
    second.may.set()
    background.wait()
    assert len(second.found) == 1


def failing(given):
    raise RunError("the disk is full")


def test_an_error_is_raised_once():
    background = Background()
    background.raise_error()  # nothing was written
    write = Writes()
    background.start(tensors(), write)
    background.raise_error()  # does not wait
    assert write.found == []
    write.may.set()
    background.start(tensors(), failing)
    background.wait()  # raises nothing
    with pytest.raises(RunError, match="the disk is full"):
        background.raise_error()
    background.raise_error()
    background.finish()
    background.start(tensors(), failing)
    with pytest.raises(RunError, match="the disk is full"):
        background.start(tensors(), failing)
    background.finish()


def test_without_memory_for_a_copy_it_is_written_at_once(monkeypatch, capsys):
    free = 2 * memory_of_copy(tensors(), 2**40)
    monkeypatch.setattr(module.capacity, "left", lambda device: free - 1)
    background, write, given = Background(), Writes(), tensors()
    write.may.set()
    for _ in range(2):
        background.start(given, write)
    assert write.threads == [threading.current_thread().name] * 2
    assert write.addresses[0] == [tensor.data_ptr() for tensor in given.values()]  # no copy
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("waits while a checkpoint is written: 0.00 GiB of memory are left") == 1
    monkeypatch.setattr(module.capacity, "left", lambda device: free)
    background.start(given, write)
    background.finish()
    assert write.threads[-1].startswith(THREAD)

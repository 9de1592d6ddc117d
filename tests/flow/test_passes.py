"""How many images a pass takes at a time, by the memory that it needs."""

import pytest
import torch
from catalogue import TINY
from helpers import CPU, images, seeded, tiny_flow

from flowtrain.flow import passes
from flowtrain.flow.passes import fitting_batch_size, largest_activation, sampling_batch_size
from flowtrain.system import capacity


def test_the_batch_is_chosen_by_memory(monkeypatch):
    """Samples take half of the memory that is left, and no more than likelihoods do."""
    glow = tiny_flow("glow")
    of_an_image = passes.ALIVE * largest_activation(glow)
    assert fitting_batch_size(glow) == passes.LARGEST_BATCH
    sizes = []
    for free in (0, 2 * of_an_image, 31 * of_an_image, 2**40):
        monkeypatch.setattr(capacity, "available", lambda device, free=free: free)
        sizes.append(sampling_batch_size(glow))
    assert sizes == [1, 1, 8, passes.LARGEST_BATCH]
    sizes.clear()
    for budget in (1, 4 * of_an_image, 8 * of_an_image - 1, 2**19):
        monkeypatch.setattr(passes, "ENOUGH_FOR_A_CPU", budget)
        sizes.append(fitting_batch_size(glow))
        assert sampling_batch_size(glow) == sizes[-1]
    assert sizes[:3] == [1, 4, 4]
    assert fitting_batch_size(tiny_flow("glow", width=24)) == sizes[3] // 4


def test_a_sequential_inverse_takes_more_at_a_time_on_a_cpu(monkeypatch):
    flow = tiny_flow("maf")
    of_an_image = passes.ALIVE * largest_activation(flow)
    monkeypatch.setattr(capacity, "available", lambda device: 2**40)
    monkeypatch.setattr(passes, "ENOUGH_FOR_A_CPU", 2 * of_an_image)
    assert sampling_batch_size(flow) == passes.LARGEST_BATCH
    monkeypatch.setattr(capacity, "total", lambda: 4 * 16 * of_an_image)
    assert sampling_batch_size(flow) == 16
    monkeypatch.setattr(capacity, "available", lambda device: 2 * 8 * of_an_image)
    assert sampling_batch_size(flow) == 8


@pytest.mark.run  # takes seconds
@pytest.mark.parametrize("model", [name for name in TINY if name != "cnf"])
def test_the_estimate_is_that_of_both_directions(model):
    """A pass needs no more than half as much again, for which the budgets leave room."""
    flow = tiny_flow(model, shape=(1, 8, 8)).eval().requires_grad_(False)
    x, z = images(64, flow.shape), flow.draw_latents(64, seeded())

    def bytes_of_an_image(run):
        many, few = (max(capacity.moments(lambda n=n: run(n), CPU)) for n in (64, 32))
        return (many - few) / 32

    estimate = 1.5 * passes.ALIVE * largest_activation(flow)
    assert 0 < bytes_of_an_image(lambda n: flow.decode(z[:n])) < estimate
    assert 0 < bytes_of_an_image(lambda n: flow(x[:n], torch.rand(n, *flow.shape))) < 1.1 * estimate

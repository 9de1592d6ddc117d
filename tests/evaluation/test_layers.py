"""Scales of the layers by name, and the first value that is not finite."""

import math

import torch
from catalogue import VARIATIONAL
from helpers import images, seeded, tiny_flow
from torch import nn

from flowtrain.evaluation.layers import first_non_finite, log_scale_ranges


def test_layers_are_named_those_of_the_noise_too():
    flow = tiny_flow(scale=0.05, noise=VARIATIONAL)
    small = tiny_flow("planar", (1, 1, 1), scale=0.05, noise=VARIATIONAL)
    x, noise = images(4, flow.shape), torch.rand((4, *flow.shape), generator=seeded())
    # of a single pixel a checkerboard keeps all, or nothing
    for each, count in ((flow, 4), (small, 2)):
        part = (slice(None), slice(None), *(slice(side) for side in each.shape[1:]))
        ranges = log_scale_ranges(each, x[part], noise[part])
        assert sum(name.startswith("dequantizer.noise_model.flow.") for name in ranges) == count
        assert all(low <= high for low, high in ranges.values())
    assert any(low < high for low, high in ranges.values())
    name = "dequantizer.noise_model.context.0"
    weight = flow.get_parameter(f"{name}.weight")
    assert first_non_finite(flow, x, noise) is None
    # It comes before the bijection, and so its gradient after.
    weight.grad = torch.full_like(weight, math.nan)
    assert first_non_finite(flow, x, noise) == f"gradient of {name}.weight"
    for parameter in flow.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert first_non_finite(flow, x, noise).startswith("gradient of bijection.")
    for value, found in ((3e38, f"output of {name}"), (math.nan, f"parameter {name}.weight")):
        nn.init.constant_(weight, value)
        assert first_non_finite(flow, x, noise) == found

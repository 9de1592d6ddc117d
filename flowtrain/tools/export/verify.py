"""Whether the graphs in files compute the same as the flow, on images and on random ones."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowtrain.errors import RunError
from flowtrain.flow.flow import Flow
from flowtrain.system.random import Stream, uniform
from flowtrain.tools.export.formats import Run
from flowtrain.tools.export.graphs import Graph, graphs_of

RANDOM = "random images"
BATCH_ENDS = (1, 3, 8)  # of the first batches, of 1, 2 and 5; the rest is one more
# Two float32 computations of one function differ by their rounding errors. Torch's error
# is measured against float64. Another order of sums or another exponential function has an error of
# the same size, and the largest of a few images varies: three times as much, and torch's own.
TIMES = 4
# By chance torch's error is zero. A sum of a few thousand terms, added up in blocks, is exact to
# about 16 roundings of 2**-24 relative to the terms.
ROUNDING = 2.0**-20


@dataclass(frozen=True)
class Check:
    """A difference between a file and torch.

    graph: the name of the graph, or `decode(encode(x))`.
    inputs: the kind of images.
    difference: the largest of all images, in `unit`.
    bound: the largest that rounding explains.
    """

    graph: str
    inputs: str
    difference: float
    bound: float
    unit: str

    def __str__(self) -> str:
        return (
            f"{self.graph} of {self.inputs}: the largest difference is {self.difference:.2g} "
            f"{self.unit}, the bound {self.bound:.2g}"
        )

    def require(self) -> None:
        """Raises `RunError` for a difference above the bound, or NaN."""
        if not self.difference <= self.bound:
            raise RunError(f"{self}, by float32 rounding: nothing is written")


@torch.no_grad()
def checks(
    flow: Flow, graphs: list[Graph], runs: Mapping[str, Run], x: Tensor, kind: str
) -> Iterator[Check]:
    """Compares files with the flow, on images `x` `(B, C, H, W)` of a kind, or on points. Of
    `RANDOM` images, only finite results count.
    """
    precise = graphs_of(copy.deepcopy(flow).double(), "")[0]
    tensors = {"x": x, "noise": uniform(x.shape, 0, Stream.EVALUATION)}
    for graph, exact in zip(graphs, precise, strict=True):
        if graph.name == "decode":
            continue
        inputs = {name: tensors[name] for name in graph.inputs}
        own, truth = (each.function(*inputs.values())[-1] for each in (graph, exact))
        finite = torch.ones_like(truth, dtype=torch.bool)
        if kind == RANDOM:  # on noise, a scale may overflow in torch
            finite = truth.isfinite() & own.isfinite()
        found, own, truth = (
            each[finite] for each in (_in_batches(runs[graph.name], inputs), own, truth)
        )
        bound = TIMES * _largest(own - truth) + ROUNDING * _largest(truth)
        unit = {"bits_per_dim": "bits/dim", "log_prob": "nats"}.get(
            graph.outputs[-1], "in a latent"
        )
        yield Check(graph.name, kind, _largest(found - own), bound, unit)


@torch.no_grad()
def round_trip(flow: Flow, runs: Mapping[str, Run], x: Tensor, kind: str) -> Check:
    """Compares `decode(encode(x))` of files with `x`. No level may change unless `TIMES` the
    rounding error of torch's own round trip takes it out of its bin. Points may move by rounding.
    """
    found = _in_batches(runs["decode"], {"z": _in_batches(runs["encode"], {"x": x})})
    z, _ = flow.bijection(flow.dequantizer.middle(x), flow.conditioning(len(x)))
    own = flow.dequantizer.to_unit(flow.bijection.inverse(z, flow.conditioning(len(x)))[0])
    if flow.num_bins is None:
        bound = TIMES * _largest(own - x) + ROUNDING * _largest(x)
        return Check("decode(encode(x))", kind, _largest(found - x), bound, "in a coordinate")
    bound = TIMES * _largest(own * flow.num_bins - (x + 0.5)) + 0.5
    difference = _largest(found.float() - x.float())
    levels = math.floor(bound) if math.isfinite(bound) else math.nan
    return Check("decode(encode(x))", kind, difference, levels, "levels")


def _in_batches(run: Run, inputs: Mapping[str, Tensor]) -> Tensor:
    """The last output of a function, in batches of several sizes."""
    parts = zip(*(each.tensor_split(BATCH_ENDS) for each in inputs.values()), strict=True)
    named = (dict(zip(inputs, map(Tensor.numpy, part), strict=True)) for part in parts)
    found = [run(each)[-1] for each in named if all(map(len, each.values()))]
    return torch.from_numpy(np.concatenate(found))


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0

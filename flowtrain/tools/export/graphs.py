"""The graphs of a flow: functions of tensors alone, which `torch.export` can trace."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Direction
from flowtrain.bijections.execution import Fused
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow

EXAMPLES = 2  # images in a traced batch; torch takes a batch of 1 for a constant


class FusedOnce(Fused):
    """Fuses each chain in its first call alone. A graph traced after that has the matrices of the
    layers instead of the operations that compute them, such as the inverse of a matrix.
    """

    def __init__(self) -> None:
        self.chains: dict[tuple[Direction, tuple[Bijection, ...]], Sequence[Bijection]] = {}

    def prepared(self, layers: Sequence[Bijection], direction: Direction) -> Sequence[Bijection]:
        key = direction, tuple(layers)
        if key not in self.chains:
            self.chains[key] = super().prepared(layers, direction)
        return self.chains[key]


class _OfFlow(nn.Module):
    def __init__(self, flow: Flow):
        super().__init__()
        self.flow, self.executor = flow, FusedOnce()


class _LogProb(_OfFlow):
    """The bound on log P(x) in nats, `(B,)`, and the same in bits per dimension if there are bits.

    `noise` is uniform in [0, 1). Exact likelihoods have none.
    """

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        if noise is None:
            noise = torch.full_like(x, 0.5, dtype=self.flow.dtype)
        log_prob = self.flow(x, noise, executor=self.executor).total
        return (log_prob,) if self.flow.kind.no_bits else (log_prob, self.flow.loss(log_prob))


class _Encode(_OfFlow):
    """The latents at the middle of each bin, `(B, D)`."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        v = self.flow.dequantizer.middle(x, self.flow.dtype)
        context = self.flow.conditioning(x.shape[0])
        return self.flow.bijection.run(self.executor, "forward", v, context)[:1]


class _Decode(_OfFlow):
    """Latents `(B, D)` to images, uint8 `(B, C, H, W)`, or to points."""

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        context = self.flow.conditioning(z.shape[0])
        v, _ = self.flow.bijection.run(self.executor, "inverse", z, context)
        return (self.flow.dequantizer.to_data(v),)


@dataclass(frozen=True)
class Graph:
    """A function, and its tensors by their names. `(B, ...)` all have one B."""

    name: str
    function: nn.Module
    inputs: dict[str, Tensor]  # an example of each
    outputs: tuple[str, ...]

    @torch.no_grad()
    def program(self) -> torch.export.ExportedProgram:
        """The traced function, for batches of any size."""
        self.function(*self.inputs.values())
        batch = torch.export.Dim("batch")
        return torch.export.export(
            self.function,
            tuple(self.inputs.values()),
            dynamic_shapes=tuple({0: batch} for _ in self.inputs),
        )


def graphs_of(flow: Flow, name: str) -> tuple[list[Graph], dict[str, str]]:
    """The graphs of a flow, and the reasons why others are left out, by their names.

    Raises `UserError` that begins with the model's `name` if its likelihood is no graph.
    """
    if "forward" in flow.bijection.untraceable_directions():
        raise UserError(
            f"{name}: its likelihood takes as many steps as the values need, and a graph has a "
            f"fixed number"
        )
    x = flow.kind.random((EXAMPLES, *flow.shape), torch.Generator().manual_seed(0))
    noise = {} if flow.exact else {"noise": torch.full(x.shape, 0.5)}
    bits = () if flow.kind.no_bits else ("bits_per_dim",)
    graphs = [Graph("log_prob", _LogProb(flow), {"x": x, **noise}, ("log_prob", *bits))]
    sequential = "it computes one entry after the other"
    if flow.bijection.is_discrete:
        return graphs, {"encode": f"like decode, {sequential}", "decode": sequential}
    graphs.append(Graph("encode", _Encode(flow), {"x": x}, ("z",)))
    if flow.bijection.inverse_is_sequential:
        return graphs, {"decode": sequential}
    z = torch.zeros(EXAMPLES, flow.latent_dims)
    return [*graphs, Graph("decode", _Decode(flow), {"z": z}, ("x",))], {}

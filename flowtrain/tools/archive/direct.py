"""A flow that has the distribution of each level, as an exact map between images and bits.

A causal flow (`bijections/ordinal.py`) gives the probability of each level, given the levels before
it. So an entropy coder codes the levels themselves. Nothing is borrowed, no noise is drawn, and the
first image costs as little as any other.

A level is two choices: that of its group, and that of the level within the group. Encoder and
decoder compute both distributions by the same operations on tensors of the same shapes, so they
have the same numbers, bit for bit, as long as they code the same images together.
"""

import copy

import torch
from torch import Tensor

from flowtrain.bijections.discretized import Entry
from flowtrain.bijections.ordinal import discrete_model
from flowtrain.flow.flow import Flow
from flowtrain.tools.archive.codec import levels_of
from flowtrain.tools.archive.format import checksum
from flowtrain.tools.archive.stack import Stack


class DirectCodec:
    """See `Coder`. Raises `UserError` for a model with classes or with a context."""

    borrows = False
    # More images take less time for each, but more memory, and there are fewer streams for threads.
    chunk = stream = 128
    checked = 128  # four bytes for each image would be 0.3% of an archive of CIFAR-10

    def __init__(self, flow: Flow):
        self.levels = levels_of(flow)
        self.shape, self.dims = flow.shape, flow.dims
        model = discrete_model(copy.deepcopy(flow.bijection).cpu().eval().requires_grad_(False))
        assert model is not None
        self.model = model

    def encode(self, x: Tensor, stack: Stack) -> None:
        for choice, probabilities in reversed(self._choices(x)):
            stack.push_choice(choice, probabilities)

    def decode(self, count: int, stack: Stack) -> Tensor:
        def next_level(entry: Entry, index: int) -> Tensor:
            group = stack.pop_choice(_probabilities(entry.groups()))
            return entry.join(group, stack.pop_choice(_probabilities(entry.within(group))))

        return self.model.in_order(next_level, count).to(torch.uint8)

    def fingerprint(self, x: Tensor) -> int:
        return checksum(torch.cat([part.flatten() for _, part in self._choices(x)]))

    def _choices(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The choices `(B,)` that make up the images, and the probabilities of the options
        `(B, N)`.
        """
        levels = x.flatten(1).T.long().contiguous()
        choices = []

        def next_level(entry: Entry, index: int) -> Tensor:
            group, inner = entry.split(levels[index])
            choices.append((group, _probabilities(entry.groups())))
            choices.append((inner, _probabilities(entry.within(group))))
            return levels[index]

        self.model.in_order(next_level, len(x))
        return choices


def _probabilities(edges: Tensor) -> Tensor:
    """From F, `(N + 1, B)`, relative probabilities `(B, N)`."""
    return edges.diff(dim=0).T.contiguous()

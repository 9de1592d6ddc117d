"""Exact maps between images and bits on a stack: one for continuous flows, one for causal flows.

**Local bits-back coding** (Ho, Lohn & Abbeel 2019) codes with a continuous flow, layer by layer. A
layer that stretches space by |det J| takes `log2 |det J|` bits off the stack, as noise below the
resolution of its output. A layer that shrinks space puts as many bits there. The noise is uniform
within one cell of the grid (Zhang et al. 2021, "iFlow"), not Gaussian as in the paper. So whole
shifts take no bits, less is borrowed at the start, and each layer is a bijection of values and
stack together.

All values are whole numbers, int64, in units of `2**-bits`. Networks compute in float64, for each
image by itself, and their predictions are rounded to `2**-PREDICTED_BITS`. So neither batch nor
threads change an archive.

**Direct coding**: a causal flow (`bijections/ordinal.py`) gives the probability of each level,
given the levels before it. So an entropy coder codes the levels themselves, and nothing is
borrowed. A level is two choices: its group, and the level within the group. Encoder and decoder
compute both distributions by the same operations on tensors of the same shapes, so the numbers are
equal bit for bit if the same images are coded together.
"""

import copy
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from flowtrain.bijections.discretized import Entry
from flowtrain.bijections.orders import order_context
from flowtrain.bijections.ordinal import OrdinalAutoregressive, discrete_model
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow
from flowtrain.flow.variational import VariationalNoise
from flowtrain.tools.archive.format import checksum
from flowtrain.tools.archive.rules import rule
from flowtrain.tools.archive.stack import Stack, random_words, require, scale, unscale, whole

PROBE = 2  # images
PARTS = 2**12  # of a level; the noise in a level is one of them
GROUP_BITS = 2  # the dequantizer's map is linear within groups of 2**2 parts
DATA_BITS = 20  # precision of the data path
# A latent further out, in standard deviations, cannot be coded. None takes more than 24 bits and a
# few.
LATENT_REACH = 64

# Variational noise: its precision before it is squeezed into its level (a part is ten units or
# more), the reach of its normal numbers, and the reach of its flow's output.
NOISE_BITS = 14
NOISE_REACH = 6
SQUEEZED_REACH = 16


class Coder(ABC):
    """A flow as an exact map between images and bits on a stack, computed on the CPU.

    The same images, coded together in the same order by one thread of torch, give the same bits.
    Raises `UserError` for a model of real values or noisy images, with classes, or with a context.
    """

    borrows: bool  # whether coding takes bits off the stack, which the first images must give
    chunk: int  # images coded together, at most
    stream: int  # images on one stack, at most
    checked: int  # images with one checksum in the archive

    def __init__(self, flow: Flow):
        flow.require_no_context("compress (an archive has no context)")
        if flow.num_bins is not None and flow.kind.no_bits:
            raise UserError(f"compress: {flow.kind.no_bits}, and no code")
        if flow.classes:
            raise UserError(
                f"compress: the model is class-conditional (model.classes is {flow.classes}): no "
                f"coding rule"
            )
        self.num_bins = flow.kind.require_bins(
            "compress: a model of real-valued data has no bits without loss"
        )
        self.shape, self.dims = flow.shape, flow.dims

    @abstractmethod
    def encode(self, x: Tensor, stack: Stack, sides: Tensor | None = None) -> None:
        """Puts images, uint8 `(B, C, H, W)`, onto the stack. They are turned to `sides` `(B,)`, by
        default to the first one.

        Raises `Uncodable` and `Exhausted`, after which the stack is useless.
        """

    @abstractmethod
    def decode(self, count: int, stack: Stack, sides: Tensor | None = None) -> Tensor:
        """The inverse of `encode`: takes images off the stack, uint8 `(count, C, H, W)`.

        It may raise almost anything if it computes other numbers than `encode` did.
        """

    @abstractmethod
    def fingerprint(self, x: Tensor) -> int:
        """A checksum of the model's results for images."""

    def probe(self) -> int:
        """The fingerprint of fixed images: it differs if a machine computes other numbers."""
        channels, height, width = self.shape
        ramp = torch.arange(height)[:, None] + torch.arange(width) * 2
        level = torch.arange(PROBE * channels).view(PROBE, channels, 1, 1) * 3
        images = ((ramp + level) * self.num_bins // (4 * (height + width))) % self.num_bins
        return self.fingerprint(images.to(torch.uint8))


def coder_of(flow: Flow) -> Coder:
    """The coder of a flow. Raises `UserError` as `Coder` does, and for a layer without a rule."""
    layer = discrete_model(flow.bijection)
    return Codec(flow) if layer is None else DirectCodec(flow, layer)


class Variational:
    """The variational noise of levels `(B, C, H, W)`: a part in `[0, PARTS)`, made by a flow.

    The normal distribution function at its end is a table of bins, uniform within a bin.
    """

    def __init__(self, noise_model: VariationalNoise, num_bins: int):
        self.model = noise_model
        self.num_bins = num_bins
        self.flow = rule(noise_model.flow, NOISE_BITS)
        quantiles = torch.special.ndtri(torch.arange(1, PARTS, dtype=torch.float64) / PARTS)
        reach = torch.tensor([SQUEEZED_REACH * 2**NOISE_BITS])
        self.edges = torch.cat([-reach, whole(quantiles, NOISE_BITS), reach])

    def _context(self, x: Tensor) -> Tensor:
        scaled = self.model.squeeze(x.double() / self.num_bins - 0.5)[0]
        return torch.cat([self.model.context(each[None]) for each in scaled])

    def pop(self, x: Tensor, stack: Stack) -> Tensor:
        eps = stack.pop_normal(tuple(self.model.squeeze(x)[0].shape), NOISE_BITS, NOISE_REACH)
        w = self.flow.forward(eps, self._context(x), stack)
        require((w >= self.edges[0]) & (w < self.edges[-1]))
        part = torch.searchsorted(self.edges, w, right=True) - 1
        stack.push(w - self.edges[part], self.edges[part + 1] - self.edges[part])
        return self.model.squeeze.inverse(part)[0]

    def push(self, part: Tensor, x: Tensor, stack: Stack) -> None:
        part = self.model.squeeze(part)[0]
        w = self.edges[part] + stack.pop(self.edges[part + 1] - self.edges[part])
        stack.push_normal(self.flow.inverse(w, self._context(x), stack), NOISE_BITS, NOISE_REACH)


class Codec(Coder):
    """Local bits-back coding. Raises `UserError` for a layer without a rule, too."""

    borrows = True
    chunk = 16
    stream = 1000
    checked = 1

    def __init__(self, flow: Flow):
        super().__init__(flow)
        flow = copy.deepcopy(flow).to("cpu", torch.float64).eval().requires_grad_(False)
        noise = flow.dequantizer.noise_model
        self.noise = None
        if isinstance(noise, VariationalNoise):
            self.noise = Variational(noise, self.num_bins)
        # The dequantizer's map at each group's lower edge: `middle(x)` is its value at x + 1/2.
        groups = torch.arange(self.num_bins * PARTS // 2**GROUP_BITS + 1, dtype=torch.float64)
        edges = flow.dequantizer.middle(groups * 2**GROUP_BITS / PARTS - 0.5, torch.float64)
        self.edges = whole(edges, DATA_BITS)
        self.flow = rule(flow.bijection, DATA_BITS)

    def encode(self, x: Tensor, stack: Stack, sides: Tensor | None = None) -> None:
        stack.push_normal(self._latents(x, stack), DATA_BITS, LATENT_REACH)

    def _latents(self, x: Tensor, stack: Stack) -> Tensor:
        """Images to latents, `(B, D)` int64: `encode` without its last step."""
        x, noise = x.long(), self.noise
        part = stack.pop(torch.full_like(x, PARTS)) if noise is None else noise.pop(x, stack)
        y = x * PARTS + part
        group = y >> GROUP_BITS
        v = self.edges[group] + scale(y - (group << GROUP_BITS), *self._slope(group), stack)
        return self.flow.forward(v, None, stack)

    def decode(self, count: int, stack: Stack, sides: Tensor | None = None) -> Tensor:
        z = stack.pop_normal((count, self.dims), DATA_BITS, LATENT_REACH)
        v = self.flow.inverse(z, None, stack)
        require((v >= self.edges[0]) & (v < self.edges[-1]))
        group = torch.searchsorted(self.edges, v, right=True) - 1
        y = (group << GROUP_BITS) + unscale(v - self.edges[group], *self._slope(group), stack)
        x = y.div(PARTS, rounding_mode="floor")
        if self.noise is None:
            stack.push(y - x * PARTS, torch.full_like(x, PARTS))
        else:
            self.noise.push(y - x * PARTS, x, stack)
        return x.to(torch.uint8)

    def fingerprint(self, x: Tensor) -> int:
        stack = Stack(random_words(4 * x.numel()))
        z = self._latents(x, stack)
        return checksum(z) ^ checksum(torch.from_numpy(stack.words().astype(np.int64)))

    def _slope(self, group: Tensor) -> tuple[Tensor, Tensor]:
        return self.edges[group + 1] - self.edges[group], torch.tensor(2**GROUP_BITS)


class DirectCodec(Coder):
    """Direct coding with the probabilities of a causal flow's layer."""

    borrows = False
    # More images take less time for each, but more memory, and there are fewer streams for threads.
    chunk = stream = 128
    checked = 128  # four bytes for each image would be 0.3% of an archive of CIFAR-10

    def __init__(self, flow: Flow, layer: OrdinalAutoregressive):
        super().__init__(flow)
        self.layer = copy.deepcopy(layer).cpu().eval().requires_grad_(False)

    def encode(self, x: Tensor, stack: Stack, sides: Tensor | None = None) -> None:
        for choice, probabilities in reversed(self._choices(x, sides)):
            stack.push_choice(choice, probabilities)

    def decode(self, count: int, stack: Stack, sides: Tensor | None = None) -> Tensor:
        def next_level(entry: Entry, index: int) -> Tensor:
            group = stack.pop_choice(_probabilities(entry.groups()))
            return entry.join(group, stack.pop_choice(_probabilities(entry.within(group))))

        return self.layer.in_order(next_level, count, self._context(sides)).to(torch.uint8)

    def fingerprint(self, x: Tensor) -> int:
        return checksum(torch.cat([part.flatten() for _, part in self._choices(x)]))

    def _context(self, sides: Tensor | None) -> Tensor | None:
        orders = self.layer.conditioner.orders
        return None if sides is None or orders == 1 else order_context(sides, orders).float()

    def _choices(self, x: Tensor, sides: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """The choices `(B,)` of the images, and the probabilities of their options `(B, N)`."""
        levels = x.flatten(1).T.long().contiguous()
        choices = []

        def next_level(entry: Entry, index: int) -> Tensor:
            group, inner = entry.split(levels[index])
            choices.append((group, _probabilities(entry.groups())))
            choices.append((inner, _probabilities(entry.within(group))))
            return levels[index]

        self.layer.in_order(next_level, len(x), self._context(sides))
        return choices


def _probabilities(edges: Tensor) -> Tensor:
    """From F, `(N + 1, B)`, relative probabilities `(B, N)`."""
    return edges.diff(dim=0).T.contiguous()

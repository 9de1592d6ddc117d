"""A flow as an exact map between images and bits on a stack: local bits-back coding in whole
numbers.

Local bits-back coding (Ho, Lohn & Abbeel 2019, "Compression with Flows via Local Bits-Back Coding")
codes with a continuous flow, layer by layer. A layer that stretches space by |det J| takes `log2
|det J|` bits off the stack, as noise below the resolution of its output. A layer that shrinks space
puts as many bits there.

The paper's noise is Gaussian, far wider than the grid of the values, and each layer is linearized
within its reach. Here the noise is uniform within one cell of the grid (Zhang et al. 2021, "iFlow:
Numerically Invertible Flows for Efficient Lossless Compression via a Uniform Coder"). Whole shifts
(additive couplings, the triangular factors of a 1x1 convolution) then take no bits at all, less is
borrowed at the start, and each layer is a bijection of values and stack together.

All values are whole numbers, int64, in units of `2**-bits`. Networks compute in float64, for each
image by itself, and what they predict is rounded to `2**-PREDICTED_BITS` before it is used. So
neither batch nor threads change an archive.
"""

import copy

import numpy as np
import torch
from torch import Tensor

from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow
from flowtrain.flow.variational import VariationalNoise
from flowtrain.tools.archive.format import checksum
from flowtrain.tools.archive.rules import rule
from flowtrain.tools.archive.stack import Stack, random_words, require, scale, unscale, whole

PARTS = 2**12  # of a level; the noise in a level is one of them
GROUP_BITS = 2  # the dequantizer's map is linear within groups of 2**2 parts
DATA_BITS = 20  # precision of the data path
# A latent further out, in standard deviations, cannot be coded. None takes more than 24 bits and a
# few.
LATENT_REACH = 64

# Variational noise: its precision before it is squeezed into its level (a part is ten units or
# more), the reach of the normal numbers that it is made of, and that of what its flow makes of
# them.
NOISE_BITS = 14
NOISE_REACH = 6
SQUEEZED_REACH = 16


class Uniform:
    """Uniform noise."""

    def pop(self, x: Tensor, stack: Stack) -> Tensor:
        """Draws from the stack the noise of levels `(B, C, H, W)`: a part of each, in `[0,
        PARTS)`.
        """
        return stack.pop(torch.full_like(x, PARTS))

    def push(self, part: Tensor, x: Tensor, stack: Stack) -> None:
        """The inverse: the noise, given the levels, goes back onto the stack."""
        stack.push(part, torch.full_like(x, PARTS))


class Variational:
    """Noise that a flow makes of normal numbers, given the image.

    The normal distribution function, which comes last, is a table of bins of these numbers. Within
    a bin they are uniform.
    """

    def __init__(self, noise_model: VariationalNoise, levels: int):
        self.model = noise_model
        self.levels = levels
        self.flow = rule(noise_model.flow, NOISE_BITS)
        quantiles = torch.special.ndtri(torch.arange(1, PARTS, dtype=torch.float64) / PARTS)
        reach = torch.tensor([SQUEEZED_REACH * 2**NOISE_BITS])
        self.edges = torch.cat([-reach, whole(quantiles, NOISE_BITS), reach])

    def _context(self, x: Tensor) -> Tensor:
        scaled = self.model.squeeze(x.double() / self.levels - 0.5)[0]
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


def levels_of(flow: Flow) -> int:
    """Q. Raises `UserError` for a model of real-valued data or of noisy images, with classes, or
    with a context.
    """
    flow.require_no_context("compress (an archive has no context)")
    if flow.levels is not None and flow.kind.no_bits:
        raise UserError(f"compress: {flow.kind.no_bits}, and no code")
    if flow.classes:
        raise UserError(
            f"compress: the model is class-conditional (model.classes is {flow.classes}): no "
            f"coding rule"
        )
    return flow.kind.require_levels(
        "compress: a model of real-valued data has no bits without loss"
    )


class Codec:
    """See `Coder`.

    Raises `UserError` where a layer has no rule, and for a model of real-valued data or with
    classes.
    """

    borrows = True
    chunk = 16
    stream = 1000
    checked = 1

    def __init__(self, flow: Flow):
        self.levels = levels_of(flow)
        self.shape, self.dims = flow.shape, flow.dims
        flow = copy.deepcopy(flow).to("cpu", torch.float64).eval().requires_grad_(False)
        noise = flow.dequantizer.noise_model
        self.noise = (
            Variational(noise, self.levels) if isinstance(noise, VariationalNoise) else Uniform()
        )
        # The dequantizer's map at each group's lower edge: `middle(x)` is its value at x + 1/2.
        groups = torch.arange(self.levels * PARTS // 2**GROUP_BITS + 1, dtype=torch.float64)
        edges = flow.dequantizer.middle(groups * 2**GROUP_BITS / PARTS - 0.5, torch.float64)
        self.edges = whole(edges, DATA_BITS)
        self.flow = rule(flow.bijection, DATA_BITS)

    def encode(self, x: Tensor, stack: Stack) -> None:
        stack.push_normal(self.latents(x, stack), DATA_BITS, LATENT_REACH)

    def latents(self, x: Tensor, stack: Stack) -> Tensor:
        """Images to latents, `(B, D)` int64: `encode` without its last step."""
        x = x.long()
        y = x * PARTS + self.noise.pop(x, stack)
        group = y >> GROUP_BITS
        v = self.edges[group] + scale(y - (group << GROUP_BITS), *self._slope(group), stack)
        return self.flow.forward(v, None, stack)

    def decode(self, count: int, stack: Stack) -> Tensor:
        z = stack.pop_normal((count, self.dims), DATA_BITS, LATENT_REACH)
        v = self.flow.inverse(z, None, stack)
        require((v >= self.edges[0]) & (v < self.edges[-1]))
        group = torch.searchsorted(self.edges, v, right=True) - 1
        y = (group << GROUP_BITS) + unscale(v - self.edges[group], *self._slope(group), stack)
        x = y.div(PARTS, rounding_mode="floor")
        self.noise.push(y - x * PARTS, x, stack)
        return x.to(torch.uint8)

    def fingerprint(self, x: Tensor) -> int:
        stack = Stack(random_words(4 * x.numel()))
        z = self.latents(x, stack)
        return checksum(z) ^ checksum(torch.from_numpy(stack.words().astype(np.int64)))

    def _slope(self, group: Tensor) -> tuple[Tensor, Tensor]:
        return self.edges[group + 1] - self.edges[group], torch.full_like(group, 2**GROUP_BITS)

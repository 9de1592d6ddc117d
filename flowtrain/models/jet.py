"""Jet: A Modern Transformer-Based Normalizing Flow (Kolesnikov, Pinto & Tschannen 2024,
arXiv:2412.15129).

A chain of affine couplings over the patches of an image. Of five couplings, four split the entries
of the patches, and one splits the patches. A vision transformer sees one half, and predicts the
shift and the scale of the other. Samples take one pass.

Deliberate differences from the paper and its code:
- By default the log-scales are `2 tanh(h / 2)`. With `bounded: false` the scale is the paper's `2
  sigmoid(h)`.
- By default an ActNorm and a 1x1 convolution precede each coupling of entries, where the paper has
  a random permutation (`mixing: permutation`). PCA of the first batch sets the convolution.
- A pixel's halves are other tokens than in the code, in a coupling of patches. The transformer is
  the same.
- Images are centred in [-1/2, 1/2], where the code has [-1, 1].
- The transformer has PyTorch's GELU and an epsilon of 1e-5 in its layer norms, where the code has
  GELU by tanh and 1e-6. Its linear layers start as PyTorch starts them, not uniformly by Glorot &
  Bengio.
- The class adds to the features of the tokens. The code has attention to it.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from flowtrain.bijections import (
    ActNorm,
    AffineTransform,
    Bijection,
    Conv1x1LU,
    Coupling,
    Flatten,
    HalvePixels,
    Inverse,
    Permute,
    Sequential,
    SigmoidTransform,
)
from flowtrain.errors import UserError
from flowtrain.models.base import patches, tokens_of
from flowtrain.nets.transformer import VisionTransformer
from flowtrain.types import Positive, Shape

CHANNEL_COUPLINGS = 4  # before each coupling of patches


def build(
    shape: Shape,
    classes: int = 0,
    *,
    patch: Literal[2, 4, 8] = 4,
    width: Positive = 512,
    couplings: Positive = 32,
    layers: Positive = 2,
    mixing: Literal["whitening", "permutation"] = "whitening",
    bounded: bool = True,
) -> Bijection:
    """Jet for images. With `classes`, the networks see the class.

    Args:
        patch: Side of the square patches of an image, in pixels. It must divide both sides, and
            the number of patches must be even.
        width: Channels in the transformers. A head of attention has at least 64 of them, or all if
            there are fewer.
        couplings: Number of couplings, of which every fifth keeps half of the patches, and the
            others half of the entries of each patch.
        layers: Layers in the transformer of each coupling.
        mixing: Layer before each coupling of entries: whitening (ActNorm and a 1x1 convolution over
            the entries of a patch, initialized by PCA of the first batch), or a random permutation,
            as in the paper.
        bounded: Whether log-scales are bounded to +-2, by tanh. The paper's scales are in (0, 2).

    Raises:
        UserError: if the patches do not fill the image, or if their number is odd.
    """
    entries, *size = tokens_of(shape, patch)
    tokens = math.prod(size)
    if tokens % 2:
        raise UserError(
            f"model.patch: jet halves the patches of an image, and {shape[1]}x{shape[2]} has "
            f"{tokens} of {patch}x{patch}, an odd number: choose another patch"
        )
    chain = patches(patch)
    halves = _halves(*size)
    for i in range(couplings):
        transform = AffineTransform() if bounded else SigmoidTransform()
        outputs = transform.parameters_per_entry * entries // 2
        net = VisionTransformer(entries // 2, outputs, tokens, width, layers, classes)
        coupling = Coupling(entries // 2, net, transform)
        if (i + 1) % (CHANNEL_COUPLINGS + 1) == 0:
            first = next(halves)
            chain += [HalvePixels(first), coupling, Inverse(HalvePixels(first))]
        elif mixing == "whitening":
            chain += [ActNorm((entries, 1, 1)), Conv1x1LU(entries, "whitening"), coupling]
        else:
            chain += [Permute(torch.randperm(entries)), coupling]
    return Sequential(*chain, Flatten((entries, *size)))


def _halves(height: int, width: int) -> Iterator[Tensor]:
    """Which patches `(H, W)` the couplings of patches keep, in turn: both halves of a checkerboard,
    of vertical and of horizontal stripes, unless these cross an odd side.
    """
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    patterns = [(rows + columns) % 2]
    if width % 2 == 0:
        patterns.append((columns % 2).expand(height, width))
    if height % 2 == 0:
        patterns.append((rows % 2).expand(height, width))
    return itertools.cycle([p == kept for p in patterns for kept in (0, 1)])

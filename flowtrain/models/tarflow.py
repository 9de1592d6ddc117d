"""TarFlow: Normalizing Flows are Capable Generative Models (Zhai et al. 2024, arXiv:2412.06329).

Blocks are affine autoregressive flows over the patches of an image, in raster order and in reversed
order in turn. A causal transformer predicts the mean and the scale of a patch from those before it.

Deliberate differences from the paper and its code:
- By default the log-scales are `2 tanh(h / 2)`, and an ActNorm and a 1x1 convolution precede each
  block. The convolution mixes the entries of a token, and PCA of the first batch sets it. With
  `bounded: false` and `mixing: none` the layers are the paper's.
- Images are centred in [-1/2, 1/2], where the paper has [-1, 1].
- The mean and the log-scale have the opposite sign, and their biases start at zero.
- Where training drops labels, networks see zeros in place of a class, and the mean of the classes'
  embeddings in the code. Samples without a class are denoised by the density of all classes, a
  mixture. The code takes one pass with the mean embedding.
"""

import math
from typing import Literal

from flowtrain.bijections import (
    ActNorm,
    AffineTransform,
    Bijection,
    Conv1x1LU,
    ExponentialTransform,
    Flatten,
    Reverse,
    Sequential,
    TokenAutoregressive,
)
from flowtrain.errors import UserError
from flowtrain.models.base import patches, tokens_of
from flowtrain.nets.transformer import CausalTransformer
from flowtrain.types import Positive, Shape


def build(
    shape: Shape,
    classes: int = 0,
    *,
    patch: Literal[1, 2, 4, 8] = 4,
    width: Positive = 256,
    blocks: Positive = 8,
    layers: Positive = 4,
    mixing: Literal["whitening", "none"] = "whitening",
    bounded: bool = True,
) -> Bijection:
    """TarFlow for images. With `classes`, the networks see the class.

    Args:
        patch: Side of the square patches of an image, in pixels. It must divide both sides.
        width: Channels in the transformers. A head of attention has at least 64 of them, or all if
            there are fewer.
        blocks: Autoregressive blocks, in raster order and reversed order by turns.
        layers: Layers in the transformer of each block.
        mixing: Layer before each block: whitening (ActNorm and a 1x1 convolution over the entries
            of a patch, initialized by PCA of the first batch), or none, as in the paper.
        bounded: Whether log-scales are bounded to +-2, by tanh. The paper's are not.

    Raises:
        UserError: if the patches do not fill the image, or if there are fewer than two.
    """
    entries, *size = tokens_of(shape, patch)
    tokens = math.prod(size)
    if tokens < 2:
        raise UserError(
            f"model.name: tarflow needs at least two patches, and {shape[1]}x{shape[2]} has one "
            f"of {patch}x{patch} (model.patch)"
        )
    chain = patches(patch)
    for block in range(blocks):
        if block > 0:
            chain.append(Reverse())
        if mixing == "whitening":
            chain += [ActNorm((entries, 1, 1)), Conv1x1LU(entries, "whitening")]
        transform = AffineTransform() if bounded else ExponentialTransform()
        parameters = transform.parameters_per_entry
        net = CausalTransformer(entries, parameters, tokens, width, layers, classes)
        chain.append(TokenAutoregressive(net, transform))
    return Sequential(*chain, Flatten((entries, *size)))

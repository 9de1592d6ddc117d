"""Causal flow: an autoregressive model of the levels of an image, as a flow of one layer (Nielsen
& Winther 2020, arXiv:2002.02547, with the mixtures of Salimans et al. 2017, "PixelCNN++",
arXiv:1701.05517).

Its likelihood is exact, where other flows have a bound, and its latents are normal like theirs.
Sampling computes one entry after the other.

Deliberate differences from the papers:
- The networks see tokens of several pixels, so they have fewer places and fewer layers. A masked
  network (MADE, Germain et al. 2015) models the entries of a token. PixelCNN++ has one place for
  each pixel, and linear relations between its three colours.
- The mixtures are relative to a linear prediction of each entry, which least squares set before
  the first step. The paper's networks predict everything.
- The convolutions are plain ones with residual connections and layer normalization, without gates.
  A coarser stream, attention over all tokens and dropout are options.
- Every distribution has a small uniform part, so that no level is lost to rounding.
- The paper stacks further flows on top of this layer. Here it is the whole flow.
"""

from typing import Annotated, Literal

from pydantic import Field

from flowtrain.bijections import Bijection, OrdinalAutoregressive
from flowtrain.bijections.discretized import DiscretizedMixture
from flowtrain.errors import UserError
from flowtrain.nets.causal import CausalNet
from flowtrain.nets.prediction import LinearPrediction
from flowtrain.nets.window import Window
from flowtrain.types import NonNegative, Positive, Shape


def build(
    shape: Shape,
    num_bins: int | None,
    classes: int = 0,
    context: Shape | None = None,
    *,
    width: Positive = 128,
    blocks: Positive = 6,
    token: Literal[1, 2, 4] = 2,
    components: Positive = 5,
    units: Positive = 16,
    window: Positive = 3,
    attention: NonNegative = 0,
    pixels: bool = False,
    downsample: NonNegative = 0,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    uniform: Annotated[float, Field(ge=2.0**-12, lt=1)] = 2.0**-10,
    orders: Literal[1, 2, 4, 8] = 1,
) -> Bijection:
    """Causal flow for images with `num_bins` levels.

    The networks see the class, if there are `classes`, or an image of the shape `context`. So the
    likelihood given these is exact, too.

    Args:
        width: Channels of the convolutions.
        blocks: Residual blocks. Each sees one more token above and to each side.
        token: Side in pixels of a token, a square patch that convolutions see as one place. Any
            image size will do.
        components: Logistics in the mixture of each entry.
        units: Hidden units for each entry of a token, in each of two layers.
        window: Tokens above and to each side that the linear prediction and the first convolution
            see.
        attention: Blocks of causal self-attention over all tokens, at equal distances
            between the residual blocks.
        pixels: Whether all blocks also see the pixels of earlier tokens: convolutions in their
            window, and attention everywhere, by relative positions and with a learned temperature
            for each head.
        downsample: Residual blocks over cells of 2x2 tokens, for distant context.
            The cells of the rows above join the tokens after half of the residual blocks.
        dropout: Dropout probability in the residual blocks, for small sets and long runs.
        uniform: Weight of a uniform distribution in each mixture. A smaller one leaves less room
            for the rounding of float32 between `encode` and `decode`.
        orders: Scanning orders to learn, as turned copies of an image, each with a vector
            of its own (Jun et al. 2020, "distribution augmentation"): raster order, then mirrored;
            4 are also upside down, and 8 transposed. `--mirror` is the mixture of all.

    Raises:
        UserError: if the data are real values, if there are too few tokens to downsample, if the
            images of a model with a context are not made of whole tokens, or if classes, a context
            or images that are not square do not suit `orders`.
    """
    if num_bins is None:
        raise UserError(
            "model.name: causal is a model of the levels of images, and these data are real values"
        )
    entries = shape[0] * token**2
    size = (-(-shape[1] // token), -(-shape[2] // token))
    if downsample and size[0] < 3:
        raise UserError(
            f"model.downsample: {downsample} needs at least 3 rows of tokens, and these images "
            f"have {size[0]}: set it to 0, or use a smaller model.token"
        )
    if context is not None and (shape[1] % token or shape[2] % token):
        raise UserError(
            f"model.token: {token}, but with model.context both sides of an image must be "
            f"multiples of it, and these images have {shape[1]}x{shape[2]} pixels"
        )
    if orders > 1 and (classes or context):
        raise UserError(
            f"model.orders: {orders}, but the networks see a class or a context: leave it at 1"
        )
    if orders > 4 and shape[1] != shape[2]:
        raise UserError(
            f"model.orders: {orders} has transposed images, and these are not square "
            f"({shape[1]}x{shape[2]}): at most 4"
        )
    seen = Window(window, window, ahead=0)
    mixture = DiscretizedMixture(num_bins, components, uniform)
    start = mixture.start()
    net = CausalNet(
        *(entries, size, start, width, blocks, units, seen, classes, context),
        attention=attention,
        pixels=pixels,
        downsample=downsample,
        dropout=dropout,
        orders=orders,
    )
    prediction = LinearPrediction(entries, size, seen)
    return OrdinalAutoregressive(shape, num_bins, token, prediction, net, mixture)

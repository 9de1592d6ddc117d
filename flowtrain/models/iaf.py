"""IAF: Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al. 2016,
arXiv:1606.04934).

MAF with each autoregressive layer the other way round: samples take one pass, the density of given
data takes D steps a layer, in training too. So it is for few dimensions.

Deliberate differences from the paper: it is trained by maximum likelihood here, and not as a
posterior; else those of `flowtrain.models.maf`.
"""

from flowtrain.bijections import Bijection, Inverse
from flowtrain.models import maf


def build(
    shape: tuple[int, int, int],
    *,
    layers: maf.Positive = 5,
    width: maf.Positive = 128,
    hidden_layers: maf.Positive = 1,
    order: maf.Order = "reverse",
    transform: maf.Kind = "affine",
) -> Bijection:
    """IAF for data of `shape` (C, H, W), its entries in the order in which they are stored.

    Args:
        layers: autoregressive layers.
        width: units of a hidden layer.
        hidden_layers: of each conditioner.
        order: of the entries in the next layer: reversed, or a random permutation.
        transform: of an entry, given those of the latent before it: affine, spline or mixture.
    """
    return maf.chain(shape, layers, width, hidden_layers, order, transform, Inverse)

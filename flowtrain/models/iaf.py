"""IAF: Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al. 2016,
arXiv:1606.04934).

This is MAF with each autoregressive layer inverted. Samples take one pass. The density of given
data takes D steps per layer, also in training, so IAF suits few dimensions only.

Deliberate differences from the paper: training is by maximum likelihood, not as a posterior, and
the differences of `flowtrain.models.maf`.
"""

from flowtrain.bijections import Bijection, Inverse
from flowtrain.models import maf
from flowtrain.models.base import Elementwise
from flowtrain.types import Positive, Shape


def build(
    shape: Shape,
    *,
    layers: Positive = 5,
    width: Positive = 128,
    hidden_layers: Positive = 1,
    order: maf.Order = "reverse",
    transform: Elementwise = "affine",
) -> Bijection:
    """IAF for data. The entries are in the order in which they are stored.

    Args:
        layers: Autoregressive layers.
        width: Units per hidden layer.
        hidden_layers: Hidden layers per conditioner.
        order: Order of the entries in the next layer: reversed, or a random permutation.
        transform: Transform of an entry, given earlier entries of the latent, named as for Glow's
            `coupling`.
    """
    return maf.chain(shape, layers, width, hidden_layers, order, transform, Inverse)

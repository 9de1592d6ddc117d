"""Invertible layers with exact log-determinants, one file per family.

`base.py` states the contract. `execution.py`, `fused.py` and `memory.py` run chains of layers.
"""

from flowtrain.bijections.actnorm import ActNorm as ActNorm
from flowtrain.bijections.actnorm import DiagonalAffine as DiagonalAffine
from flowtrain.bijections.actnorm import Standardize as Standardize
from flowtrain.bijections.affine import AdditiveTransform as AdditiveTransform
from flowtrain.bijections.affine import AffineTransform as AffineTransform
from flowtrain.bijections.affine import ExponentialTransform as ExponentialTransform
from flowtrain.bijections.affine import SigmoidTransform as SigmoidTransform
from flowtrain.bijections.affine import TanhTransform as TanhTransform
from flowtrain.bijections.autoregressive import Inverse as Inverse
from flowtrain.bijections.autoregressive import MaskedAutoregressive as MaskedAutoregressive
from flowtrain.bijections.base import Bijection as Bijection
from flowtrain.bijections.base import Transform as Transform
from flowtrain.bijections.continuous import Continuous as Continuous
from flowtrain.bijections.conv1x1 import Conv1x1 as Conv1x1
from flowtrain.bijections.conv1x1 import Conv1x1LU as Conv1x1LU
from flowtrain.bijections.coupling import CheckerboardCoupling as CheckerboardCoupling
from flowtrain.bijections.coupling import Coupling as Coupling
from flowtrain.bijections.logistic import LogisticToNormal as LogisticToNormal
from flowtrain.bijections.mixture import MixtureTransform as MixtureTransform
from flowtrain.bijections.multiscale import Multiscale as Multiscale
from flowtrain.bijections.ordinal import OrdinalAutoregressive as OrdinalAutoregressive
from flowtrain.bijections.planar import Planar as Planar
from flowtrain.bijections.reshape import Flatten as Flatten
from flowtrain.bijections.reshape import HalvePixels as HalvePixels
from flowtrain.bijections.reshape import Permute as Permute
from flowtrain.bijections.reshape import Reverse as Reverse
from flowtrain.bijections.reshape import Squeeze as Squeeze
from flowtrain.bijections.sequential import Sequential as Sequential
from flowtrain.bijections.sphere import AnglesToNormal as AnglesToNormal
from flowtrain.bijections.sphere import CirclesToNormal as CirclesToNormal
from flowtrain.bijections.sphere import FlattenAngles as FlattenAngles
from flowtrain.bijections.sphere import SphereToAngles as SphereToAngles
from flowtrain.bijections.spline import CircularSplineTransform as CircularSplineTransform
from flowtrain.bijections.spline import SplineTransform as SplineTransform
from flowtrain.bijections.token_autoregressive import TokenAutoregressive as TokenAutoregressive

"""Invertible layers with exact log-determinants, one file per family.

`base.py` states the contract. `execution.py`, `fused.py` and `memory.py` run chains of layers.
"""

from flowtrain.bijections.actnorm import ActNorm, DiagonalAffine
from flowtrain.bijections.affine import ExponentialTransform, SigmoidTransform
from flowtrain.bijections.autoregressive import Inverse, MaskedAutoregressive
from flowtrain.bijections.base import Bijection, Transform
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.conv1x1 import Conv1x1, Conv1x1LU
from flowtrain.bijections.coupling import (
    AdditiveTransform,
    AffineTransform,
    CheckerboardCoupling,
    Coupling,
)
from flowtrain.bijections.logistic import LogisticToNormal
from flowtrain.bijections.mixture import MixtureTransform
from flowtrain.bijections.multiscale import Multiscale
from flowtrain.bijections.ordinal import OrdinalAutoregressive
from flowtrain.bijections.planar import Planar
from flowtrain.bijections.reshape import Flatten, HalvePixels, Permute, Reverse, Squeeze
from flowtrain.bijections.sequential import Sequential
from flowtrain.bijections.sphere import AnglesToNormal, SphereToAngles
from flowtrain.bijections.spline import CircularSplineTransform, SplineTransform
from flowtrain.bijections.token_autoregressive import TokenAutoregressive

__all__ = [
    "ActNorm",
    "AdditiveTransform",
    "AffineTransform",
    "AnglesToNormal",
    "Bijection",
    "CheckerboardCoupling",
    "CircularSplineTransform",
    "Continuous",
    "Conv1x1",
    "Conv1x1LU",
    "Coupling",
    "DiagonalAffine",
    "ExponentialTransform",
    "Flatten",
    "HalvePixels",
    "Inverse",
    "LogisticToNormal",
    "MaskedAutoregressive",
    "MixtureTransform",
    "Multiscale",
    "OrdinalAutoregressive",
    "Permute",
    "Planar",
    "Reverse",
    "Sequential",
    "SigmoidTransform",
    "SphereToAngles",
    "SplineTransform",
    "Squeeze",
    "TokenAutoregressive",
    "Transform",
]

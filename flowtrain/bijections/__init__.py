"""Invertible layers with exact log-determinants; one file a family."""

from flowtrain.bijections.actnorm import ActNorm, DiagonalAffine
from flowtrain.bijections.base import Bijection, Transform
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
from flowtrain.bijections.reshape import Flatten, Permute, Squeeze
from flowtrain.bijections.sequential import Sequential
from flowtrain.bijections.spline import SplineTransform

__all__ = [
    "ActNorm",
    "AdditiveTransform",
    "AffineTransform",
    "Bijection",
    "CheckerboardCoupling",
    "Conv1x1",
    "Conv1x1LU",
    "Coupling",
    "DiagonalAffine",
    "Flatten",
    "LogisticToNormal",
    "MixtureTransform",
    "Multiscale",
    "Permute",
    "Sequential",
    "SplineTransform",
    "Squeeze",
    "Transform",
]

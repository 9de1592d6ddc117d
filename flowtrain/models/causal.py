"""Causal flow."""

from typing import Literal

from flowtrain.bijections import Bijection
from flowtrain.bijections.discretized import DiscretizedMixture
from flowtrain.bijections.ordinal import OrdinalAutoregressive
from flowtrain.errors import UserError
from flowtrain.nets.causal import CausalNet, LinearPrediction, Window
from flowtrain.types import Positive, Shape


def build(
    shape: Shape,
    data_levels: int | None,
    *,
    width: Positive = 128,
    blocks: Positive = 6,
    token: Literal[1, 2, 4] = 2,
    components: Positive = 5,
    units: Positive = 16,
    window: Positive = 3,
) -> Bijection:
    if data_levels is None:
        raise UserError("model.name: causal is for images with levels, and these data are real")
    levels = data_levels
    entries = shape[0] * token**2
    size = (shape[1] // token, shape[2] // token)
    seen = Window(window, window, itself=False)
    mixture = DiscretizedMixture(levels, components)
    net = CausalNet(entries, size, mixture.start(), width, blocks, units, seen)
    return OrdinalAutoregressive(
        shape, levels, token, LinearPrediction(entries, size, seen), net, mixture
    )

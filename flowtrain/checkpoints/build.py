"""The flow that a configuration describes."""

import math

import torch

from flowtrain import config as configuration
from flowtrain.bijections import Bijection
from flowtrain.config import Config, Dequantization
from flowtrain.errors import UserError
from flowtrain.flow.class_prior import ClassPrior
from flowtrain.flow.dequantize import Dequantizer, RealValued, UniformNoise
from flowtrain.flow.flow import Flow
from flowtrain.flow.variational import VariationalNoise
from flowtrain.system.random import Stream
from flowtrain.types import Shape


def build_flow(config: Config, shape: Shape, levels: int | None) -> Flow:
    """A new flow for images of `shape` with values 0..levels-1, or for real values (None).

    Its weights are a function of the configuration's seed. Raises `UserError` where the options do
    not fit the shape, or do not fit data without levels.
    """
    module = configuration.component_module(configuration.Model, config.model.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + int(Stream.WEIGHTS))
        bijection: Bijection = module.build(shape, **config.model.options())
        latent_dims = bijection.latent_dims(math.prod(shape))
        class_prior = None
        if config.model.classes:
            coarsest = bijection.split_latents(torch.zeros(1, latent_dims))[-1]
            class_prior = ClassPrior(config.model.classes, tuple(coarsest.shape[1:]))
        if levels is not None and latent_dims != math.prod(shape):
            raise UserError(
                f"model.name: {config.model.name} is for real-valued data, these have {levels} "
                f"levels"
            )
        # After the bijection, so that its weights are the same with any noise.
        dequantizer = _build_dequantizer(config.dequantization, shape, levels)
    return Flow(bijection, dequantizer, shape, class_prior)


def _build_dequantizer(
    options: Dequantization, shape: Shape, levels: int | None
) -> Dequantizer | RealValued:
    if levels is None:
        if options != Dequantization.model_validate({}):
            raise UserError(
                "dequantization: real-valued data have no levels, and need none of its keys"
            )
        return RealValued()
    variational = options.name == "variational"
    noise_model = (
        VariationalNoise(shape, options.steps, options.width) if variational else UniformNoise()
    )
    return Dequantizer(levels, options.transform, options.alpha, noise_model)

"""The flow that a configuration describes."""

import math

import torch

from flowtrain import config as configuration
from flowtrain.config import Config, Dequantization
from flowtrain.errors import UserError
from flowtrain.flow.class_prior import ClassPrior
from flowtrain.flow.dequantize import Dequantizer, RealValued, UniformNoise
from flowtrain.flow.flow import Flow
from flowtrain.flow.variational import VariationalNoise
from flowtrain.system.random import Stream


def build_flow(config: Config, shape: tuple[int, int, int], levels: int | None) -> Flow:
    """A new flow for images of `shape` with values 0..levels-1, or real-valued; its weights are a
    function of the seed.

    Raises `UserError` where the options do not fit the shape, or data without levels.
    """
    module = configuration.component_module(configuration.Model, config.model.name)
    options = config.dequantization
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + int(Stream.WEIGHTS))
        bijection = module.build(shape, **config.model.options())
        class_prior = None
        if config.model.classes:
            probe = torch.zeros(1, bijection.latent_dims(math.prod(shape)))
            class_prior = ClassPrior(
                config.model.classes, tuple(bijection.split_latents(probe)[-1].shape[1:])
            )
        if levels is None:
            if options != Dequantization.model_validate({}):
                raise UserError(
                    "dequantization: real-valued data have no levels, and need none of its keys"
                )
            return Flow(bijection, RealValued(), shape, class_prior)
        if bijection.latent_dims(math.prod(shape)) != math.prod(shape):
            raise UserError(
                f"model.name: {config.model.name} is for real-valued data, these have {levels} "
                f"levels"
            )
        # After the bijection, whose weights are the same with any noise.
        variational = options.name == "variational"
        noise_model = (
            VariationalNoise(shape, options.steps, options.width) if variational else UniformNoise()
        )
    dequantizer = Dequantizer(levels, options.transform, options.alpha, noise_model)
    return Flow(bijection, dequantizer, shape, class_prior)

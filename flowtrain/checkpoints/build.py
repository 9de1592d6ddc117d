"""The flow that a configuration describes."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flowtrain import config as configuration
from flowtrain.bijections import Bijection, Sequential, Standardize
from flowtrain.bijections.ordinal import discrete_model
from flowtrain.bijections.sphere import of_angles
from flowtrain.config import Config, Dequantization, Model
from flowtrain.errors import UserError
from flowtrain.flow.class_prior import ClassContext, ClassPrior
from flowtrain.flow.dequantize import Dequantizer, GaussianDequantizer, RealValued, UniformNoise
from flowtrain.flow.flow import Flow
from flowtrain.flow.image_context import ImageContext
from flowtrain.flow.variational import VariationalNoise
from flowtrain.system.capacity import left
from flowtrain.system.random import Stream
from flowtrain.types import Shape

LONGEST_BUILD = 100_000  # operations on tensors, far more than any model needs; it takes seconds
# Numbers of a build that is not tried on the meta device, for which torch imports its compiler.
SMALL = 2**26


def build_flow(
    config: Config,
    shape: Shape,
    num_bins: int | None,
    copies: int = 1,
    check: Callable[[Flow], object] = lambda sizes: None,
) -> Flow:
    """A new flow for images of `shape` with values 0..num_bins-1, or for real values (None).

    Its weights are a function of the configuration's seed. `check` is called with the flow, or, if
    that is not small, with one of the same sizes on the meta device before the weights get any
    memory. A module of the user is not checked, because it may not build there.

    Raises `UserError` if the options do not fit the data, or if there is no memory for so many
    `copies` of the weights.
    """
    if "." in config.model.name:
        return _in_order(_build(config, shape, num_bins))
    try:
        with _Counting(SMALL):
            sizes = _build(config, shape, num_bins)
    except _NotSmall:
        with torch.device("meta"), _Counting():
            sizes = _build(config, shape, num_bins)
    weights = sum(tensor.nbytes for tensor in (*sizes.parameters(), *sizes.buffers()))
    free = left(torch.device("cpu"))
    if copies * weights > free:
        also = f"and training needs {copies} times that; " if copies > 1 else ""
        raise UserError(
            f"model: its weights take {weights / 2**30:,.1f} GiB, {also}"
            f"{free / 2**30:,.1f} GiB are available: make it smaller"
        )
    check(sizes)
    return _in_order(_build(config, shape, num_bins) if sizes.device.type == "meta" else sizes)


def _in_order(flow: Flow) -> Flow:
    """The flow with the memory of each parameter in the order of its indices. Fused optimizers
    combine a weight and its state in the order of their memory, and a checkpoint does not keep it.
    A rotation by `torch.linalg.qr` would have its columns first.
    """
    for parameter in flow.parameters():
        parameter.data = parameter.data.contiguous()
    return flow


class _NotSmall(Exception):
    """A build makes more numbers than a small one."""


class _Counting(TorchFunctionMode):
    """Ends a build that has too many operations, or more numbers than `most`.

    Results of operations on tensors count one by one, because a build keeps few of them.
    """

    def __init__(self, most: float = math.inf):
        super().__init__()
        self.operations = 0
        self.left = most

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.operations += 1
        if self.operations > LONGEST_BUILD:
            raise UserError(
                f"model: it has too many layers: building it takes more than {LONGEST_BUILD:,} "
                f"operations"
            )
        made = 0 if func is torch.tensor else _numbers(args)  # `tensor` takes values, not sizes
        if made > self.left:
            raise _NotSmall
        if not any(isinstance(each, Tensor) for each in args):
            self.left -= made
        return func(*args, **(kwargs or {}))


def _numbers(args: Sequence[Any]) -> int:
    """The count of numbers that a call makes from its tensors, broadcast, or from its sizes."""
    shapes = [reversed(each.shape) for each in args if isinstance(each, Tensor)]
    if shapes:
        return math.prod(map(max, zip_longest(*shapes, fillvalue=1)))
    sizes = args[0] if args and isinstance(args[0], Sequence) else args
    return math.prod(size for size in sizes if isinstance(size, int))


def _build(config: Config, shape: Shape, num_bins: int | None) -> Flow:
    build = configuration.component(Model, config.model.name).build
    with torch.random.fork_rng(devices=[]):
        # The host's generator alone, because `fork_rng` would not restore a GPU's.
        torch.default_generator.manual_seed(config.seed + int(Stream.WEIGHTS))
        image_context = _image_context(config.model, shape, num_bins)
        about = {
            "num_bins": num_bins,
            "classes": config.model.classes,
            "context": None if image_context is None else image_context.shape,
        }
        wanted = about.keys() & inspect.signature(build).parameters.keys()
        if image_context is not None and "context" not in wanted:
            raise UserError(
                f"model.context: {config.model.context}, but no network of {config.model.name} "
                f"sees a context: it is for {', '.join(_with_context())}"
            )
        arguments = {name: about[name] for name in wanted}
        bijection: Bijection = build(shape, **arguments, **config.model.options())
        if not isinstance(bijection, Bijection) or not list(bijection.parameters()):
            raise UserError(
                f"model.name: `build` of {config.model.name} returned a "
                f"{type(bijection).__name__}, expected a Bijection with parameters"
            )
        # Each column of vectors has a unit of its own, but angles and points of a sphere have none.
        if config.data.name == "vectors" and not of_angles(bijection):
            bijection = Sequential(Standardize(shape), bijection)
        latent_dims = bijection.latent_dims(math.prod(shape))
        class_prior: ClassPrior | ClassContext | None = None
        if config.model.classes and "classes" in wanted:
            class_prior = ClassContext(config.model.classes, config.model.label_dropout)
        elif config.model.label_dropout:
            why = "the model has no classes: set model.classes"
            if config.model.classes:
                why = f"the networks of {config.model.name} do not see the class: leave it at 0"
            raise UserError(f"model.label_dropout: {config.model.label_dropout:g}, but {why}")
        elif config.model.classes:
            latents = torch.zeros(1, latent_dims)
            if config.model.class_prior == "coarsest":
                latents = bijection.split_latents(latents)[-1]
            class_prior = ClassPrior(config.model.classes, tuple(latents.shape[1:]))
        if (model := discrete_model(bijection)) is not None:
            _require_centred(config)
            if model.conditioner.orders > 1 and config.data.flip is not False:
                raise UserError(
                    "data.flip: the orders of model.orders have mirror images: set data.flip=false"
                )
        if num_bins is not None and latent_dims != math.prod(shape):
            raise UserError(
                f"model.name: {config.model.name} is for real-valued data, these have {num_bins} "
                f"levels"
            )
        # After the bijection, so that its weights are the same with any noise.
        dequantizer = _build_dequantizer(config.dequantization, shape, num_bins)
    return Flow(bijection, dequantizer, shape, class_prior, image_context)


def _image_context(model: Model, shape: Shape, num_bins: int | None) -> ImageContext | None:
    if model.context == "none":
        return None
    if num_bins is None:
        raise UserError(
            f"model.context: {model.context} is of images, and these data are real values"
        )
    if model.classes:
        both = f"model.context: {model.context}, and model.classes: {model.classes}"
        raise UserError(f"{both}: a model is given one of the two")
    return ImageContext(model.context, model.context_factor, shape, num_bins)


def _with_context() -> list[str]:
    """The models whose networks see a context."""
    names = configuration.component_names(Model)
    builds = {name: configuration.component(Model, name).build for name in names}
    return [name for name in names if "context" in inspect.signature(builds[name]).parameters]


def _require_centred(config: Config) -> None:
    name, options = config.model.name, config.dequantization
    if options.name != "uniform":
        raise UserError(
            f"dequantization.name: {options.name}, but the likelihood of {name} does not depend on "
            f"the noise: leave it at uniform"
        )
    if options.transform != "center":
        raise UserError(
            f"dequantization.transform: {options.transform}, but {name} reads the levels of "
            f"centred images: leave it at center"
        )


def _build_dequantizer(
    options: Dequantization, shape: Shape, num_bins: int | None
) -> Dequantizer | RealValued:
    if num_bins is None:
        if options != Dequantization.model_validate({}):
            raise UserError(
                "dequantization: real-valued data have no levels, and need none of its keys"
            )
        return RealValued()
    if options.name == "gaussian":
        if options.transform != "center":
            raise UserError(
                f"dequantization.transform: {options.transform}, but Gaussian noise leaves [0, 1], "
                f"where it is not defined: leave it at center"
            )
        return GaussianDequantizer(num_bins, options.sigma)
    variational = options.name == "variational"
    noise_model = (
        VariationalNoise(shape, options.steps, options.width) if variational else UniformNoise()
    )
    return Dequantizer(num_bins, options.transform, options.alpha, noise_model)

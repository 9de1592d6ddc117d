"""A foreign flow as a `Flow`: its layers are watched and checked like flowtrain's own."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flowtrain.bijections.base import Bijection, Direction, Executor
from flowtrain.bijections.context import Context
from flowtrain.bijections.execution import FUSED, Container, Fused
from flowtrain.bijections.precision import default_dtype
from flowtrain.errors import RunError, UserError, raised
from flowtrain.flow.dequantize import EDGE, Dequantizer, RealValued
from flowtrain.flow.flow import Flow
from flowtrain.foreign.adapters import Adapted, Step, adapt
from flowtrain.foreign.contract import Foreign
from flowtrain.foreign.state import copied, map_tensors, modules_in, require_held, tensors_in
from flowtrain.system.random import seeded
from flowtrain.types import Shape

TRIED = 2  # examples of the trial that reads the shapes of latents


class Source:
    """The foreign flow, shared by its bijection and the layers of that.

    seed: If it is not None, each call of the foreign code draws the same random numbers, by it.
    """

    def __init__(self, flow: Any):
        self.flow = flow
        self.running: Adapted | None = None  # while layers are diverted, their own functions
        self.in_layer = False  # whether a diverted layer runs
        self.seed: int | None = None
        self.latent_shapes: list[tuple[int, ...]] = []  # found by a trial

    @contextmanager
    def called(self, dtype: torch.dtype) -> Iterator[None]:
        """Tensors that the foreign code makes get the type of its input: `torch.zeros(n)`, say.
        Raises `RunError` for any error of this code.
        """
        try:
            with default_dtype(dtype), seeded(self.seed):
                yield
        except (UserError, RunError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # foreign code may raise anything
            raise RunError(_words(self.flow, error)) from error

    @property
    def adapted(self) -> Adapted:
        return self.running or adapt(self.flow)

    def parts(self, z: Tensor) -> list[Tensor]:
        """Latents `(B, D)` as the tensors of the flow."""
        sizes = [math.prod(shape) for shape in self.latent_shapes]
        return [
            part.reshape(len(z), *shape)
            for part, shape in zip(z.split(sizes, dim=1), self.latent_shapes, strict=True)
        ]


def _words(flow: Any, error: Exception, where: str = "") -> str:
    name = f"{type(flow).__module__}.{type(flow).__qualname__}"
    return f"{name}: {where}{raised(error)}"


@contextmanager
def _trial(flow: Any, where: str) -> Iterator[None]:
    """Raises `UserError` for any error of the foreign code."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_words(flow, error, f"{where}: ")) from error


def _per_example(log_det: Any, like: Tensor) -> Tensor:
    """A log-det as `(B,)`, floating-point numbers. Raises `ValueError` for another shape."""
    if not isinstance(log_det, Tensor):
        return like.new_full((len(like),), float(log_det))
    if log_det.shape not in ((), (1,), (len(like),)):
        raise ValueError(f"log_det has shape {tuple(log_det.shape)}, expected ({len(like)},)")
    if not log_det.is_floating_point():
        log_det = log_det.to(like.dtype)
    if not log_det.ndim:  # a number on the CPU counts on every device
        log_det = log_det.to(like.device)
    expanded: Tensor = log_det.expand(len(like))
    return expanded


class ForeignLayer(Bijection):
    """One layer of a foreign flow. If it has latents in a list, which only a whole flow has, they
    are one tensor `(B, D)` here.
    """

    random_latents = False  # whether the layer adds noise
    random_log_dets = False  # whether its log-det is an estimate, but its latents are not random

    def __init__(self, source: Source, index: int):
        super().__init__()
        self.source, self.index = source, index

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        with self.source.called(x.dtype):
            z, log_det = self.source.adapted.layers[self.index].forward(x.clone())
            if not isinstance(z, Tensor):
                z = torch.cat([part.flatten(1) for part in z], dim=1)
            return z, _per_example(log_det, x)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        step = self.source.adapted.layers[self.index]
        in_list = step.diverted is None and len(self.source.latent_shapes) > 1
        with self.source.called(z.dtype):
            z = z.clone()
            x, log_det = step.inverse(self.source.parts(z) if in_list else z)
            return x, _per_example(log_det, z)


class ForeignBijection(Container):
    """A foreign flow from data `(B, C, H, W)` to latents `(B, D)`, in float32 or float64.

    Its layers are the library's. The flow itself calls them. If an executor is to call them,
    they are diverted to it for this one call.

    Args:
        flow: The flow of the contract. It is not copied.
        shape: The shape of one image.
        input_shape: The shape of one example for the flow.
    """

    def __init__(self, flow: Any, shape: Shape, input_shape: tuple[int, ...]):
        super().__init__()
        require_held(flow)
        self.source = Source(flow)
        self.shape, self.input_shape = shape, input_shape
        self.own = flow if isinstance(flow, nn.Module) else nn.ModuleList(modules_in(flow))
        tensors = [*self.own.parameters(), *self.own.buffers(), *tensors_in(flow)]
        if any(map(is_lazy, tensors)):
            raise UserError("a lazy layer has no weights yet: call the flow on a batch first")
        # `Flow` reads device and type from the first parameter, and a flow need not have one.
        marker = torch.zeros(0, device=tensors[0].device if tensors else None)
        self.marker = nn.Parameter(marker, requires_grad=False)
        self.float().eval()
        with _trial(flow, "its parts"):
            layers = self.source.adapted.layers
        for index, step in enumerate(layers):
            self.add_module(step.name, ForeignLayer(self.source, index))

    def inner_layers(self) -> Iterable[Bijection]:
        return [layer for layer in self.children() if isinstance(layer, ForeignLayer)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ForeignBijection":
        map_tensors(self.source.flow, fn)
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "ForeignBijection":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        vars(new).update(copied(vars(self), memo))
        return new

    def run(
        self, executor: Executor, direction: Direction, x: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        source = self.source
        adapted = adapt(source.flow)
        layers = list(self.inner_layers())
        divert = not isinstance(executor, Fused) and bool(layers)
        x = x.clone()  # foreign code may change its input
        given: Any
        with source.called(x.dtype):
            if direction == "forward":
                given = x.reshape(len(x), *self.input_shape)
            else:
                given = source.parts(x)
            if divert and adapted.layers[0].diverted is None:
                if direction == "inverse":
                    given = given[0] if len(given) == 1 else x
                result, log_det = executor.chain(layers, direction, given, context)
                z = [result]
            else:
                with _diverted(source, layers, adapted, executor) if divert else nullcontext():
                    result, log_det = getattr(adapted, direction)(given)
                z = list(result) if direction == "forward" else [result]
            if direction == "inverse":
                return z[0].reshape(len(x), *self.shape), _per_example(log_det, x)
            return torch.cat([part.flatten(1) for part in z], dim=1), _per_example(log_det, x)

    def split_latents(self, z: Tensor) -> list[Tensor]:
        return self.source.parts(z)


@contextmanager
def _diverted(
    source: Source, layers: Sequence[Bijection], adapted: Adapted, executor: Executor
) -> Iterator[None]:
    """The modules of the layers call the executor instead of themselves."""
    changed: list[tuple[nn.Module, str, Any]] = []
    absent = object()
    source.running = adapted
    try:
        for layer, step in zip(layers, adapted.layers, strict=True):
            assert step.diverted is not None and step.module is not None  # they are modules

            def call(
                direction: Direction, x: Tensor, own: Bijection = layer, step: Step = step
            ) -> Any:
                # A layer of another one is a part of that: `CompositeCDFTransform` of nflows has
                # its first layer in its last one.
                if source.in_layer:
                    return getattr(step, direction)(x)
                source.in_layer = True
                try:
                    return executor.call(own, direction, x, None)
                finally:
                    source.in_layer = False

            for name, function in step.diverted(call).items():
                changed.append((step.module, name, step.module.__dict__.get(name, absent)))
                step.module.__dict__[name] = function
        yield
    finally:
        for module, name, before in reversed(changed):
            if before is absent:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before
        source.running = None


class LinearDequantizer(Dequantizer):
    """`v = offset + scale (x + u)` for integers x and uniform noise u."""

    def __init__(self, num_bins: int, scale: float | None, offset: float):
        super().__init__(num_bins)
        self.scale = 1 / num_bins if scale is None else scale
        self.offset = offset

    def from_unit(self, y: Tensor) -> tuple[Tensor, Tensor]:
        constant = y[0].numel() * math.log(self.scale)
        return self.offset + self.scale * self.num_bins * y, y.new_full((len(y),), constant)

    def to_unit(self, v: Tensor) -> Tensor:
        return (v - self.offset) / (self.scale * self.num_bins)


class NoNoise(LinearDequantizer):
    """`v = offset + scale x` for a flow that adds noise itself, and has the terms for the bins.

    `noise` has no effect, but a derivative, of `v` with respect to x.
    """

    of_entry = 0.0

    def forward(
        self, x: Tensor, noise: Tensor, executor: Executor = FUSED
    ) -> tuple[Tensor, Tensor]:
        return self.from_unit((x + (noise - noise.detach())) / self.num_bins)

    def middle(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.from_unit(x.to(dtype) / self.num_bins)[0]

    def from_unit(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return super().from_unit(y)[0], y.new_zeros(len(y))

    def to_unit(self, v: Tensor) -> Tensor:
        # The inverse may give the lower end of a bin, which rounding must not move to the next one.
        return super().to_unit(v) + EDGE / self.num_bins


def _dequantizer(contract: Foreign) -> Dequantizer | RealValued:
    if contract.num_bins is None:
        return RealValued()
    if contract.alpha is not None:
        return Dequantizer(contract.num_bins, "logit", contract.alpha)
    linear = NoNoise if contract.adds_noise else LinearDequantizer
    return linear(contract.num_bins, contract.scale, contract.offset)


class ForeignModel(Flow):
    """A foreign flow, with the base density of its library instead of N(0, I).

    Raises `UserError` if the flow has none of the known forms, raises an error, or has results of
    wrong shapes.
    """

    bijection: ForeignBijection

    def __init__(self, contract: Foreign):
        bijection = ForeignBijection(contract.flow, contract.image_shape, contract.input_shape)
        super().__init__(bijection, _dequantizer(contract), contract.image_shape)
        self.contract = contract
        self.source = bijection.source
        self.source.latent_shapes, self.tried = _tried(self)
        self.home = self.device  # where the user's file has the flow
        self.is_random = False  # whether the log-density depends on the seed

    def example(self) -> Tensor:
        if self.num_bins is not None:
            return super().example()
        return self.tried.to(self.device, self.dtype)  # zeros may be outside of the domain

    def base_log_prob(self, z: Tensor) -> Tensor:
        with self.source.called(z.dtype):
            return self.source.adapted.base(self.source.parts(z.clone()))

    def own_log_prob(self, v: Tensor) -> Tensor:
        """The library's own log-density of inputs `v` of the bijection, `(B,)`."""
        own = self.source.adapted.log_prob
        assert own is not None
        with self.source.called(v.dtype):
            return own(v.clone().reshape(len(v), *self.contract.input_shape))

    def draw_latents(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` latents of the library's base density. They are a function of `n`."""
        draw = self.source.adapted.draw
        if draw is None:
            return super().draw_latents(n, generator)
        seed = None
        if generator is not None:
            drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
            seed = int(drawn)
        with torch.no_grad(), self.source.called(self.dtype), seeded(seed):
            z = torch.cat([part.flatten(1) for part in draw(n)], dim=1)
        return z.to(self.device, self.dtype)


@torch.no_grad()
def _tried(model: ForeignModel) -> tuple[list[tuple[int, ...]], Tensor]:
    """The shapes of the latents, and an input `(1, C, H, W)`, from a trial of both directions on a
    copy of the flow: layers that set themselves on their first batch must not see this one.
    """
    flow, shape = model.contract.flow, model.contract.input_shape
    if model.num_bins is None:  # densities of positive values, or of values below 1, have these
        x = 0.25 + torch.arange(TRIED * model.dims) % 2 / 2
    else:
        x = torch.arange(TRIED * model.dims) % model.num_bins
    x = x.reshape(TRIED, *model.shape).to(model.device)
    v = model.dequantizer.middle(x, torch.float32)
    with _trial(flow, "a copy"):
        adapted = adapt(copied(flow))
    with seeded(0):
        if model.num_bins is None and adapted.draw is not None:  # of the flow's own domain
            with _trial(flow, "sample"):
                v = adapted.inverse(adapted.draw(TRIED))[0].float()
                if v.shape != (TRIED, *shape):
                    raise ValueError(f"shape {tuple(v.shape)}, expected {(TRIED, *shape)}")
        first = v[:1].reshape(1, *model.shape).clone()  # foreign code may change its input
        with _trial(flow, "forward"):
            z, log_det = adapted.forward(v.reshape(TRIED, *shape))
            shapes = [tuple(part.shape[1:]) for part in z]
            _per_example(log_det, v)
            if any(len(part) != TRIED for part in z) or sum(map(math.prod, shapes)) != model.dims:
                raise ValueError(f"latents of shapes {shapes} for examples of {shape}")
        with _trial(flow, "inverse"):
            back, log_det = adapted.inverse(z)
            _per_example(log_det, v)
            if back.numel() != v.numel():
                raise ValueError(f"shape {tuple(back.shape)}, expected {tuple(v.shape)}")
        with _trial(flow, "log_prob of the base"):
            if (found := adapted.base(z).shape) != (TRIED,):
                raise ValueError(f"shape {tuple(found)}, expected ({TRIED},)")
        with _trial(flow, "sample"):
            drawn = z if adapted.draw is None else adapted.draw(TRIED)
            for part, like in zip(drawn, z, strict=True):
                if part.shape != like.shape:
                    raise ValueError(f"shape {tuple(part.shape)}, expected {tuple(like.shape)}")
    return shapes, first

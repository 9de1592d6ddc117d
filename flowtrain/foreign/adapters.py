"""The two directions and the base density of a flow, found by its type.

A library is never imported here. Its objects are known by the module of their class, so a library
need not be installed, and a library that is not used costs nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Direction, sum_per_example
from flowtrain.errors import UserError
from flowtrain.flow.class_prior import normal_log_prob
from flowtrain.flow.kinds import log_mean_exp

Map = Callable[[Any], tuple[Any, Any]]
Call = Callable[[Direction, Tensor], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Step:
    """A layer of a flow: `forward` from data to latents, and `inverse`, with their log-dets.

    Layers of a module are called by the module. `diverted` gives the attributes by which such a
    layer calls another function instead, and is None in a chain of layers.
    """

    name: str
    forward: Map
    inverse: Map
    module: nn.Module | None = None
    diverted: Callable[[Call], dict[str, Callable[..., Any]]] | None = None


@dataclass(frozen=True)
class Adapted:
    """A flow by its functions. Latents are tensors of any shapes, `(B, ...)` each.

    forward: an example `(B, *shape)` to its latents and the log-det, `(B,)` or a number.
    inverse: the latents to the example and the log-det.
    base: the log-density of latents, `(B,)`.
    draw: draws a number of latents from the base, or None if that is N(0, I).
    log_prob: the library's own log-density of an example, if there is one.
    layers: the layers, in the order of data to latents.
    """

    forward: Callable[[Tensor], tuple[Sequence[Tensor], Any]]
    inverse: Callable[[Sequence[Tensor]], tuple[Tensor, Any]]
    base: Callable[[Sequence[Tensor]], Tensor]
    draw: Callable[[int], Sequence[Tensor]] | None = None
    log_prob: Callable[[Tensor], Tensor] | None = None
    layers: list[Step] = field(default_factory=list)


def adapt(flow: Any) -> Adapted:
    """The functions of a flow. Raises `UserError` if it has none of the known forms."""
    libraries = {base.__module__.partition(".")[0] for base in type(flow).__mro__}
    for library, adapter in ADAPTERS.items():
        if library in libraries and (adapted := adapter(flow)) is not None:
            return adapted
    return _plain(flow)


def standard_normal(z: Sequence[Tensor]) -> Tensor:
    total: Tensor = sum(normal_log_prob(part.flatten(1)) for part in z)  # type: ignore[assignment]
    return total


def _single(forward: Map, inverse: Map) -> dict[str, Any]:
    """`forward` and `inverse` of `Adapted` for a flow with latents in one tensor."""

    def both(x: Tensor) -> tuple[Sequence[Tensor], Any]:
        z, log_det = forward(x)
        return ([z], log_det) if isinstance(z, Tensor) else (list(z), log_det)

    def back(z: Sequence[Tensor]) -> tuple[Tensor, Any]:
        return inverse(z[0] if len(z) == 1 else list(z))

    return {"forward": both, "inverse": back}


def _bases(thing: Any) -> set[str]:
    """The names of the class of an object and of its base classes."""
    return {base.__name__ for base in type(thing).__mro__}


def _modules(
    module: nn.Module, kind: str, containers: set[str], path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """The layers in a module by their paths: submodules with a base class called `kind`, in which
    `containers` are opened.
    """
    for name, child in module.named_children():
        here = f"{path}{name}"
        names = _bases(child)
        if kind in names and not names & containers:
            yield f"{here} {type(child).__name__}".replace(".", "/"), child
        elif kind in names or isinstance(child, nn.ModuleList):
            yield from _modules(child, kind, containers, f"{here}.")


def _step(name: str, module: Any, to_latents: str, to_data: str, *more: None) -> Step:
    """A layer whose directions are methods of these names, called with an input and `more`."""
    forward, inverse = getattr(module, to_latents), getattr(module, to_data)

    def diverted(call: Call) -> dict[str, Callable[..., Any]]:
        return {
            to_latents: lambda x, *args, **kwargs: call("forward", x),
            to_data: lambda z, *args, **kwargs: call("inverse", z),
        }

    return Step(name, lambda x: forward(x, *more), lambda z: inverse(z, *more), module, diverted)


# --- normflows: `forward` maps latents to data ---------------------------------------------------


def _normflows(flow: Any) -> Adapted | None:
    names = _bases(flow)
    if not names & {"NormalizingFlow", "MultiscaleFlow"}:
        if "Flow" not in names:
            return None
        step = _step("flow", flow, "inverse", "forward")
        return Adapted(**_single(step.forward, step.inverse), base=standard_normal, layers=[step])
    layers = [
        _step(name, module, "inverse", "forward")
        for name, module in _modules(flow, "Flow", {"GlowBlock", "Composite"})
        if not {"Split", "Merge"} & _bases(module)
    ][::-1]
    if "NormalizingFlow" in names:
        return Adapted(
            **_single(flow.inverse_and_log_det, flow.forward_and_log_det),
            base=lambda z: flow.q0.log_prob(z[0]),
            draw=lambda n: [flow.q0(n)[0]],
            log_prob=flow.log_prob,
            layers=layers,
        )
    levels = list(flow.q0)
    classes = levels[0].num_classes if flow.class_cond else 0

    def base(z: Sequence[Tensor]) -> Tensor:
        labels = [[z[0].new_full((len(z[0]),), k, dtype=torch.long)] for k in range(classes)]
        each = [
            torch.stack([q0.log_prob(part, *y) for q0, part in zip(levels, z, strict=True)]).sum(0)
            for y in labels or [[]]
        ]
        return log_mean_exp(torch.stack(each))

    def draw(n: int) -> Sequence[Tensor]:
        y = [torch.randint(classes, (n,), device=next(flow.parameters()).device)] if classes else []
        return [q0(n, *y)[0] for q0 in levels]

    return Adapted(
        flow.inverse_and_log_det,
        flow.forward_and_log_det,
        base,
        draw,
        None if classes else lambda x: flow.log_prob(x, None),
        layers,
    )


# --- nflows ---------------------------------------------------------------------------------------


def _nflows(flow: Any) -> Adapted | None:
    names = _bases(flow)
    transform = flow if "Transform" in names else getattr(flow, "_transform", None)
    if transform is None:
        return None
    holder = nn.Module()
    holder.add_module("transform", transform)
    containers = {"CompositeTransform", "MultiscaleCompositeTransform"}
    layers = [
        _step(name, module, "forward", "inverse", None)  # without a context
        for name, module in _modules(holder, "Transform", containers)
    ]
    both = _single(lambda x: transform(x, None), lambda z: transform.inverse(z, None))
    if transform is flow:
        return Adapted(**both, base=standard_normal, layers=layers)
    return Adapted(
        **both,
        base=lambda z: flow._distribution.log_prob(z[0]),
        draw=lambda n: [flow._distribution.sample(n)],
        log_prob=flow.log_prob,
        layers=layers,
    )


# --- FrEIA: one method, with `rev` for the inverse ------------------------------------------------


def _freia(flow: Any) -> Adapted | None:
    containers = {"GraphINN", "SequenceINN"}
    if not containers & _bases(flow):
        return None
    layers = [
        _freia_step(name, module)
        for name, module in _modules(flow, "InvertibleModule", containers)
        if not type(module).__module__.endswith("graph_topology")  # of several tensors
    ]
    both = _single(flow, lambda z: flow(z, rev=True))
    return Adapted(**both, base=standard_normal, layers=layers)


def _freia_step(name: str, module: Any) -> Step:
    method = module.forward

    def diverted(call: Call) -> dict[str, Callable[..., Any]]:
        def forward(x: Any, *args: Any, rev: bool = False, **kwargs: Any) -> Any:
            z, log_det = call("inverse" if rev else "forward", x[0])
            return (z,), log_det

        return {"forward": forward}

    def one(x: Tensor, rev: bool) -> tuple[Tensor, Any]:
        z, log_det = method((x,), rev=rev)
        return z[0], log_det

    return Step(name, lambda x: one(x, False), lambda z: one(z, True), module, diverted)


# --- zuko, and torch.distributions: chains of transforms ------------------------------------------


def _zuko(flow: Any) -> Adapted | None:
    distribution = flow() if isinstance(flow, nn.Module) else flow
    if not hasattr(distribution, "transform"):  # a mixture
        return _plain(distribution)
    transform, base = distribution.transform, distribution.base
    parts = getattr(transform, "transforms", [transform])

    steps = [
        Step(f"{index} {type(part).__name__}", part.call_and_ladj, part.inv.call_and_ladj)
        for index, part in enumerate(parts)
    ]
    return _chain(steps, base, distribution)


def _torch(flow: Any) -> Adapted | None:
    if not isinstance(flow, torch.distributions.TransformedDistribution):
        return None

    def step(index: int, part: Any) -> Step:
        def forward(y: Tensor) -> tuple[Tensor, Tensor]:
            x = part.inv(y)
            return x, -part.log_abs_det_jacobian(x, y)

        def inverse(x: Tensor) -> tuple[Tensor, Tensor]:
            y = part(x)
            return y, part.log_abs_det_jacobian(x, y)

        return Step(f"{index} {type(part).__name__}", forward, inverse)

    parts = [step(index, part) for index, part in enumerate(flow.transforms)]
    return _chain(parts[::-1], flow.base_dist, flow)


def _chain(steps: list[Step], base: Any, distribution: Any) -> Adapted:
    """Of layers one after the other, whose log-dets may be per entry."""

    def summed(function: Map) -> Map:
        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = function(x)
            return z, log_det if log_det.ndim < 2 else sum_per_example(log_det)

        return call

    steps = [Step(each.name, summed(each.forward), summed(each.inverse)) for each in steps]

    def through(x: Tensor, maps: list[Map]) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for one in maps:
            x, log_det = one(x)
            total = total + log_det
        return x, total

    def of(density: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: density.log_prob(x).reshape(len(x), -1).sum(dim=1)

    own = of(base)
    return Adapted(
        **_single(
            lambda x: through(x, [each.forward for each in steps]),
            lambda z: through(z, [each.inverse for each in reversed(steps)]),
        ),
        base=lambda z: own(z[0]),
        draw=lambda n: [base.sample((n,))],
        log_prob=of(distribution),
        layers=steps,
    )


ADAPTERS = {
    "normflows": _normflows,
    "nflows": _nflows,
    "FrEIA": _freia,
    "zuko": _zuko,
    "torch": _torch,
}


# --- the plain contract ---------------------------------------------------------------------------


def _plain(flow: Any) -> Adapted:
    has = {name for name in ("forward", "inverse", "log_prob", "sample") if hasattr(flow, name)}
    log_prob = flow.log_prob if "log_prob" in has else None
    if {"forward", "inverse"} <= has:
        step = Step("flow", flow if isinstance(flow, nn.Module) else flow.forward, flow.inverse)
        both = _single(step.forward, step.inverse)
        return Adapted(**both, base=standard_normal, log_prob=log_prob, layers=[step])
    if {"log_prob", "sample"} <= has:  # latents are the data, and their density is the base
        sample = flow.sample

        def draw(n: int) -> Sequence[Tensor]:
            distribution = isinstance(flow, torch.distributions.Distribution)
            drawn = sample((n,)) if distribution else sample(n)
            return [drawn[0] if isinstance(drawn, tuple) else drawn]

        return Adapted(
            lambda x: ([x], 0), lambda z: (z[0], 0), lambda z: flow.log_prob(z[0]), draw, log_prob
        )
    missing = "inverse" if "forward" in has else "forward(x) -> z, log_det"
    raise UserError(
        f"{type(flow).__module__}.{type(flow).__qualname__}: no {missing}: a flow has forward and "
        f"inverse, or log_prob and sample"
    )

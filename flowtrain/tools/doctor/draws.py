"""Flows of other code that draw random numbers: noise that they add, and estimated log-dets."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowtrain.bijections import Bijection
from flowtrain.bijections.base import Direction
from flowtrain.bijections.context import Context
from flowtrain.bijections.execution import call
from flowtrain.evaluation.layers import Watching, layers_of
from flowtrain.flow.flow import Flow
from flowtrain.foreign.model import ForeignLayer, ForeignModel, Source
from flowtrain.tools.doctor.findings import BOUNDS, IMAGES, Notes

TOGETHER = 8  # images that are evaluated together
CALLS = 16  # whose mean is compared with an exact value
ERRORS = 6  # standard errors; Student's t with 15 degrees of freedom exceeds 6 once in 40,000 times


def adds_noise(flow: Flow) -> bool:
    return isinstance(flow, ForeignModel) and flow.contract.adds_noise


def check_randomness(flow: ForeignModel, x: Tensor, noise: Tensor, notes: Notes) -> None:
    """Marks layers that draw random numbers, and checks that latents are random if and only if the
    contract has `adds_noise`. Afterwards every call draws the same numbers.

    An estimated log-det is sound (residual flows, FFJORD). Later checks take its mean. A flow of
    `log_prob` and `sample` alone may have exact probabilities of integers, without noise.
    """
    first = ""

    def changes(function: Callable[[], Sequence[Tensor]]) -> list[float]:
        results = []
        for seed in (1, 0):
            flow.source.seed = seed
            results.append(function())
        return [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]

    def around(
        name: str, layer: Bijection, direction: Direction, given: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        nonlocal first
        assert isinstance(layer, ForeignLayer)
        latents, log_dets = changes(lambda: call(layer, direction, given, context))
        layer.random_latents = latents > of_solver
        layer.random_log_dets = latents <= of_solver and log_dets > same
        first = first or (name if latents > same else "")
        return call(layer, direction, given, context)

    same, of_solver = BOUNDS["random latents"]
    images = x[:TOGETHER].to(flow.device), noise[:TOGETHER].to(flow.device)
    flow.source.seed = 0
    try:
        flow.to_latents(*images, Watching(flow, around))
        (change,) = changes(lambda: flow.to_latents(*images)[:1])
        flow.is_random = changes(lambda: [flow(*images).total])[0] > same
    except Exception:  # the passes note it
        return
    reason, harmless = "", False
    if flow.contract.adds_noise:
        change = 0.0 if flow.is_random else 1.0
        reason = "" if flow.is_random else "with adds_noise, but the flow draws no random numbers"
        harmless = not layers_of(flow)
    elif change > same:
        reason = "the flow adds noise, without adds_noise in its contract"
    notes.add("random latents", change, first, IMAGES, harmless, reason)


def averaged(part: Flow | Bijection, function: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of a result over calls with different random numbers, and six standard errors of it,
    both in float64 on the CPU. It is one call if the flow or layer draws none for log-dets.
    """
    source = _source(part)
    if source is None:
        value = function().double().cpu()
        return value, torch.zeros_like(value)
    each = []
    for seed in range(CALLS):
        source.seed = seed
        each.append(function().double().cpu())
    source.seed = 0
    values = torch.stack(each)
    return values.mean(dim=0), ERRORS * values.std(dim=0) / CALLS**0.5


def _source(part: Flow | Bijection) -> Source | None:
    if isinstance(part, ForeignModel) and part.is_random:
        return part.source
    if isinstance(part, ForeignLayer) and part.random_log_dets:
        return part.source
    return None


def beyond(error: Tensor, sure: Tensor) -> Tensor:
    """The part of an error that its estimate's own error does not explain."""
    return (error.abs() - sure).clamp_min(0)

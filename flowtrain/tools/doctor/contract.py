"""Checks of a flow of other code that flowtrain's own layers pass by construction: an evaluation
changes nothing, examples do not affect each other, and the figures are those of the density.
"""

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowtrain.bijections import Bijection
from flowtrain.bijections.base import Direction
from flowtrain.bijections.context import Context
from flowtrain.bijections.execution import call
from flowtrain.errors import RunError, UserError, raised
from flowtrain.evaluation.layers import Watching, layers_of
from flowtrain.flow.dequantize import Dequantizer
from flowtrain.foreign.adapters import standard_normal
from flowtrain.foreign.model import ForeignModel
from flowtrain.foreign.state import tensors_in
from flowtrain.system.random import Stream, seeded, uniform
from flowtrain.tools.doctor.draws import ERRORS, TOGETHER, averaged, beyond
from flowtrain.tools.doctor.findings import BOUNDS, IMAGES, Notes
from flowtrain.tools.doctor.log_dets import nearest

DRAWS = 8  # of the noise, for the standard error of a figure
PRINTED = 0.005  # rounding of a figure with two digits after the point
SAME = 1e-9  # largest change that is rounding in float64


def check_constancy(flow: ForeignModel, x: Tensor, noise: Tensor, notes: Notes) -> None:
    """Checks that an evaluation does not change the parameters, before anything else runs. Buffers
    and other tensors may change if latents do not depend on them, such as counters of calls.

    A layer that sets itself from its first batch does so again if it has forgotten that it is set.
    """
    used, fresh = copy.deepcopy(flow), copy.deepcopy(flow)
    used.source.seed = fresh.source.seed = 0
    v, _ = flow.dequantizer(x[:TOGETHER].to(flow.device), noise[:TOGETHER].to(flow.device))
    try:
        _density(used, v)
        after: dict[str, Tensor] = dict(used.named_parameters())
        half = v[: (len(v) + 1) // 2]
        loose = 0  # tensors that are neither parameters nor buffers
        if not all(map(_same, _density(used, half), _density(fresh, half))):
            after |= dict(used.named_buffers())
            before_it, after_it = (tensors_in(each.source.flow) for each in (flow, used))
            loose = abs(len(before_it) - len(after_it)) + sum(
                not _same(*pair) for pair in zip(before_it, after_it, strict=False)
            )
    except Exception:  # the passes note it
        return
    before = {**dict(flow.named_parameters()), **dict(flow.named_buffers())}
    changed: dict[str, list[str]] = {}
    for name, tensor in after.items():
        if name in before and not _same(tensor, before[name]):
            module, _, own = name.removeprefix("bijection.own.").rpartition(".")
            changed.setdefault(module, []).append(own)
    for module, names in changed.items():
        reason = f"the first batch sets {' and '.join(names)}"
        notes.add("parameters that change", len(names), module, reason=reason)
    if loose or not changed:
        reason = "the first batch sets tensors that are neither parameters nor buffers"
        notes.add("parameters that change", loose, reason=reason if loose else "")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and not bool(((a != b) & ~(a.isnan() & b.isnan())).any())


def _density(flow: ForeignModel, v: Tensor) -> tuple[Tensor, Tensor]:
    """The latents and the log-density of inputs `v` of the bijection."""
    z, log_det = flow.bijection(v)
    return z, log_det + flow.base_log_prob(z)


def check_batch(flow: ForeignModel, x: Tensor, noise: Tensor, notes: Notes) -> None:
    """Checks that the latent and the log-density of an image do not depend on its batch.

    The check is in float64, where the first image is the same in both batches. In training mode a
    dependence is harmless: batch normalization has it by design. Dropout is the same for both
    batches.
    """
    if len(x) < 3:
        return
    v = flow.dequantizer(x[:TOGETHER], noise[:TOGETHER].to(flow.dtype))[0]
    for mode, training in (("evaluation", False), ("training", True)):
        check = f"other examples, {mode}"
        used = copy.deepcopy(flow).train(training)
        first = ""

        def around(
            name: str,
            layer: Bijection,
            direction: Direction,
            given: Tensor,
            context: Context | None,
        ) -> tuple[Tensor, Tensor]:
            nonlocal first
            if not first and _change(lambda y: call(layer, direction, y), given) > SAME:
                first = name
            return call(layer, direction, given, context)

        try:
            change = _change(partial(_density, used), v)
            if change > SAME:
                used.bijection.run(Watching(used, around), "forward", v)
        except Exception as error:
            if not training:
                notes.failed((check,), error, inputs=IMAGES)
        else:
            of_density = "its log-density reads them" if change > SAME else ""
            reason = "the first layer that reads them" if first else of_density
            notes.add(check, change, first, IMAGES, harmless=training, reason=reason)


def _change(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> float:
    """The largest change of the first example's latent or log-density with other examples."""
    # Only values of the data, because a density may be of integers, or of another part of space.
    others = [x[:1], x[2:3].expand_as(x[2:]), x[:1]]
    results = [function(batch) for batch in (x, torch.cat(others))]
    return max(float((a[0] - b[0]).abs().max()) for a, b in zip(*results, strict=True))


def check_device(flow: ForeignModel, x: Tensor, noise: Tensor, notes: Notes) -> None:
    """Checks that a layer makes and keeps no tensors on the CPU for an input on another device.

    That device is torch's `meta`, whose tensors have no values. A layer that reads values passes.
    """
    notes.add("device", 0, "", IMAGES)
    try:
        elsewhere = layers_of(copy.deepcopy(flow).to("meta"))
    except Exception:  # TorchScript has no such device
        return

    def around(
        name: str, layer: Bijection, direction: Direction, given: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        try:
            results = call(elsewhere[name], direction, given.to("meta"))
            on_cpu = any(each.is_cpu for each in results)
        except Exception as error:
            on_cpu = re.search("same device|expected device", str(error)) is not None
        if on_cpu:
            notes.add("device", 1, name, IMAGES, reason="it makes or keeps tensors on the CPU")
        return call(layer, direction, given, context)

    with contextlib.suppress(Exception):  # the passes note it
        flow.to_latents(x[:TOGETHER], noise[:TOGETHER], Watching(flow, around))


def check_log_prob(precise: ForeignModel, x: Tensor, noise: Tensor, notes: Notes) -> None:
    """Checks the library's log-density against its two directions and its base density."""
    if precise.source.adapted.log_prob is None:
        return
    v, _ = precise.dequantizer(x, noise.to(precise.dtype))

    def difference() -> Tensor:
        z, log_det = precise.bijection(v)
        return precise.own_log_prob(v) - log_det - precise.base_log_prob(z)

    try:
        error = beyond(*averaged(precise, difference)).max()
    except Exception as failure:
        notes.failed(("log_prob",), failure, inputs=IMAGES)
    else:
        bits = float(error) / (precise.dims * math.log(2))
        words = "it is not the base density of the latent plus the log-det"
        if precise.source.adapted.base is standard_normal:
            words = "it is not log N(z; 0, I) plus the log-det: is the base another one?"
        reason = words if bits > BOUNDS["log_prob"][0] else ""
        notes.add("log_prob", bits, inputs=IMAGES, reason=reason)


def check_noise_bits(flow: ForeignModel, log_prob: Tensor, sure: Tensor, notes: Notes) -> None:
    """Checks that uniform noise with these likelihoods needs at least its entropy, D log Q.

    For images x of N uniform draws, the probability that one of them has `-log P(x)` below the
    entropy by t nats is at most N exp(-t), if the probabilities of all images add up to at most 1
    (Markov's inequality).
    """
    assert flow.num_bins is not None
    below = (flow.dims * math.log(flow.num_bins) + log_prob - sure).max().clamp_min(0)
    impossible = f"impossible: their entropy is {math.log2(flow.num_bins):.3g} bits/dim"
    reason = impossible if below > BOUNDS["noise below its entropy"][0] else ""
    notes.add("noise below its entropy", below, inputs=IMAGES, reason=reason)


def _noises(x: Tensor, seed: int) -> Iterator[Tensor]:
    return (uniform(x.shape, seed, Stream.EVALUATION, 0, draw) for draw in range(DRAWS))


def figures(flow: ForeignModel, x: Tensor, seed: int) -> Tensor:
    """The bits/dim of each image by each draw of the noise, `(DRAWS, B)`."""
    each = []
    for draw, noise in enumerate(_noises(x, seed)):
        flow.source.seed = draw
        each.append(flow.loss(flow(x.to(flow.device), noise.to(flow.device)).total).cpu().double())
    flow.source.seed = 0
    return torch.stack(each)


def _error_of_images(figures: Tensor) -> float:
    """Six standard errors of the mean for other images of the distribution, and rounding."""
    images = figures.mean(dim=0)
    return ERRORS * float(images.std()) / math.sqrt(len(images)) + PRINTED


def check_figure(
    flow: ForeignModel, x: Tensor, random: Tensor, train: Tensor | None, seed: int, notes: Notes
) -> None:
    """Compares the project's own bits/dim for images `x` with its density's, and names the
    reason. `train` are images on which the flow was trained.
    """
    own = flow.contract.bits_per_dim
    if own is None:
        return
    try:
        each, seen = (None if of is None else figures(flow, of, seed) for of in (x, train))
    except Exception as error:
        notes.failed(("the project's bits/dim",), error, inputs=IMAGES)
        return
    assert each is not None
    true = float(each.mean())
    words, reason = "", ""
    if callable(own):
        found, random_bits = (_own_figure(flow, own, images) for images in (x, random))
        # The project draws its noise once. Student's t with 7 degrees of freedom is beyond 5.6 once
        # in 1,000 times.
        sure = ERRORS * float(each.mean(dim=1).std()) + 1e-4
        entropy = math.log2(flow.num_bins or 1)
        if random_bits < entropy - 40 / (flow.dims * math.log(2)):
            words = f", and {random_bits:.4f} for noise of {entropy:.4g} bits/dim, which is "
            words += "impossible"
    else:
        found, sure = float(own), _error_of_images(each)
    words = f"the project gives {found:.4f}, its density {true:.4f}{words}"
    distance = abs(found - true) - sure
    distance = 0.0 if distance <= 0 else distance  # also NaN, unlike `max`
    if seen is not None:
        words += f", and {seen.mean():.4f} for training images"
        if distance and abs(found - float(seen.mean())) < _error_of_images(seen):
            reason = "it is the figure of data seen in training"
    if distance and not reason:
        # A single mistake is likelier than two of them.
        mistakes = _mistakes(flow, x, true, seed)
        reason = next(filter(None, (nearest(found, each, sure + 1e-3) for each in mistakes)), "")
    reason = f"{words}: {reason}" if reason else words
    notes.add("the project's bits/dim", distance, inputs=IMAGES, reason=reason)


def _own_figure(flow: ForeignModel, own: Callable[[Tensor], Any], images: Tensor) -> float:
    device = flow.device
    flow.to(flow.home)  # for which the project's function is written
    try:
        with seeded(0):
            return float(torch.as_tensor(own(images.clone())).mean())
    except Exception as error:
        raise UserError(f"bits_per_dim: {raised(error)}") from error
    finally:
        flow.to(device)


def _mistakes(
    flow: ForeignModel, x: Tensor, true: float, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The figures that common mistakes, and then pairs of them, give in place of the `true` one, in
    bits/dim.
    """
    bins, dequantizer = flow.num_bins, flow.dequantizer
    assert bins is not None and isinstance(dequantizer, Dequantizer)
    terms = {f"log {bins} is missing": -math.log2(bins)}
    for other in (2**n for n in range(1, 9)):
        if other != bins:
            terms[f"{other} bins in place of {bins}"] = math.log2(other / bins)
    # By the noise of `figures`: at the ends of a logit, its mean is not its value at the middle.
    of_draws = [dequantizer(x, noise)[1].mean() for noise in _noises(x, seed)]
    of_map = float(torch.stack(of_draws).mean()) / (flow.dims * math.log(2))
    by_flow = flow.contract.adds_noise  # with all terms of the bins
    if flow.contract.alpha is not None:
        terms["the log-determinant of the logit is missing"] = of_map + math.log2(bins)
        terms["the log-determinants of logit and bins are missing"] = of_map
    elif abs(of_map + math.log2(bins)) > 1e-3 and not by_flow:
        terms["the log-determinant of the scale is missing"] = of_map
        terms[f"log {bins} in place of the scale's log-determinant"] = of_map + math.log2(bins)
    units = {
        "nats are called bits": math.log(2),
        "it is the sum over an image in nats": flow.dims * math.log(2),
        "it is the sum over an image in bits": flow.dims,
    }
    single = {words: true + term for words, term in terms.items()}
    single |= {words: true * factor for words, factor in units.items()}
    pairs = {
        f"{unit}, and {words}": (true + term) * factor
        for unit, factor in units.items()
        for words, term in terms.items()
    }
    u = uniform(x.shape, seed, Stream.EVALUATION)
    noises = {words: of_noise(u) for words, of_noise in NOISES.items()}
    inputs = {words: dequantizer.from_unit((x + noise) / bins) for words, noise in noises.items()}
    if offset := flow.contract.offset:
        v, given = dequantizer.from_unit((x + u) / bins)
        inputs["the offset is missing"] = v - offset, given
    for words, (v, given) in ({} if by_flow else inputs).items():
        try:
            z, own = flow.bijection(v.to(flow.device))
            figure = float(flow.loss(flow.base_log_prob(z) + own + given.to(flow.device)).mean())
        except RunError:  # not an input of the flow
            continue
        if math.isfinite(figure):
            single[words] = figure
    return single, pairs


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "no noise is added": torch.zeros_like,
    "the middle of each bin in place of noise": lambda u: torch.full_like(u, 0.5),
    "the noise is outside of the bin, in [-1/2, 1/2)": lambda u: u - 0.5,
    "the noise fills two bins": lambda u: 2 * u,
    "the noise has a standard deviation of one bin": lambda u: torch.special.ndtri(
        u.clamp(1e-6, 1 - 1e-6)
    ),
}

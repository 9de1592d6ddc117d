"""The integral of a density on the line, in the plane, on a torus or on the sphere, by quadrature;
bounds of it in more dimensions; and the sum of the probabilities of images.
"""

import math

import torch
from torch import Tensor

from flowtrain.errors import RunError
from flowtrain.evaluation.layers import layers_of
from flowtrain.flow.flow import Flow
from flowtrain.flow.kinds import log_mean_exp
from flowtrain.foreign.model import ForeignModel
from flowtrain.pictures.draw import mesh
from flowtrain.system.random import Stream, generator
from flowtrain.tools.doctor.draws import ERRORS, adds_noise
from flowtrain.tools.doctor.findings import Notes

SIDE = 128  # cells of the mesh in each direction
BATCH = 4096
AT_A_TIME = 256  # images
ALL_IMAGES = 4096  # the most possible images of which all are evaluated
DRAWS = 16  # of the noise, for each of them
CERTAIN = 20  # nats; a sum of probabilities exceeds exp(20) by chance in exp(-20) of cases
MOST_DIMS = 64  # of a Gaussian that is fitted to samples
SAMPLES = 8192
STAKES = 0.5 ** torch.arange(1, 11, dtype=torch.float64)  # shares of the capital in each bet


def check_integral(flow: Flow, x: Tensor, z: Tensor, notes: Notes) -> None:
    """Checks that the density integrates to 1.

    In one or two dimensions, the midpoint rule on a mesh covers the sphere, a torus, or the part of
    the space with data `x` and the samples of latents `z`. There the integral is at most 1. A mesh
    of half the side shows the error of the rule: if it is as large as the excess, the excess is
    harmless.
    """
    surface = flow.kind.on_surface
    if flow.num_bins is not None:
        # The probabilities of images given different contexts need not add up to 1.
        if flow.kind.no_bits is None and flow.image_context is None:
            _check_sum(flow, x, z, notes)
        return
    if flow.dims > 2 and not surface:
        if flow.dims <= MOST_DIMS:
            _check_ratios(flow, notes)
        return
    torus = any(layer.of_angles for layer in layers_of(flow).values()) and not surface
    try:
        if torus or surface:
            ends = [(-math.pi, math.pi), (-1.0, 1.0) if surface else (-math.pi, math.pi)]
        else:
            points = torch.cat([x.cpu(), flow.decode(z).cpu()]).flatten(1)
            ends = list(zip(points.amin(dim=0).tolist(), points.amax(dim=0).tolist(), strict=True))
        if flow.dims == 1:
            ends = ends[:1]
        coarse, fine = (_integral(flow, ends, side) for side in (SIDE // 2, SIDE))
    except Exception as error:
        # The rectangle around the data may have cells outside of a foreign density's domain.
        outside = isinstance(flow, ForeignModel) and isinstance(error, RunError)
        if torus or surface or not outside:
            notes.failed(("integral",), error)
        return
    excess = abs(fine - 1) if torus or surface else max(0.0, fine - 1)
    estimated = isinstance(flow, ForeignModel) and flow.is_random  # exp of it is too large
    notes.add("integral", excess, harmless=estimated or abs(fine - coarse) > excess / 2)


def _check_ratios(flow: Flow, notes: Notes) -> None:
    """Compares the density p with a Gaussian q, which is fitted to half of the flow's samples.

    The mean of p / q over draws of q is the integral of p in their range, and the mean of q / p
    over the other samples is at most 1 if p is their density. In bets that are fair if a mean is 1
    (Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting"), the
    capital reaches exp(20) with probability exp(-20) (Ville's inequality).
    """
    try:
        z = flow.latents_of_classes(flow.draw_latents(SAMPLES, generator(0, Stream.LATENTS)))
        samples = flow.decode(z).flatten(1).double().cpu()
        fitted, others = samples[samples.isfinite().all(dim=1)].chunk(2)
        covariance = fitted.T.cov() + 1e-9 * fitted.var(dim=0).diag()
        gaussian = torch.distributions.MultivariateNormal(fitted.mean(dim=0), covariance)
        noise = torch.randn(fitted.shape, dtype=fitted.dtype, generator=generator(0, Stream.PAIRS))
        drawn = gaussian.loc + noise @ gaussian.scale_tril.T
        # Outside of the samples' range, a density may be undefined, or periodic.
        inside = ((drawn > others.amin(dim=0)) & (drawn < others.amax(dim=0))).all(dim=1)
        over = _log_prob(flow, drawn[inside]) - gaussian.log_prob(drawn[inside])
        under = gaussian.log_prob(others) - _log_prob(flow, others)
    except Exception as error:
        if not (isinstance(flow, ForeignModel) and isinstance(error, RunError)):
            notes.failed(("integral",), error)
        return
    excess, words = 0.0, ""
    for log_ratios, sign in ((over, 1), (under, -1)):
        ratios = log_ratios.nan_to_num(-math.inf, -math.inf).clamp(max=700).exp()
        ratios = torch.cat([ratios, ratios.new_zeros(len(inside) - len(ratios))])
        capitals = (STAKES[:, None] * (ratios - 1)).log1p().sum(dim=1)
        mean = float(ratios.mean())
        if log_mean_exp(capitals) > CERTAIN and mean - 1 > excess:
            excess, words = mean - 1, f"it is about {mean**sign:.4g}"
            words += ", or the samples are not from the density" if sign < 0 else ""
    estimated = isinstance(flow, ForeignModel) and flow.is_random
    notes.add("integral", excess, harmless=estimated, reason=words)


def _log_prob(flow: Flow, points: Tensor) -> Tensor:
    """The log-density of points `(N, D)`, in float64 on the CPU."""
    randomness = generator(0, Stream.EVALUATION)  # not used by a density, but drawn
    x = points.to(flow.dtype).reshape(-1, *flow.shape)
    parts = [
        flow.log_prob(part.to(flow.device), randomness).double().cpu() for part in x.split(BATCH)
    ]
    return torch.cat(parts)


def _check_sum(flow: Flow, x: Tensor, z: Tensor, notes: Notes) -> None:
    """Checks that the probabilities of different images add up to at most 1.

    With few possible images, it takes all of them. Each draw of the noise gives an unbiased
    estimate of the sum, which may be six standard errors above 1. Otherwise it takes images `x` and
    the samples of latents `z`, and a bound instead of an error: an unbiased estimate above exp(t)
    has probability exp(-t) (Markov's inequality).
    """
    assert flow.num_bins is not None
    every = flow.dims * math.log2(flow.num_bins) <= math.log2(ALL_IMAGES)
    draws = DRAWS if every and not flow.exact else 1
    try:
        if every:
            levels = torch.arange(flow.num_bins, dtype=torch.uint8)
            images = torch.cartesian_prod(*[levels] * flow.dims).view(-1, *flow.shape)
        else:
            images = torch.cat([x.cpu(), flow.decode(z).cpu()]).unique(dim=0)
        sums = torch.stack([_log_sum(flow, images, draw) for draw in range(draws)])
    except Exception as error:
        notes.failed(("integral",), error)
        return
    log_total = float(log_mean_exp(sums))
    total = math.exp(min(log_total, 700))
    if every:
        sure = ERRORS * float(sums.exp().std()) / math.sqrt(draws) if draws > 1 else 0.0
        words = f"all {len(images)} images together have {total:.4g} +- {sure / ERRORS:.2g}"
    else:
        sure = math.exp(CERTAIN)
        words = f"{len(images)} images together have exp({log_total:.4g})"
    excess = max(0.0, total - 1 - sure)
    # The exponential function of an unbiased estimate is too large.
    estimated = isinstance(flow, ForeignModel) and flow.is_random and not adds_noise(flow)
    notes.add("integral", excess, harmless=estimated, reason=words if excess else "")


def _log_sum(flow: Flow, images: Tensor, draw: int) -> Tensor:
    """The log of the sum of the images' probabilities, by one draw of the noise."""
    randomness = generator(0, Stream.EVALUATION, draw)
    if isinstance(flow, ForeignModel):
        flow.source.seed = draw
    parts = [
        flow.log_prob(part.to(flow.device), randomness).double().cpu()
        for part in images.split(AT_A_TIME)
    ]
    return torch.cat(parts).logsumexp(dim=0)


def _integral(flow: Flow, ends: list[tuple[float, float]], side: int) -> float:
    """The integral between the ends of one or two coordinates, by `side**2` cells."""
    if len(ends) == 1:
        area = (ends[0][1] - ends[0][0]) / side**2
        line = ends[0][0] + area * (torch.arange(side**2, dtype=torch.float64) + 0.5)
        cells = line[:, None]
    else:
        cells, area = mesh(flow, (*ends[0], *ends[1]), side)
    return float(_log_prob(flow, cells.flatten(1)).exp().sum()) * area

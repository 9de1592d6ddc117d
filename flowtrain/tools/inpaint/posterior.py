"""Samples of images of which a part is known, from the exact posterior under a flow's density.

Hamiltonian Monte Carlo moves all unknown entries of the dequantized image together, on the data's
side of the flow. There the known pixels are known exactly. In latent space they are a curved
surface of no volume, so a sampler needs a tolerance and has another posterior.

Chains start from random latents that are changed just enough for their images to agree with the
constraint. If the inverse is sequential, this takes too long. Then they start from random images,
and the density is raised slowly from the power 0 to 1 (annealing).

Models of levels (`bijections/ordinal.py`) give the probability of each entry given the entries
before it. Entries after the last known one are drawn from these directly, each sample anew. Earlier
ones start there, and then move like all others. Their force is the derivative with respect to the
levels, at whole numbers. The Metropolis test takes the exact probabilities, so the result is exact.
Between the moves, a few entries are drawn anew (`_Redraws`), so a black pixel can become white.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtrain.bijections.context import Context
from flowtrain.bijections.discretized import Entry
from flowtrain.bijections.ordinal import OrdinalAutoregressive, discrete_model
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow
from flowtrain.flow.passes import gradient_batch_size
from flowtrain.system import capacity
from flowtrain.system.console import silent
from flowtrain.system.random import Stream, generator
from flowtrain.tools.inpaint.constraints import Constraint, Pixels
from flowtrain.tools.inpaint.hamiltonian import Chains, Target, effective_size

# The distance from the constraint that latents may have, at first and at last: 0 is black, 1 white.
FAR, NEAR = 0.5, 0.02
RATE = 0.1  # of Adam, for latents whose size is about 1
LEAPFROG = 8  # mean number of gradients for a move
BEGINNING = 0.5  # the share of the moves before the density has the power 1
ADAPTED = 0.25  # the share of the moves at the power 1 during which the step is adapted
RISE = 3.0  # the power rises like t^RISE, because what it multiplies are thousands of nats
STEEPEST = 2.0  # nats per level: larger derivatives only make steps small; 0.1 is usual
REDRAWS = 16  # times that entries are drawn anew after a move, which takes about as long
MOST_REDRAWN = 64  # entries at a time
REDRAWN = 0.5  # the rate of acceptance to which their number is adapted
QUANTITIES = 100  # unknown entries by which the effective sample size is judged


@dataclass(frozen=True)
class Posterior:
    """Samples and their diagnostics. Without moves, all samples are independent."""

    x: Tensor  # uint8 (B, C, H, W) on the CPU: the last state of each of B chains
    accepted: float | None  # mean acceptance probability of a move
    effective: float | None  # effective sample size of a chain after the warm-up
    moves: int  # of each chain after the warm-up


def sample(
    flow: Flow,
    constraint: Constraint,
    chains: int,
    moves: int,
    seed: int,
    label: int | None = None,
    progress: Callable[[float, float], None] = silent,
) -> Posterior:
    """Images that agree with a constraint, one from each of B `chains`, as `require` allows them.
    Each chain takes so many `moves`, at least 4, with the warm-up. `label` is the class of a
    class-conditional model.
    """
    labels = None if label is None else torch.full((chains,), label, device=flow.device)
    randomness = generator(seed, Stream.POSTERIOR)
    sampler = _Sampler(flow, constraint, chains, moves, labels, randomness, progress)
    layer = discrete_model(flow.bijection)
    if layer is not None and isinstance(constraint, Pixels):
        return _in_order_and_moved(sampler, layer, constraint)
    density = _density(flow)
    if flow.bijection.inverse_is_sequential:
        s = torch.randn(chains, *flow.shape, generator=randomness).to(flow.device)
        return sampler.moved(density, s)
    s = constraint.coordinates(sampler.start_from_latents())
    return sampler.moved(density, s, begun=True)


def estimated_seconds(
    flow: Flow, constraint: Constraint, chains: int, moves: int, label: int | None = None
) -> float | None:
    """The time of `sample`, from one measured gradient. None if nothing moves."""
    layer, gradients = discrete_model(flow.bijection), LEAPFROG
    if layer is not None and isinstance(constraint, Pixels):
        if not _early(layer, constraint).any():
            return None
        gradients *= 2  # `_Redraws` takes about as long
    y = torch.full((chains, *flow.shape), 0.5, device=flow.device)
    labels = None if label is None else torch.full((len(y),), label, device=flow.device)
    target = _in_parts(flow, _density(flow), y, labels)
    target(y)  # the first is slower
    started = time.perf_counter()
    float(target(y)[0].sum())  # which waits for the device
    return moves * gradients * (time.perf_counter() - started)


def require(flow: Flow, chains: int, label: int | None = None) -> None:
    """Raises `UserError` if a flow cannot complete images, or not with this class, or if so many
    chains do not fit into memory.
    """
    flow.kind.require_bins("inpaint: the model is of real-valued data, which have no pixels")
    if flow.kind.no_bits is not None:
        raise UserError(f"inpaint: {flow.kind.no_bits}, so known pixels have no probability")
    flow.require_no_context("inpaint")
    if label is not None and not flow.classes:
        raise UserError(f"--class {label}: the model is not class-conditional (model.classes is 0)")
    if label is not None and not 0 <= label < flow.classes:
        raise UserError(f"--class {label}: the model has the classes 0..{flow.classes - 1}")
    if label is None and flow.classes and discrete_model(flow.bijection) is not None:
        raise UserError(
            f"inpaint: give the class of the image, --class 0 to {flow.classes - 1}: this model "
            f"gives the probabilities of levels for one class at a time"
        )
    capacity.require(chains * (12 * 4 + 1) * flow.dims, f"--num-images {chains}: the chains need")


# --- the density and its force --------------------------------------------------------------------

# Numbers `(B, ...)` of chains and their labels to the log-density `(B,)`, whose gradient with
# respect to the numbers is the force.
Density = Callable[[Tensor, Tensor | None], Tensor]


def _in_parts(flow: Flow, density: Density, s: Tensor, labels: Tensor | None) -> Target:
    """Computes a density and its force at as many `s` `(B, ...)` at a time as fit into memory."""

    def gradient(part: Tensor, of_part: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            part = part.detach().requires_grad_()
            log_density = density(part, of_part)
            (force,) = torch.autograd.grad(log_density.sum(), part)
        return log_density.detach(), force

    def measured(part: Tensor) -> object:
        return gradient(part, None if labels is None else labels[:1].expand(len(part)))

    at_a_time = gradient_batch_size(flow, measured, s[:1])

    def target(s: Tensor) -> tuple[Tensor, Tensor]:
        of_parts = itertools.repeat(None) if labels is None else labels.split(at_a_time)
        parts = [gradient(*each) for each in zip(s.split(at_a_time), of_parts, strict=False)]
        log_density, force = (torch.cat(each) for each in zip(*parts, strict=True))
        return log_density, force

    return target


def _density(flow: Flow, counted: Tensor | float = 1.0) -> Density:
    """The density of dequantized images. `counted` `(C, H, W)` weights the entries of a model of
    levels.
    """
    layer = discrete_model(flow.bijection)
    if layer is None:
        return flow.log_density

    def of_levels(y: Tensor, labels: Tensor | None) -> Tensor:
        assert flow.num_bins is not None
        scaled = y * flow.num_bins
        whole = scaled.detach().floor().clamp(0, flow.num_bins - 1)
        x = whole + (scaled - scaled.detach())  # the values are whole, the gradient is that of y
        x.register_hook(lambda slope: slope.nan_to_num(0.0).clamp(-STEEPEST, STEEPEST))
        terms = layer.log_probs(x, flow.conditioning(len(x), labels))
        return (terms * counted).flatten(1).sum(dim=1)

    return of_levels


# --- chains ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sampler:
    """The arguments of `sample`, and the steps of its work."""

    flow: Flow
    constraint: Constraint
    chains: int
    moves: int
    labels: Tensor | None
    randomness: torch.Generator
    progress: Callable[[float, float], None]

    @property
    def beginning(self) -> int:
        """The moves before the density has the power 1, or `LEAPFROG` times as many gradients in
        latents.
        """
        return round(BEGINNING * self.moves)

    def start_from_latents(self) -> Tensor:
        """Dequantized images `(B, C, H, W)` that nearly agree with the constraint.

        Their latents n minimize `|n - random|^2 / 2 + miss(n) / sigma^2`, where sigma falls. For a
        linear flow these are samples of the posterior ("randomize, then optimize": Bardsley,
        Solonen, Haario & Laine 2014, SIAM J. Sci. Comput. 36).
        """
        flow, count, steps = self.flow, self.chains, LEAPFROG * self.beginning
        labels = flow.classes_in_turn(count) if self.labels is None else self.labels
        random = torch.randn(count, flow.latent_dims, generator=self.randomness).to(flow.device)
        n = random.clone().requires_grad_()

        def images(n: Tensor, labels: Tensor | None) -> Tensor:
            v, _ = flow.bijection.inverse(
                flow.latents_of_classes(n, labels), flow.conditioning(len(n), labels)
            )
            return flow.dequantizer.to_unit(v)

        def closeness(n: Tensor, labels: Tensor | None) -> Tensor:
            return -self.constraint.miss(images(n, labels))

        target = _in_parts(flow, closeness, n, labels)
        optimizer = torch.optim.Adam([n], lr=RATE)
        for step in range(steps):
            sigma = FAR * (NEAR / FAR) ** ((step + 1) / steps)
            _, force = target(n)
            n.grad = n.detach() - random - force / sigma**2
            optimizer.step()
            self.progress((step + 1) // LEAPFROG, self.moves)
        with torch.no_grad():
            return images(n, labels)

    def moved(
        self, density: Density, s: Tensor, redraws: "_Redraws | None" = None, begun: bool = False
    ) -> Posterior:
        """Moves coordinates `s` `(B, C, H, W)`.

        It begins with annealing, unless the chains have `begun` in latents, or have `redraws` after
        each move.
        """
        num_bins, constraint = self.flow.num_bins, self.constraint
        assert num_bins is not None

        def of_coordinates(s: Tensor, labels: Tensor | None) -> Tensor:
            y, volume = constraint.images(s)
            return density(y, labels) + volume

        target = _in_parts(self.flow, of_coordinates, s, self.labels)
        chains = Chains(target, s, constraint.moves, LEAPFROG, self.randomness)
        annealed = self.beginning if redraws is None else 0
        warm_up = annealed + max(1, round(ADAPTED * (self.moves - annealed)))
        unknown = constraint.unknown.flatten().nonzero().flatten()
        followed = unknown[:: -(-len(unknown) // QUANTITIES)]
        probabilities, history = [], []
        for move in range(annealed if begun else 0, self.moves):
            power = min(1.0, ((move + 1) / annealed) ** RISE) if annealed else 1.0
            probability = chains.move(power, adapting=move < warm_up)
            if redraws is not None:
                chains.put(redraws(chains.point.s, adapting=move < warm_up))
            if move >= warm_up:
                probabilities.append(probability.mean())
                y, _ = constraint.images(chains.point.s)
                x = (y * num_bins).floor().clamp(0, num_bins - 1).to(torch.uint8)
                history.append(x.flatten(1)[:, followed].float().cpu())
            self.progress(move + 1, self.moves)
        return Posterior(
            x.cpu(),
            float(torch.stack(probabilities).mean()),
            effective_size(torch.stack(history)) / len(s),
            self.moves - warm_up,
        )


# --- models of levels -----------------------------------------------------------------------------


def _early(layer: OrdinalAutoregressive, constraint: Pixels) -> Tensor:
    """The missing entries `(C, H, W)` before the last known one in the order of the model."""
    order, known = layer.order(), constraint.known
    return ~known & (order < order[known].max())


def _in_order_and_moved(
    sampler: _Sampler, layer: OrdinalAutoregressive, constraint: Pixels
) -> Posterior:
    """Draws entries in order, and then moves those before a known one."""
    flow, labels, randomness = sampler.flow, sampler.labels, sampler.randomness
    assert flow.num_bins is not None
    known, early = constraint.known, _early(layer, constraint)
    given = constraint.x.expand(sampler.chains, -1, -1, -1)
    x = in_order(flow, layer, given, known, labels, randomness)
    if not early.any():
        sampler.progress(1, 1)
        return Posterior(x.to(torch.uint8).cpu(), None, None, 0)
    moving = Pixels(constraint.x, ~early, flow.num_bins, within=False)
    uniform = torch.rand(x.shape, generator=randomness).to(x.device)
    s = moving.coordinates((x + uniform) / flow.num_bins)
    counted = (known | early).to(flow.device)  # the others do not affect the moving entries
    redraws = _Redraws(layer, flow.conditioning(len(x), labels), moving, counted, randomness)
    chains = dataclasses.replace(sampler, constraint=moving)
    found = chains.moved(_density(flow, counted), s, redraws)
    x = in_order(flow, layer, found.x, known | early, labels, randomness)
    return dataclasses.replace(found, x=x.to(torch.uint8).cpu())


@dataclass
class _Redraws:
    """Draws entries of chains anew, from the model's own distributions, with a Metropolis test.

    A few random entries get levels from P(x_d | x_<d), all at once and given the present levels.
    The test takes the ratios of the images' probabilities and of the proposals'. The number of
    entries is adapted in the warm-up.
    """

    layer: OrdinalAutoregressive
    context: Context | None
    constraint: Pixels
    counted: Tensor
    randomness: torch.Generator
    count: float = 1.0  # entries at a time

    def __post_init__(self) -> None:
        self.free = self.constraint.moves.flatten().nonzero().flatten()

    @torch.no_grad()
    def __call__(self, s: Tensor, adapting: bool) -> Tensor:
        """Coordinates `(B, C, H, W)` after `REDRAWS` draws."""
        num_bins = self.layer.num_bins
        scaled = self.constraint.images(s)[0] * num_bins
        x = scaled.floor().clamp(0, num_bins - 1)
        within = scaled - x
        for _ in range(REDRAWS):
            x, rate = self._once(x)
            if adapting:
                most = min(len(self.free), MOST_REDRAWN)
                self.count = min(max(self.count * (1 + 0.2 * (rate - REDRAWN)), 1.0), most)
        moved = self.constraint.coordinates((x + within) / num_bins)
        return torch.where(self.constraint.moves.to(s.device), moved, s)

    def _once(self, x: Tensor) -> tuple[Tensor, float]:
        order = torch.randperm(len(self.free), generator=self.randomness)
        entries = self.free[order[: round(self.count)]].to(x.device)
        log_prob, table = self._at(x, entries)
        uniform = torch.rand(len(x), len(entries), 1, generator=self.randomness).to(x)
        below = table.exp().cumsum(dim=2) < uniform
        drawn = below.sum(dim=2).clamp_(max=self.layer.num_bins - 1)
        other = x.flatten(1).index_copy(1, entries, drawn.to(x)).view_as(x)
        its_log_prob, its_table = self._at(other, entries)
        old = x.flatten(1)[:, entries].long()
        there = table.gather(2, drawn[..., None]).sum(dim=(1, 2))
        back = its_table.gather(2, old[..., None]).sum(dim=(1, 2))
        ratio = (its_log_prob - log_prob + back - there).exp().clamp(max=1)
        accepted = torch.rand(len(x), generator=self.randomness).to(x) < ratio
        return torch.where(accepted[:, None, None, None], other, x), float(ratio.mean())

    def _at(self, x: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        terms, table = self.layer.log_probs_of_all(x, entries, self.context)
        return (terms * self.counted).flatten(1).double().sum(dim=1), table.double()


def in_order(
    flow: Flow,
    layer: OrdinalAutoregressive,
    x: Tensor,
    known: Tensor,
    labels: Tensor | None,
    randomness: torch.Generator,
) -> Tensor:
    """Levels `(B, C, H, W)`, int64: the `known` ones `(C, H, W)` are copied from `x`, of the same
    shape, and each other one is drawn given all before it.
    """
    given = x.flatten(1).T.long().to(flow.device).contiguous()
    free = (~known).flatten().tolist()
    uniform = torch.rand(given.shape, generator=randomness, dtype=torch.float64).to(flow.device)

    def next_level(entry: Entry, index: int) -> Tensor:
        return entry.find(uniform[index])[0] if free[index] else given[index]

    return layer.in_order(next_level, len(x), flow.conditioning(len(x), labels))

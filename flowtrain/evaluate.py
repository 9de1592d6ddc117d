"""Bits per dimension of a split, in float32, with what is needed to know what was measured."""

import csv
import io
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet, Split, labels_of
from flowtrain.diagnostics import watching
from flowtrain.errors import UserError
from flowtrain.flow.dequantize import draw_noise
from flowtrain.flow.flow import Flow, bits_per_dim
from flowtrain.system import distributed
from flowtrain.system.random import Stream, generator

log = logging.getLogger("flowtrain")

ENOUGH_FOR_A_CPU = 256 * 2**20  # bytes of activations; a larger batch is no faster (benchmarks/evaluation.py)
LARGEST_BATCH = 2048  # so that progress is seen
ALIVE = 6  # times the largest activation, while a batch is computed: a convolution's input, output, their copies


@torch.no_grad()
def fitting_batch_size(flow: Flow) -> int:
    """How many images to score at a time: a power of two, as many as fit into a quarter of a GPU's memory.

    Of all of it, not of what is free just now: the last digits of a likelihood depend on the batch size, and are to be
    the same the next time. On a CPU speed is the limit, well before memory.
    """
    largest = 0

    def note(name: str, module: nn.Module, output: Any) -> None:
        nonlocal largest
        largest = max([largest, *(t.nbytes for t in tree_leaves(output) if isinstance(t, Tensor))])

    with watching(flow, note):
        x = torch.zeros(1, *flow.shape, dtype=torch.uint8, device=flow.device)
        flow(x, torch.full_like(x, 0.5, dtype=flow.dtype))
    budget: float = ENOUGH_FOR_A_CPU
    if flow.device.type == "cuda":
        budget = torch.cuda.get_device_properties(flow.device).total_memory / 4
    fitting = min(budget / (ALIVE * largest), LARGEST_BATCH)
    return 2 ** int(math.log2(max(fitting, 1)))


@dataclass(frozen=True)
class Scores:
    """Per image, nats, float64 on the CPU."""

    draws: Tensor  # single-draw bounds, (K, N)
    base: Tensor  # log N(z; 0, I) of the first draw, (N,)
    log_det: Tensor  # all the rest of the first draw, (N,)
    draws_by_class: Tensor | None = None  # of a class-conditional model, bounds on log P(x | class), (K, C, N)

    @cached_property
    def log_prob(self) -> Tensor:
        """`log 1/K sum_k exp(draw_k)`, `(N,)`: the importance-weighted bound, of one draw that draw itself."""
        return self.draws.logsumexp(dim=0) - math.log(len(self.draws))

    @cached_property
    def elbo(self) -> Tensor:
        """The mean of the draws, `(N,)`: an estimate of the single-draw bound's expectation."""
        return self.draws.mean(dim=0)

    @cached_property
    def log_prob_by_class(self) -> Tensor:
        """The importance-weighted bound on log P(x | class), `(C, N)`."""
        assert self.draws_by_class is not None
        return self.draws_by_class.logsumexp(dim=0) - math.log(len(self.draws_by_class))

    def log_prob_leaving_one_out(self) -> Tensor:
        """The importance-weighted bound without each of the draws, `(K, N)`, for K > 1."""
        k = len(self.draws)
        largest, where = self.draws.max(dim=0)
        weights = (self.draws - largest).exp()
        rest = largest + (weights.sum(dim=0) - weights).log()
        # Without the largest of them the difference may be nothing but rounding: those are summed up anew.
        without = self.draws.scatter(0, where[None], -torch.inf).logsumexp(dim=0)
        return rest.scatter(0, where[None], without[None]) - math.log(k - 1)


@torch.no_grad()
def score(
    flow: Flow,
    split: Split,
    *,
    num_images: int | None = None,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """The bounds on log P(x) of the first `num_images` images of a split, from `samples` draws of the noise.

    For K > 1 draws the bound is the importance-weighted one, `log 1/K sum_k p(y_k) / q(u_k|x)` (Burda et al. 2016; Ho
    et al. 2019, section 3.1). An image's noise depends on the seed, its index and the draw, and on nothing else.

    Of several processes each scores a part of the images, and has the scores of all.
    """
    count = len(split) if num_images is None else min(num_images, len(split))
    own = distributed.share(count)
    batch_size = batch_size or fitting_batch_size(flow)
    noisy = flow.levels is not None
    rows = [torch.empty(samples * (1 + flow.classes) + 2, 0, dtype=torch.float64)]  # of a process without an image
    for start in range(own.start, own.stop, batch_size):
        stop = min(start + batch_size, own.stop)
        x = split.take(slice(start, stop)).to(flow.device)
        generators = [generator(seed, Stream.EVALUATION, index) for index in range(start, stop)] if noisy else []
        draws = []
        for _ in range(samples):
            noise = torch.zeros_like(x, device="cpu")
            if noisy:
                noise = torch.stack([draw_noise(x.shape[1:], g, torch.device("cpu")) for g in generators])
            parts = flow(x, noise.to(flow.device))
            of_classes = [] if parts.by_class is None else parts.by_class.T
            draws.append(torch.stack([parts.log_det, parts.base, *of_classes]).cpu().double())
        by_draw = torch.stack(draws)  # (K, 2 + C, B)
        bounds = by_draw[:, 1:] + by_draw[:, :1]  # of all classes together, then of each
        rows.append(torch.cat([bounds.flatten(0, 1), by_draw[0, :2]]))
        progress(stop - own.start, len(own))
    gathered = distributed.gather(torch.cat(rows, dim=1), count)
    bounds = gathered[:-2].unflatten(0, (samples, -1))
    return Scores(bounds[:, 0], gathered[-1], gathered[-2], bounds[:, 1:] if flow.classes else None)


def mean_loss(flow: Flow, split: Split, **options: Any) -> float:
    """The mean over the images, bits/dim (nats of real-valued data); not finite if any image is not."""
    return flow.loss(score(flow, split, **options).log_prob).mean().item()


@torch.no_grad()
def reconstruction_error(flow: Flow, x: Tensor) -> float:
    """The largest distance, in levels, of a decoded latent from the middle of its bin; below 1/2 all come back.

    Of real-valued data it is a distance from the data, in their own unit.
    """
    v = flow.dequantizer.middle(x.to(flow.device), flow.dtype)
    back = flow.bijection.inverse(flow.bijection(v)[0])[0]
    error = (flow.dequantizer.to_unit(back) - flow.dequantizer.to_unit(v)).abs() * (flow.levels or 1)
    return error.max().item()


def evaluate(
    model: LoadedModel,
    data: DataSet,
    split_name: Any,
    *,
    num_images: int | None = None,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], Scores]:
    """The result of `flowtrain evaluate` as plain data (a figure that is not finite is None), and the scores.

    Raises `UserError` where the data do not have the model's shape and levels, or the split is empty.
    """
    flow = model.flow
    data.require(flow.shape, flow.levels, model.checkpoint.path)
    with distributed.one_first():
        split = data.split(split_name)
    counts = distributed.exchange(len(split))
    if len(set(counts)) > 1:
        raise UserError(f"--split {split_name}: the processes have other data, {', '.join(map(str, counts))} images")
    if len(split) == 0:
        raise UserError(f"--split {split_name}: it is empty (data.validation is {data.config.validation:g})")
    if flow.levels is None and samples > 1:
        raise UserError(f"--samples {samples}: the likelihood of real-valued data is exact, there is nothing to draw")
    labels = _labels(model, data, split)
    options = {"num_images": num_images, "samples": samples, "seed": seed, "batch_size": batch_size}
    scores = score(flow, split, progress=progress, **options)  # type: ignore[arg-type]
    count = len(scores.log_prob)
    bad = torch.isfinite(scores.draws).all(dim=0).logical_not().nonzero().flatten().tolist()
    result = {
        **summarize(scores, flow),
        **_classification(scores, flow, labels),
        "num_images": count,
        "dims": flow.dims,
        "levels": flow.levels,
        "split": split_name,
        "dataset": data.config.name,
        "weights": model.weights,
        "step": model.checkpoint.meta["step"],
        "seed": seed,
        "non_finite_images": len(bad),
        "non_finite_indices": bad,
        "max_reconstruction_error": None
        if flow.bijection.inverse_is_sequential
        else _finite(reconstruction_error(flow, split.take(slice(0, min(64, count))))),
        "checkpoint": str(model.checkpoint.path),
    }
    return result, scores


def summarize(scores: Scores, flow: Flow) -> dict[str, Any]:
    """Mean bits/dim of both bounds, with the standard errors of the mean: over images, and over draws alone.

    `bits_per_dim` is that of `bound`; the single-draw bound stands beside it. Real-valued data have a likelihood in
    nats and no draws: `bound` is `exact`, and there are no bits. Over draws the error is what another seed
    would change: from the variance of an image's draws, for the importance-weighted bound by the jackknife (Efron 1982,
    eq. 3.5). One draw tells nothing about it (None); nor does anything where an image is not finite.
    """
    k, n = scores.draws.shape
    nats = -scores.log_prob
    in_nats = {
        "nats_per_image": _finite(nats.mean().item()),
        "nats_per_image_stderr": _finite(nats.std().item() / math.sqrt(n)) if n > 1 else None,
    }
    if flow.levels is None:
        return {"bits_per_dim": None, "bits_per_dim_stderr": None, "bound": "exact", "samples": k, **in_nats}
    dims = flow.dims
    result: dict[str, Any] = {"bound": "elbo" if k == 1 else "iwbo", "samples": k}
    variances = [torch.tensor(math.nan)] * 2  # of each image, over draws
    if k > 1:
        leaving_out = bits_per_dim(scores.log_prob_leaving_one_out(), dims)
        spread = bits_per_dim(scores.draws, dims).var(dim=0)
        variances = [(k - 1) * leaving_out.var(dim=0, correction=0), spread / k]
    for prefix, bound, variance in zip(("", "elbo_"), (scores.log_prob, scores.elbo), variances, strict=True):
        bits = bits_per_dim(bound, dims)
        over_images = bits.std().item() / math.sqrt(n) if n > 1 else math.nan
        result[f"{prefix}bits_per_dim"] = _finite(bits.mean().item())
        result[f"{prefix}bits_per_dim_stderr"] = _finite(over_images)
        result[f"{prefix}bits_per_dim_stderr_draws"] = _finite(variance.sum().sqrt().item() / n)
    return result | in_nats


def _labels(model: LoadedModel, data: DataSet, split: Split) -> Tensor | None:
    """The classes of a split for a class-conditional model; None, and said, where they cannot be the model's."""
    if not model.flow.classes or data.undivided or data.config.name != model.config.data.name:
        return None  # of other data the classes are others, or have other numbers
    try:
        return labels_of(split, model.flow.classes, data.config.name)
    except UserError as error:
        log.warning("no accuracy: %s", error)
        return None


def _classification(scores: Scores, flow: Flow, labels: Tensor | None) -> dict[str, Any]:
    """Of a class-conditional model on labelled data: the bits given the class, and the accuracy of Bayes' rule.

    `P(class | x)` is in proportion to `P(x | class)`, all classes being as likely; the most probable is predicted.
    """
    if labels is None:
        return {}
    by_class = scores.log_prob_by_class
    labels = labels[: by_class.shape[1]]
    given = flow.loss(by_class.gather(0, labels[None])[0])
    correct = torch.where(torch.isfinite(by_class).all(dim=0), by_class.argmax(dim=0) == labels, math.nan).double()
    accuracy = correct.mean()
    return {
        f"{flow.metric}_given_class": _finite(given.mean().item()),
        "accuracy": _finite(accuracy.item()),
        "accuracy_stderr": _finite((accuracy * (1 - accuracy) / len(correct)).sqrt().item()),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def scores_csv(scores: Scores, flow: Flow) -> bytes:
    """One row an image; `log_prob` is the bound, and `log_prob_base + log_det` that of the first draw.

    Of a class-conditional model also the class that it predicts. Real-valued data have no bits.
    """
    log_prob = scores.log_prob.tolist()
    bits = [""] * len(log_prob) if flow.levels is None else bits_per_dim(scores.log_prob, flow.dims).tolist()
    columns = {"bits_per_dim": bits, "log_prob": log_prob}
    columns |= {"log_prob_base": scores.base.tolist(), "log_det": scores.log_det.tolist()}
    if flow.classes:
        by_class = scores.log_prob_by_class
        known = torch.isfinite(by_class).all(dim=0).tolist()
        predicted = by_class.argmax(dim=0).tolist()
        columns["predicted_class"] = [label if ok else "" for label, ok in zip(predicted, known, strict=True)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", *columns])
    writer.writerows([index, *row] for index, row in enumerate(zip(*columns.values(), strict=True)))
    return text.getvalue().encode()

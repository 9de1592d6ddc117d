"""Bits per dimension of a split, in float32, with what is needed to know what was measured."""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flowtrain import distributed
from flowtrain.checkpoint import LoadedModel
from flowtrain.data import DataSet, Split
from flowtrain.dequantize import draw_noise
from flowtrain.device import Stream, generator
from flowtrain.diagnostics import watching
from flowtrain.errors import UserError
from flowtrain.flow import Flow, bits_per_dim

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
    """Per image, nats, float64 on the CPU, each `(N,)`."""

    log_prob: Tensor  # the bound: single-draw ELBO, or importance-weighted over the draws
    base: Tensor  # log N(z; 0, I) of the first draw
    log_det: Tensor  # all the rest of the first draw


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
    """The bound on log P(x) of the first `num_images` images of a split.

    With `samples` K > 1 it is the importance-weighted bound `log 1/K sum_k p(y_k) / q(u_k|x)` (Burda et al. 2016; Ho et
    al. 2019, section 3.1). An image's noise depends on the seed, its index and the draw, and on nothing else.

    Of several processes each scores a part of the images, and has the scores of all.
    """
    count = len(split) if num_images is None else min(num_images, len(split))
    own = distributed.share(count)
    batch_size = batch_size or fitting_batch_size(flow)
    rows = [torch.empty(3, 0, dtype=torch.float64)]  # of a process without an image
    for start in range(own.start, own.stop, batch_size):
        stop = min(start + batch_size, own.stop)
        x = split.take(slice(start, stop)).to(flow.device)
        generators = [generator(seed, Stream.EVALUATION, index) for index in range(start, stop)]
        draws = []
        for _ in range(samples):
            noise = torch.stack([draw_noise(x.shape[1:], g, torch.device("cpu")) for g in generators])
            parts = flow(x, noise.to(flow.device))
            draws.append(torch.stack([parts.base, parts.log_det]).cpu().double())
        by_draw = torch.stack(draws)  # (K, 2, B)
        bound = by_draw.sum(dim=1).logsumexp(dim=0) - math.log(samples)
        rows.append(torch.stack([bound, *by_draw[0]]))
        progress(stop - own.start, len(own))
    return Scores(*distributed.gather(torch.cat(rows, dim=1), count))


def mean_bits_per_dim(flow: Flow, split: Split, **options: Any) -> float:
    """The mean over the images; not finite if any image is not."""
    return bits_per_dim(score(flow, split, **options).log_prob, flow.dims).mean().item()


@torch.no_grad()
def reconstruction_error(flow: Flow, x: Tensor) -> float:
    """The largest distance, in levels, of a decoded latent from the middle of its bin; below 1/2 all come back."""
    v = flow.dequantizer.middle(x.to(flow.device), flow.dtype)
    back = flow.bijection.inverse(flow.bijection(v)[0])[0]
    error = (flow.dequantizer.to_unit(back) - flow.dequantizer.to_unit(v)).abs() * flow.levels
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
    options = {"num_images": num_images, "samples": samples, "seed": seed, "batch_size": batch_size}
    scores = score(flow, split, progress=progress, **options)  # type: ignore[arg-type]
    bits = bits_per_dim(scores.log_prob, flow.dims)
    stderr = bits.std().item() / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    result = {
        "bits_per_dim": _finite(bits.mean().item()),
        "bits_per_dim_stderr": _finite(stderr),
        "bound": "elbo" if samples == 1 else "iwbo",
        "samples": samples,
        "nats_per_image": _finite(-scores.log_prob.mean().item()),
        "num_images": len(bits),
        "dims": flow.dims,
        "levels": flow.levels,
        "split": split_name,
        "dataset": data.config.name,
        "weights": model.weights,
        "step": model.checkpoint.meta["step"],
        "seed": seed,
        "non_finite_images": int((~torch.isfinite(scores.log_prob)).sum()),
        "max_reconstruction_error": _finite(reconstruction_error(flow, split.take(slice(0, min(64, len(bits)))))),
        "checkpoint": str(model.checkpoint.path),
    }
    return result, scores


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def scores_csv(scores: Scores, dims: int) -> bytes:
    """One row an image; `log_prob` is the bound, and `log_prob_base + log_det` that of the first draw."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "bits_per_dim", "log_prob", "log_prob_base", "log_det"])
    columns = (bits_per_dim(scores.log_prob, dims), scores.log_prob, scores.base, scores.log_det)
    for index, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        writer.writerow([index, *map(repr, row)])
    return text.getvalue().encode()

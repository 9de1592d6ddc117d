"""`flowtrain evaluate`: the likelihood of a split in float32, with the conditions of the figure."""

import csv
import dataclasses
import io
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel, model_hash
from flowtrain.config import Data as DataConfig
from flowtrain.data.named import source
from flowtrain.data.splits import DataSet, Split, SplitName, labels_for, sampled
from flowtrain.datasets.base import digests, duplicates, first_equal
from flowtrain.errors import RunError, UserError
from flowtrain.evaluation.score import Scores, require_memory, score
from flowtrain.flow.flow import Flow
from flowtrain.flow.kinds import NoisyImages, bits_per_dim
from flowtrain.results import Evaluation
from flowtrain.system import distributed
from flowtrain.system.console import silent

log = logging.getLogger("flowtrain")


@torch.no_grad()
def reconstruction_error(flow: Flow, x: Tensor) -> float:
    """The largest distance of a decoded latent from the middle of its bin, in levels: below 1/2 all
    pixels come back exactly. For real-valued data it is in their own unit.
    """
    x = x.to(flow.device)
    v = flow.dequantizer.middle(x, flow.dtype)
    seen = flow.conditioning(len(x), context=flow.context_of(x))
    back = flow.bijection.inverse(flow.bijection(v, seen)[0], seen)[0]
    error = flow.distance(flow.dequantizer.to_unit(back), flow.dequantizer.to_unit(v))
    return error.max().item() * flow.kind.scale


def evaluate(
    model: LoadedModel,
    data: DataSet,
    split_name: SplitName,
    *,
    num_images: int | None = None,
    draws: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = silent,
) -> tuple[Evaluation, Scores]:
    """The result of `flowtrain evaluate`, and the scores of the images, or of a sample of
    `num_images` by the seed (`sampled`).

    Raises `UserError` if the data do not have the model's shape and levels, or the split is empty.
    """
    flow = model.flow
    if flow.exact and draws > 1:
        of = "real-valued data" if flow.kind.exact else model.config.model.name
        raise UserError(f"--draws {draws}: the likelihood of {of} is exact, so leave it out")
    data.require(flow.shape, flow.num_bins, model.checkpoint.path)
    with distributed.main_process_first():
        split = data.split(split_name)
    counts = distributed.all_gather_object(len(split))
    if len(set(counts)) > 1:
        raise UserError(
            f"--split {split_name}: the processes have other data, {', '.join(map(str, counts))} "
            f"images"
        )
    if len(split) == 0:
        raise UserError(
            f"--split {split_name}: it is empty (data.validation is {data.config.validation:g})"
        )
    positions = sampled(len(split), num_images or len(split), seed)
    split = split.at(positions)
    here = trained_on(model, data.config, data)
    known = model.checkpoint.meta.get("data")
    if here is None and known and source(data.config) == source(model.config.data):
        log.warning(
            "data: they have changed since the training, which may have had images of the %s split",
            split_name,
        )
    labels = None if here is None else _labels(model, data, split)
    require_memory(flow, len(distributed.shard(len(split))), batch_size, draws)
    scores = score(flow, split, draws=draws, seed=seed, batch_size=batch_size, progress=progress)
    more: dict[str, Any] = {"edition": data.test_images.edition}
    more["sides"] = flow.sides if flow.sides > 1 else None
    more["given"] = None if flow.image_context is None else flow.image_context.words
    bad = torch.isfinite(scores.draws).all(dim=0).logical_not().numpy()
    result = Evaluation(
        **summarize(scores, flow),
        **_classification(scores, flow, labels),
        num_images=len(split),
        duplicates=duplicates(first_equal(digests(split.pixels, split.indices))),
        **_shared(model, data, split_name, here, split),
        **{key: value for key, value in more.items() if value is not None},
        dims=flow.dims,
        levels=flow.num_bins,
        sampling=flow.sampling,
        split=split_name,
        dataset=data.config.name,
        weights=model.weights,
        step=model.checkpoint.meta["step"],
        seed=seed,
        non_finite_images=int(bad.sum()),
        non_finite_indices=positions[bad].tolist(),
        max_reconstruction_error=None
        if flow.bijection.inverse_is_sequential
        else _finite(reconstruction_error(flow, split.take(slice(0, 64)))),
        checkpoint=str(model.checkpoint.path),
        model=model_hash(model),
    )
    return result, dataclasses.replace(scores, positions=positions, names=split.names)


def trained_on(model: LoadedModel, place: DataConfig, data: DataSet) -> DataSet | None:
    """The model's own data, divided as for its training, if `place` names them.

    Files of any content have the name `npz`. So they are compared with the fingerprint in the
    checkpoint, if there is one and nothing has to be downloaded or decoded for it. `data` are taken
    if they are the same, because they are read already.
    """
    own, known = model.config.data, model.checkpoint.meta.get("data")
    if place.name != own.name:
        return None
    divided = {"validation": own.validation, "split_seed": own.split_seed}
    config = place.model_copy(update=divided)
    try:
        found = data if (config, data.undivided) == (data.config, False) else DataSet(config)
        if known and found.train_images.at_hand():
            return found if found.matches(known) else None
    except (UserError, RunError, OSError):
        return None
    return found if place.options() == own.options() else None


def _shared(
    model: LoadedModel, data: DataSet, name: SplitName, here: DataSet | None, split: Split
) -> dict[str, Any]:
    """The number of images of `split` that equal a training image: none for that split itself, and
    None if the model's own data are not at hand.
    """
    if name == "train" and here:
        return {}
    own = here or trained_on(model, model.config.data, data)
    return {"duplicates_of_training": own.equal_to_training(split) if own else None}


def summarize(scores: Scores, flow: Flow) -> dict[str, Any]:
    """The mean loss, with two standard errors: over images, and over draws.

    `loss` belongs to `bound`, and `elbo_bits_per_dim` to the single-draw bound. An exact likelihood
    has neither a second bound nor an error over draws. The latter estimates the effect of another
    seed: from the variance of each image's draws, for the importance-weighted bound by the
    jackknife (Efron 1982, eq. 3.5). It is None for one draw, and if an image is not finite.
    """
    k, n = scores.draws.shape
    kind, nats = flow.kind, -scores.log_prob
    noisy = isinstance(kind, NoisyImages)
    bound = "exact" if flow.exact else "density" if noisy else "elbo" if k == 1 else "iwbo"
    result: dict[str, Any] = {"bound": bound, "draws": k, "unit": kind.unit}
    if isinstance(kind, NoisyImages):
        result["sigma"] = kind.sigma
    losses = {"loss": scores.log_prob}
    variances = {}  # per image, over draws
    if not flow.exact:
        spread = flow.loss(scores.draws).var(dim=0) / k if k > 1 else torch.tensor(math.nan)
        variances = {"loss": spread}
        if not noisy:
            losses["elbo_bits_per_dim"] = scores.elbo
            variances["elbo_bits_per_dim"] = spread
            if k > 1:
                leaving_out = flow.loss(scores.log_prob_leaving_one_out())
                variances["loss"] = (k - 1) * leaving_out.var(dim=0, correction=0)
    for name, log_prob in losses.items():
        loss = flow.loss(log_prob)
        result |= {name: _finite(loss.mean().item()), f"{name}_stderr": _stderr(loss)}
        if name in variances:
            over_draws = variances[name].sum().sqrt().item() / n
            result[f"{name}_stderr_draws"] = _finite(over_draws)
    for suffix in ("", "_stderr"):
        result[f"bits_per_dim{suffix}"] = None if kind.no_bits else result[f"loss{suffix}"]
    return result | {
        "nats_per_image": _finite(nats.mean().item()),
        "nats_per_image_stderr": _stderr(nats),
    }


def _labels(model: LoadedModel, data: DataSet, split: Split) -> Tensor | None:
    """The classes of a split, or None, with a warning, if they cannot be the model's classes."""
    if not model.flow.classes or data.undivided:
        return None
    try:
        return labels_for(model.flow.classes, split.labels, data.config.name)
    except UserError as error:
        log.warning("no accuracy: %s", error)
        return None


def _classification(scores: Scores, flow: Flow, labels: Tensor | None) -> dict[str, Any]:
    """The number of classes. With labels: the loss given the class, and Bayes' accuracy."""
    classes = {"classes": flow.classes} if flow.classes else {}
    if labels is None:
        return classes
    by_class = scores.log_prob_by_class
    given = flow.loss(by_class.gather(0, labels[None])[0])
    correct = torch.where(
        torch.isfinite(by_class).all(dim=0), by_class.argmax(dim=0) == labels, math.nan
    ).double()
    accuracy = correct.mean()
    return {
        **classes,
        "loss_given_class": _finite(given.mean().item()),
        "accuracy": _finite(accuracy.item()),
        "accuracy_stderr": _finite((accuracy * (1 - accuracy) / len(correct)).sqrt().item()),
    }


def _stderr(values: Tensor) -> float | None:
    """The standard error of the mean; None for a single value, or if one is not finite."""
    return _finite(values.std().item() / math.sqrt(len(values))) if len(values) > 1 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def scores_csv(scores: Scores, flow: Flow) -> bytes:
    """One row per image, whose `index` is its place in the split, in nats.

    `log_prob` is the bound, `log_prob_base + log_det` the first draw's. Class-conditional
    models add the predicted class, and image files their names. A density has no bits.
    """
    bits = bits_per_dim(scores.log_prob, flow.dims).tolist()
    columns = {"bits_per_dim": [""] * len(bits) if flow.kind.no_bits else bits}
    columns |= {"log_prob": scores.log_prob.tolist(), "log_prob_base": scores.base.tolist()}
    columns |= {"log_det": scores.log_det.tolist()}
    if flow.classes:
        by_class = scores.log_prob_by_class
        known = torch.isfinite(by_class).all(dim=0).tolist()
        labels = zip(by_class.argmax(dim=0).tolist(), known, strict=True)
        columns["predicted_class"] = [label if ok else "" for label, ok in labels]
    if scores.names is not None:
        columns["file"] = scores.names
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", *columns])
    writer.writerows(zip(scores.positions.tolist(), *columns.values(), strict=True))
    return text.getvalue().encode(errors="backslashreplace")

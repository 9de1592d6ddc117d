"""The files of a comparison: `ood.json` and a CSV file of scores."""

import csv
import io
import math
from typing import Any, NamedTuple

import numpy as np

from flowtrain.pictures.lossless import coders
from flowtrain.tools.ood.scores import Comparison, Scored


class Mean(NamedTuple):
    """A mean with its standard error, and the median. None stands for what is not finite."""

    mean: float | None
    stderr: float | None
    median: float | None


def mean_of(values: np.ndarray) -> Mean:
    """The median beside the mean: for noise, a few images determine the mean."""
    with np.errstate(invalid="ignore"):  # for infinite values
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Mean(_finite(values.mean()), _finite(error), _finite(np.median(values)))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The content of `ood.json`. None stands for what cannot be computed."""
    model = comparison.model
    return {
        "in": _described(comparison.inside),
        "out": [
            {
                **_described(scored),
                "auroc": {name: area.auroc for name, area in areas.items()},
                "auroc_stderr": {name: area.stderr for name, area in areas.items()},
            }
            for scored, areas in zip(comparison.outside, comparison.areas, strict=True)
        ],
        f"entropy_{comparison.kind.metric}": _finite(comparison.entropy),
        "entropy_split": comparison.reference.collection.split,
        "entropy_images": len(comparison.reference.log_prob),
        "coders": coders(),
        "dims": model.flow.dims,
        "levels": model.flow.levels,
        "weights": model.weights,
        "step": model.checkpoint.meta["step"],
        "seed": comparison.seed,
        "checkpoint": str(model.checkpoint.path),
    }


def _described(scored: Scored) -> dict[str, Any]:
    collection = scored.collection
    shape, levels = collection.stored or (None, None)
    described: dict[str, Any] = {
        "dataset": collection.name,
        "split": collection.split,
        "num_images": len(collection.images),
        "non_finite_images": len(scored.non_finite),
        "stored_shape": shape and list(shape),
        "stored_levels": levels,
    }
    metric = scored.kind.metric
    means = {metric: mean_of(scored.likelihood), f"complexity_{metric}": mean_of(scored.complexity)}
    for name, (mean, stderr, median) in means.items():
        described |= {name: mean, f"{name}_stderr": stderr, f"{name}_median": median}
    return described


def scores_csv(comparison: Comparison) -> bytes:
    """One row per image, those of the `in` data first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metric = comparison.kind.metric
    writer.writerow(
        [
            *("dataset", "index", metric, "log_prob"),
            *("typicality", f"complexity_{metric}", "complexity_corrected"),
        ]
    )
    for scored in comparison.compared:
        columns = (scored.likelihood, scored.log_prob, scored.typicality, scored.complexity)
        values = (column.tolist() for column in (*columns, scored.complexity_corrected))
        for row in zip(scored.collection.positions.tolist(), *values, strict=True):
            writer.writerow([scored.collection.name, *map(repr, row)])
    return text.getvalue().encode()

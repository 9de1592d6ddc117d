"""The files of a comparison: `ood.json` and a CSV file of scores."""

import csv
import io
import itertools
import math
from typing import Any

import numpy as np

from flowtrain.pictures.lossless import coders
from flowtrain.tools.ood.scores import Comparison, Scored


def mean_of(values: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """The mean, its standard error and the median; None if they are not finite.

    The median is there because a few images dominate the mean of noise.
    """
    with np.errstate(invalid="ignore"):  # for infinite values
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return _finite(values.mean()), _finite(error), _finite(np.median(values))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The content of `ood.json`. None stands for figures that cannot be computed."""
    model, reference = comparison.model, comparison.reference
    return {
        "unit": reference.kind.unit,
        **({"sides": model.flow.sides} if model.flow.sides > 1 else {}),
        "in": _described(comparison.inside),
        "out": [
            {
                **_described(scored),
                "auroc": {name: area.auroc for name, area in areas.items()},
                "auroc_stderr": {name: area.stderr for name, area in areas.items()},
            }
            for scored, areas in zip(comparison.outside, comparison.areas, strict=True)
        ],
        "entropy": _finite(reference.entropy),
        "entropy_split": reference.collection.split,
        "entropy_images": len(reference.log_prob),
        "coders": coders(),
        "dims": model.flow.dims,
        "levels": model.flow.num_bins,
        "weights": model.weights,
        "step": model.checkpoint.meta["step"],
        "seed": comparison.seed,
        "checkpoint": str(model.checkpoint.path),
    }


def _described(scored: Scored) -> dict[str, Any]:
    collection = scored.collection
    shape, num_bins = collection.stored or (None, None)
    described: dict[str, Any] = {
        "dataset": collection.name,
        "split": collection.split,
        "num_images": len(collection.images),
        "non_finite_images": len(scored.non_finite),
        "stored_shape": shape and list(shape),
        "stored_levels": num_bins,
    }
    for name, values in (("loss", scored.loss), ("complexity", scored.complexity)):
        mean, stderr, median = mean_of(values)
        described |= {name: mean, f"{name}_stderr": stderr, f"{name}_median": median}
    for suffix in ("", "_stderr"):
        bits = None if scored.kind.no_bits else described[f"loss{suffix}"]
        described[f"bits_per_dim{suffix}"] = bits
    return described


def scores_csv(comparison: Comparison) -> bytes:
    """One row per image, with the `in` data first. Losses are in the unit of `ood.json`. The names
    of image files are in the last column.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    named = any(scored.collection.names for scored in comparison.compared)
    for scored in comparison.compared:
        columns = {"index": scored.collection.positions, "loss": scored.loss}
        columns |= {"log_prob": scored.log_prob, "typicality": scored.scores["typicality"]}
        columns |= {"complexity": scored.complexity}
        columns |= {"complexity_corrected": scored.scores["complexity_corrected"]}
        if scored is comparison.inside:
            writer.writerow(["dataset", *columns, *(["file"] if named else [])])
        files = scored.collection.names or itertools.repeat("")
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        for row, file in zip(rows, files, strict=False):
            also = [file] if named else []
            writer.writerow([scored.collection.name, *map(repr, row), *also])
    return text.getvalue().encode()

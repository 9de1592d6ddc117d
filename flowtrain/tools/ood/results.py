"""The files of a comparison: `ood.json` and a CSV file of scores."""

import csv
import io
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from flowtrain.evaluation.heat import picture
from flowtrain.pictures.grid import png
from flowtrain.pictures.lossless import coders
from flowtrain.tools.ood.scores import SCORES, Comparison, Scored
from flowtrain.tools.ood.verdict import rate


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
        **({} if comparison.false_positives is None else {"verdict": _verdict(comparison)}),
        "in": _described(comparison.inside) | _flagged(comparison, comparison.inside),
        "out": [
            {
                **_described(scored),
                **_flagged(comparison, scored),
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


def _verdict(comparison: Comparison) -> dict[str, Any]:
    reference = comparison.reference
    return {
        "score": comparison.decides,
        "false_positives": comparison.false_positives,
        "threshold": _finite(comparison.threshold),
        "held_out_split": reference.collection.split,
        "held_out_images": len(reference.log_prob),
    }


def _flagged(comparison: Comparison, scored: Scored) -> dict[str, Any]:
    """The rate of outliers, and the verdict on each image; nothing without verdicts."""
    if comparison.false_positives is None:
        return {}
    outliers = comparison.outliers(scored)
    found = rate(outliers)
    rows = zip(names_of(scored), comparison.p_values(scored), outliers, strict=True)
    return {
        "outliers": int(outliers.sum()),
        "outlier_rate": found.rate,
        "outlier_rate_interval": [found.low, found.high],
        "images": [
            {"image": name, "p_value": float(p), "outlier": bool(outlier)}
            for name, p, outlier in rows
        ],
    }


def names_of(scored: Scored) -> list[str]:
    """The file of each image, or its place in the split."""
    return scored.collection.names or list(map(str, scored.collection.positions))


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
        mean, stderr, median = (None, None, None) if values is None else mean_of(values)
        described |= {name: mean, f"{name}_stderr": stderr, f"{name}_median": median}
    for suffix in ("", "_stderr"):
        bits = None if scored.kind.no_bits else described[f"loss{suffix}"]
        described[f"bits_per_dim{suffix}"] = bits
    return described


def scores_csv(comparison: Comparison) -> bytes:
    """One row per example, the `in` data first. Losses are in the unit of `ood.json`. The names
    of image files are in the last column.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    named = any(scored.collection.names for scored in comparison.compared)
    for scored in comparison.compared:
        columns = {"index": scored.collection.positions, "loss": scored.loss}
        columns |= {"log_prob": scored.log_prob, "typicality": scored.scores["typicality"]}
        if scored.complexity is not None:
            columns["complexity"] = scored.complexity
        columns |= {key: scored.scores[key] for key in SCORES[2:] if key in scored.scores}
        columns["p_value"] = comparison.p_values(scored)
        if scored is comparison.inside:
            writer.writerow(["dataset", *columns, *(["file"] if named else [])])
        files = scored.collection.names or itertools.repeat("")
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        for row, file in zip(rows, files, strict=False):
            also = [file] if named else []
            writer.writerow([scored.collection.name, *map(repr, row), *also])
    return text.getvalue().encode(errors="backslashreplace")


def pictures(comparison: Comparison) -> Iterator[tuple[str, bytes]]:
    """Each image of `outside` beside its heat map, as a name and a PNG file."""
    flow, taken = comparison.model.flow, set[str]()
    num_bins = flow.kind.require_bins("heat maps are of images")
    for scored in comparison.outside:
        assert scored.heat is not None
        images = torch.from_numpy(scored.collection.images).split(1)
        for x, heat, name in zip(images, scored.heat, names_of(scored), strict=True):
            stem = f"{scored.collection.name}-{name.removesuffix('.png')}"
            # A file name has at most 255 bytes, and a letter up to four.
            stem = re.sub(r"[^\w.-]+", "_", stem)[-60:].lstrip("._")
            file = stem
            while file in taken:  # `a b.png` and `a_b.png`
                file = f"{file}-{len(taken)}"
            taken.add(file)
            yield f"{file}.png", png(picture(x, heat[None], num_bins, 2))

"""Histograms of the scores."""

import io
from typing import Any

import numpy as np

from flowtrain.evaluation.heat import HOTTEST
from flowtrain.flow.kinds import Kind, QuantizedImages
from flowtrain.pictures.lossless import coders
from flowtrain.tools.ood.scores import Comparison


def draw(comparison: Comparison) -> bytes:
    """Histograms as a PNG file: one panel per score, with all data sets and their AUROC."""
    from matplotlib.figure import Figure

    kind, inside = comparison.reference.kind, comparison.inside
    log = "log" if kind.no_bits else "log2"
    titles = {
        "likelihood": f"likelihood: -{log} p(x)",
        "typicality": f"typicality: |-{log} p(x) - {comparison.reference.entropy:.2f}|",
        "complexity_corrected": f"complexity-corrected: -{log} p(x) - L(x) ({', '.join(coders())})",
        "local": "local: largest heat of a place",
    }
    names = list(inside.scores)
    figure = Figure(figsize=(16 * len(names) / 3, 5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        unit = "spreads" if name == "local" else kind.unit
        furthest = _furthest(kind, name, inside.scores[name])
        values = [scored.scores[name] for scored in comparison.compared]
        values = [of_set[np.isfinite(of_set)].clip(max=furthest) for of_set in values]
        edges = np.histogram_bin_edges(np.concatenate(values), bins=100)
        labels = [f"{inside.collection.name} (in)"]
        for scored, areas in zip(comparison.outside, comparison.areas, strict=True):
            area = areas[name].auroc
            labels.append(scored.collection.name + ("" if area is None else f": AUROC {area:.3f}"))
        for order, (of_set, label) in enumerate(zip(values, labels, strict=True)):
            share = np.full(len(of_set), 1 / max(len(of_set), 1))
            style: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.5}
            if order == 0:
                style = {"histtype": "step", "color": "black"}
            label = label.replace("$", r"\$")  # a path is no formula
            axes.hist(of_set, edges, weights=share, label=label, **style)
        axes.set_title(titles[name])
        axes.set(xlabel=f"{unit} (the last bar has all above {furthest:.3g})", ylabel="share")
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _furthest(kind: Kind, name: str, inside: np.ndarray) -> float:
    """The score at the last bar, because noise and shuffled pixels may cost millions of bits: twice
    the log2 Q bits of a uniform coder, or of real values twice the range of the model's own.
    """
    if name == "local":
        return 2 * HOTTEST
    if isinstance(kind, QuantizedImages):
        return kind.uniform_loss + float(kind.in_unit(np.log2(kind.num_bins)))
    finite = inside[np.isfinite(inside)]
    return float(2 * finite.max() - finite.min()) if len(finite) else 0.0

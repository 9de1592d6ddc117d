"""The table and the picture of a sweep."""

import io
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flowtrain.checkpoints import record
from flowtrain.system.files import write_atomically
from flowtrain.tools.sweep.trials import Result
from flowtrain.tools.sweep.work import Sweep

TITLES = ["settings", "parameters", "steps", "images", "seconds", "validation"]
TITLES += ["difference to the first row", "end"]
ERRORS = "+- standard error over images, then over seeds if there are several"


def write(sweep: Sweep) -> str:
    """Writes `table.md`, `table.json` and `table.png`, and returns the table in Markdown."""
    names = sweep.rows()
    reached = [_reached(sweep, row) for row in range(len(names))]
    lines = [
        {
            "settings": name,
            "unit": "",
            "end": _end(sweep, row),
            **_figures(reached[row], reached[0]),
        }
        for row, name in enumerate(names)
    ]
    table = [TITLES, ["---"] * len(TITLES), *map(_cells, lines)]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    unit = next((each["unit"] for each in lines if each["unit"]), "no loss")
    text = f"{text}\nvalidation: {unit}, {ERRORS}\n"
    write_atomically(sweep.folder / "table.md", text.encode())
    write_atomically(sweep.folder / "table.json", json.dumps(lines, indent=2).encode() + b"\n")
    write_atomically(sweep.folder / "table.png", _picture(sweep, lines, unit))
    return text


def mean(losses: np.ndarray) -> dict[str, float | None]:
    """The mean of losses or differences `(S, N)` of S seeds and N images, with standard errors:
    over images of their means over seeds, and over seeds. One image or seed has none.
    """
    found: dict[str, float | None] = {"mean": float(losses.mean())}
    for name, axis in (("over_images", 0), ("over_seeds", 1)):
        values = losses.mean(axis=axis)
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
        found[name] = None if error is None else float(error)
    return found


def _reached(sweep: Sweep, row: int) -> list[list[Result]]:
    """The results of all seeds, of each rung that all have reached."""
    rungs = range(1, len(sweep.plan.shares) + 1)
    results = [[each.result(rung) for each in sweep.trials(row)] for rung in rungs]
    return [[x for x in found if x] for found in results if all(x and not x.message for x in found)]


def _figures(own: Sequence[Sequence[Result]], first: Sequence[Sequence[Result]]) -> dict[str, Any]:
    """Figures of the last rung of a row, and its difference to the first row, of the same images
    and seeds, at the last rung that both have reached.
    """
    if not own:
        return {}
    figures: dict[str, Any] = {key: getattr(own[-1][0], key) for key in ("unit", "parameters")}
    for title, key in (("steps", "step"), ("images", "images"), ("seconds", "seconds")):
        figures[title] = statistics.fmean(getattr(each, key) for each in own[-1])
    figures["validation"] = mean(np.array([each.losses for each in own[-1]]))
    if first and own is not first:
        both = [*zip(own, first, strict=False)][-1]
        a, b = (np.array([each.losses for each in results]) for results in both)
        figures["difference to the first row"] = mean(a - b)
    return figures


def _end(sweep: Sweep, row: int) -> str:
    """How a row ended: at the end of the budget or of a rung, or early, with the reason."""
    shares = [0.0]
    for rung, share in enumerate(sweep.plan.shares, 1):
        results = [x for each in sweep.trials(row) if (x := each.result(rung))]
        if reason := next((x.message for x in results if x.message), None):
            return reason
        shares += [share] * bool(results)
    return "finished" if shares[-1] == 1 else f"stopped at {shares[-1]:.3g} of the budget"


def _cells(line: dict[str, Any]) -> list[str]:
    cells = ["`{}`".format(line["settings"].replace("|", "\\|"))]
    for title in TITLES[1:-1]:
        value = line.get(title)
        if isinstance(value, dict):
            cells.append(" +- ".join(f"{x:.4f}" for x in value.values() if x is not None))
        else:
            cells.append("-" if value is None else f"{value:,.0f}")
    return [*cells, line["end"].replace("|", "\\|")]


def _picture(sweep: Sweep, lines: Sequence[dict[str, Any]], unit: str) -> bytes:
    """A PNG: validation during training, with the error over seeds, and the differences to the
    first row, with the errors over images (thick) and over seeds (thin).
    """
    figure = Figure(figsize=(13, 2 + max(3, 0.3 * len(lines))), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    key = "images" if sweep.plan.seconds is None else "seconds"
    for row, line in enumerate(lines):
        x, y, error = curve(sweep, row, key)
        left.errorbar(x, y, yerr=error, fmt=".-", color=f"C{row}", lw=1.2)
        if each := line.get("difference to the first row"):
            for name, width in (("over_images", 4), ("over_seeds", 1)):
                right.errorbar(
                    each["mean"], row, xerr=each[name], fmt="o", color=f"C{row}", elinewidth=width
                )
    left.set(xlabel=key, ylabel=f"validation, {unit}")
    right.axvline(0, color="#888888", lw=1)
    right.set(xlabel=f"difference to the first row, {unit}", ylim=(len(lines) - 0.5, -0.5))
    names = [each["settings"][-60:].replace("$", r"\$") for each in lines]  # no mathematics
    right.set_yticks(range(len(lines)), names, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def curve(sweep: Sweep, row: int, key: str) -> np.ndarray:
    """Mean of `key`, mean loss, and its standard error over seeds, `(3, K)`, for the K steps at
    which all seeds were validated, and the end.
    """
    points: dict[float, list[tuple[float, float]]] = {}
    for trial in sweep.trials(row):
        file = trial.path / "metrics.jsonl"
        rows = record.read_rows(file) if file.exists() else []
        rows = [each for each in rows if each.split == "validation" and each.loss is not None]
        for each in rows:
            step = math.inf if each is rows[-1] else each.step  # a time ends at any step
            points.setdefault(step, []).append((getattr(each, key), each.loss or 0.0))
    complete = [points[step] for step in sorted(points) if len(points[step]) == sweep.plan.seeds]
    x, y = np.array(complete).reshape(-1, sweep.plan.seeds, 2).transpose(2, 0, 1)
    error = y.std(axis=1, ddof=1) / math.sqrt(y.shape[1]) if y.shape[1] > 1 else np.zeros(len(y))
    return np.stack([x.mean(axis=1), y.mean(axis=1), error])

"""Training curves, drawn with matplotlib: a PNG that compares runs, and SVG for a report."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowtrain.results import Row

COLOURS = [
    *("#4477cc", "#dd7722", "#2a9d5c", "#cc3344", "#8866cc"),
    *("#997755", "#cc66aa", "#888888", "#a0a020", "#1fa0b0"),
]
STYLES = ("-", "--", ":", "-.")  # the next one when all colours are used
# The axis leaves out the loss over this share of a run's images, at the start. The loss falls so
# fast there that the rest would look flat.
STARTING = 0.05
INK = "#010203"  # the colour of text and lines, which nothing else in a chart has


def losses_png(runs: Mapping[str, Sequence[Row]], unit: str) -> bytes:
    """A PNG of the loss of several runs, given by name, against time and against images.

    Validation is bold, and training is faint.
    """
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("seconds", "images"), strict=True):
        handles = _losses(axes, runs, key, unit)
    # Names of folders may have bytes that are no UTF-8.
    names = [name.encode(errors="backslashreplace").decode() for name in runs]
    legend = figure.legend(handles, names, loc="outside lower center", ncols=min(len(runs), 3))
    legend.set_title("validation bold, training faint")
    for text in legend.get_texts():  # a dollar in a name is no mathematics
        text.set_parse_math(False)
    return _saved(figure, "png")


def curves_svg(rows: Sequence[Row], unit: str) -> dict[str, str]:
    """The curves of one run by title, as SVG elements in the text colour of their page."""
    train = [row for row in rows if row.split == "train"]

    def losses(key: str) -> Callable[[Axes], object]:
        return lambda axes: _losses(axes, {"": rows}, key, unit)

    def of_training(key: str, scale: str, label: str) -> Callable[[Axes], object]:
        def draw(axes: Axes) -> None:
            values = [(row.images, getattr(row, key)) for row in train]
            points = [(x, y) for x, y in values if y is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], color=COLOURS[0], lw=1.2)
            axes.set(xlabel="images", ylabel=label, yscale=scale)
            axes.grid(alpha=0.25)

        return draw

    norms = of_training("grad_norm", "log", "norm")
    speeds = of_training("images_per_second", "linear", "images a second")
    return {
        f"Loss, {unit}, against time": _svg(losses("seconds"), "time"),
        f"Loss, {unit}, against images seen": _svg(losses("images"), "images"),
        "Norm of the gradient, before clipping": _svg(norms, "gradient"),
        "Learning rate": _svg(of_training("lr", "linear", "rate"), "rate"),
        "Speed of training, without validation": _svg(speeds, "speed"),
    }


def _losses(axes: Axes, runs: Mapping[str, Sequence[Row]], key: str, unit: str) -> list[Any]:
    """Draws both splits of each run. Returns one line per run, for a legend."""
    handles, shown = [], []
    scale, label = (1, key)
    if key == "seconds":
        scale, label = _time([row.seconds for rows in runs.values() for row in rows])
    for index, rows in enumerate(runs.values()):
        colour, style = COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]
        for split, look in (
            ("train", {"lw": 1, "alpha": 0.55}),
            ("validation", {"lw": 1.6, "marker": ".", "ms": 6}),
        ):
            points = [
                (row, loss) for row in rows if row.split == split and (loss := row.loss) is not None
            ]
            x = [getattr(row, key) / scale for row, _ in points]
            (line,) = axes.plot(x, [loss for _, loss in points], style, color=colour, **look)
            shown += [loss for row, loss in points if row.images >= STARTING * rows[-1].images]
        handles.append(line)
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(xlabel=label, ylabel=unit)
    axes.grid(alpha=0.25)
    return handles


def _time(seconds: Sequence[float]) -> tuple[int, str]:
    """The unit of a time axis, in seconds, and its name."""
    longest = max(seconds, default=0)
    return (
        (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 120 else (1, "seconds")
    )


def _svg(draw: Callable[[Axes], object], name: str) -> str:
    figure = Figure(figsize=(4.2, 2.9), layout="constrained")
    inked = ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"]
    style: Any = dict.fromkeys([*inked, "grid.color"], INK)
    with matplotlib.rc_context({**style, "svg.fonttype": "none", "svg.hashsalt": name}):
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_facecolor("none")
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)
        axes.locator_params(axis="x", nbins=5)
        draw(axes)
        svg = _saved(figure, "svg", transparent=True, metadata={"Date": None}).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # A page has several of them, and each id may occur only once in a page.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace(INK, "currentColor")


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()

"""Pictures of samples and of paths: grids of images, or points and their density.

Points of the unit sphere, `(3, 1, 1)`, are drawn by longitude and height: Lambert's cylindrical
projection, which preserves areas.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.bijections.sphere import of_angles
from flowtrain.data.splits import Split
from flowtrain.errors import RunError, UserError
from flowtrain.flow.flow import Flow
from flowtrain.flow.kinds import Points, QuantizedImages
from flowtrain.pictures import grid
from flowtrain.pictures.stages import stages_of
from flowtrain.system.random import Stream, generator
from flowtrain.types import Shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 2.6  # inches
DPI = 100
MESH = 160  # points per side
STAGES = 6  # stages of the way from the base to the data that are shown
POINTS = Points.picture_count

Bounds = tuple[float, float, float, float]  # left, right, bottom, top


class ImageGrids:
    def __init__(self, num_bins: int):
        self.num_bins = num_bins

    def require_room(self, count: int, shape: Shape, columns: int, what: str) -> None:
        grid.require_room(count, shape, columns, what)

    def samples(
        self, x: Tensor, columns: int, seed: int, temperatures: Sequence[float] = (1.0,)
    ) -> Tensor:
        """A grid of the samples `x` `(T N, C, H, W)` with so many columns for each temperature:
        uint8 `(3, H', W')`.
        """
        if len(temperatures) == 1:
            return grid.grid(x, self.num_bins, columns)
        titles = [f"temperature {temperature:g}" for temperature in temperatures]
        return grid.blocks(x, self.num_bins, columns, titles)

    def paths(self, rows: Tensor) -> Tensor:
        """One row of images for each of the paths `(P, S, C, H, W)`: uint8 `(3, H', W')`."""
        return grid.grid(rows.flatten(0, 1), self.num_bins, rows.shape[1])

    def path_frames(self, rows: Tensor) -> list[Tensor]:
        """An animation of the paths `(P, S, C, H, W)`: for each step a row of images."""
        return [grid.grid(step, self.num_bins, len(step)) for step in rows.unbind(dim=1)]


class PointPlots:
    """Pictures of points, beside points of the data. `split` is called when these are needed."""

    def __init__(self, flow: Flow, split: Callable[[], Split]):
        self.flow = flow
        self.split = split

    def require_room(self, count: int, shape: Shape, columns: int, what: str) -> None:
        """A picture has the same size for any number of points."""

    def samples(
        self, x: Tensor, columns: int, seed: int, temperatures: Sequence[float] = (1.0,)
    ) -> Tensor:
        """The samples `x` `(T N, C, 1, 1)`, N for each temperature, as uint8 `(3, H', W')`.

        The upper row shows them beside the data and the log-density on a mesh. The rows below show
        how some layers carry the latents of `seed` to the data, at temperature 1. `columns` is not
        used. Raises `UserError` for points without a picture.
        """
        flow, beside = self.flow, self._beside()
        bounds = _bounds(beside)
        each = x.chunk(len(temperatures))
        z = flow.draw_latents(min(len(each[0]), POINTS), generator(seed, Stream.LATENTS))
        columns = 2 + len(temperatures)
        stages = _full_rows(stages_of(flow.bijection, flow.latents_of_classes(z)), columns)
        figure, (upper, *lower) = _figure(1 + -(-len(stages) // columns), columns)
        first, *middle = upper
        _scatter(first, f"data ({len(beside):,})", beside, bounds)
        for axes, part, temperature in zip(middle, each, temperatures, strict=False):
            at = "" if temperature == 1 else f" at {temperature:g}"
            _scatter(axes, f"samples{at} ({len(part):,})", part, bounds)
        _density(middle[-1], flow, bounds)
        colours = torch.atan2(z[:, 1], z[:, 0])
        for i, (axes, stage) in enumerate(zip(itertools.chain(*lower), stages, strict=False)):
            title = "base" if i == 0 else "data" if i == len(stages) - 1 else ""
            _scatter(axes, title, stage, _bounds(stage), colours)
        return _pixels(figure)

    def paths(self, rows: Tensor) -> Tensor:
        """The paths `(P, S, C, 1, 1)` as lines over the data: uint8 `(3, H', W')`. Raises
        `UserError` as `samples` does.
        """
        return self._lines(rows, self._beside())

    def path_frames(self, rows: Tensor) -> list[Tensor]:
        """An animation of the paths `(P, S, C, 1, 1)`: for each step the lines up to there."""
        beside = self._beside()
        return [self._lines(rows[:, : step + 1], beside) for step in range(rows.shape[1])]

    def _lines(self, rows: Tensor, beside: Tensor) -> Tensor:
        figure, panels = _figure(1, 1, 2 * PANEL)
        axes = panels[0][0]
        _scatter(axes, "", beside, _bounds(beside))
        for path in rows:
            places = _line(path, of_angles(self.flow.bijection))
            axes.plot(*places.T.numpy(), ".-", linewidth=1, markersize=3)
            axes.plot(*places[-1:].T.numpy(), "ko", markersize=4)
        return _pixels(figure)

    def _beside(self) -> Tensor:
        """Points of the data. Raises `UserError` if they are neither of the plane nor a sphere."""
        if self.flow.dims != 2 and not self.flow.kind.on_surface:
            raise UserError(
                f"there are no pictures of real-valued data of {self.flow.dims} dimensions, only "
                f".npz files"
            )
        return self.split().take(slice(0, POINTS))


def drawing(flow: Flow, split: Callable[[], Split]) -> ImageGrids | PointPlots:
    """The pictures for the kind of data of a flow. Only points need the split of the data."""
    kind = flow.kind
    return (
        ImageGrids(kind.num_bins) if isinstance(kind, QuantizedImages) else PointPlots(flow, split)
    )


def _line(path: Tensor, angles: bool) -> Tensor:
    """Coordinates of a path, `(S + breaks, 2)`, which breaks where `angles` pass half a turn."""
    places = coordinates(path)
    if angles:
        crossed = (places.diff(dim=0).abs() > math.pi).any(dim=1).nonzero().flatten().numpy()
        places = torch.from_numpy(np.insert(places.numpy(), crossed + 1, np.nan, axis=0))
    return places


def coordinates(x: Tensor) -> Tensor:
    """Coordinates in a picture of points of the plane or the sphere: `(N, ...)` to `(N, 2)`."""
    x = x.flatten(1).cpu().double()
    if x.shape[1] == 3:
        return torch.stack([torch.atan2(x[:, 1], x[:, 0]), x[:, 2]], dim=1)
    return x


def mesh(flow: Flow, bounds: Bounds, side: int) -> tuple[Tensor, float]:
    """The centres of a regular mesh, `(side**2, C, 1, 1)` in data space, and the area of a cell."""
    left, right, bottom, top = bounds
    width, height = (right - left) / side, (top - bottom) / side
    middle = torch.arange(side, dtype=torch.float64) + 0.5
    v, u = torch.meshgrid(bottom + height * middle, left + width * middle, indexing="ij")
    u, v = u.flatten(), v.flatten()
    if flow.shape[0] == 3:
        radius = (1 - v.square()).clamp_min(0).sqrt()
        points = torch.stack([radius * u.cos(), radius * u.sin(), v], dim=1)
    else:
        points = torch.stack([u, v], dim=1)
    return points.to(flow.dtype).reshape(-1, *flow.shape), width * height


def _bounds(x: Tensor) -> Bounds:
    """The whole sphere; in the plane, a square around almost all points, with a margin."""
    if x.flatten(1).shape[1] == 3:
        return -math.pi, math.pi, -1, 1
    places = coordinates(x)
    low, high = places.quantile(0.002, dim=0), places.quantile(0.998, dim=0)
    middle, half = (low + high) / 2, 0.65 * (float((high - low).max()) or 1.0)  # 0 for one point
    return tuple((middle[:, None] + torch.tensor([-half, half])).flatten().tolist())


def _full_rows(stages: Sequence[Tensor], columns: int) -> list[Tensor]:
    """About `STAGES` of the stages, the first and the last among them, that fill whole rows."""
    count = min(len(stages), -(-STAGES // columns) * columns)
    count = count // columns * columns or count
    chosen = torch.linspace(0, len(stages) - 1, count).round().long().tolist()
    return [stages[i] for i in chosen]


def _figure(rows: int, columns: int, panel: float = PANEL) -> "tuple[Figure, list[list[Axes]]]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panel * columns, panel * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).tolist()
    for axes in [axes for row in panels for axes in row]:
        axes.set_axis_off()
    return figure, panels


def _scatter(
    axes: "Axes", title: str, x: Tensor, bounds: Bounds, colours: Tensor | None = None
) -> None:
    places = coordinates(x)[:POINTS].numpy()
    style: dict[str, Any] = {"c": "tab:blue"}
    if colours is not None:
        style = {"c": colours[:POINTS].cpu().numpy(), "cmap": "hsv"}
    axes.scatter(places[:, 0], places[:, 1], s=2, linewidths=0, **style)
    _frame(axes, title, bounds)


@torch.no_grad()
def _density(axes: "Axes", flow: Flow, bounds: Bounds) -> None:
    points, _ = mesh(flow, bounds, MESH)
    try:
        values = torch.cat([flow.log_prob(part).cpu() for part in torch.split(points, 4096)])
    except RunError:  # the mesh may leave the domain of a foreign density
        _frame(axes, "no log-density: it raises an error here", bounds)
        return
    # The scale ends ten nats below the peak, because far away the density falls without end.
    lowest, pixels = float(values.max()) - 10, values.reshape(MESH, MESH).numpy()
    axes.imshow(pixels, "viridis", aspect="auto", vmin=lowest, origin="lower", extent=bounds)
    _frame(axes, "log-density", bounds)


def _frame(axes: "Axes", title: str, bounds: Bounds) -> None:
    axes.set_axis_on()
    axes.set(xlim=bounds[:2], ylim=bounds[2:], xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def _pixels(figure: "Figure") -> Tensor:
    figure.canvas.draw()
    rgba = torch.from_numpy(np.array(figure.canvas.buffer_rgba()))  # type: ignore[attr-defined]
    return rgba[..., :3].movedim(-1, 0).contiguous()

"""Draws docs/volume.png, the picture of the change of variables in docs/learn.md.

Left: an increasing function carries strips of equal probability from the base to the data. Right:
the trained model `two_moons` carries a mesh of squares of equal area.
"""

import math
from pathlib import Path

import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from torch import Tensor

import flowtrain

TARGET = Path(__file__).parent / "volume.png"
STRIPS, SIDE, REACH = 16, 40, 2.4  # strips, squares per side of the mesh, and where it ends


def carried(z: Tensor) -> Tensor:
    """From the base to the data, in one dimension: two regions, and little between them."""
    return 0.25 * z + 1.5 * torch.tanh(2.5 * z)


def one_dimension(figure: Figure) -> None:
    curve, base, data = (figure.add_axes(place) for place in (
        (0.12, 0.38, 0.24, 0.55), (0.03, 0.38, 0.08, 0.55), (0.12, 0.08, 0.24, 0.28)
    ))  # fmt: skip
    z = torch.linspace(-REACH, REACH, 601, dtype=torch.float64).requires_grad_()
    x = carried(z)
    (slope,) = torch.autograd.grad(x.sum(), z)
    density = (-0.5 * z**2).exp() / math.sqrt(2 * math.pi)
    z, x, at_data = z.detach(), x.detach(), (density / slope).detach()
    density = density.detach()
    curve.plot(x, z, "k")
    base.plot(-density, z, "k")
    data.plot(x, at_data, "k")
    edges = torch.special.ndtri(torch.linspace(0, 1, STRIPS + 1, dtype=torch.float64)[1:-1])
    for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        inside = (z >= low) & (z <= high)
        colour = f"C{i % 2}"
        base.fill_betweenx(z[inside], -density[inside], color=colour, alpha=0.5)
        data.fill_between(x[inside], at_data[inside], color=colour, alpha=0.5)
    for edge in edges:
        place = carried(edge)
        curve.plot([x[0], place, place], [edge, edge, z[0]], "0.75", linewidth=0.5)
    curve.set(xlim=(x[0], x[-1]), ylim=(z[0], z[-1]), title="x = f⁻¹(z)")
    base.set(ylim=(z[0], z[-1]), title="p(z)")
    data.set(xlim=(x[0], x[-1]), xlabel="p(x): strips of 1/16 each, wide where it is low")


def two_dimensions(figure: Figure) -> None:
    flow = flowtrain.load("two_moons", device="cpu")
    line = torch.linspace(-REACH, REACH, SIDE + 1)
    corners = torch.cartesian_prod(line, line)  # (N, 2)
    index = torch.arange((SIDE + 1) ** 2).view(SIDE + 1, SIDE + 1)
    squares = torch.stack([index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]], dim=-1)
    squares = squares.flatten(0, 1)  # (cells, 4)
    x = flow.decode(corners).flatten(1)
    shade = (-0.5 * corners[squares].mean(dim=1).square().sum(dim=1)).exp()  # of the base density
    for left, places, title in (
        (0.42, corners, "squares of the base"),
        (0.71, x, "the same squares among the data"),
    ):
        axes = figure.add_axes((left, 0.08, 0.28, 0.85))
        cells = PolyCollection(places[squares].tolist(), array=shade, cmap="viridis")
        cells.set_edgecolor("white")
        cells.set_linewidth(0.3)
        axes.add_collection(cells)
        axes.autoscale_view()
        axes.set_title(title)


def main() -> None:
    figure = Figure(figsize=(11, 3.7), dpi=100)
    one_dimension(figure)
    two_dimensions(figure)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        axes.title.set_fontsize(10)
    figure.savefig(TARGET)


if __name__ == "__main__":
    main()

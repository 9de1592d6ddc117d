"""`flowtrain interpolate`."""

from pathlib import Path
from typing import Annotated

import typer

from flowtrain.cli.base import (
    DataSetOption,
    DeviceOption,
    ModelArgument,
    SeedOption,
    TrustOption,
    WeightsOption,
    check_suffix,
    command,
    data_of,
    load,
    on_one_process,
)
from flowtrain.errors import UserError

EPILOG = (
    "Example: [cyan]flowtrain interpolate runs/glow_digits --images a.png b.png --steps 12 "
    "--out path.gif[/cyan]"
)


@command
@on_one_process
def interpolate(
    model: ModelArgument = None,
    pairs: Annotated[
        int, typer.Option("--pairs", min=1, help="Number of pairs of test images, one row each.")
    ] = 4,
    steps: Annotated[
        int, typer.Option("--steps", min=2, help="Images per row, the ends included.")
    ] = 8,
    files: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--images",
            metavar="A B",
            help="Interpolate between two image files of your own.",
            show_default=False,
        ),
    ] = None,
    from_class: Annotated[
        int | None,
        typer.Option(
            "--from-class",
            min=0,
            metavar="A",
            help="Move images of this class to the class --to-class.",
            show_default=False,
        ),
    ] = None,
    to_class: Annotated[
        int | None,
        typer.Option(
            "--to-class",
            min=0,
            metavar="B",
            help="Move images to this class, by the difference of the mean latents.",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.png|.gif",
            help="A grid, or an animation.",
            show_default="interpolate.png in the run",
        ),
    ] = None,
    weights: WeightsOption = None,
    overrides: DataSetOption = None,
    trust_code: TrustOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Walk between images through the latent space. Images of the data come back exactly.

    The ends are two images of your own, or random pairs of test images. With --from-class and
    --to-class, the first test images of one class move along the difference of the two classes'
    mean latents.
    """
    from flowtrain.checkpoints.load import run_of
    from flowtrain.pictures import draw, grid
    from flowtrain.pictures import interpolate as paths
    from flowtrain.system.console import console

    suffix = check_suffix(out, (".png", ".gif"))
    if (from_class is None) != (to_class is None):
        raise UserError("--from-class and --to-class: one is of no use without the other")
    if from_class is not None and files is not None:
        raise UserError("--images: with --from-class the images are those of the class")
    loaded = load(model, device, weights, trust_code)
    flow = loaded.flow
    drawing = draw.drawing(flow, lambda: data_of(loaded, overrides).split("test"))
    paths_drawn = 1 if files else pairs
    what = f"--steps {steps}: a picture of {paths_drawn:,} paths of {steps:,} images needs"
    drawing.require_room(steps * paths_drawn, flow.shape, steps, what)
    if from_class is not None and to_class is not None:
        data = data_of(loaded, overrides)
        data.require(flow.shape, flow.levels, loaded.checkpoint.path)
        rows = paths.between_classes(flow, data.split("test"), from_class, to_class, pairs, steps)
    elif files is not None:
        rows = paths.interpolate(flow, *paths.from_files(files, loaded), steps)
    else:
        rows = paths.interpolate(
            flow, *paths.from_test_images(loaded, data_of(loaded, overrides), pairs, seed), steps
        )
    rows = rows.cpu()  # (P, S, C, H, W)
    path = out or run_of(loaded.checkpoint.path) / "interpolate.png"
    if suffix == ".gif":
        frames = drawing.path_frames(rows)
        grid.save_gif(path, frames + frames[-2:0:-1])  # there and back
    else:
        grid.save_png(path, drawing.paths(rows))
    console.print(
        f"wrote {path}: {len(rows)} paths of {steps} steps through {loaded.checkpoint.path}"
    )

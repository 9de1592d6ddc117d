"""`flowtrain interpolate`."""

from pathlib import Path
from typing import Annotated

import typer

from flowtrain.commands.base import (
    DataSetOption,
    DeviceOption,
    ModelArgument,
    SeedOption,
    TrustOption,
    WeightsOption,
    command,
    data_of,
    load,
    on_one_process,
)

EPILOG = "Example: [cyan]flowtrain interpolate runs/glow_digits --images a.png b.png --steps 12 --out path.gif[/cyan]"


@command
@on_one_process
def interpolate(
    model: ModelArgument = None,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Pairs of test images, a row each.")] = 4,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Images in a row, the ends included.")] = 8,
    files: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--images", metavar="A B", help="Between two image files of your own.", show_default=False),
    ] = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE.png|.gif", help="A grid, or an animation.", show_default="interpolate.png in the run"
        ),
    ] = None,
    weights: WeightsOption = None,
    overrides: DataSetOption = None,
    trust_code: TrustOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Walk between images through the latent space. The ends come back exactly."""
    from flowtrain import checkpoint, images
    from flowtrain import interpolate as paths
    from flowtrain.console import console

    suffix = images.check_suffix(out, (".png", ".gif")) if out else ".png"
    loaded = load(model, device, weights, trust_code)
    if files is not None:
        ends = paths.from_files(files, loaded)
    else:
        ends = paths.from_test_images(loaded, data_of(loaded, overrides), pairs, seed)
    rows = paths.interpolate(loaded.flow, *ends, steps).cpu()  # (P, S, C, H, W)
    path = out or checkpoint.run_of(loaded.checkpoint.path) / "interpolate.png"
    if suffix == ".gif":
        frames = [images.grid(rows[:, step], loaded.flow.levels, columns=len(rows)) for step in range(steps)]
        images.save_gif(path, frames + frames[-2:0:-1])  # there and back
    else:
        images.save_png(path, images.grid(rows.flatten(0, 1), loaded.flow.levels, columns=steps))
    console.print(f"wrote {path}: {len(rows)} paths of {steps} steps through {loaded.checkpoint.path}")

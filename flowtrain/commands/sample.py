"""`flowtrain sample`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from flowtrain.commands.base import (
    DeviceOption,
    ModelArgument,
    SeedOption,
    TrustOption,
    WeightsOption,
    command,
    load,
    on_one_process,
)
from flowtrain.errors import UserError

EPILOG = "Example: [cyan]flowtrain sample runs/glow_digits --temperature 0.7 --temperature 1 --out t.png[/cyan]"


@command
@on_one_process
def sample(
    model: ModelArgument = None,
    num: Annotated[int, typer.Option("--num", min=1, help="Images for each temperature.")] = 64,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            "--temperature",
            min=0,
            metavar="T",
            help="Repeatable, a row each; 0 is the mode of the base.",
            show_default="1.0",
        ),
    ] = None,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE.png|.npz", help="A grid, or the images.", show_default="sample.png in the run"
        ),
    ] = None,
    trust_code: TrustOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Draw images from a trained flow. One seed gives the same images, however many are drawn."""
    import io

    import numpy as np

    from flowtrain import checkpoint, images
    from flowtrain import sample as sampling
    from flowtrain.console import ProgressBar, console

    suffix = images.check_suffix(out, (".png", ".npz")) if out else ".png"
    temperatures = temperature or [1.0]
    if not all(map(math.isfinite, temperatures)):
        raise UserError(f"--temperature {max(temperatures)}: expected a finite number")
    loaded = load(model, device, weights, trust_code)
    with ProgressBar("sampling") as bar:
        drawn = sampling.sample(loaded.flow, num, temperatures, seed, bar)
    path = out or checkpoint.run_of(loaded.checkpoint.path) / "sample.png"
    if suffix == ".npz":
        buffer = io.BytesIO()
        arrays = {"images": drawn.movedim(1, -1).numpy(), "temperature": np.repeat(temperatures, num)}
        np.savez_compressed(buffer, **arrays, seed=seed, levels=loaded.flow.levels)  # type: ignore[arg-type]
        images.save(path, buffer.getvalue())
    else:
        columns = num if len(temperatures) > 1 else max(1, round(num**0.5))
        images.save_png(path, images.grid(drawn, loaded.flow.levels, columns))
    console.print(f"wrote {path}: {len(drawn)} samples of {loaded.checkpoint.path}")

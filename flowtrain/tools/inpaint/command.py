"""`flowtrain inpaint`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from flowtrain.cli.base import (
    ModelOptions,
    SeedOption,
    command,
    on_one_process,
    require_file,
    require_folder,
)
from flowtrain.errors import UserError

EPILOG = (
    "Examples: [cyan]flowtrain inpaint runs/photos --image torn.png --mask holes.png --out "
    "whole[/cyan], [cyan]flowtrain inpaint glow_cifar_small --image 16x16.png --factor 2 --out "
    "large[/cyan]"
)
FEW = 3.0  # effective samples of a chain below which its end may depend on its beginning


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG, rich_help_panel="Draw and edit")(inpaint)


@command
@on_one_process
def inpaint(
    image: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="An image of the model's size, or with --factor a smaller one."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER|FILE.npz",
            help="A folder for PNG files with a grid, the mean and inpaint.json, or one file of "
            "arrays.",
        ),
    ],
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An image of the same size: white where pixels are missing, else black.",
        ),
    ] = None,
    factor: Annotated[
        int | None,
        typer.Option(
            metavar="F", help="Enlarge the image F times: its pixels are means of FxF pixels."
        ),
    ] = None,
    num_images: Annotated[
        int, typer.Option(min=1, metavar="N", help="Samples, one per chain.")
    ] = 8,
    steps: Annotated[
        int,
        typer.Option(
            min=8, help="Moves of each chain, of about 8 gradients each, including the warm-up."
        ),
    ] = 80,
    label: Annotated[
        int | None,
        typer.Option(
            "--class",
            metavar="K",
            help="The class of the image, for a class-conditional model. A causal one needs it.",
            show_default="unknown",
        ),
    ] = None,
    seed: SeedOption = 0,
    *,
    options: ModelOptions,
) -> None:
    """Complete an image, or enlarge one, by samples from the posterior of a flow.

    The known pixels keep their levels. The missing ones are sampled from p(missing | known) under
    the exact density of the model, by Hamiltonian Monte Carlo with a Metropolis test, so more steps
    bring them closer to it. A causal model draws the pixels after the last known one directly, in
    order. It moves earlier ones as other models do, and also redraws a few at a time.
    """
    from flowtrain.latents.paths import log_probs
    from flowtrain.system.console import ProgressBar, console, counted, duration
    from flowtrain.system.files import require_absent, save
    from flowtrain.tools.inpaint import completion, posterior

    if (mask is None) == (factor is None):
        raise UserError("give one of --mask FILE, for missing pixels, and --factor F, to enlarge")
    one_file = out.suffix.lower() == ".npz"
    require_file(out) if one_file else require_folder(out, out)
    loaded = options.load_model()
    posterior.require(loaded.flow, num_images, label)
    if mask is not None:
        given = completion.of_mask(image, mask, loaded)
    else:
        assert factor is not None
        given = completion.of_averages(image, factor, loaded)
    if not one_file:
        require_absent(completion.names(num_images), out)
    levels = loaded.flow.num_bins
    reduced = "" if levels == 256 else f" with the {levels} levels of the model"
    console.print(f"{image}{reduced}: {given.words}")
    seconds = posterior.estimated_seconds(loaded.flow, given.constraint, num_images, steps, label)
    if seconds is not None:
        console.print(
            f"about {duration(seconds)} for {counted(num_images, 'chain')} of {steps} moves; the "
            f"time is proportional to --steps"
        )
    with ProgressBar("sampling") as bar:
        found = posterior.sample(loaded.flow, given.constraint, num_images, steps, seed, label, bar)
    losses = loaded.flow.loss(log_probs(loaded.flow, found.x)).tolist()  # as `evaluate`
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError("the likelihood of a sample is not finite")
    if one_file:
        save(out, completion.npz(loaded, given, found, losses, seed))
    else:
        about = {
            "model": str(loaded.checkpoint.path),
            "image": str(image),
            "mask": None if mask is None else str(mask),
            "factor": factor,
            "class": label,
            "seed": seed,
            "steps": steps,
            "accepted": found.accepted,
            "effective_samples_of_a_chain": found.effective,
            "bits_per_dim": losses,
        }
        completion.write_folder(out, loaded, given, found, about)
    console.print(f"wrote {out}: {counted(num_images, 'sample')} of {loaded.checkpoint.path}")
    console.print(f"bits/dim {min(losses):.3f} to {max(losses):.3f}, of the whole images")
    if found.effective is None:
        console.print("exact: the samples are independent, drawn pixel by pixel")
        return
    console.print(
        f"moves: {found.accepted:.0%} accepted; the {found.moves} moves of a chain after the "
        f"warm-up are worth {found.effective:.1f} independent samples"
    )
    if found.effective < FEW:
        console.print("that is few: the samples may not have converged; use more --steps")

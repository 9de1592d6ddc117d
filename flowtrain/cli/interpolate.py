"""`flowtrain interpolate`."""

import functools
import math
from pathlib import Path
from typing import Annotated

import typer

from flowtrain.cli.base import (
    DataOptions,
    SeedOption,
    check_suffix,
    command,
    on_one_process,
    output,
)
from flowtrain.errors import UserError

EPILOG = (
    "Examples: [cyan]flowtrain interpolate runs/glow_digits --images a.png b.png --steps 12 "
    "--out path.gif[/cyan], [cyan]flowtrain interpolate glow_digits --from-class 4 --to-class 9"
    "[/cyan]"
)


@command
@on_one_process
def interpolate(
    pairs: Annotated[
        int | None,
        typer.Option(min=1, help="Number of pairs of test images, one row each.", show_default="4"),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Images per row, the ends included.")] = 8,
    files: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--images", metavar="A B", help="Interpolate between two image files of your own."
        ),
    ] = None,
    from_class: Annotated[
        int | None,
        typer.Option(min=0, metavar="A", help="Move images of this class to the class --to-class."),
    ] = None,
    to_class: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="B",
            help="Move images to this class, by the mean latents of both, or by the class priors "
            "of a class-conditional model.",
        ),
    ] = None,
    along: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Move images along an attribute from `flowtrain attributes`."
        ),
    ] = None,
    strength: Annotated[
        float,
        typer.Option(
            metavar="S",
            help="Distance of --along: 1 is the mean of images with the attribute, -1 the mean of "
            "images without it.",
        ),
    ] = 1.0,
    stop: Annotated[
        bool,
        typer.Option(
            "--stop/--no-stop",
            help="Stop --along before an image that is less likely than 99% of the test images.",
        ),
    ] = True,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="An image file of your own to move --along; repeatable.",
            show_default="random test images",
        ),
    ] = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png|.gif",
            help="A grid, or an animation.",
            show_default="interpolate.png in the run",
        ),
    ] = None,
    *,
    options: DataOptions,
) -> None:
    """Interpolate between images in latent space. Images of the data are restored exactly.

    The ends are two images of your own, or random pairs of test images. With --from-class and
    --to-class, the first test images of one class move to another one. With --along, images move
    along an attribute.

    A path along an attribute stops before an image that is less likely than 99% of the test images.
    The command counts the paths to a class that pass such images.
    """
    import torch

    from flowtrain.latents import directions, paths
    from flowtrain.latents.encoding import encode, read_images
    from flowtrain.pictures import draw, grid
    from flowtrain.system.console import ProgressBar, console, counted
    from flowtrain.system.files import save

    suffix = check_suffix(out, (".png", ".gif"))
    _check(files, from_class, to_class, along, strength, image, stop, pairs)
    pairs = pairs or 4
    if files is not None and options.words():
        raise UserError("--images: not with KEY=VALUE")
    loaded = options.load_model()
    path = output(out, loaded, "interpolate.png", "--out")
    flow = loaded.flow
    data = functools.cache(lambda: options.data(loaded))  # image files need none
    drawing = draw.drawing(flow, lambda: data().split("test"))
    count = len(image) if image else 1 if files else pairs
    what = f"--steps {steps}: a picture of {count:,} paths of {steps:,} images needs"
    across = count if suffix == ".gif" else steps  # images in a row, which is enlarged if short
    drawing.require_room(steps * count, flow.shape, across, what)
    latents = None
    if from_class is not None or along is not None:
        data().require(flow.shape, flow.num_bins, loaded.checkpoint.path)
    if from_class is not None and to_class is not None:
        latents = paths.of_classes(flow, data(), from_class, to_class, pairs, steps)
    elif along is not None:
        direction = directions.named(loaded, along)
        paths.require_room(flow, count, steps)
        if image:
            x = read_images(image, loaded, "--image")
        else:
            x = paths.random_images(loaded, data(), pairs, seed, "--pairs", pairs)
        latents = paths.along(encode(flow, x), direction, strength, steps)
    else:
        if files:
            x = read_images(files, loaded, "--images")
        else:
            x = paths.random_images(loaded, data(), 2 * pairs, seed, "--pairs", pairs)
        first, second = x.chunk(2)
        rows = paths.interpolate(flow, first, second, steps)
    if latents is not None:
        with ProgressBar("the test images") as bar:
            lowest = paths.lowest_typical(flow, data().split("test"), bar)
        rows = paths.decoded(flow, latents)
        counts = paths.stopped(flow, rows, lowest)
        # A path to a class ends at images of the class, whatever is on the way.
        stays = stop and along is not None
        if stays:
            rows = paths.stay(rows, counts)
        early = sum(count < steps for count in counts)
        limit = float(flow.loss(torch.tensor(lowest)))
        console.print(
            f"{early} of {len(counts)} paths {'stop before' if stays else 'pass'} images that are "
            f"less likely than 99% of the test images (above {limit:.3f} {flow.kind.unit})"
            + ("; --no-stop shows them" if stays and early else "")
        )
    if suffix == ".gif":
        frames = drawing.path_frames(rows)
        content = grid.animation(frames + frames[-2:0:-1])  # there and back
    else:
        content = grid.png(drawing.paths(rows))
    save(path, content, named=out is not None)
    console.print(
        f"wrote {path}: {counted(len(rows), 'path')} of {steps} steps through "
        f"{loaded.checkpoint.path}"
    )


def _check(
    files: tuple[Path, Path] | None,
    from_class: int | None,
    to_class: int | None,
    along: str | None,
    strength: float,
    image: list[Path] | None,
    stop: bool,
    pairs: int | None,
) -> None:
    """Raises `UserError` for options that do not go together."""
    if files is not None and str(files[1]).startswith("-"):  # the next option
        raise UserError(f"--images {files[0]} {files[1]}: expected two image files, A B")
    if (from_class is None) != (to_class is None):
        raise UserError("--from-class and --to-class: give both")
    if from_class is not None and files is not None:
        raise UserError("--images: not with --from-class, which takes test images")
    if along is not None and from_class is not None:
        raise UserError("--along and --from-class: give one of the two")
    if along is not None and files is not None:
        raise UserError("--images: with --along, give each image by --image")
    if along is None and (image or strength != 1.0 or not stop):
        raise UserError("--image, --strength and --no-stop: they need --along")
    if pairs is not None and (files or image):
        raise UserError(f"--pairs {pairs}: not with image files, which are given one by one")
    if not math.isfinite(strength):
        raise UserError(f"--strength {strength}: expected a finite number")

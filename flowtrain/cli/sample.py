"""`flowtrain sample`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flowtrain.cli.base import (
    DataOptions,
    MirrorOption,
    SeedOption,
    check_suffix,
    command,
    on_one_process,
    output,
)
from flowtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from flowtrain.checkpoints.load import LoadedModel
    from flowtrain.data.splits import Split

EPILOG = (
    "Example: [cyan]flowtrain sample runs/glow_digits --temperature 0.7 --temperature 1 "
    "--out t.png[/cyan]"
)

LONGEST_ROW = 12  # samples at one of several temperatures, so that a latent has a column


@command
@on_one_process
def sample(
    num: Annotated[
        int | None,
        typer.Option(
            "--num-images",
            min=1,
            help="Number of images per temperature, and per class or context.",
            show_default="64; 2000 points; 8 per class or context; 4 with --stages",
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            metavar="T",
            help="Sampling temperature; repeatable, one row or block each. 0 is the base's mode.",
            show_default="1.0",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,...",
            help="For a class-conditional model: one row per class.",
            show_default="all in turn",
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For a conditional model (model.context): a small image to enlarge, or any image, "
            "which is first reduced or made grey.",
            show_default="8 test images",
        ),
    ] = None,
    method: Annotated[
        Literal["sequential", "jacobi"],
        typer.Option(
            help="For TarFlow, MAF: entry by entry, or all in parallel until none changes."
        ),
    ] = "sequential",
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="W",
            help="Weight of classifier-free guidance, which makes samples more typical of their "
            "class. 0 is none. Needs a model trained with model.label_dropout.",
            show_default="none",
        ),
    ] = None,
    denoise: Annotated[
        bool,
        typer.Option(
            "--denoise",
            help="Remove the noise in one step. Needs a model trained with Gaussian noise.",
        ),
    ] = False,
    stages: Annotated[
        bool,
        typer.Option(
            "--stages",
            help="Show how test images become noise, layer by layer, and how other noise becomes "
            "samples, level by level.",
        ),
    ] = False,
    mirror: MirrorOption = False,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png|.npz",
            help="A picture, or the images as arrays.",
            show_default="sample.png in the run, or stages.png",
        ),
    ] = None,
    *,
    options: DataOptions,
) -> None:
    """Draw images from a trained flow. The same seed gives the same images for any --num-images.

    Points of the plane or the sphere are shown beside the data and the log-density. Below, a row
    shows how the flow carries the base density to the data, layer by layer. --stages is such a
    picture of images.
    """
    if stages:
        others = (temperature, classes, image, guidance, method == "jacobi", denoise, mirror)
        if any(each not in (None, False) for each in others):
            raise UserError("--stages: only --num-images, --seed and --out go with it")
        _draw_stages(num or 4, seed, out, options)
        return
    from flowtrain.pictures import conditional, draw, grid
    from flowtrain.pictures import sample as sampling
    from flowtrain.system.console import ProgressBar, console, counted
    from flowtrain.system.files import save

    suffix = check_suffix(out, (".png", ".npz"))
    temperatures = temperature or [1.0]
    if not all(map(math.isfinite, temperatures)):
        raise UserError(f"--temperature {max(temperatures)}: expected a finite number")
    if guidance is not None and not math.isfinite(guidance):
        raise UserError(f"--guidance {guidance}: expected a finite number")
    labels = [] if classes is None else _labels(classes)
    loaded = options.load_model(conditional=True, mirror=mirror)
    path = output(out, loaded, "sample.png", "--out")
    flow = loaded.flow
    needs_data = flow.num_bins is None or (flow.image_context is not None and image is None)
    if options.words() and not needs_data:
        raise UserError("--set: these samples need no data, so leave it out")
    contexts = _contexts(options, loaded, image)
    num = num or (8 if labels or contexts is not None else flow.kind.picture_count)

    def beside() -> "Split":
        data = options.data(loaded)
        data.require(flow.shape, flow.num_bins, loaded.checkpoint.path)
        return data.split("test")

    drawing = draw.drawing(flow, beside)
    in_a_row = labels or (len(temperatures) > 1 and num <= LONGEST_ROW)
    columns = num if in_a_row else _root(num)
    groups = max(1, len(labels))
    if contexts is not None:
        groups, columns = len(contexts), num + 1  # with the context itself
    if suffix == ".png":
        count = max(num, columns) * len(temperatures) * groups
        what = f"--num-images {num}: a picture of {count:,} samples needs"
        drawing.require_room(count, flow.shape, columns, what)
    with ProgressBar("sampling") as bar:
        drawn = sampling.sample(
            *(flow, num, temperatures, seed, bar, labels),
            contexts=contexts,
            iterate=method == "jacobi",
            guidance=guidance,
            denoise=denoise,
        )
    if suffix == ".npz":
        also = {} if guidance is None else {"guidance": guidance}
        also |= {"denoised": True} if denoise else {}
        also |= {"sides": flow.sides} if mirror else {}
        content = sampling.npz(flow, drawn, temperatures, seed, labels, contexts, **also)
    else:
        shown = drawn
        if contexts is not None:
            shown = conditional.rows(flow, contexts, drawn, len(temperatures))
        content = grid.png(drawing.samples(shown, columns, seed, temperatures))
    save(path, content, named=out is not None)
    console.print(f"wrote {path}: {counted(len(drawn), 'sample')} of {loaded.checkpoint.path}")
    if guidance is not None:
        console.print(
            f"guidance {guidance:g}: the prediction of the networks for a class, plus {guidance:g} "
            f"times its difference from the prediction without one"
        )
    sigma = flow.dequantizer.sigma
    if sigma is not None and denoise:
        console.print(f"denoised: one step x + sigma^2 grad log p(x), where sigma is {sigma:g}")
    elif sigma is not None:
        console.print(f"noisy images, as in training (sigma {sigma:g}); --denoise removes it")


def _draw_stages(num: int, seed: int, out: Path | None, options: DataOptions) -> None:
    from flowtrain.latents.paths import random_images
    from flowtrain.pictures import grid, stages
    from flowtrain.system.console import console
    from flowtrain.system.files import save

    check_suffix(out, (".png",))
    loaded = options.load_model(conditional=True)
    path = output(out, loaded, "stages.png", "--out")
    loaded.flow.kind.require_bins("--stages: pictures of points show them always")
    x = random_images(loaded, options.data(loaded), num, seed, "--num-images", num)
    save(path, grid.png(stages.picture(loaded.flow, x, seed)), named=out is not None)
    console.print(
        f"wrote {path}: {num} test images become noise, layer by layer, and below {num} samples "
        f"of {loaded.checkpoint.path} grow from the coarsest level to the finest"
    )


def _contexts(options: DataOptions, loaded: "LoadedModel", image: Path | None) -> "Tensor | None":
    """The context of the image in a file, or the contexts of test images."""
    from flowtrain.pictures import conditional
    from flowtrain.system.console import console

    if image is not None:
        context, how = conditional.of_file(image, loaded)
        console.print(f"context: {how}")
        return context
    if loaded.flow.image_context is None:
        return None
    data = options.data(loaded)
    data.require(loaded.flow.shape, loaded.flow.num_bins, loaded.checkpoint.path)
    return conditional.of_split(loaded.flow, data.split("test"), conditional.CONTEXTS)


def _labels(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--classes {text}: expected whole numbers separated by commas") from None


def _root(number: int) -> int:
    """The square root of a number of any size, rounded, and at least 1."""
    return max(1, (math.isqrt(4 * number) + 1) // 2)

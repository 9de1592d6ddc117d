"""`flowtrain ood`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowtrain.cli.base import (
    DATA_NAMES,
    BatchSizeOption,
    DataOptions,
    JsonOption,
    MirrorOption,
    ScoresOption,
    SeedOption,
    check_suffix,
    command,
    on_one_process,
    output,
    require_file,
    write_json,
)

if TYPE_CHECKING:
    from flowtrain.tools.ood.scores import Comparison, Scored

EPILOG = (
    "Example: [cyan]flowtrain ood runs/glow_cifar_small --data mnist --data noise --data "
    "constant[/cyan]"
)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG, rich_help_panel="Check")(ood)


@command
@on_one_process
def ood(
    outside: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="NAME|PATH",
            help="Images to compare; repeatable. A name as for --in, or noise (uniform levels), "
            "constant (one colour per image) or shuffled (the --in images, pixels reordered).",
        ),
    ],
    inside: Annotated[
        str | None,
        typer.Option(
            "--in",
            metavar="NAME|PATH",
            help="Images of the kind that the model was trained on. " + DATA_NAMES,
            show_default="the model's own test split",
        ),
    ] = None,
    num_images: Annotated[
        int,
        typer.Option(
            "--num-images", min=1, metavar="N", help="A sample of N images of each data set."
        ),
    ] = 1000,
    mirror: MirrorOption = False,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = None,
    json_out: JsonOption = None,
    scores_out: ScoresOption = None,
    picture_out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.png",
            help="Where the histograms of the scores go.",
            show_default="ood.png in the run",
        ),
    ] = None,
    *,
    options: DataOptions,
) -> None:
    """Can the model detect out-of-distribution images? AUROC and histograms of three scores.

    Likelihood, -log p(x), is known to fail (Nalisnick et al. 2019): a Glow trained on CIFAR-10
    gives MNIST digits 1.2 bits/dim and CIFAR-10 itself 3.5, an AUROC of 0.00, where 0.5 is chance
    (docs/ood.md). So there are two more scores:

    Typicality, |-log p(x) - H|: how far an image's likelihood is from the usual one.

    Complexity-corrected, -log p(x) - L(x): how many more bits it needs than with a lossless coder
    (Serra et al. 2020).

    Images of another size, or with other channels or levels, are converted to the model's.
    """
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import save
    from flowtrain.tools.ood import results
    from flowtrain.tools.ood.histograms import draw
    from flowtrain.tools.ood.images import collect
    from flowtrain.tools.ood.scores import score_all

    check_suffix(picture_out, (".png",), "--out")
    require_file(json_out, "--json")
    require_file(scores_out, "--scores")
    console.stderr = json_out == "-"
    loaded = options.load_model(conditional=True, mirror=mirror)
    path = output(json_out, loaded, "ood.json", "--json")
    picture = output(picture_out, loaded, "ood.png", "--out")
    collections = collect(
        loaded, options.data(loaded), inside, outside, num_images=num_images, seed=seed
    )
    for collection in collections.all:
        if collection.stored:
            (channels, height, width), num_bins = collection.stored
            console.print(
                f"{collection.name}: {channels}x{height}x{width} with {num_bins} levels, brought "
                f"to the model's"
            )
    with ProgressBar("scoring") as bar:
        comparison = score_all(loaded, collections, seed=seed, batch_size=batch_size, progress=bar)
    write_json(results.as_json(comparison), json_out, path)
    if scores_out is not None:
        save(scores_out, results.scores_csv(comparison))
        console.print(f"wrote {scores_out}")
    save(picture, draw(comparison), named=picture_out is not None)
    console.print(f"wrote {picture}")
    _print(comparison)
    comparison.check_finite()


def _print(comparison: "Comparison") -> None:
    """A table with one row per data set."""
    from rich import box
    from rich.table import Table

    from flowtrain.flow.sides import mixture
    from flowtrain.pictures.lossless import coders
    from flowtrain.system.console import console
    from flowtrain.tools.ood.results import mean_of

    def of(scored: "Scored") -> tuple[str, str]:
        mean, stderr, _ = mean_of(scored.loss)
        return scored.collection.name, _figure(mean, stderr)

    reference = comparison.reference
    kind, entropy = reference.kind, reference.entropy
    unit = kind.unit
    table = Table(box=box.SIMPLE)
    titles = ("\ndata", f"\n{unit}", "AUROC by\nlikelihood", "\ntypicality")
    for column in (*titles, "complexity-\ncorrected"):
        table.add_column(column, overflow="fold")
    table.add_row(*of(comparison.inside))
    for scored, areas in zip(comparison.outside, comparison.areas, strict=True):
        table.add_row(*of(scored), *(_figure(*area) for area in areas.values()))
    console.print(table)
    console.print(
        f"AUROC: the probability that an image has a larger score than one of "
        f"{comparison.inside.collection.name}. 1 tells them apart, 0.5 is chance, below it the "
        f"others look more like the model's own.\n"
        f"Typicality: the distance from {f'{entropy:.3f}' if math.isfinite(entropy) else '-'} "
        f"{unit}, the mean of {len(reference.log_prob)} {reference.collection.split} images. "
        f"Complexity: the shorter code of {' and '.join(coders())}."
    )
    if comparison.model.flow.sides > 1:
        console.print(f"p(x) is {mixture(comparison.model.flow.sides)}.")
    if kind.no_bits:
        console.print(
            f"No bits/dim: {kind.no_bits}. Complexity-corrected scores are known up to a constant."
        )


def _figure(value: float | None, error: float | None) -> str:
    from flowtrain.system.console import figure

    return figure(value, error, ".2g" if value is not None and abs(value) >= 1000 else ".3f", "-")

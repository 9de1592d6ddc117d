"""`flowtrain attributes`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flowtrain.cli.base import (
    DataOptions,
    DatasetOption,
    SeedOption,
    Split,
    command,
    on_one_process,
    require_file,
)
from flowtrain.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flowtrain.latents.directions import Direction, Method

EPILOG = (
    "Examples: [cyan]flowtrain attributes runs/faces --positive smiling --negative serious --name "
    "smile[/cyan], [cyan]flowtrain attributes glow_digits --to-class 9 --from-class 4[/cyan]"
)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG, rich_help_panel="Draw and edit")(attributes)


@command
@on_one_process
def attributes(
    positive: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER|FILE", help="Images that have the attribute; repeatable."),
    ] = None,
    negative: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER|FILE", help="Images that do not have it; repeatable."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FILE.csv",
            help="A table of file names, with a 0 or 1 for each attribute. Its first line names "
            "the columns.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The folder of the files in --csv.",
            show_default="the table's own",
        ),
    ] = None,
    to_class: Annotated[
        int | None,
        typer.Option(min=0, metavar="B", help="The attribute: this class of a data set."),
    ] = None,
    from_class: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="A",
            help="The class of the images without the attribute.",
            show_default="all others",
        ),
    ] = None,
    dataset: DatasetOption = None,
    split: Annotated[
        Split | None, typer.Option(help="The split of the data set.", show_default="train")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The name of the attribute.",
            show_default="the folder of --positive, or A-to-B",
        ),
    ] = None,
    method: Annotated[
        Literal["difference", "logistic"],
        typer.Option(help="The direction: a difference of means, or a logistic regression."),
    ] = "difference",
    orthogonal: Annotated[
        bool,
        typer.Option(
            "--orthogonal",
            help="Make each direction orthogonal to the others found, so that moving along it "
            "leaves their projections unchanged.",
        ),
    ] = False,
    num_images: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="At most N images with the attribute and N without, or N of --csv: a sample.",
        ),
    ] = 2000,
    seed: SeedOption = 0,
    *,
    options: DataOptions,
) -> None:
    """Find attribute directions in latent space, and measure how well they separate images.

    The balanced accuracy is of a held-out quarter of the images; chance is 0.5. The directions are
    saved beside the model, in attributes.npz, for `flowtrain interpolate --along NAME`.
    """
    from flowtrain.latents import directions
    from flowtrain.latents.encoding import encode
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.tools.edit import labels

    if bool(positive) != bool(negative):
        raise UserError("--positive and --negative: give both")
    if bool(positive) + (table is not None) + (to_class is not None) != 1:
        raise UserError(
            "give the images in one of three ways: --positive and --negative, --csv, or --to-class"
        )
    if images is not None and table is None:
        raise UserError("--images: needs --csv")
    of_data = not (from_class is None and dataset is None and split is None)
    if to_class is None and (of_data or options.words("; repeat the option for each file")):
        raise UserError("--from-class, --data, --split and KEY=VALUE: these need --to-class")
    if to_class is not None and to_class == from_class:
        raise UserError(f"--to-class {to_class}: it is the same class as --from-class")
    if table is not None and name is not None:
        raise UserError(f"--name {name}: the attributes of --csv have the names of its columns")
    loaded = options.load_model()
    require_file(directions.file_of(loaded), "attributes")
    if positive and negative:
        first = positive[0].resolve()
        shown = name or (first.name if first.is_dir() else first.stem)
        labelled = labels.from_folders(positive, negative, shown, loaded, num_images, seed)
    elif table is not None:
        labelled = labels.from_table(table, images or table.parent, loaded, num_images, seed)
    else:
        assert to_class is not None
        shown = name or (str(to_class) if from_class is None else f"{from_class}-to-{to_class}")
        data = options.data(loaded, dataset)
        if data.undivided:
            raise UserError(f"--data {dataset}: it has no classes")
        labelled = labels.from_classes(
            loaded, data, split or "train", from_class, to_class, shown, num_images, seed
        )
    before = directions.of_these_weights(loaded)
    with ProgressBar("encoding") as bar:
        z = encode(loaded.flow, labelled.x, bar)
    found = {
        way: directions.of_attributes(
            z, labelled.attributes, way, list(before.values()), orthogonal, seed
        )
        for way in directions.METHODS
    }
    after = directions.add(loaded, found[method])
    _print(found, method)
    console.print(f"wrote {directions.file_of(loaded)}: {', '.join(after)}")
    words = ["flowtrain", "interpolate", options.model, "--along", found[method][0].name]
    console.print(shlex.join(filter(None, words)))


def _print(found: "Mapping[Method, list[Direction]]", kept: str) -> None:
    """A table of the accuracies, by both methods."""
    from rich import box
    from rich.table import Table

    from flowtrain.system.console import console, figure

    table = Table(box=box.SIMPLE)
    for column in ("attribute", *found, "held-out images"):
        table.add_column(column + (", kept" if column == kept else ""), overflow="fold")
    for each in zip(*found.values(), strict=True):
        accuracies = (figure(way.accuracy, way.error) for way in each)
        table.add_row(each[0].name, *accuracies, str(each[0].held_out))
    console.print(table)
    console.print("accuracy on held-out images; 0.5 is chance")

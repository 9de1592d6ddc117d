"""`flowtrain ood`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flowtrain.cli.base import (
    DATA_NAMES,
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
    write_json,
)
from flowtrain.errors import UserError

EPILOG = (
    "Example: [cyan]flowtrain ood runs/glow_cifar_small --out mnist --out noise --out "
    "constant[/cyan]"
)


@command
@on_one_process
def ood(
    outside: Annotated[
        list[str],
        typer.Option(
            "--out",
            metavar="NAME|PATH",
            help="Repeatable: other images. As --in, or noise (uniform levels), constant (one "
            "colour an image), "
            "shuffled (the pixels of the --in images in another order).",
        ),
    ],
    model: ModelArgument = None,
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
            "--num-images", min=1, metavar="N", help="The first N images of each data set."
        ),
    ] = 1000,
    seed: SeedOption = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, metavar="B", help="Images at a time; no effect on the result."
        ),
    ] = None,
    weights: WeightsOption = None,
    json_out: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE|-",
            help="Where the result goes.",
            show_default="ood.json in the run",
        ),
    ] = None,
    scores_out: Annotated[
        Path | None,
        typer.Option("--scores", metavar="FILE.csv", help="One row an image.", show_default=False),
    ] = None,
    picture_out: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE.png",
            help="Histograms of the scores.",
            show_default="ood.png in the run",
        ),
    ] = None,
    overrides: DataSetOption = None,
    trust_code: TrustOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Can the model tell other images from its own? AUROC and histograms of three scores, side by
    side.

    Likelihood, -log p(x), is known to fail (Nalisnick et al. 2019): a Glow trained on CIFAR-10
    gives MNIST digits 1.2 bits/dim and CIFAR-10 itself 3.5, an AUROC of 0.00, where 0.5 is chance
    (docs/ood.md). So there are also:

    Typicality, |-log p(x) - H|: how far an image is from the usual likelihood.

    Complexity-corrected, -log p(x) - L(x): how many more bits it needs than with a lossless coder
    (Serra et al. 2020).

    Images of another size, number of channels or of levels are brought to the model's.
    """

    from flowtrain.checkpoints.load import run_of
    from flowtrain.evaluation import ood as scoring
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import save

    if picture_out is not None and picture_out.suffix.lower() != ".png":
        raise UserError(f"--picture {picture_out}: expected a name that ends in .png")
    console.stderr = json_out == "-"
    loaded = load(model, device, weights, trust_code)
    data = data_of(loaded, overrides)
    own = data.config
    scoring.check_names(inside or own.name, outside)
    run = run_of(loaded.checkpoint.path)

    def named(name: str, option: str) -> scoring.Collection:
        found = scoring.named(name, option, loaded, own, num_images)
        if found.stored:
            (channels, height, width), levels = found.stored
            console.print(
                f"{name}: {channels}x{height}x{width} with {levels} levels, brought to the model's"
            )
        return found

    within = (
        named(inside, "--in") if inside else scoring.own_split("test", loaded, data, num_images)
    )
    others = [
        scoring.made(name, within, scoring.levels_of(loaded), seed)
        if name in scoring.MADE
        else named(name, "--out")
        for name in outside
    ]
    reference = "validation" if len(data.split("validation")) else "train"
    with ProgressBar("scoring") as bar:
        comparison = scoring.score_all(
            loaded,
            scoring.own_split(reference, loaded, data, num_images),
            within,
            others,
            progress=bar,
            seed=seed,
            batch_size=batch_size,
        )
    outcome = scoring.result(comparison, loaded, seed)
    _print(outcome)
    write_json(outcome, json_out, run / "ood.json")
    if scores_out is not None:
        save(scores_out, scoring.scores_csv(comparison))
        console.print(f"wrote {scores_out}")
    picture = picture_out or run / "ood.png"
    save(picture, scoring.draw(comparison, outcome))
    console.print(f"wrote {picture}")
    scoring.check_finite(comparison)


def _print(outcome: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from flowtrain.evaluation.ood import SCORES
    from flowtrain.system.console import console

    def figure(value: float | None, error: float | None) -> str:
        if value is None:
            return "-"
        digits = ".3f" if abs(value) < 1000 else ".2g"
        return f"{value:{digits}}" + ("" if error is None else f" +- {error:{digits}}")

    table = Table(box=box.SIMPLE)
    for column in (
        "\ndata",
        "\nbits/dim",
        "AUROC by\nlikelihood",
        "\ntypicality",
        "complexity-\ncorrected",
    ):
        table.add_column(column, overflow="fold")
    for row in (outcome["in"], *outcome["out"]):
        areas = (
            [figure(row["auroc"][name], row["auroc_stderr"][name]) for name in SCORES]
            if "auroc" in row
            else []
        )
        table.add_row(
            row["dataset"], figure(row["bits_per_dim"], row["bits_per_dim_stderr"]), *areas
        )
    console.print(table)
    entropy = outcome["entropy_bits_per_dim"]
    console.print(
        f"AUROC: the chance that an image has a larger score than one of "
        f"{outcome['in']['dataset']}. 1 tells them "
        "apart, 0.5 is chance, below it the others look more like the model's own.\n"
        f"Typicality: the distance from {'-' if entropy is None else f'{entropy:.3f}'} bits/dim, "
        f"the mean of "
        f"{outcome['entropy_images']} {outcome['entropy_split']} images. Complexity: the shorter "
        f"code of "
        f"{' and '.join(outcome['coders'])}."
    )

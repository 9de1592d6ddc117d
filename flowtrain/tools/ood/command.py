"""`flowtrain ood`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    is_setting,
    on_one_process,
    output,
    require_file,
    require_folder,
    write_json,
)
from flowtrain.errors import UserError, cut

if TYPE_CHECKING:
    from flowtrain.tools.ood.scores import Comparison, Scored

EPILOG = (
    "Example: [cyan]flowtrain ood runs/glow_cifar_small --data mnist --data noise --data "
    "constant[/cyan]"
)


Score = Literal["likelihood", "typicality", "complexity_corrected", "local"]


def percentage(text: str) -> float:
    """A share between 0 and 1, as `1%` or `0.01`. Raises `typer.BadParameter`."""
    number, percent, rest = text.partition("%")
    try:
        # 0.7 / 100 is below 0.007, and an equal p-value would be above it.
        value = round(float(number) / 100, 15) if percent else float(number)
    except ValueError:
        value = 0.0
    if rest or not 0 < value < 1:
        raise typer.BadParameter(f"{cut(text)}: expected a share such as 1% or 0.01")
    return value


@dataclass(eq=False, repr=False)
class ImagesOptions(DataOptions):
    """The model of a command line, images to compare, and settings of its data."""

    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGES|KEY=VALUE",
            help="Images to compare, as for --data. KEY=VALUE overrides keys of the model's data.",
        ),
    ] = None

    def images(self) -> list[str]:
        """The words that are no settings, which it removes."""
        words = self.settings or []
        self.settings = [word for word in words if is_setting(word)]
        return [word for word in words if not is_setting(word)]


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG, rich_help_panel="Check")(ood)


@command
@on_one_process
def ood(
    outside: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="NAME|PATH",
            help="Images to compare; repeatable. A name as for --in, or noise (uniform levels), "
            "constant (one colour per image) or shuffled (the --in images, pixels reordered).",
            show_default=False,
        ),
    ] = None,
    inside: Annotated[
        str | None,
        typer.Option(
            "--in",
            metavar="NAME|PATH",
            help="In-distribution images. " + DATA_NAMES,
            show_default="the model's own test split",
        ),
    ] = None,
    num_images: Annotated[
        int, typer.Option(min=1, metavar="N", help="A sample of N images of each data set.")
    ] = 1000,
    false_positives: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            parser=percentage,
            help="An image is an outlier if at most this share of held-out images is as far out: "
            "1% or 0.01.",
            show_default="no verdicts",
        ),
    ] = None,
    decides: Annotated[
        Score | None,
        typer.Option(
            "--score",
            help="The score for p-values and verdicts.",
            show_default="complexity_corrected, for real values likelihood",
        ),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also compute heat maps and the local score, and write a picture of each compared "
            "image here.",
            show_default="none",
        ),
    ] = None,
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
    options: ImagesOptions,
) -> None:
    """Detect out-of-distribution images: AUROC and histograms of scores, and verdicts.

    IMAGES are the same as --data IMAGES. With --false-positives, each of them gets a p-value and a
    verdict, and the rate of false positives is measured on the --in images.

    Likelihood, -log p(x), is known to fail (Nalisnick et al. 2019): a Glow trained on CIFAR-10
    gives MNIST digits 1.2 bits/dim and CIFAR-10 itself 3.5, an AUROC of 0.00, where 0.5 is chance
    (docs/ood.md). The other scores are repairs:

    Typicality, |-log p(x) - H|: the distance of an image's likelihood from the mean, H.

    Complexity-corrected, -log p(x) - L(x): the bits beyond a lossless coder's (Serra et al. 2020).

    Local: the most unusual region of the image, with --maps or --score local.

    Images of another size, or with other channels or levels, are converted to the model's. Vectors
    and points have the first two scores.
    """
    from flowtrain.evaluation.heat import HeatMaps
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import save
    from flowtrain.tools.ood import results
    from flowtrain.tools.ood.histograms import draw
    from flowtrain.tools.ood.images import collect, num_bins_of, own_split
    from flowtrain.tools.ood.scores import score_all

    check_suffix(picture_out, (".png",), "--out")
    require_file(json_out, "--json")
    require_file(scores_out, "--scores")
    if maps is not None:
        require_folder(maps, maps, "--maps")
    names = [*(outside or []), *options.images()]
    if not names:
        raise UserError("IMAGES: give a folder, an image file or a name, such as mnist or noise")
    for name in names:
        if maps is not None and maps.resolve().is_relative_to(Path(name).resolve()):
            raise UserError(f"--maps {maps}: is in {name}, whose images are compared")
    console.stderr = json_out == "-"
    loaded = options.load_model(conditional=True, mirror=mirror)
    path = output(json_out, loaded, "ood.json", "--json")
    picture = output(picture_out, loaded, "ood.png", "--out")
    if maps is not None:
        num_bins_of(loaded, "--maps")
    if decides in ("complexity_corrected", "local"):
        num_bins_of(loaded, f"--score {decides}")
    data = options.data(loaded)
    collections = collect(loaded, data, inside, names, num_images=num_images, seed=seed)
    for collection in collections:
        if collection.stored:
            (channels, height, width), num_bins = collection.stored
            console.print(
                f"{collection.name}: {channels}x{height}x{width} with {num_bins} levels, brought "
                f"to the model's"
            )
    heat_maps = None
    if maps is not None or decides == "local":
        training = own_split("train", loaded, data, num_images, seed).images
        heat_maps = HeatMaps(loaded.flow, training, seed, batch_size)
    with ProgressBar("scoring") as bar:
        comparison = score_all(
            loaded,
            collections,
            decides=decides,
            false_positives=false_positives,
            heat_maps=heat_maps,
            seed=seed,
            batch_size=batch_size,
            progress=bar,
        )
    write_json(results.as_json(comparison), json_out, path)
    if scores_out is not None:
        save(scores_out, results.scores_csv(comparison))
        console.print(f"wrote {scores_out}")
    save(picture, draw(comparison), named=picture_out is not None)
    console.print(f"wrote {picture}")
    if maps is not None:
        for name, png in results.pictures(comparison):
            save(maps / name, png)
        console.print(f"wrote heat maps to {maps}")
    _print(comparison)
    if false_positives is not None:
        _print_verdicts(comparison)
    comparison.check_finite()


def _print(comparison: "Comparison") -> None:
    from rich import box
    from rich.table import Table

    from flowtrain.flow.kinds import NoisyImages
    from flowtrain.flow.sides import mixture
    from flowtrain.pictures.lossless import coders
    from flowtrain.system.console import console
    from flowtrain.tools.ood.results import mean_of
    from flowtrain.tools.ood.scores import SCORES

    def of(scored: "Scored") -> tuple[str, str]:
        mean, stderr, _ = mean_of(scored.loss)
        return scored.collection.name, _figure(mean, stderr)

    reference = comparison.reference
    kind, entropy = reference.kind, reference.entropy
    unit = kind.unit
    table = Table(box=box.SIMPLE)
    titles = ("AUROC by\nlikelihood", "\ntypicality", "complexity-\ncorrected", "\nlocal")
    found = dict(zip(SCORES, titles, strict=True))
    for column in ("\ndata", f"\n{unit}", *(found[key] for key in comparison.inside.scores)):
        table.add_column(column, overflow="fold")
    table.add_row(*of(comparison.inside))
    for scored, areas in zip(comparison.outside, comparison.areas, strict=True):
        table.add_row(*of(scored), *(_figure(*area) for area in areas.values()))
    console.print(table)
    coded = f" Complexity: the shorter code of {' and '.join(coders())}."
    console.print(
        f"AUROC: the probability that an example has a larger score than one of "
        f"{comparison.inside.collection.name}. 1 separates them, 0.5 is chance; below 0.5, the "
        f"others look more typical.\n"
        f"Typicality: the distance from {f'{entropy:.3f}' if math.isfinite(entropy) else '-'} "
        f"{unit}, the mean of {len(reference.log_prob)} {reference.collection.split} examples."
        f"{'' if reference.complexity is None else coded}"
    )
    if comparison.model.flow.sides > 1:
        console.print(f"p(x) is {mixture(comparison.model.flow.sides)}.")
    if isinstance(kind, NoisyImages):
        console.print(
            f"No bits/dim: {kind.no_bits}. Complexity-corrected scores are known up to a constant."
        )


SHOWN = 20  # images of a data set whose verdicts are printed


def _print_verdicts(comparison: "Comparison") -> None:
    """The measured rate of false positives, and the verdicts, the smallest p-values first."""
    from flowtrain.system.console import console
    from flowtrain.tools.ood.results import names_of
    from flowtrain.tools.ood.verdict import rate

    reference = comparison.reference
    console.print(
        f"Outliers have a p-value of at most {comparison.false_positives:g}: {comparison.decides} "
        f"above {comparison.threshold:.4g}, by {len(reference.log_prob):,} "
        f"{reference.collection.split} examples."
    )
    if reference.collection.split == "train":
        console.print("The model has seen these, so p-values are too small: hold out some images.")
    for scored in comparison.compared:
        outliers, p, names = comparison.outliers(scored), comparison.p_values(scored), []
        share, low, high = rate(outliers)
        what = "false positives" if scored is comparison.inside else "outliers"
        console.print(
            f"{scored.collection.name}: {outliers.sum():,} of {len(p):,} are {what}, "
            f"{share:.2%} ({low:.2%} to {high:.2%} with 95% confidence)"
        )
        if scored is not comparison.inside:
            names = names_of(scored)
        for i in p.argsort(kind="stable")[: min(SHOWN, len(names))]:
            console.print(f"  {'outlier' if outliers[i] else 'usual  '}  p {p[i]:.4f}  {names[i]}")
        if len(names) > SHOWN:
            console.print(f"  and {len(names) - SHOWN:,} more (--json, --scores)")


def _figure(value: float | None, error: float | None) -> str:
    from flowtrain.system.console import figure

    return figure(value, error, ".2g" if value is not None and abs(value) >= 1000 else ".3f", "-")

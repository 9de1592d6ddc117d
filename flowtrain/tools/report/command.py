"""`flowtrain report` and `flowtrain compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowtrain.cli.base import (
    DataOptions,
    SeedOption,
    check_suffix,
    command,
    on_one_process,
    output,
    require_file,
    write_json,
)
from flowtrain.errors import RunError, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from flowtrain.data.splits import DataSet
    from flowtrain.tools.report.compare import Result

REPORT_EXAMPLES = "Example: [cyan]flowtrain report runs/glow_digits --out digits.html[/cyan]"
COMPARE_EXAMPLES = (
    "Example: [cyan]flowtrain compare runs/glow_digits runs/realnvp_digits --out digits.png[/cyan]"
)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=REPORT_EXAMPLES, rich_help_panel="Share")(report)
    app.command(epilog=COMPARE_EXAMPLES, rich_help_panel="Share")(compare)


@command
@on_one_process
def report(
    num_images: Annotated[
        int, typer.Option(min=1, metavar="N", help="Test images to reconstruct and examine.")
    ] = 64,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="The report.", show_default="report.html in the run"
        ),
    ] = None,
    *,
    options: DataOptions,
) -> None:
    """Write one HTML file about a run: curves, samples, nearest images, evaluation, health.

    If something is missing, such as the data set or an evaluation of the test split, the report
    gives the reason and contains the rest.
    """
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import save
    from flowtrain.tools.report import report as reporting

    check_suffix(out, (".html",))
    loaded = options.load_model(conditional=True)
    path = output(out, loaded, "report.html", "--out")
    data: DataSet | str
    try:
        data = options.data(loaded)
        data.require(loaded.flow.shape, loaded.flow.num_bins, loaded.checkpoint.path)
        for split in ("train", "test"):
            data.split(split)
    except (UserError, RunError) as error:
        if options.words():
            raise
        data = f"{error}; --set data.KEY=VALUE locates the data"
    with ProgressBar("report") as bar:
        html, missing = reporting.page(loaded, data, num_images=num_images, seed=seed, progress=bar)
    # Names of files may have bytes that are no UTF-8.
    save(path, html.encode(errors="backslashreplace"), named=out is not None)
    for line in missing:
        console.print(f"not in it: {line}")
    console.print(f"wrote {path}: a report of {loaded.checkpoint.path}")


@command
@on_one_process
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE.png", help="Bits/dim against time and against images seen."),
    ] = Path("compare.png"),
    json_out: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE|-", help="Also write the table as JSON.", show_default=False
        ),
    ] = None,
) -> None:
    """Compare runs in one table and one plot. They may still be training.

    No model is evaluated.
    """
    from flowtrain.system.console import console
    from flowtrain.system.files import save
    from flowtrain.tools.report import compare as comparison

    check_suffix(out, (".png",))
    require_file(json_out, "--json")
    console.stderr = json_out == "-"
    found = comparison.compare(runs)
    save(out, found.picture)
    console.print(f"wrote {out}")
    if json_out is not None:
        write_json(found.content(), json_out, Path(json_out))
    _print_table(found.results)
    for note in found.notes:
        console.print(f"- {note}")


# The columns that are left out first if the table is too wide.
LEAST_IMPORTANT = ("unit", "images/s", "parameters", "data", "model", "images seen")


def _print_table(results: "list[Result]") -> None:
    from flowtrain.system.console import console, duration, figure
    from flowtrain.tools.report import compare as comparison

    columns = {
        "run": [row.run for row in results],
        "model": [row.model for row in results],
        "data": [row.data for row in results],
        "parameters": [f"{row.parameters:,}" for row in results],
        "images seen": [f"{row.images:,}" for row in results],
        "time": [duration(row.seconds) for row in results],
        "validation": [figure(row.validation, None, ".4f", "-") for row in results],
        **{
            title: [
                figure(test.loss, test.loss_stderr, ".4f")
                if (test := row.tests.get(title))
                else "-"
                for row in results
            ]
            for title in comparison.titles(results)
        },
        "unit": [row.unit for row in results],
        "images/s": [figure(row.images_per_second, None, ".0f", "-") for row in results],
    }
    if len(set(columns["unit"])) == 1:
        (unit, *_) = columns.pop("unit")
        columns = {
            f"{title}, {unit}" if title == "validation" else title: column
            for title, column in columns.items()
        }
    unlimited = console.options.update(width=10**6)
    for title in LEAST_IMPORTANT:
        if console.measure(_table(columns), options=unlimited).maximum <= console.width:
            break
        columns.pop(title, None)
    console.print(_table(columns))


def _table(columns: dict[str, list[str]]) -> "Table":
    from rich.table import Table

    table = Table()
    for title in columns:
        words = title in ("run", "model", "data")
        table.add_column(title, justify="left" if words else "right", overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table

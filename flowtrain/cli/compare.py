"""`flowtrain compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowtrain.cli.base import check_suffix, command, on_one_process, require_file, write_json

if TYPE_CHECKING:
    from flowtrain.results import Evaluation
    from flowtrain.runs.compare import Result

EPILOG = (
    "Example: [cyan]flowtrain compare runs/glow_digits runs/realnvp_digits --out digits.png[/cyan]"
)


@command
@on_one_process
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE.png", help="Bits/dim against time and against images seen."
        ),
    ] = Path("compare.png"),
    json_out: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE|-", help="Also write the table as JSON.", show_default=False
        ),
    ] = None,
) -> None:
    """Compare runs in one table and one plot. They may still be training.

    It evaluates nothing itself.
    """
    from flowtrain.runs import compare as comparison
    from flowtrain.system.console import console
    from flowtrain.system.files import save

    check_suffix(out, (".png",))
    require_file(json_out, "--json")
    console.stderr = json_out == "-"
    found = comparison.compare(runs)
    _print_table(found.results)
    for note in found.notes:
        console.print(f"- {note}")
    save(out, found.picture)
    console.print(f"wrote {out}")
    if json_out is not None:
        write_json(found.content(), json_out, Path(json_out))


def _print_table(results: "list[Result]") -> None:
    from rich.table import Table

    from flowtrain.system.console import console, duration

    table = Table()
    for title in ("run", "model", "data"):
        table.add_column(title, overflow="fold")
    for title in ("parameters", "images seen", "time", "validation", "test", "unit", "images/s"):
        table.add_column(title, justify="right", overflow="fold")
    for row in results:
        table.add_row(
            *(
                row.run,
                row.model,
                row.data,
                f"{row.parameters:,}",
                f"{row.images:,}",
                duration(row.seconds),
            ),
            *(
                _figure(row.validation, ".4f"),
                _test(row.test),
                row.unit,
                _figure(row.images_per_second, ".0f"),
            ),
        )
    console.print(table)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _test(test: "Evaluation | None") -> str:
    if test is None:
        return "-"
    value, stderr = test.loss
    if value is None:
        return "not finite"
    return f"{value:.4f}" if stderr is None else f"{value:.4f} +- {stderr:.4f}"

"""`flowtrain sweep`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flowtrain.cli import configs as configfiles
from flowtrain.cli.base import DeviceOption, SetOption, command, on_one_process, require_folder
from flowtrain.errors import UserError

EPILOG = (
    "Example: [cyan]flowtrain sweep --try none --try model.width=64 --seeds 2 --seconds 60 --out "
    "runs/widths[/cyan]"
)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG, rich_help_panel="Train and measure")(sweep)


@command
@on_one_process
def sweep(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="SWEEP.yaml",
            help="A file with the keys config, set, rows, seeds, seconds, images and halving, the "
            "options below, and ranges and trials.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="The configuration of all rows.",
            show_default=configfiles.DEMO,
        ),
    ] = None,
    overrides: SetOption = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="SETTINGS",
            help="A row of the table: KEY=VALUE, or several separated by spaces; none is the "
            "unchanged configuration. Repeatable.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="Seeds of each row.", show_default="1")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Budget of a trial: processor time of its steps, or wall-clock time on a GPU.",
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(metavar="N", help="Budget of a trial: training images.")
    ] = None,
    halving: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            help="Successive halving: rows begin with a part of the budget, and the best 1/R of "
            "them continue to R times as much, up to all of it.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Parallel trials.", show_default="one per core, or per GPU"
        ),
    ] = None,
    device: DeviceOption = "auto",
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the sweep.")],
) -> None:
    """Compare settings at an equal budget, in a table with errors over seeds and images.

    Each trial is an ordinary run. The same command continues after a kill. Several such commands,
    on any machines, may share the directory.
    """
    from flowtrain import config as configuration
    from flowtrain.system import device as devices
    from flowtrain.system.console import console
    from flowtrain.tools.sweep import plan as planning
    from flowtrain.tools.sweep import table
    from flowtrain.tools.sweep.work import Sweep, environments

    require_folder(out, out)
    values = {} if file is None else configuration.load_yaml(file)
    given: dict[str, Any] = {"config": config, "set": overrides, "rows": rows, "seeds": seeds}
    given |= {"seconds": seconds, "images": images, "halving": halving}
    values |= {key: each for key, each in given.items() if each is not None}
    where = "sweep" if file is None else str(file)
    if "base" in values:
        raise UserError(f"{where}: base: a sweep's own plan; give its config.yaml as config")
    name, settings = values.pop("config", configfiles.DEMO), values.pop("set", [])
    if not isinstance(name, str) or not isinstance(settings, list):
        raise UserError(f"{where}: expected a name for config, and a list for set")
    base = configuration.load_config(configfiles.find_config(name), map(str, settings))
    plan = planning.planned(values, base, where)
    found = devices.resolve(device)
    made = Sweep(out, plan, found, environments(found, workers))
    planning.begin(out, plan)
    made.run()
    console.print(table.write(made))
    console.print(f"wrote table.md, table.json and table.png in {out}")

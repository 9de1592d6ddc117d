"""`flowtrain train`."""

from pathlib import Path
from typing import Annotated

import typer

from flowtrain.cli import configs as configfiles
from flowtrain.cli.base import DeviceOption, command, device_of, on_all_processes


def _complete_config(incomplete: str) -> list[tuple[str, str]]:
    configs = configfiles.shipped_configs().items()
    return [
        (name, configfiles.headline(path)) for name, path in configs if name.startswith(incomplete)
    ]


def _config_list() -> str:
    rows = [
        f"[bold]{name}[/bold]  {configfiles.headline(path)}"
        for name, path in configfiles.shipped_configs().items()
    ]
    return "\n\n".join(["[bold]Configurations that come with flowtrain:[/bold]", *rows])


EPILOG = (
    "Example: [cyan]flowtrain train --config glow_mnist_small.yaml --set "
    "train.budget=20min[/cyan]\n\n" + _config_list()
)


@command
@on_all_processes
def train(
    config: Annotated[
        str,
        typer.Option(
            "--config",
            metavar="NAME|FILE",
            autocompletion=_complete_config,
            help="A YAML file: as given, in configs/, or one that comes with flowtrain (below).",
        ),
    ] = configfiles.DEMO,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a key, such as train.lr=5e-4; repeatable.",
            show_default=False,
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            help="Where everything is written.",
            show_default="runs/<config name>",
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="auto|never|CHECKPOINT",
            help="auto goes on from the last checkpoint in the run directory; never refuses one "
            "that holds a run.",
        ),
    ] = "auto",
    init_from: Annotated[
        str | None,
        typer.Option(
            "--init-from",
            metavar="MODEL",
            help="Start from this model's weights (fine-tuning).",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print parameters, operations, memory and estimated time, and stop."
        ),
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Train a flow. The same command again goes on where it stopped."""
    from flowtrain import config as configuration

    path = configfiles.find_config(config)
    settings = configuration.load_config(path, overrides or [])
    target = device_of(device)
    if dry_run:
        from flowtrain.training.dry_run import dry_run as run_dry

        run_dry(settings, target)
        return
    from flowtrain.training.loop import fit
    from flowtrain.training.run_directory import RunDirectory

    fit(settings, RunDirectory(run_dir or Path("runs") / path.stem), target, resume, init_from)

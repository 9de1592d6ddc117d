"""`flowtrain verify-record`."""

import typer

from flowtrain.cli.base import DataOptions, MirrorOption, command, on_one_process

EPILOG = "Example: [cyan]flowtrain verify-record runs/causal_cifar_small[/cyan]"


def add_to(app: typer.Typer) -> None:
    app.command("verify-record", epilog=EPILOG, rich_help_panel="Check")(verify_record)


@command
@on_one_process
def verify_record(mirror: MirrorOption = False, *, options: DataOptions) -> None:
    """Verify a run on MNIST or CIFAR-10, and print its row for the leaderboard.

    Validation and test figures are measured again with the best checkpoint. They must equal those
    in the run, the data must be the benchmark's, and log and checkpoints must agree.
    """
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.tools.leaderboard.verify import verify

    loaded = options.load_model(mirror=mirror)
    with ProgressBar("evaluating") as bar:
        found = verify(loaded, options.data(loaded), bar)
    console.print("verified")
    console.print(found.row)

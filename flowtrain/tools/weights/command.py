"""`flowtrain import`."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from flowtrain.cli.base import SettingOptions, check_suffix, command, on_one_process, require_file

EPILOG = (
    "Example: [cyan]flowtrain import model_100000.pt --from rosinality data.name=folder "
    "data.path=faces data.size=64 data.n_bits=5[/cyan]"
)
Project = Literal["rosinality", "y0ast", "normflows", "chrischute", "tarflow"]


def add_to(app: typer.Typer) -> None:
    app.command("import", epilog=EPILOG, rich_help_panel="Share")(import_)


@command
@on_one_process
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file from torch.save.")],
    project: Annotated[Project, typer.Option("--from", help="The project that trained it.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            help="The checkpoint.",
            show_default="FILE with the suffix .safetensors",
        ),
    ] = None,
    *,
    options: SettingOptions,
) -> None:
    """Convert the weights of another project's model to a checkpoint for all commands.

    The model computes the same function. KEY=VALUE names its training data, which determine the
    size and the levels of images: data.name=cifar10. Keys of dequantization name a logit or
    Gaussian noise, if the project used one. No code in FILE is run.
    """
    from flowtrain.system.console import console
    from flowtrain.tools.weights.convert import import_file

    target = out or file.parent / f"{file.stem}.safetensors"
    check_suffix(out, (".safetensors",))
    require_file(target)
    import_file(file, project, options.words(), target)
    console.print(f"wrote {target}: flowtrain evaluate {shlex.quote(str(target))}")

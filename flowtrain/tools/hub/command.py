"""`flowtrain push`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from flowtrain.cli.base import (
    DeviceOption,
    TrustOption,
    WeightsOption,
    command,
    complete_model,
    data_of,
    load,
    on_one_process,
    require_folder,
)
from flowtrain.errors import UserError

EPILOG = (
    "Examples: [cyan]flowtrain push runs/glow_digits user/name --dry-run[/cyan], [cyan]flowtrain "
    "sample hf://user/name[/cyan]"
)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG, rich_help_panel="Share")(push)


@command
@on_one_process
def push(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=complete_model,
            help="A run directory, a checkpoint, or a trained model of `flowtrain list`.",
        ),
    ],
    repository: Annotated[
        str,
        typer.Argument(
            metavar="USER/NAME", help="The repository on the hub, created if it is missing."
        ),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that only you can see.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the files, and upload nothing.")
    ] = False,
    licence: Annotated[
        str, typer.Option(metavar="NAME", help="The licence of the weights, as the hub names it.")
    ] = "unknown",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the files.", show_default="push in the run"),
    ] = None,
    weights: WeightsOption = None,
    trust_code: TrustOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Upload a model to the Hugging Face Hub: weights, configuration, pictures, and a page.

    Anyone can then use it as the MODEL hf://USER/NAME. The files are written to a folder first.
    Uploading needs the extra hf and an account (`hf auth login`).
    """
    from flowtrain.checkpoints import about, hub
    from flowtrain.checkpoints import format as checkpoint_format
    from flowtrain.checkpoints.load import run_of
    from flowtrain.pictures import draw, grid
    from flowtrain.pictures import sample as sampling
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import save
    from flowtrain.tools.hub import page

    wanted = hub.address(repository)
    if wanted.revision is not None:
        raise UserError(f"{repository}: a revision cannot be uploaded to; leave out the @")
    if out is not None:
        require_folder(out, out)
    if not dry_run:
        hub.require_login(repository)
    loaded = load(model, device, weights, trust_code)
    flow = loaded.flow
    folder = out or run_of(loaded.checkpoint.path) / "push"
    require_folder(folder, folder)
    there = sorted(path.name for path in folder.glob("[!.]*"))
    for name in there:
        if name not in page.FILES or hub.FILE not in there:
            raise UserError(
                f"{folder}: holds {name}, which push has not written; choose another folder (--out)"
            )
    if there:
        checkpoint_format.read(folder / hub.FILE)  # another program's would be lost

    def samples() -> bytes:
        picture = draw.drawing(flow, lambda: data_of(loaded, None).split("test"))
        with ProgressBar("sampling") as bar:
            drawn = sampling.sample(flow, flow.kind.picture_count, [1.0], 0, bar)
        return grid.png(picture.samples(drawn, 8, 0))

    files = dict(page.files(loaded, wanted.repository, licence, samples))
    console.print(f"files of {hub.PREFIX}{wanted.repository}, in {folder}:")
    for name, content in files.items():
        save(folder / name, content, named=out is not None)
        console.print(f"  {name:17}  {len(content) / 2**10:10,.1f} KiB")
    if not any(each.split == "test" for each in about.figures(loaded)):
        command = f"flowtrain evaluate {shlex.quote(model)}"
        console.print(f"the page has no figure of the test split: {command}")
    if dry_run:
        return
    console.print("uploading them, " + ("for you alone" if private else "for everybody to see"))
    url = hub.upload(wanted.repository, files, private)
    console.print(f"uploaded to {url}: flowtrain sample {hub.PREFIX}{wanted.repository}")

"""`flowtrain decompress`."""

from pathlib import Path
from typing import Annotated

import typer

from flowtrain.commands.base import TrustOption, command, on_one_process
from flowtrain.errors import UserError

EPILOG = "Example: [cyan]flowtrain decompress digits.fta --out digits[/cyan]"


@command
@on_one_process
def decompress(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="An archive of flowtrain compress.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the PNG files go.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="The checkpoint or run directory that the archive was made with.",
            show_default="the embedded one, else where it was",
        ),
    ] = None,
    trust_code: TrustOption = False,
) -> None:
    """Unpack an archive: every image bit for bit, or an error before anything is written."""
    from flowtrain import archive, compression, images
    from flowtrain.commands.base import device_of
    from flowtrain.console import ProgressBar, console

    opened = compression.Opened(file)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give the name of a folder")
    present = next((name for name in opened.names if (out / name).exists()), None)
    if present is not None:
        raise UserError(f"--out {out}: {present} is there already; give another folder")
    device_of("cpu")
    loaded = opened.load(model, trust_code) if opened.streams else None
    with ProgressBar("decompressing") as bar:
        x = opened.images(loaded, bar)
    for name, image in zip(opened.names, images.to_8bit(x, opened.levels), strict=True):
        images.save(out / name, archive.encoded(image, "PNG"))
    console.print(f"wrote {out}: {len(x)} images, each of which matches its checksum")

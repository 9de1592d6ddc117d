"""`flowtrain decompress`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from flowtrain.cli.base import TrustOption, command, on_one_process
from flowtrain.errors import RunError, UserError

EPILOG = "Example: [cyan]flowtrain decompress digits.fta --out digits[/cyan]"


@command
@on_one_process
def decompress(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", show_default=False, help="An archive of flowtrain compress."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", help="Where the PNG files go.", show_default=False),
    ],
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
    from flowtrain.cli.base import device_of
    from flowtrain.compression.decompress import Opened
    from flowtrain.compression.inputs import require_writable
    from flowtrain.pictures import grid
    from flowtrain.pictures.lossless import encoded
    from flowtrain.system.console import ProgressBar, console

    opened = Opened(file)
    require_writable(out, out)
    present = next((name for name in opened.names if os.path.lexists(out / name)), None)
    if present is not None:
        raise UserError(f"--out {out}: {present!r} is there already; give another folder")
    for folder in {parent for name in opened.names for parent in Path(name).parents}:
        if os.path.lexists(out / folder) and not (out / folder).is_dir():
            raise UserError(
                f"--out {out}: {str(folder)!r} is a file, and a folder in the archive; give "
                f"another folder"
            )
    device_of("cpu")
    loaded = opened.load(model, trust_code) if opened.streams else None
    with ProgressBar("decompressing") as bar:
        x = opened.images(loaded, bar)
    for name, image in zip(opened.names, grid.to_8bit(x, opened.levels), strict=True):
        _write(out / name, encoded(image, "PNG"))
    console.print(f"wrote {out}: {len(x)} images, each of which matches its checksum")


def _write(path: Path, data: bytes) -> None:
    """A new file. What a crash leaves of thousands is of no use, so none is flushed to the disk by
    itself.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written, the images before it were: {error.strerror or error}"
        ) from error

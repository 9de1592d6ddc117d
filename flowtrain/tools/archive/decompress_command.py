"""`flowtrain decompress`."""

from pathlib import Path
from typing import Annotated

import typer

from flowtrain.cli.base import TrustOption, command, device_of, on_one_process, require_folder

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
    max_memory: Annotated[
        int | None,
        typer.Option(
            "--max-memory",
            metavar="MIB",
            min=1,
            help="Refuse an archive that takes more MiB of memory to unpack.",
            show_default="a quarter of the machine's memory",
        ),
    ] = None,
    trust_code: TrustOption = False,
) -> None:
    """Unpack an archive. Every image comes back bit for bit, or nothing is written."""
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import require_absent
    from flowtrain.tools.archive.decompress import Opened

    opened = Opened(file, None if max_memory is None else max_memory * 2**20)
    require_folder(out, out)
    require_absent(opened.names, out)
    device_of("cpu")
    loaded = opened.load(model, trust_code)
    with ProgressBar("decompressing") as bar:
        images = opened.images(loaded, bar)
    opened.write(images, out)
    console.print(f"wrote {out}: {len(images)} images, each of which matches its checksum")

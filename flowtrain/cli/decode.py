"""`flowtrain decode`."""

from pathlib import Path
from typing import Annotated

import typer

from flowtrain.cli.base import (
    DeviceOption,
    TrustOption,
    WeightsOption,
    command,
    load,
    on_one_process,
    require_file,
    require_folder,
)

EPILOG = "Example: [cyan]flowtrain decode runs/glow_digits z.npz --out images[/cyan]"


@command
@on_one_process
def decode(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The checkpoint, run directory or trained model that made the latents.",
        ),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE.npz", help="Latents of flowtrain encode.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER|FILE.npz",
            help="A folder for one PNG file per image, or one file for all.",
        ),
    ],
    weights: WeightsOption = None,
    trust_code: TrustOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Decode latents into images. Latents from encode restore the images exactly.

    Edited latents are decoded, too. Points need --out FILE.npz.
    """
    from flowtrain.latents import encoding, files
    from flowtrain.pictures import sample
    from flowtrain.pictures.lossless import png_files
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import require_absent, save, write_folder

    one_file = out.suffix.lower() == ".npz"
    require_file(out) if one_file else require_folder(out, out)
    loaded = load(model, device, weights, trust_code)
    wrong = f"--out {out}: the model is of real-valued data, so give the name of an .npz file"
    num_bins = None if one_file else loaded.flow.kind.require_bins(wrong)
    latents = files.read(file, loaded)
    names = encoding.picture_names(latents.names)
    if num_bins is not None:
        require_absent(names, out)
    with ProgressBar("decoding") as bar:
        x = sample.decode(loaded.flow, latents.z, lambda done: bar(done, len(latents.z)))
    if num_bins is None:
        save(out, files.images_npz(loaded.flow, x, latents.names))
    else:
        write_folder(out, png_files(names, x, num_bins))
    console.print(f"wrote {out}: {len(x)} images")

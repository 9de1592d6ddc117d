"""`flowtrain encode`."""

from pathlib import Path
from typing import Annotated

import typer

from flowtrain.cli.base import (
    DataOptions,
    DatasetOption,
    FirstImagesOption,
    SplitOption,
    check_suffix,
    command,
    on_one_process,
    split_of,
)
from flowtrain.errors import UserError

EPILOG = (
    "Examples: [cyan]flowtrain encode runs/glow_digits --images photos --images cat.png --out "
    "z.npz[/cyan], [cyan]flowtrain encode glow_digits --split test --out z.npz[/cyan]"
)


@command
@on_one_process
def encode(
    out: Annotated[Path, typer.Option(metavar="FILE.npz", help="The latents.")],
    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="Image files, and folders of them; repeatable. For a model of points, an .npy or "
            ".npz file.",
        ),
    ] = None,
    dataset: DatasetOption = None,
    split: SplitOption = None,
    num_images: FirstImagesOption = None,
    *,
    options: DataOptions,
) -> None:
    """Encode images as latents, one array per level. decode restores the images.

    Before the file is written, all latents are decoded, and every pixel is compared.
    """
    from flowtrain.latents import encoding, files
    from flowtrain.pictures.sample import decode
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import save

    check_suffix(out, (".npz",))
    other = dataset is not None or split is not None
    if images and (other or options.words("; repeat --images for each file")):
        raise UserError("--images: not with --data, --split or KEY=VALUE")
    if not images and dataset is None and split is None:
        raise UserError("give the images: --images FILE|FOLDER, --split test, or --data NAME")
    loaded = options.load_model()
    classes = None
    if images:
        names, x = encoding.named_images(images, loaded, num_images)
    else:
        data = options.data(loaded, dataset)
        chosen = split_of(data, split, dataset)
        names, x, classes = encoding.of_split(loaded, data, chosen, num_images)
    with ProgressBar("encoding") as bar:
        z = encoding.encode(loaded.flow, x, bar)
    with ProgressBar("comparing") as bar:
        back = decode(loaded.flow, z, lambda done: bar(done, len(z)))
    error = encoding.difference(loaded.flow, x, back, names)
    save(out, files.npz(files.Latents(z, names, classes), loaded))
    levels = ", ".join(
        "x".join(map(str, level.shape[1:])) for level in loaded.flow.split_latents(z)
    )
    console.print(f"wrote {out}: the latents of {len(z)} images, {levels} for each")
    console.print(
        "decoding restores every pixel"
        if loaded.flow.num_bins is not None
        else f"decoding restores the points within {error:.1e}"
    )

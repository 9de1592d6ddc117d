"""`flowtrain compress` and `flowtrain decompress`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowtrain.cli.base import (
    FirstImagesOption,
    MirrorOption,
    SetOption,
    Split,
    TrustOption,
    WeightsOption,
    command,
    data_of,
    device_of,
    is_setting,
    load,
    on_one_process,
    print_table,
    require_file,
    require_folder,
)
from flowtrain.errors import UserError

if TYPE_CHECKING:
    from flowtrain.tools.archive.compress import Compressed

COMPRESS_EXAMPLES = (
    "Examples: [cyan]flowtrain compress runs/glow_digits --split test --out digits.fta[/cyan], "
    "[cyan]flowtrain compress runs/my_model photos/ cat.png --out photos.fta --embed[/cyan]"
)
DECOMPRESS_EXAMPLES = "Example: [cyan]flowtrain decompress digits.fta --out digits[/cyan]"


def add_to(app: typer.Typer) -> None:
    app.command(epilog=COMPRESS_EXAMPLES, rich_help_panel="Files")(compress)
    app.command(epilog=DECOMPRESS_EXAMPLES, rich_help_panel="Files")(decompress)


@command
@on_one_process
def compress(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The archive.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] INPUT...",
            help="A model, by default the newest run in runs/, then image files and folders of "
            "the model's image size. With --split, there is no INPUT, and KEY=VALUE overrides "
            "keys of the data.",
        ),
    ] = None,
    split: Annotated[
        Split | None, typer.Option(help="Compress a split of the model's data set.")
    ] = None,
    num_images: FirstImagesOption = None,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            help="Pack copies of the image files, brought to the model's size, channels and "
            "levels. The originals cannot be restored.",
        ),
    ] = False,
    embed: Annotated[bool, typer.Option("--embed", help="Put the model into the archive.")] = False,
    mirror: MirrorOption = False,
    weights: WeightsOption = None,
    overrides: SetOption = None,
    trust_code: TrustOption = False,
) -> None:
    """Compress images losslessly, to about as many bits as the flow's likelihood.

    It runs on the CPU, and needs the extra compress. OMP_NUM_THREADS sets the number of parallel
    streams, and does not change the archive.
    """
    from flowtrain.checkpoints.load import model_hash
    from flowtrain.latents.encoding import of_split
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import save
    from flowtrain.tools.archive.codec import coder_of
    from flowtrain.tools.archive.compress import choose, prepare
    from flowtrain.tools.archive.inputs import form_of, from_files, ordinary_sizes
    from flowtrain.tools.archive.stack import constriction
    from flowtrain.tools.archive.strips import strips

    constriction()
    settings = [*(overrides or []), *filter(is_setting, inputs or [])]
    model, files = _model_and_files([word for word in inputs or [] if not is_setting(word)])
    if (split is None) == (not files):
        raise UserError(
            "INPUT: give image files or folders, or --split test" + (", not both" if files else "")
        )
    if fit and split is not None:
        raise UserError("--fit: only for image files; the images of --split are not converted")
    if settings and split is None:
        raise UserError("--set: only with --split, to locate the data")
    require_file(out)
    loaded = load(model, "cpu", weights, trust_code, conditional=True, mirror=mirror)
    # A model without rules is refused before any work is done.
    num_bins = coder_of(loaded.flow).num_bins
    names: list[str] | str
    if split is None:
        names, x = from_files(files, loaded, num_bins, out, num_images, fit)
    else:
        names, (_, x, _) = split, of_split(loaded, data_of(loaded, settings), split, num_images)
    path = loaded.checkpoint.path
    sides = f", each in its likeliest of {loaded.flow.sides} orientations" if mirror else ""
    console.print(f"compressing {len(x)} images with {path} ({loaded.weights} weights){sides}")
    if fit:
        console.print(
            f"packing copies of {form_of(loaded.flow.shape)} with {num_bins} levels (data.resize: "
            f"{loaded.config.data.resize_policy}): decompress restores these, not the originals"
        )
    with ProgressBar("scoring") as bar:
        prepared = prepare(loaded, x, bar)
    with ProgressBar("packing without the flow") as bar:
        plain = strips(x, bar)
    result = choose(
        prepared,
        names,
        plain=plain,
        embed=embed,
        progress=lambda: ProgressBar("compressing"),
        announce=console.print,
    )
    save(out, result.data)
    with ProgressBar("comparing") as bar:
        sizes = ordinary_sizes(x, num_bins, bar)
    _print(result, len(x), x[0].numel(), sizes, embed)
    console.print(
        f"wrote {out}: {len(x)} images" + (", with the model" if embed and result.coded else "")
    )
    if not result.coded:
        console.print("it can be unpacked without a model")
    elif not embed:
        console.print(
            f"flowtrain decompress needs the model {model_hash(loaded)[:16]}, {loaded.weights} "
            f"weights: keep a copy of {path}, because training replaces it, or use --embed"
        )


def _model_and_files(inputs: list[str]) -> tuple[str | None, list[Path]]:
    """Divides the arguments. The first is a model if it is a checkpoint, a run directory, a model
    on the hub, or the name of a trained model, but of no file or folder.
    """
    from flowtrain.checkpoints import hub, zoo

    if not inputs:
        return None, []
    first = inputs[0]
    trained = first in zoo.names() and not os.path.lexists(first)
    is_run = os.path.isdir(os.path.join(first, "checkpoints"))  # noqa: PTH112, PTH118 (never raises)
    is_model = is_run or trained or first.startswith(hub.PREFIX) or first.endswith(".safetensors")
    files = [Path(name) for name in inputs]
    return (first, files[1:]) if is_model else (None, files)


def _print(result: "Compressed", count: int, dims: int, sizes: dict[str, int], embed: bool) -> None:
    """A table of the archive's size, beside ordinary formats."""
    from flowtrain.pictures.lossless import FORMATS
    from flowtrain.system.console import console
    from flowtrain.system.packages import install_command

    table: dict[str, object] = {"images": count}
    if result.coded:
        values = dims * result.coded
        table["bits/dim, net"] = f"{result.net_bits / values:.4f} of {result.coded} images"
        table["bits/dim, the bound"] = f"{result.bound_bits / values:.4f} of the same images"
        if result.initial_bits:
            table["initial bits"] = (
                f"{result.initial_bits} ({result.carriers} images in an ordinary format)"
            )
        table["images/s"] = f"{result.coded / result.seconds:.1f}"
        if result.stored:
            table["stored without the flow"] = (
                f"{result.stored} images, which it cannot code or makes larger"
            )
    else:
        table["bits/dim, the bound"] = f"{result.bound_bits / (count * dims):.4f}"
        why = "the flow makes them larger"
        if embed:
            why = "with the model in it, the archive would be larger"
        if not result.codable:
            why = "it cannot code them"
        table["stored without the flow"] = f"all: {why}"
    all_sizes = {"of the archive": len(result.data)}
    all_sizes |= {f"as {name}": size for name, size in sizes.items()}
    for name, size in all_sizes.items():
        table[f"bytes {name}"] = f"{size}, {8 * size / (count * dims):.4f} bits/dim"
    best = min(sizes, key=lambda name: sizes[name])
    table["relative size"] = f"{100 * len(result.data) / sizes[best]:.1f}% of {best}"
    print_table(table)
    slow = [f"{name} {each.slow}" for name, each in FORMATS.items() if name in sizes and each.slow]
    untried = [name for name in slow if name not in sizes]
    if untried:
        console.print(f"not tried, because so many images take long: {', '.join(untried)}")
    missing = [name for name in FORMATS if name not in sizes]
    if missing:
        jxl = install_command("pillow-jxl-plugin")
        console.print(
            f"not compared, because this Pillow lacks lossless {', '.join(missing)}"
            + (f"; {jxl} adds JPEG XL" if "JXL" in missing else "")
        )


@command
@on_one_process
def decompress(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive of flowtrain compress.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the PNG files go.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The checkpoint or run directory that made the archive.",
            show_default="the embedded one, else its former path",
        ),
    ] = None,
    max_memory: Annotated[
        int | None,
        typer.Option(
            metavar="MIB",
            min=1,
            help="Refuse an archive that needs more memory to unpack.",
            show_default="a quarter of the machine's memory",
        ),
    ] = None,
    trust_code: TrustOption = False,
) -> None:
    """Unpack an archive. Every image is restored bit for bit, or nothing is written."""
    from flowtrain.pictures.lossless import png_files
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import require_absent, write_folder
    from flowtrain.tools.archive.decompress import Opened

    opened = Opened(file, None if max_memory is None else max_memory * 2**20)
    require_folder(out, out)
    require_absent(opened.names, out)
    device_of("cpu")
    loaded = opened.load(model, trust_code)
    with ProgressBar("decompressing") as bar:
        images = opened.images(loaded, bar)
    write_folder(out, png_files(opened.names, images, opened.num_bins))
    console.print(f"wrote {out}: {len(images)} images, whose checksums all match")

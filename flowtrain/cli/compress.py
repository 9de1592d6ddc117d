"""`flowtrain compress`."""

from pathlib import Path
from typing import Annotated

import typer

from flowtrain.cli.base import (
    DataSetOption,
    TrustOption,
    WeightsOption,
    command,
    data_of,
    load,
    on_one_process,
)
from flowtrain.errors import UserError

EPILOG = (
    "Examples: [cyan]flowtrain compress runs/glow_digits --split test --out digits.fta[/cyan], "
    "[cyan]flowtrain compress runs/my_model photos/ cat.png --out photos.fta --embed[/cyan]"
)


@command
@on_one_process
def compress(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[MODEL] INPUT...",
            show_default=False,
            help="A checkpoint or run directory, or by default the newest run in runs/; then "
            "image files and folders "
            "of the model's shape, which are not resized. With --split, no INPUT.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The archive.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="test|validation|train",
            help="Images of the model's data set.",
            show_default=False,
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images", min=1, metavar="N", help="Only the first N.", show_default="all"
        ),
    ] = None,
    embed: Annotated[bool, typer.Option("--embed", help="Put the model into the archive.")] = False,
    weights: WeightsOption = None,
    overrides: DataSetOption = None,
    trust_code: TrustOption = False,
) -> None:
    """Pack images without loss into as many bits as the flow's likelihood says.

    On the CPU; OMP_NUM_THREADS says how many streams are coded at a time, and changes no byte.
    """
    import time

    import torch

    from flowtrain.cli.base import print_table
    from flowtrain.compression import compress as compression
    from flowtrain.compression.codec import Codec, model_hash
    from flowtrain.compression.inputs import (
        find_files,
        ordinary_sizes,
        read_files,
        require_writable,
    )
    from flowtrain.compression.stack import constriction
    from flowtrain.compression.streams import Estimate
    from flowtrain.pictures.lossless import FORMATS
    from flowtrain.system.console import ProgressBar, console, duration
    from flowtrain.system.files import save

    constriction()
    model, *files = [None, *(inputs or [])]
    if files and (files[0].suffix == ".safetensors" or (files[0] / "checkpoints").is_dir()):
        model, *files = files
    if split not in (None, "test", "validation", "train"):
        raise UserError(f"--split {split}: expected test, validation or train")
    if (split is None) == (not files):
        raise UserError(
            "INPUT: give image files or folders, or --split test" + (", not both" if files else "")
        )
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; give the name of a file")
    if overrides and split is None:
        raise UserError("--set: only with --split, where it says where the data are")
    require_writable(out, out.parent)
    loaded = load(None if model is None else str(model), "cpu", weights, trust_code)
    flow, path = loaded.flow, loaded.checkpoint.path
    Codec(flow)  # refuses a model that has no rules, before any work is done
    names: list[str] | str
    if split is None:
        found = find_files(files)
        for file in (*found.values(), path):
            if out.exists() and file.exists() and out.samefile(file):
                raise UserError(
                    f"--out {out}: is one of the files that are read; give another name"
                )
        names = list(found)[:num_images]
        x = read_files([found[name] for name in names], flow.shape, flow.levels)
    else:
        data = data_of(loaded, overrides)
        data.require(flow.shape, flow.levels, path)
        of_split = data.split(split)
        if len(of_split) == 0:
            raise UserError(
                f"--split {split}: it is empty (data.validation is {data.config.validation:g})"
            )
        names, x = split, of_split.take(slice(0, num_images))
    console.print(f"compressing {len(x)} images with {path} ({loaded.weights} weights)")
    with ProgressBar("scoring") as bar:
        prepared = compression.prepare(loaded, x, bar)
    with ProgressBar("packing without the flow") as bar:
        plain = compression.strips(x, bar)
    with ProgressBar("compressing") as bar:

        def announce(expected: Estimate, count: int) -> None:
            bar.started = time.monotonic()  # what is done by now was another kind of work
            threads = min(torch.get_num_threads(), -(-count // compression.STREAM))
            there, back = (
                s * count / threads for s in (expected.encode_seconds, expected.decode_seconds)
            )
            console.print(
                f"about {duration(there)} on {threads} thread(s), and {duration(back)} to "
                f"decompress"
            )

        result = compression.compress(
            prepared, names, plain=plain, embed=embed, progress=bar, announce=announce
        )
    save(out, result.data)
    with ProgressBar("comparing") as bar:
        others = ordinary_sizes(x, flow.levels, bar)
    values = flow.dims * result.coded
    table: dict[str, object] = {"images": len(x)}
    if result.coded:
        table["bits/dim, net"] = f"{result.net_bits / values:.4f} of {result.coded} images"
        table["bits/dim, the bound"] = f"{result.bound_bits / values:.4f} of the same images"
        table["initial bits"] = (
            f"{result.initial_bits} ({result.carriers} images in an ordinary format)"
        )
        table["images/s"] = f"{result.coded / result.seconds:.1f}"
        if result.stored:
            table["stored without the flow"] = (
                f"{result.stored} images, which it cannot code or makes larger"
            )
    else:
        table["bits/dim, the bound"] = f"{prepared.bound.sum().item() / (flow.dims * len(x)):.4f}"
        why = (
            "with the model in it, the archive would be larger"
            if embed
            else "with the flow they take more"
        )
        table["stored without the flow"] = (
            f"all: {why if prepared.promising else 'it cannot code them'}"
        )
    table["bytes of the archive"] = (
        f"{len(result.data)}, {8 * len(result.data) / (flow.dims * len(x)):.4f} bits/dim"
    )
    for name, size in others.items():
        table[f"bytes as {name}"] = f"{size}, {8 * size / (flow.dims * len(x)):.4f} bits/dim"
    print_table(table)
    missing = [name for name in FORMATS if name not in others]
    if missing:
        console.print(
            f"not compared, as this Pillow does not write it without loss: {', '.join(missing)}"
        )
    console.print(
        f"wrote {out}: {len(x)} images" + (", with the model" if embed and result.coded else "")
    )
    if not result.coded:
        console.print("it can be unpacked without a model")
    elif not embed:
        console.print(
            f"flowtrain decompress needs the model {model_hash(loaded)[:16]}, {loaded.weights} "
            f"weights: "
            f"keep a copy of {path}, which more training replaces, or use --embed"
        )

"""`flowtrain quality`."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

from flowtrain.cli.base import (
    DATA_NAMES,
    DataOptions,
    JsonOption,
    SeedOption,
    Split,
    check_suffix,
    command,
    data_config,
    on_all_processes,
    output,
    print_table,
    require_file,
    require_folder,
    write_json,
)
from flowtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from flowtrain.checkpoints.load import LoadedModel
    from flowtrain.data.splits import SplitName
    from flowtrain.tools.quality.figures import Quality

EPILOG = (
    "Example: [cyan]flowtrain quality runs/glow_mnist_small --num-images 2000 --temperature 0.8"
    "[/cyan]"
)
IMAGES = "A split of the model's data (train, validation, test). " + DATA_NAMES


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG, rich_help_panel="Check")(quality)


@command
@on_all_processes
def quality(
    images: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="Measure these instead of samples. " + IMAGES,
            show_default="samples of the model",
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            metavar="NAME|PATH",
            help="The reference. " + IMAGES + "Or an .npz file of statistics, mu and sigma.",
        ),
    ] = "test",
    features: Annotated[
        Literal["inception", "mnist-cnn", "cifar-cnn"] | None,
        typer.Option(
            help="The feature network: Inception, as in the usual FID, or a small classifier that "
            "comes with flowtrain. Figures of different networks are never comparable.",
            show_default="the classifier for images of its shape, else inception",
        ),
    ] = None,
    num_images: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Number of samples; of --images, at most so many."),
    ] = 5000,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="Sampling temperature.")
    ] = 1.0,
    guidance: Annotated[
        float | None, typer.Option(min=0, metavar="W", help="As for sample.", show_default="none")
    ] = None,
    denoise: Annotated[bool, typer.Option("--denoise", help="As for sample.")] = False,
    seed: SeedOption = 0,
    json_out: JsonOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Also write the images here, in the format of the ADM suite: arr_0, uint8 (N, H, "
            "W, C).",
            show_default="none",
        ),
    ] = None,
    *,
    options: DataOptions,
) -> None:
    """Compare samples with real images: FID, KID, precision, recall, density, coverage.

    All compare features of a network. The classifiers that come with flowtrain need no download,
    but their figures do not compare with the usual FID. FID falls with the number of samples, so
    compare equal numbers.

    torchrun distributes the sampling. The same command continues after a stop. The command needs
    the extra quality.
    """
    import numpy as np
    import torch

    from flowtrain.pictures.grid import to_8bit
    from flowtrain.system import distributed
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import save
    from flowtrain.tools.quality import figures, samples
    from flowtrain.tools.quality.features import features_of, load, name_for

    require_file(json_out, "--json")
    check_suffix(out, (".npz",))
    if out is not None and out.exists():
        for option, read in (("--images", images), ("--against", against)):
            if read is not None and Path(read).exists() and out.samefile(read):
                raise UserError(f"--out {out}: {option} reads this file; give another name")
    console.stderr = json_out == "-"
    loaded = options.load_model()
    path = output(json_out, loaded, "quality.json", "--json")
    flow, name = loaded.flow, features or name_for(loaded.flow.shape)
    bins = flow.kind.require_bins(
        f"{loaded.checkpoint.path}: real values; the figures are of images"
    )
    given = {"temperature": temperature, "guidance": guidance, "denoise": denoise or None}
    drawn_with: dict[str, Any] = {k: value for k, value in given.items() if value is not None}
    if not all(map(math.isfinite, drawn_with.values())):
        raise UserError("--temperature, --guidance: expected finite numbers")
    if images is not None and drawn_with != {"temperature": 1.0}:
        raise UserError("--images: not with options of sampling")
    if images is None:
        folder = samples.folder_of(loaded, seed, **drawn_with)
        require_folder(folder, folder, "samples")
    known = figures.statistics_in(Path(against)) if against.endswith(".npz") else None
    if distributed.is_main():
        if known is None:
            reference = to_8bit(_read(loaded, against, "--against", options), bins)
        if images is not None:
            x = _read(loaded, images, "--images", options, num_images, seed)
        network = load(name, flow.shape, flow.device)
        if known is not None:  # before the samples are drawn
            blank = torch.zeros(1, *flow.shape, dtype=torch.uint8)
            size = features_of(blank, network, flow.device).shape[1]
            figures.require_size(known, size, name)
        with ProgressBar("features") as bar:
            y = known or figures.statistics_of(
                features_of(reference, network, flow.device, bar), name
            )
        figures.require_enough(num_images if images is None else len(x), len(y.mu), name)
    if images is None:
        with ProgressBar("sampling") as bar:
            x = samples.draw(loaded, num_images, folder, seed, bar, **drawn_with)
    if not distributed.is_main():
        return  # the rest is on one process
    x = to_8bit(x, bins)
    if out is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x.movedim(1, -1).numpy())
        save(out, buffer.getvalue())
        console.print(f"wrote {out}")
    x = features_of(x, network, flow.device)
    result = figures.compare(figures.statistics_of(x, name), y, name)
    of = drawn_with if images is None else {"images": images}
    content = vars(result) | {"against": against, **of, "seed": seed, "weights": loaded.weights}
    content |= {"checkpoint": str(loaded.checkpoint.path), "step": loaded.checkpoint.meta["step"]}
    write_json(content, json_out, path)
    how = "".join(f", {key} {value:g}" for key, value in drawn_with.items())
    if images is None:
        samples.remove(folder)
    _print(result, images or f"samples of {loaded.checkpoint.path}{how}", against)


def _read(
    loaded: "LoadedModel",
    name: str,
    option: str,
    options: DataOptions,
    most: int | None = None,
    seed: int = 0,
) -> "Tensor":
    """The images that an option names, or a sample of them: uint8 `(N, C, H, W)`, 0..Q-1."""
    from flowtrain import config as configuration
    from flowtrain.data.named import section_named, undivided
    from flowtrain.data.splits import DataSet
    from flowtrain.system import capacity

    if name in get_args(Split):
        data, split_name = options.data(loaded), name
    else:
        # Settings are of the model's own data, which need not be at hand.
        own, levels = data_config(loaded, options.words()), loaded.flow.num_bins
        section = section_named(name, own, loaded.flow.shape, option)
        config = configuration.parse({"data": section}, f"{option} {name}", trust_code=True).data
        data = DataSet(config, undivided(config, own), levels)
        split_name = "all" if data.undivided else "test"
    data.require(loaded.flow.shape, loaded.flow.num_bins, loaded.checkpoint.path)
    split = data.split(cast("SplitName", split_name))
    count = min(most or len(split), len(split))
    # As bytes twice, and twice as the int32 of `to_8bit`.
    needed = (2 + 2 * 4) * count * split.bytes_of_image
    capacity.require(needed, f"{option} {name}: {count:,} images need")
    return split.sample(count, seed).take(slice(None))


def _print(result: "Quality", what: str, against: str) -> None:
    from flowtrain.system.console import console, figure

    of = f"of features {result.features}"
    table: dict[str, object] = {f"FID {of}": result.fid}
    if result.kid is not None:
        table[f"KID {of}"] = figure(result.kid, result.kid_stderr, ".5f")
        for key in ("precision", "recall", "density", "coverage"):
            table[f"{key} {of}"] = getattr(result, key)
    of_reference = "statistics" if result.num_reference is None else f"{result.num_reference:,}"
    table |= {"images": f"{result.num_images:,}: {what}", "against": f"{of_reference}: {against}"}
    print_table(table)
    console.print(
        f"Compare these with figures {of} for {result.num_images:,} images and this reference"
        + ("." if result.features == "inception" else ", and never with the usual FID.")
    )

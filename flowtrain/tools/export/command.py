"""`flowtrain export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flowtrain.cli.base import (
    ModelArgument,
    SettingOptions,
    TrustOption,
    WeightsOption,
    command,
    data_of,
    is_setting,
    load,
    on_one_process,
    require_folder,
)
from flowtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from flowtrain.checkpoints.load import LoadedModel

EPILOG = "Example: [cyan]flowtrain export runs/glow_digits --to onnx --out digits[/cyan]"
OLDEST, NEWEST = 18, 23  # operator sets that torch writes


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG, rich_help_panel="Share")(export)


@command
@on_one_process
def export(
    model: ModelArgument = None,
    to: Annotated[
        Literal["onnx", "torch"],
        typer.Option(help="ONNX files, or programs of torch.export (.pt2)."),
    ] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Output folder.", show_default="export in the run"),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(
            min=OLDEST,
            max=NEWEST,
            metavar="N",
            help="The version of ONNX's operators.",
            show_default=str(OLDEST),
        ),
    ] = None,
    weights: WeightsOption = None,
    trust_code: TrustOption = False,
    *,
    options: SettingOptions,
) -> None:
    """Export a model as graphs for other programs: log_prob, encode and decode.

    They are compared with torch on test images, or else on samples, and on random images. Nothing
    is written if a difference exceeds rounding. ONNX needs the extra onnx.
    """
    from flowtrain.checkpoints.load import run_of
    from flowtrain.system.console import console
    from flowtrain.system.files import require_absent, write_folder
    from flowtrain.tools.export import export as exporting
    from flowtrain.tools.export.formats import SUFFIX

    if to == "torch" and opset is not None:
        raise UserError(f"--opset {opset}: it is for --to onnx")
    if out is not None:
        require_folder(out, out)
    settings = options.words()
    if model is not None and is_setting(model):
        settings, model = [*settings, model], None
    loaded = load(model, "cpu", weights, trust_code)
    folder = out or run_of(loaded.checkpoint.path) / "export"
    require_folder(folder, folder)
    names = [f"{name}{SUFFIX[to]}" for name in ("log_prob", "encode", "decode")]
    require_absent([exporting.FACTS, *names], folder)
    images = _test_images(loaded, settings, exporting.IMAGES)
    files = exporting.export(
        loaded, to, images, opset or OLDEST, lambda said: console.print(str(said))
    )
    write_folder(folder, files.items())
    for name, content in files.items():
        console.print(f"wrote {folder / name}, {len(content) / 2**20:,.1f} MiB")


def _test_images(loaded: "LoadedModel", settings: list[str], count: int) -> "Tensor | None":
    """Test images of the model's data, or None if they are not there and nothing names them."""
    try:
        data = data_of(loaded, settings)
        data.require(loaded.flow.shape, loaded.flow.num_bins, loaded.checkpoint.path)
        here = data.train_images.at_hand() and data.test_images.at_hand()
        return data.split("test").sample(count).take(slice(None)) if here or settings else None
    except UserError:
        if settings:
            raise
        return None

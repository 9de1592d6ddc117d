"""`flowtrain report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowtrain.cli.base import (
    DataSetOption,
    DeviceOption,
    ModelArgument,
    SeedOption,
    TrustOption,
    WeightsOption,
    check_suffix,
    command,
    data_of,
    load,
    on_one_process,
    output,
)
from flowtrain.errors import RunError, UserError

if TYPE_CHECKING:
    from flowtrain.data.splits import DataSet

EPILOG = "Example: [cyan]flowtrain report runs/glow_digits --out digits.html[/cyan]"


@command
@on_one_process
def report(
    model: ModelArgument = None,
    num_images: Annotated[
        int,
        typer.Option(
            "--num-images", min=1, metavar="N", help="Test images to reconstruct and examine."
        ),
    ] = 64,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE.html", help="The report.", show_default="report.html in the run"
        ),
    ] = None,
    weights: WeightsOption = None,
    overrides: DataSetOption = None,
    trust_code: TrustOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Write one HTML file about a run: curves, samples, reconstructions, nearest training images,
    evaluation, health.

    If something is missing, such as the data set or an evaluation of the test split, the report
    says so and has the rest.
    """
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import save
    from flowtrain.tools.report import report as reporting

    check_suffix(out, (".html",))
    loaded = load(model, device, weights, trust_code, conditional=True)
    path = output(out, loaded, "report.html", "--out")
    data: DataSet | str
    try:
        data = data_of(loaded, overrides)
        data.require(loaded.flow.shape, loaded.flow.levels, loaded.checkpoint.path)
        for split in ("train", "test"):
            data.split(split)
    except (UserError, RunError) as error:
        if overrides:
            raise
        data = f"{error}; --set data.KEY=VALUE says where the data are"
    with ProgressBar("report") as bar:
        html, missing = reporting.page(loaded, data, num_images=num_images, seed=seed, progress=bar)
    save(path, html.encode(), named=out is not None)
    for line in missing:
        console.print(f"not in it: {line}")
    console.print(f"wrote {path}: a report of {loaded.checkpoint.path}")

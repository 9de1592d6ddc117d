"""`flowtrain evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from flowtrain.cli.base import (
    DATA_NAMES,
    BatchSizeOption,
    DataSetOption,
    DeviceOption,
    ModelArgument,
    ScoresOption,
    SeedOption,
    TrustOption,
    WeightsOption,
    command,
    data_of,
    load,
    mention_unused,
    on_all_processes,
    print_table,
    require_file,
    split_of,
    write_json,
)
from flowtrain.errors import RunError, UserError

EPILOG = (
    "Example: [cyan]flowtrain evaluate runs/glow_digits --samples 16 --scores scores.csv[/cyan]"
)


@command
@on_all_processes
def evaluate(
    model: ModelArgument = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", metavar="test|validation|train", help="Which images.", show_default="test"
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            metavar="NAME|PATH",
            help=DATA_NAMES
            + "All images of a folder without test/ or of a file without x_test are evaluated.",
            show_default="the model's own",
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images", min=1, metavar="N", help="Only the first N images.", show_default="all"
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            min=1,
            metavar="K",
            help="Draws of the dequantization noise. Above 1, the bound is importance-weighted.",
        ),
    ] = 1,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = None,
    weights: WeightsOption = None,
    json_out: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE|-",
            help="Where to write the result.",
            show_default="evaluate-<split>.json or evaluate-<dataset>-<split>.json in the run",
        ),
    ] = None,
    scores_out: ScoresOption = None,
    overrides: DataSetOption = None,
    trust_code: TrustOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Measure bits per dimension of a data set's split in float32, with the standard error.

    By default it is the test split of the data that the model was trained on.
    """
    from flowtrain.checkpoints.load import run_of
    from flowtrain.evaluation import evaluate as evaluation
    from flowtrain.system import distributed
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.files import save

    split_name = split_of(split)
    require_file(json_out, "--json")
    require_file(scores_out, "--scores")
    console.stderr = json_out == "-"
    loaded = load(model, device, weights, trust_code)
    mention_unused(device, loaded.flow.device)
    data = data_of(loaded, overrides, dataset)
    if data.undivided and split is not None:
        raise UserError(
            f"--split {split}: {dataset} has no splits; without --split, all of its images are "
            f"evaluated"
        )
    split_name = split_name or ("all" if data.undivided else "test")
    console.print(
        f"evaluating {loaded.checkpoint.path} on {split_name}"
        + (f" of {dataset}" if dataset else "")
    )
    with ProgressBar("evaluating") as bar:
        result, scores = evaluation.evaluate(
            loaded,
            data,
            split_name,
            num_images=num_images,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
            progress=bar,
        )
    if not distributed.is_main():
        return  # the rest is writing
    name = f"evaluate-{split_name}.json"
    if dataset is not None:
        result = result.model_copy(update={"dataset": dataset})
        name = f"evaluate-{Path(dataset).resolve().stem}-{split_name}.json"
    content = result.content()
    print_table({key: value for key, value in content.items() if key != "non_finite_indices"})
    write_json(content, json_out, run_of(loaded.checkpoint.path) / name)
    if scores_out is not None:
        save(scores_out, evaluation.scores_csv(scores, loaded.flow))
        console.print(f"wrote {scores_out}")
    if bad := result.non_finite_indices:
        which = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise RunError(
            f"{len(bad)} of {result.num_images} images have a likelihood that is not finite: "
            f"those at {which}"
        )

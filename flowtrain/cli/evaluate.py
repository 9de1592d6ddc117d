"""`flowtrain evaluate`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowtrain.cli.base import (
    BatchSizeOption,
    DataOptions,
    DatasetOption,
    JsonOption,
    MirrorOption,
    ScoresOption,
    SeedOption,
    SplitOption,
    command,
    on_all_processes,
    output,
    print_table,
    require_file,
    split_of,
    write_json,
)
from flowtrain.errors import RunError

if TYPE_CHECKING:
    from flowtrain.results import Evaluation

EPILOG = "Example: [cyan]flowtrain evaluate runs/glow_digits --draws 16 --scores scores.csv[/cyan]"


@command
@on_all_processes
def evaluate(
    split: SplitOption = None,
    dataset: DatasetOption = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Only a random sample of N images.", show_default="all"
        ),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="K",
            help="Draws of dequantization noise. Above 1, the bound is importance-weighted. "
            "With Gaussian noise, they are averaged.",
        ),
    ] = 1,
    seed: SeedOption = 0,
    mirror: MirrorOption = False,
    batch_size: BatchSizeOption = None,
    json_out: JsonOption = None,
    scores_out: ScoresOption = None,
    *,
    options: DataOptions,
) -> None:
    """Measure bits per dimension on a split in float32, with the standard error.

    The default is the test split of the model's own data. A folder without test/, or a file without
    x_test, is used whole. Image files are brought to the model's size and levels. A model trained
    with Gaussian noise has no bits/dim, but a mean log-density of noisy images in nats/dim.
    """
    from flowtrain.data.named import source
    from flowtrain.evaluation import evaluate as evaluation
    from flowtrain.system import distributed
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.system.device import mention_unused
    from flowtrain.system.files import save

    require_file(json_out, "--json")
    require_file(scores_out, "--scores")
    console.stderr = json_out == "-"
    loaded = options.load_model(conditional=True, mirror=mirror)
    mention_unused(options.device, loaded.flow.device)
    with distributed.main_process_first():  # it may list a large folder
        data = options.data(loaded, dataset)
        other = dataset
        moved = dataset is None and source(data.config) != source(loaded.config.data)
        if moved and evaluation.trained_on(loaded, data.config, data) is None:
            place = data.config.options()
            other = str(place.get("path") or place.get("repository") or data.config.name)
    split_name = split_of(data, split, dataset)
    of = "mirror-" * mirror + f"{draws}-draws-" * (draws > 1)
    of += "" if other is None else f"{_file_name(other, data.config.name)}-"
    path = output(json_out, loaded, f"evaluate-{of}{split_name}.json", "--json")
    console.print(
        f"evaluating {loaded.checkpoint.path} on {split_name}" + (f" of {other}" if other else "")
    )
    with ProgressBar("evaluating") as bar:
        result, scores = evaluation.evaluate(
            loaded,
            data,
            split_name,
            num_images=num_images,
            draws=draws,
            seed=seed,
            batch_size=batch_size,
            progress=bar,
        )
    if not distributed.is_main():
        return  # the rest is writing
    if other is not None:
        result = result.model_copy(update={"dataset": other})
    write_json(result.content(), json_out, path)
    if scores_out is not None:
        save(scores_out, evaluation.scores_csv(scores, loaded.flow))
        console.print(f"wrote {scores_out}")
    _print(result)
    if bad := result.non_finite_indices:
        which = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise RunError(
            f"{len(bad)} of {result.num_images} images have a non-finite likelihood: "
            f"indices {which}"
        )


def _file_name(dataset: str, kind: str) -> str:
    """The name of a data set, or the stem of a path with eight digits for its folder."""
    import hashlib

    if dataset == kind:
        return dataset
    path = Path(dataset).resolve()
    return f"{path.stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def _print(result: "Evaluation") -> None:
    """The loss in one line, and what it is made of in a table."""
    from flowtrain.flow.sides import mixture
    from flowtrain.system.console import console, counted, figure

    of = "images" if result.levels is not None else "examples"
    of = of if result.split == "all" else f"{result.split} {of}"
    given = "" if result.given is None else f", given {result.given}"
    loss = figure(result.loss, result.loss_stderr)
    console.print(f"{loss} {result.unit}{given} ({result.num_images:,} {of})")
    draws = f"{counted(result.draws, 'draw')} of noise"
    bounds = {
        "exact": "exact",
        "elbo": f"a bound, from {draws}",
        "iwbo": f"an importance-weighted bound, from {draws}",
        "density": f"none, and no bits/dim: minus the mean log-density of noisy images (sigma "
        f"{result.sigma}), from {draws}",
    }
    table: dict[str, object] = {"likelihood": bounds[result.bound]}
    if result.sides > 1:
        table["mixture"] = mixture(result.sides)
    if result.given is not None:
        table["conditional on"] = f"{result.given}: not comparable with figures of whole images"
    if result.loss_stderr_draws is not None:
        table["error over draws"] = f"{result.loss_stderr_draws:.2g}"
    if result.bound == "iwbo":
        table["bound of a single draw"] = (
            figure(result.elbo_bits_per_dim, result.elbo_bits_per_dim_stderr) + " bits/dim"
        )
    if result.levels is not None:
        table["nats per image"] = figure(result.nats_per_image, result.nats_per_image_stderr, ".1f")
    if result.classes is not None:
        table["class"] = f"unknown: the mean over {result.classes} equally likely classes"
    if result.loss_given_class is not None:
        table["given the class"] = f"{result.loss_given_class:.3f} {result.unit}"
    if result.accuracy is not None:
        table["accuracy"] = figure(result.accuracy, result.accuracy_stderr)
    if equal := result.duplicates_of_training:
        console.print(f"{equal:,} of {result.num_images:,} images are equal to a training image")
    for name, count in (
        ("equal to earlier images", result.duplicates),
        ("not finite", result.non_finite_images),
    ):
        if count:
            table[name] = f"{count:,} of {result.num_images:,}"
    if result.max_reconstruction_error is not None:
        table["largest reconstruction error"] = f"{result.max_reconstruction_error:.2g}"
    levels = "" if result.levels is None else f", {result.levels} levels"
    table["data"] = f"{result.dataset}: {result.dims} dimensions{levels}"
    if result.edition is not None:
        table["version of the data"] = result.edition
    table["model"] = f"{result.checkpoint}: step {result.step:,}, {result.weights} weights"
    table["sampling"] = result.sampling
    print_table(table)

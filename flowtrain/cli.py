"""The command line: each command parses, then calls one function."""

import functools
import logging
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from flowtrain import configfiles
from flowtrain.errors import EndedElsewhere, Interrupted, RunError, UserError, exit_code

# torch takes seconds to import, so the commands import what they need themselves: `--help` is instant.

app = typer.Typer(
    help="Train normalizing flows on images, and get likelihoods that can be trusted.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main() -> None:
    # Process 1 of a container gets no signal that it has no handler for. `train` puts its own in place.
    signal.signal(signal.SIGTERM, _stop)
    app(prog_name="flowtrain")


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    """One message instead of a traceback, and the exit code that belongs to it."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        _log_warnings()
        try:
            function(*args, **kwargs)
        except (Interrupted, EndedElsewhere) as ended:  # it has been said why
            raise typer.Exit(ended.exit_code) from None
        except (UserError, RunError) as error:
            _fail(str(error), error.exit_code)
        except FloatingPointError as error:
            _fail(f"{error}: the model is damaged or diverged", RunError.exit_code)
        except BrokenPipeError:
            raise  # for the command line library, which ends quietly
        except OSError as error:
            _fail(f"{error.filename or 'a file'}: {error.strerror or error}", exit_code(error))
        except KeyboardInterrupt:
            _fail("interrupted", exit_code(KeyboardInterrupt()))
        except MemoryError as error:
            _fail(f"out of memory: {error}", RunError.exit_code)
        except RuntimeError as error:
            if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            _fail(f"out of memory; lower the batch size: {error}", RunError.exit_code)

    return wrapped


def _on_all_processes(function: Callable[..., None]) -> Callable[..., None]:
    """Where torchrun has started several, they do it together."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from flowtrain import distributed

        with distributed.setup():
            function(*args, **kwargs)

    return wrapped


def _on_one_process(function: Callable[..., None]) -> Callable[..., None]:
    """Where torchrun has started several, the first does it, and the others have nothing to do."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        if os.environ.get("RANK", "0") == "0" or not _launched():
            function(*args, **kwargs)

    return wrapped


def _launched() -> bool:
    from flowtrain import distributed

    return distributed.launched()


def _fail(message: str, code: int) -> None:
    typer.echo(f"flowtrain: {message}", err=True)
    raise typer.Exit(code)


def _log_warnings() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("flowtrain: %(message)s"))
    logger = logging.getLogger("flowtrain")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def _complete_config(incomplete: str) -> list[tuple[str, str]]:
    configs = configfiles.shipped_configs().items()
    return [(name, configfiles.headline(path)) for name, path in configs if name.startswith(incomplete)]


def _config_list() -> str:
    rows = [
        f"[bold]{name}[/bold]  {configfiles.headline(path)}" for name, path in configfiles.shipped_configs().items()
    ]
    return "\n\n".join(["[bold]Configurations that come with flowtrain:[/bold]", *rows])


def _print_version(value: bool) -> None:
    if value:
        import flowtrain

        typer.echo(f"flowtrain {flowtrain.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A checkpoint, or a run directory (its best checkpoint, else its last); or the newest run in runs/.",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="D", help="auto, cpu, cuda, cuda:N or mps.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the random numbers.")]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", metavar="ema|raw", help="Averaged or raw weights.", show_default="ema where kept"),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-code", help="Let the checkpoint name a module of your own, and import it.")
]
DataSetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override where the data are, such as data.root=DIR.", show_default=False
    ),
]


@app.command(
    epilog="Example: [cyan]flowtrain train --config glow_mnist_small.yaml --set train.budget=20min[/cyan]\n\n"
    + _config_list()
)
@_command
@_on_all_processes
def train(
    config: Annotated[
        str,
        typer.Option(
            "--config",
            metavar="NAME|FILE",
            autocompletion=_complete_config,
            help="A YAML file: as given, in configs/, or one that comes with flowtrain (below).",
        ),
    ] = configfiles.DEMO,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key, such as train.lr=5e-4; repeatable.", show_default=False
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir", metavar="DIR", help="Where everything is written.", show_default="runs/<config name>"
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="auto|never|CHECKPOINT",
            help="auto goes on from the last checkpoint in the run directory; never refuses one that holds a run.",
        ),
    ] = "auto",
    init_from: Annotated[
        str | None,
        typer.Option(
            "--init-from", metavar="MODEL", help="Start from this model's weights (fine-tuning).", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, memory, speed and estimated time, and stop.")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Train a flow. The same command again goes on where it stopped."""
    from flowtrain import config as configuration

    path = configfiles.find_config(config)
    settings = configuration.load_config(path, overrides or [])
    target = _device(device)
    if dry_run:
        from flowtrain.dryrun import dry_run as run_dry

        run_dry(settings, target)
        return
    from flowtrain.run import RunDirectory
    from flowtrain.train import fit

    fit(settings, RunDirectory(run_dir or Path("runs") / path.stem), target, resume, init_from)


@app.command(epilog="Example: [cyan]flowtrain evaluate runs/glow_digits --samples 16 --scores scores.csv[/cyan]")
@_command
@_on_all_processes
def evaluate(
    model: ModelArgument = None,
    split: Annotated[str, typer.Option("--split", metavar="test|validation|train", help="Which images.")] = "test",
    num_images: Annotated[
        int | None,
        typer.Option("--num-images", min=1, metavar="N", help="Only the first N images.", show_default="all"),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", min=1, metavar="K", help="Dequantization draws; above 1, the importance-weighted bound."
        ),
    ] = 1,
    seed: SeedOption = 0,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, metavar="B", help="Images at a time; no effect on the result.")
    ] = None,
    weights: WeightsOption = None,
    json_out: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE|-", help="Where the result goes.", show_default="evaluate-<split>.json in the run"
        ),
    ] = None,
    scores_out: Annotated[
        Path | None, typer.Option("--scores", metavar="FILE.csv", help="One row an image.", show_default=False)
    ] = None,
    overrides: DataSetOption = None,
    trust_code: TrustOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Bits per dimension of a data set's split, in float32, with standard error."""
    import json

    from flowtrain import checkpoint, distributed, images
    from flowtrain import evaluate as evaluation
    from flowtrain.console import ProgressBar, console

    if split not in ("test", "validation", "train"):
        raise UserError(f"--split {split}: expected test, validation or train")
    console.stderr = json_out == "-"
    loaded = _load(model, device, weights, trust_code)
    console.print(f"evaluating {loaded.checkpoint.path} on {split}")
    with ProgressBar("evaluating") as bar:
        result, scores = evaluation.evaluate(
            loaded,
            _data(loaded, overrides),
            split,
            num_images=num_images,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
            progress=bar,
        )
    if not distributed.is_main():
        return  # the rest is writing
    _print_table(result)
    text = json.dumps(result, indent=2, allow_nan=False)
    if json_out == "-":
        print(text)
    else:
        file = Path(json_out) if json_out else checkpoint.run_of(loaded.checkpoint.path) / f"evaluate-{split}.json"
        images.save(file, text.encode() + b"\n")
        console.print(f"wrote {file}")
    if scores_out is not None:
        images.save(scores_out, evaluation.scores_csv(scores, loaded.flow.dims))
        console.print(f"wrote {scores_out}")
    if result["non_finite_images"]:
        raise RunError(
            f"{result['non_finite_images']} of {result['num_images']} images have a likelihood that is not finite"
        )


@app.command(
    epilog="Example: [cyan]flowtrain sample runs/glow_digits --temperature 0.7 --temperature 1 --out t.png[/cyan]"
)
@_command
@_on_one_process
def sample(
    model: ModelArgument = None,
    num: Annotated[int, typer.Option("--num", min=1, help="Images for each temperature.")] = 64,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            "--temperature",
            min=0,
            metavar="T",
            help="Repeatable, a row each; 0 is the mode of the base.",
            show_default="1.0",
        ),
    ] = None,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE.png|.npz", help="A grid, or the images.", show_default="sample.png in the run"
        ),
    ] = None,
    trust_code: TrustOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Draw images from a trained flow. One seed gives the same images, however many are drawn."""
    import io

    import numpy as np

    from flowtrain import checkpoint, images
    from flowtrain import sample as sampling
    from flowtrain.console import ProgressBar, console

    suffix = images.check_suffix(out, (".png", ".npz")) if out else ".png"
    temperatures = temperature or [1.0]
    if not all(map(math.isfinite, temperatures)):
        raise UserError(f"--temperature {max(temperatures)}: expected a finite number")
    loaded = _load(model, device, weights, trust_code)
    with ProgressBar("sampling") as bar:
        drawn = sampling.sample(loaded.flow, num, temperatures, seed, bar)
    path = out or checkpoint.run_of(loaded.checkpoint.path) / "sample.png"
    if suffix == ".npz":
        buffer = io.BytesIO()
        arrays = {"images": drawn.movedim(1, -1).numpy(), "temperature": np.repeat(temperatures, num)}
        np.savez_compressed(buffer, **arrays, seed=seed, levels=loaded.flow.levels)  # type: ignore[arg-type]
        images.save(path, buffer.getvalue())
    else:
        columns = num if len(temperatures) > 1 else max(1, round(num**0.5))
        images.save_png(path, images.grid(drawn, loaded.flow.levels, columns))
    console.print(f"wrote {path}: {len(drawn)} samples of {loaded.checkpoint.path}")


@app.command(
    epilog="Example: [cyan]flowtrain interpolate runs/glow_digits --images a.png b.png --steps 12 --out path.gif[/cyan]"
)
@_command
@_on_one_process
def interpolate(
    model: ModelArgument = None,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Pairs of test images, a row each.")] = 4,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Images in a row, the ends included.")] = 8,
    files: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--images", metavar="A B", help="Between two image files of your own.", show_default=False),
    ] = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE.png|.gif", help="A grid, or an animation.", show_default="interpolate.png in the run"
        ),
    ] = None,
    weights: WeightsOption = None,
    overrides: DataSetOption = None,
    trust_code: TrustOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Walk between images through the latent space. The ends come back exactly."""
    from flowtrain import checkpoint, images
    from flowtrain import interpolate as paths
    from flowtrain.console import console

    suffix = images.check_suffix(out, (".png", ".gif")) if out else ".png"
    loaded = _load(model, device, weights, trust_code)
    if files is not None:
        ends = paths.from_files(files, loaded)
    else:
        ends = paths.from_test_images(loaded, _data(loaded, overrides), pairs, seed)
    rows = paths.interpolate(loaded.flow, *ends, steps).cpu()  # (P, S, C, H, W)
    path = out or checkpoint.run_of(loaded.checkpoint.path) / "interpolate.png"
    if suffix == ".gif":
        frames = [images.grid(rows[:, step], loaded.flow.levels, columns=len(rows)) for step in range(steps)]
        images.save_gif(path, frames + frames[-2:0:-1])  # there and back
    else:
        images.save_png(path, images.grid(rows.flatten(0, 1), loaded.flow.levels, columns=steps))
    console.print(f"wrote {path}: {len(rows)} paths of {steps} steps through {loaded.checkpoint.path}")


def _load(model: str | None, device: str, weights: str | None, trust_code: bool) -> Any:
    if weights not in (None, "ema", "raw"):
        raise UserError(f"--weights {weights}: expected ema or raw")
    from flowtrain import checkpoint

    return checkpoint.load_model(model, _device(device), weights, trust_code)


def _device(name: str) -> Any:
    from flowtrain import allocator
    from flowtrain import device as devices

    device = devices.resolve(name)
    if device.type == "cpu":
        allocator.keep_freed_memory()
    return device


def _data(loaded: Any, overrides: list[str] | None) -> Any:
    """The data set that the model was trained on, perhaps from another place."""
    from flowtrain import config as configuration
    from flowtrain.data import DataSet

    for text in overrides or []:
        if not text.startswith("data."):
            raise UserError(f"--set {text}: only keys of data can be set here; the model is as it was trained")
    values = configuration.override(loaded.checkpoint.meta["config"], overrides or [])
    return DataSet(configuration.parse(values, "--set").data)


def _print_table(result: dict[str, Any]) -> None:
    from rich.table import Table

    from flowtrain.console import console

    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path is of no use with its end cut off
    for key, value in result.items():
        table.add_row(key.replace("_", " "), f"{value:.5g}" if isinstance(value, float) else str(value))
    console.print(table)


if __name__ == "__main__":
    main()

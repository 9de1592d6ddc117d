"""What the commands share: options, errors to exit codes, loading."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flowtrain.errors import EndedElsewhere, Interrupted, RunError, UserError, exit_code

# torch takes seconds to import, so the commands import what they need themselves: `--help` is
# instant.


def command(function: Callable[..., Any]) -> Callable[..., Any]:
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


def on_all_processes(function: Callable[..., None]) -> Callable[..., None]:
    """Where torchrun has started several, they do it together."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from flowtrain.system import distributed

        with distributed.setup():
            function(*args, **kwargs)

    return wrapped


def on_one_process(function: Callable[..., None]) -> Callable[..., None]:
    """Where torchrun has started several, the first does it, and the others have nothing to do."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        if os.environ.get("RANK", "0") == "0" or not _launched():
            function(*args, **kwargs)

    return wrapped


def _launched() -> bool:
    from flowtrain.system import distributed

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


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A checkpoint, or a run directory (its best checkpoint, else its last); or the "
        "newest run in runs/.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="D", help="auto, cpu, cuda, cuda:N or mps.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the random numbers.")]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="ema|raw",
        help="Averaged or raw weights.",
        show_default="ema where kept",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Let the checkpoint name a module of your own, and import it."
    ),
]
DataSetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override where the data are, such as data.root=DIR.",
        show_default=False,
    ),
]
DATA_NAMES = (
    "A data set (mnist, cifar10, digits, ..., found or downloaded under data.root), a folder of "
    "image files, an image "
    "file, or an .npz file. "
)


def load(model: str | None, device: str, weights: str | None, trust_code: bool) -> Any:
    if weights not in (None, "ema", "raw"):
        raise UserError(f"--weights {weights}: expected ema or raw")
    from flowtrain.checkpoints.load import load_model

    return load_model(model, device_of(device), weights, trust_code)


def device_of(name: str) -> Any:
    from flowtrain.system import allocator
    from flowtrain.system import device as devices

    device = devices.resolve(name)
    if device.type == "cpu":
        allocator.keep_freed_memory()
    return device


def data_of(loaded: Any, overrides: list[str] | None, dataset: str | None = None) -> Any:
    """The data set that the model was trained on, perhaps from another place, or the one that
    `--dataset` names.
    """
    from flowtrain import config as configuration
    from flowtrain.data.named import section_named, undivided
    from flowtrain.data.splits import DataSet

    for text in overrides or []:
        if not text.startswith("data."):
            raise UserError(
                f"--set {text}: only keys of data can be set here; the model is as it was trained"
            )
    values = dict(loaded.checkpoint.meta["config"])
    if dataset is None:
        return DataSet(
            configuration.parse(configuration.override(values, overrides or []), "--set").data
        )
    values["data"] = section_named(dataset, loaded.config.data, loaded.flow.shape, "--dataset")
    config = configuration.parse(
        configuration.override(values, overrides or []), f"--dataset {dataset}"
    ).data
    return DataSet(config, undivided(config, loaded.config.data))


def write_json(result: Any, given: str | None, default: Path) -> None:
    """To standard output for `-`, alone there (`console.stderr` is set before); else to a file, and
    says where.
    """
    import json

    from flowtrain.system.console import console
    from flowtrain.system.files import save

    text = json.dumps(result, indent=2, allow_nan=False)
    if given == "-":
        print(text)
        return
    file = Path(given) if given else default
    save(file, text.encode() + b"\n")
    console.print(f"wrote {file}")


def print_table(result: dict[str, Any]) -> None:
    from rich.table import Table

    from flowtrain.system.console import console

    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path is of no use with its end cut off
    for key, value in result.items():
        table.add_row(
            key.replace("_", " "), f"{value:.5g}" if isinstance(value, float) else str(value)
        )
    console.print(table)

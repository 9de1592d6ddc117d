"""What the commands share: their options, the exit codes of errors, loading and writing."""

import copy
import functools
import inspect
import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, ParamSpec

import typer

from flowtrain.errors import (
    EndedElsewhere,
    Interrupted,
    RunError,
    UserError,
    cut,
    exit_code,
    place,
    raised,
)
from flowtrain.system.files import is_special

# torch takes seconds to import, and `--help` should be instant. So functions import what they need.
if TYPE_CHECKING:
    import torch

    from flowtrain.checkpoints.load import LoadedModel
    from flowtrain.config import Data as DataConfig
    from flowtrain.data.splits import DataSet

P = ParamSpec("P")
NO_MEMORY = "out of memory|can't allocate memory"  # in messages of torch


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turns an error into one message, without a traceback, and its exit code.

    A parameter whose type is a dataclass is a group of options: its fields are the parameters.
    """
    parameters = inspect.signature(function).parameters
    types = {name: each.annotation for name, each in parameters.items()}
    groups = {name: x for name, x in types.items() if isinstance(x, type) and is_dataclass(x)}
    fields = {name: inspect.signature(group).parameters for name, group in groups.items()}

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        for name, group in groups.items():
            own = {each: kwargs.pop(each) for each in fields[name] if each in kwargs}
            kwargs[name] = group(**own)
        _log_warnings()
        try:
            Path.cwd()  # libraries crash without one
        except OSError as error:
            fail(f"the working directory: {error.strerror}; use another", exit_code(error))
        try:
            function(*args, **kwargs)
        except (Interrupted, EndedElsewhere) as ended:  # the reason was printed before
            raise typer.Exit(ended.exit_code) from None
        except (UserError, RunError) as error:
            fail(str(error), error.exit_code)
        except FloatingPointError as error:
            fail(f"{error}: the model is damaged or diverged", RunError.exit_code)
        except OSError as error:
            fail(f"{error.filename or 'a file'}: {error.strerror or error}", exit_code(error))
        except KeyboardInterrupt:
            fail("interrupted", exit_code(KeyboardInterrupt()))
        except MemoryError as error:
            fail(f"out of memory: {error}", RunError.exit_code)
        except Exception as error:
            if isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error)):
                fail(f"out of memory; use a smaller batch or model: {error}", RunError.exit_code)
            if str(error).startswith("Symlink loop"):  # of `Path.resolve` before Python 3.13
                fail(str(error), UserError.exit_code)
            if not place(error):
                raise
            fail(raised(error), RunError.exit_code)

    flat = [p for name in parameters for p in fields.get(name, {name: parameters[name]}).values()]
    # Typer would keep the line breaks of all paragraphs but the first.
    wrapped.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(function) or "")
    wrapped.__annotations__ = {each.name: each.annotation for each in flat}
    # By name, as Typer passes them, so those without a default may follow.
    flat = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in flat]
    wrapped.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    return wrapped


def on_all_processes(function: Callable[P, None]) -> Callable[P, None]:
    """A command on which all processes of torchrun work together."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from flowtrain.system import torchrun

        with torchrun.setup():
            function(*args, **kwargs)

    return wrapped


def on_one_process(function: Callable[P, None]) -> Callable[P, None]:
    """A command that only the first process of torchrun runs."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        if os.environ.get("RANK", "0") != "0":
            from flowtrain.system import torchrun

            if torchrun.launched():
                return
        function(*args, **kwargs)

    return wrapped


LINES = 6  # of a message
WIDTH = 2000  # characters of a line


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with a message of at most `LINES` lines."""
    lines = [cut(line, WIDTH) for line in message.splitlines()]
    if len(lines) > LINES:
        lines[LINES - 1 :] = [f"and {len(lines) - LINES + 1} more lines"]
    typer.echo("flowtrain: " + "\n".join(lines), err=True)
    raise typer.Exit(code)


def _log_warnings() -> None:
    # Pillow warns of pictures that it reads all the same, matplotlib of letters not in its font.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.filterwarnings("ignore", "Glyph|Matplotlib currently does not support", UserWarning)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("flowtrain: %(message)s"))
    logger = logging.getLogger("flowtrain")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def complete_model(incomplete: str) -> list[str]:
    """Run directories in runs/, and trained models. Other paths are completed by the shell."""
    from flowtrain.checkpoints import zoo

    runs = (str(path.parent) for path in Path("runs").glob("*/checkpoints"))
    return [name for name in (*sorted(runs), *zoo.names()) if name.startswith(incomplete)]


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        autocompletion=complete_model,
        help="A checkpoint, a run directory (its best checkpoint, else its last), a trained model "
        "of `flowtrain list`, hf://user/name on the Hugging Face Hub, or FILE.py:NAME, a flow in a "
        "Python file, which is run. By default, the newest run in runs/.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="D", help="auto, cpu, cuda, cuda:N, xpu, xpu:N or mps.")
]
FirstImagesOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Only the first N images.", show_default="all"),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the random numbers.")]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="B",
        help="Images per batch. It affects only rounding, by about 1e-6 bits/dim for an image.",
    ),
]
ScoresOption = Annotated[
    Path | None,
    typer.Option(
        "--scores", metavar="FILE.csv", help="Also write the scores here, one row per image."
    ),
]
WeightsOption = Annotated[
    Literal["ema", "raw"] | None,
    typer.Option(
        help="Use the averaged or the raw weights.", show_default="ema if the checkpoint has them"
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Allow the checkpoint to import and run a module of your own."
    ),
]
MirrorOption = Annotated[
    bool,
    typer.Option(
        "--mirror",
        help="Use the mixture over an image and its mirror image, for a model trained with flips "
        "(data.flip), or over all orders of the model (model.orders). Likelihoods average them, "
        "one pass each. Samples pick one at random. Archives store the likeliest.",
    ),
]
Split = Literal["test", "validation", "train"]
SplitOption = Annotated[
    Split | None, typer.Option(help="The split of the data set.", show_default="test")
]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="File for the result; - is standard output.",
        show_default="a file in the run",
    ),
]
NAMES_OF_DATA = ("data.name=", "data.path=")
DATA_NAMES = (
    "A data set (mnist, cifar10, digits, ..., found or downloaded under data.root), a folder of "
    "image files, an image file, an .npz or .npy file, or for vectors and points a CSV file. "
)
DatasetOption = Annotated[
    str | None,
    typer.Option("--data", metavar="NAME|PATH", help=DATA_NAMES, show_default="the model's own"),
]


def _complete_key(incomplete: str) -> list[str]:
    from flowtrain.config import all_keys

    return [f"{key}=" for key in all_keys() if key.startswith(incomplete)]


SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="The same as KEY=VALUE; repeatable.",
        autocompletion=_complete_key,
    ),
]


def is_setting(word: str) -> bool:
    """Whether a word is `SECTION.KEY=VALUE`, and no file."""
    return re.match(r"\w+(\.\w+)+=", word) is not None and not os.path.lexists(word)


@dataclass(eq=False, repr=False)
class SettingOptions:
    """Settings of a command line: `KEY=VALUE`, or `--set KEY=VALUE`."""

    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Override keys of the configuration, such as train.lr=5e-4. A trained model takes "
            "only keys of data, such as data.root=DIR if the data have moved.",
            autocompletion=_complete_key,
        ),
    ] = None
    overrides: SetOption = None

    def words(self, hint: str = "") -> list[str]:
        """All settings. Raises `UserError`, with the hint at its end, for another word."""
        for word in self.settings or []:
            if "=" not in word:
                raise UserError(f"{cut(word)}: expected KEY=VALUE, such as data.root=DIR{hint}")
        return [*(self.overrides or []), *(self.settings or [])]


@dataclass(eq=False, repr=False)
class ModelOptions:
    """The model of a command line."""

    model: ModelArgument = None
    weights: WeightsOption = None
    trust_code: TrustOption = False
    device: DeviceOption = "auto"

    def load_model(self, conditional: bool = False, mirror: bool = False) -> "LoadedModel":
        return load(self.model, self.device, self.weights, self.trust_code, conditional, mirror)


@dataclass(eq=False, repr=False)
class DataOptions(SettingOptions, ModelOptions):
    """The model of a command line, and settings of its data."""

    def __post_init__(self) -> None:
        if self.model is not None and is_setting(self.model):
            self.settings, self.model = [self.model, *(self.settings or [])], None

    def data(self, loaded: "LoadedModel", dataset: str | None = None) -> "DataSet":
        return data_of(loaded, self.words(), dataset)


def check_suffix(path: Path | None, suffixes: tuple[str, ...], option: str = "--out") -> str:
    """The suffix of an output file, or the first of `suffixes` if none is given.

    Raises `UserError` for another suffix, and as `require_file` does.
    """
    suffix = suffixes[0] if path is None else path.suffix.lower()
    if suffix not in suffixes:
        raise UserError(f"{option} {path}: expected a name that ends in {' or '.join(suffixes)}")
    require_file(path, option)
    return suffix


def require_file(path: Path | str | None, option: str = "--out") -> None:
    """Raises `UserError`, naming the option, if no file can be written to `path`, or it is a
    checkpoint, which no output replaces. None and `-` (standard output) are no files.
    """
    if path is None or path == "-":
        return
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; give the name of a file")
    if is_special(path):
        raise UserError(f"{option} {path}: is not a regular file")
    if path.suffix.lower() == ".safetensors" and path.exists():
        raise UserError(f"{option} {path}: is a checkpoint; give another name")
    require_folder(path.parent, path, option)


def output(given: Path | str | None, loaded: "LoadedModel", name: str, option: str) -> Path:
    """The path of an output: the value of `option`, which was checked, or else `name` in the run.

    Raises `UserError` as `require_file` does.
    """
    from flowtrain.checkpoints.load import run_of

    if given is not None:
        return Path(given)
    path = run_of(loaded.checkpoint.path) / name
    try:
        require_file(path, option)
    except UserError as error:
        raise UserError(f"{error}: give {option} FILE") from None
    return path


def require_folder(folder: Path, path: Path, option: str = "--out") -> None:
    """Raises `UserError`, naming the option and its `path`, if no file can be made in `folder`."""
    folder = folder.absolute()
    existing = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not existing.is_dir():
        raise UserError(f"{option} {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: there is no permission to write into {existing}")


def load(
    model: str | None,
    device: str,
    weights: str | None,
    trust_code: bool,
    conditional: bool = False,
    mirror: bool = False,
) -> "LoadedModel":
    """The model of a command line, with `--mirror` or without. Raises `UserError` if it cannot be
    loaded, or if it is one of images given a part of them (`model.context`) and the command is not
    for `conditional` ones.
    """
    from flowtrain.checkpoints.load import load_model

    loaded = load_model(model, device_of(device), weights, trust_code, mirror)
    if not conditional:
        loaded.flow.require_no_context(str(loaded.checkpoint.path))
    return loaded


def device_of(name: str, announce: bool = False) -> "torch.device":
    """The device of `--device`, made ready. With `announce`, a line states the threads of a busy
    machine.
    """
    import torch

    from flowtrain.system import device as devices
    from flowtrain.system.console import console

    device = devices.resolve(name)
    if device.type == "cpu":
        line = _prepare_cpu()
        if announce and line:
            console.print(line, style="dim")
    elif device.index is not None:
        # New events, streams and graphs are on the current device.
        torch.get_device_module(device).set_device(device)
    return device


@functools.cache
def _prepare_cpu() -> str | None:
    from flowtrain.system import allocator, threads

    allocator.keep_freed_memory()
    return threads.use_free_cores()


def data_of(
    loaded: "LoadedModel", settings: list[str] | None = None, dataset: str | None = None
) -> "DataSet":
    """The data set of `--data`, or the one that the model was trained on, with other settings. It
    prints how other data are converted to the model's.
    """
    from flowtrain.data.named import undivided
    from flowtrain.data.splits import DataSet
    from flowtrain.system.console import console

    config = data_config(loaded, settings, dataset)
    if dataset is None:
        return DataSet(config)
    data = DataSet(config, undivided(config, loaded.config.data), loaded.flow.num_bins)
    if data.reduced_to or config.name == "folder":
        shape = "x".join(map(str, data.shape))
        console.print(f"{dataset}: images are brought to {shape} with {data.kind.words}")
    return data


def data_config(
    loaded: "LoadedModel", settings: list[str] | None = None, dataset: str | None = None
) -> "DataConfig":
    """The configuration of the data set of `data_of`, which may not be at hand."""
    from flowtrain import config as configuration
    from flowtrain.data.named import section_named, source

    for text in settings or []:
        if not text.startswith("data."):
            raise UserError(f"--set {cut(text)}: a trained model takes only keys of data")
        if dataset not in (None, loaded.config.data.name) and text.startswith(NAMES_OF_DATA):
            raise UserError(f"--set {cut(text)}: --data {dataset} names the data; leave one out")
    values = copy.deepcopy(loaded.checkpoint.meta["config"])
    if dataset is not None:
        values["data"] = section_named(dataset, loaded.config.data, loaded.flow.shape, "--data")
    values = configuration.override(values, settings or [])
    where = f"--data {dataset}" if dataset else "--set"
    # A module of the checkpoint was trusted when it was loaded; the rest comes from the user.
    data, own = configuration.parse(values, where, trust_code=True).data, loaded.config.data
    divided = data.split_seed != own.split_seed or data.validation not in (0, own.validation)
    if dataset is None and source(data) == source(own) and divided:
        raise UserError(
            f"--set data.validation, data.split_seed: a trained model keeps its held-out images, "
            f"here of {own.validation:g} and {own.split_seed}"
        )
    return data


def split_of(data: "DataSet", split: Split | None, dataset: str | None) -> Split | Literal["all"]:
    """The split of `--split`, by default the test split, or all images of data without splits."""
    if data.undivided and split is not None:
        raise UserError(f"--split {split}: {dataset} has no splits; leave it out")
    return split or ("all" if data.undivided else "test")


def write_json(result: Mapping[str, object], given: str | None, default: Path) -> None:
    """Writes a result to the file `given`, or to `default`, and prints its path. For `-` it goes to
    standard output, and all else to standard error (`console.stderr` is set before).
    """
    import json

    from flowtrain.system.console import console
    from flowtrain.system.files import save

    text = json.dumps(result, indent=2, allow_nan=False)
    if given == "-":
        print(text)
    else:
        file = Path(given or default)
        save(file, text.encode() + b"\n", named=given is not None)
        console.print(f"wrote {file}")


def print_table(result: Mapping[str, object]) -> None:
    from rich.table import Table

    from flowtrain.system.console import console

    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path is of no use with its end cut off
    for key, value in result.items():
        text = f"{value:.5g}" if isinstance(value, float) else str(value)
        table.add_row(key, text)
    console.print(table)

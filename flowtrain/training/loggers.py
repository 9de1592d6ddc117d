"""TensorBoard and Weights & Biases, for the charts and pictures of a run.

Each class imports its package when it is used, so only those in `train.logger` are needed.
`metrics.jsonl` is always written (`run_directory.py`).
"""

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shlex
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from flowtrain.config import Config
from flowtrain.errors import UserError, short
from flowtrain.system import distributed, packages
from flowtrain.system.console import console
from flowtrain.system.files import read_regular, write_atomically

PROJECT = "flowtrain"  # of the runs in Weights & Biases
PATIENCE = 30.0  # seconds to wait for Weights & Biases
OLDEST_WANDB = (0, 31)  # the version of the tests


class Logger(Protocol):
    """One process calls these, in the order of the steps. Nothing may wait for a network."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds a point to each chart."""

    def picture(self, name: str, picture: Tensor, step: int) -> None:
        """Adds a picture, uint8 `(3, H, W)`."""

    def flush(self) -> None:
        """Brings to the disk what would be lost if this process were killed."""

    def close(self) -> None:
        """Ends this part of the run. A later part goes on with the same charts."""


class TensorBoard:
    """Event files in the run directory itself."""

    def __init__(self, folder: Path, config: Config, step: int):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._writer.add_text("configuration", f"```yaml\n{config.yaml()}```", step)
        # `add_hparams` would make a run of its own. The table shows the last point of a metric.
        metrics = dict.fromkeys(("validation/loss", "train/loss"), 0.0)
        for summary in hparams(flattened(config.resolved()), metrics):
            self._writer._get_file_writer().add_summary(summary, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, picture: Tensor, step: int) -> None:
        self._writer.add_image(name, picture, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def flattened(section: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """The keys of a configuration with their section, `train.lr`, and their values. Lists are text,
    and keys without a value are left out.
    """
    values: dict[str, bool | int | float | str] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            values |= flattened(value, f"{prefix}{key}.")
        elif value is not None:
            plain = isinstance(value, bool | int | float)
            values[f"{prefix}{key}"] = value if plain else str(value)
    return values


class WandB:
    """Weights & Biases, in the folder `wandb` of the run directory.

    It is offline unless the user is logged in or has chosen a mode (`WANDB_MODE`, `wandb offline`),
    and also if its server cannot be reached. It takes each step once and in order, so steps that
    are trained again, after a kill or a non-finite step, keep their first figures.
    """

    def __init__(self, folder: Path, config: Config, step: int):
        wandb = imported_wandb()
        quiet = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=PATIENCE,
            finish_timeout=PATIENCE,
            finish_timeout_raises=True,  # else nothing tells that data are missing
        )
        mode: str = wandb.setup(quiet).settings.mode
        chosen = "WANDB_MODE" in os.environ or mode != "online"
        if not chosen and not wandb.login(prompt=False, verify=False):
            mode = "offline"
        start = functools.partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity(folder),
            name=folder.name,
            dir=str(folder),
            config=config.resolved(),
            allow_val_change=True,  # of the length of the run
            resume="allow",
            reinit="create_new",  # also beside a run that was given up
        )
        try:
            self._run = start(mode=mode)
        except wandb.Error as error:
            ended(wandb.teardown)  # it takes an identity once, and would wait again at the exit
            if chosen:
                raise UserError(
                    f"train.logger: wandb: {short(error)}; WANDB_MODE=offline needs no network"
                ) from error
            console.print(f"wandb: {short(error)}")
            mode = "offline"
            wandb.setup(quiet)
            self._run = start(mode=mode)
        self._wandb = wandb
        if mode == "online":
            console.print(f"wandb: {self._run.url}")
        elif mode == "offline":
            parts = shlex.quote(str(folder / "wandb")) + "/offline-run-*"
            console.print(f"wandb: offline; this sends it: wandb sync {parts}")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, picture: Tensor, step: int) -> None:
        image = self._wandb.Image(picture.permute(1, 2, 0).cpu().numpy())
        self._run.log({name: image}, step=step)

    def flush(self) -> None:
        pass  # a process of its own writes, which lives on

    def close(self) -> None:
        """Data that the server does not take in time stay in files, for `wandb sync`."""
        if not ended(self._run.finish):
            ended(self._wandb.teardown)  # else it would wait at the exit
            place = shlex.quote(self._run.settings.sync_dir)
            console.print(f"wandb: not all was sent; this sends it: wandb sync {place}")


def ended(end: Callable[[], object]) -> bool:
    """Whether a call that ends a run or the service of Weights & Biases worked in time. A call that
    never returns is left to its thread, which does not keep the process.
    """
    worked = threading.Event()

    def call() -> None:
        with contextlib.suppress(Exception, SystemExit):  # of a service that is gone
            end()
            worked.set()

    ending = threading.Thread(target=call, daemon=True)
    ending.start()
    ending.join(1.5 * PATIENCE)  # a service that works gives up after `PATIENCE`, and saves all
    return worked.is_set()


LOGGERS: dict[str, Callable[[Path, Config, int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


@distributed.main_only
def require(names: Iterable[str]) -> None:
    """Raises `UserError` if the package of a logger is not installed, or too old."""
    if "wandb" in names:
        imported_wandb()


def imported_wandb() -> Any:
    return packages.required("train.logger: wandb", "wandb", OLDEST_WANDB, extra="wandb")


def opened(names: Iterable[str], folder: Path, config: Config, step: int) -> list[Logger]:
    """The loggers of a run that continues after `step`. Its `folder` exists."""
    return [LOGGERS[name](folder, config, step) for name in names]


def identity(folder: Path) -> str:
    """Eight digits, kept in the run directory, that distinguish this run from all of its name.

    Beside them are the directory's inode and a hash of its path. A copy has neither, and gets
    digits of its own.
    """
    path = folder / "logged-as"
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    here = [str(folder.stat().st_ino), place]
    known, there = "", []
    with contextlib.suppress(OSError, ValueError):
        known, *there = read_regular(path, 100).decode().split()
    is_copy = there and set(there).isdisjoint(here)  # earlier versions wrote the digits alone
    if is_copy or not re.fullmatch("[0-9a-f]{8}", known):
        known = secrets.token_hex(4)
    write_atomically(path, " ".join([known, *here]).encode())
    return known

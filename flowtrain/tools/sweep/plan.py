"""The plan of a sweep: its rows, seeds and budget, from a YAML file and the command line."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, PositiveFloat, ValidationError

from flowtrain import config as configuration
from flowtrain.config import Config, Section, differences
from flowtrain.config.messages import described
from flowtrain.errors import UserError
from flowtrain.system.files import make_folder_of, write_atomically
from flowtrain.types import Count, Positive

AS_IS = "none"  # the row without settings
# Keys of `data` that leave the validation images as they are.
OF_TRAINING = {"flip", "shift", "max_in_memory", "workers"}
Choices = Annotated[list[str | bool | int | float], Field(min_length=1)]


class Plan(Section):
    """The keys of a SWEEP.yaml. `base` is its configuration, with the settings of all rows."""

    base: dict[str, Any]
    rows: list[str] = []
    # Values for Optuna: a list, or `low`, `high`, `step` and `log`.
    ranges: dict[str, Choices | dict[str, bool | int | float]] = {}
    trials: Positive = 20  # rows that Optuna proposes, if there are ranges
    seeds: Positive = 1
    seconds: PositiveFloat | None = None
    images: Count | None = None
    halving: Annotated[int, Field(ge=2, le=100)] | None = None

    @property
    def num_rows(self) -> int:
        """The rows of the plan, and those that Optuna proposes."""
        return len(self.rows) + (self.trials if self.ranges else 0)

    @property
    def shares(self) -> list[float]:
        """The share of the budget at the end of each rung; the last one is 1."""
        shares = [1.0]
        while self.halving and self.halving ** len(shares) <= self.num_rows:
            shares.append(shares[-1] / self.halving)
        return shares[::-1]

    def settings(self, row: str, seed: int, processor: bool) -> list[str]:
        """The settings of a trial, beside `base`. `processor`: seconds are processor time."""
        clock = "processor" if processor else "wall"
        words = [*_words(row), f"seed={seed}", f"train.clock={clock}"]
        if self.images is None:
            return [*words, f"train.budget={self.seconds}s"]
        train = self.config(row).train
        steps = math.ceil(self.images / (train.batch_size * train.accumulate))
        return [*words, f"train.num_steps={steps}"]

    def config(self, row: str) -> Config:
        """The configuration of a row, apart from seed and budget. Raises `UserError`."""
        values = configuration.parse(self.base, trust_code=True).resolved()
        where = f"row {row}"
        return configuration.parse(configuration.override(values, _words(row)), where, True)


def planned(values: Mapping[str, Any], base: Config, where: str) -> Plan:
    """Checks a plan and its rows.

    Raises `UserError` with the first wrong key, also in the settings of a row, or if losses of the
    rows would not compare.
    """
    try:
        plan = Plan.model_validate({**values, "base": base.resolved()})
    except ValidationError as error:
        raise UserError("\n".join(described(error, Plan, where))) from error
    if not plan.num_rows:
        raise UserError(f"{where}: no rows: give --try SETTINGS, or a file with rows or ranges")
    if (plan.seconds is None) == (plan.images is None):
        raise UserError(f"{where}: give either --seconds or --images, the budget of a trial")
    if not base.data.validation:
        raise UserError("data.validation: 0, but rows are compared on the validation images")
    for key, x in plan.ranges.items():
        if not isinstance(x, list) and not {"low", "high"} <= set(x):
            raise UserError(f"{where}: ranges: {key}: expected a list of values, or low and high")
    ranges: dict[str, list[Any]] = {
        key: x if isinstance(x, list) else [x["low"], x["high"]] for key, x in plan.ranges.items()
    }
    firsts = {key: values[0] for key, values in ranges.items()}
    of_ranges = [row_of({**firsts, key: x}) for key, each in ranges.items() for x in each]
    for row in [*plan.rows, *of_ranges]:
        if changed := differences(_measured(base), _measured(plan.config(row))):
            raise UserError(
                f"row {row}: {changed[0][0]} changes the meaning of the loss, the seed or the "
                f"budget, so rows would not compare; set it for all rows (--set, or an option)"
            )
    return plan


def row_of(values: Mapping[str, object]) -> str:
    return shlex.join(f"{key}={value}" for key, value in values.items())


def _words(row: str) -> list[str]:
    try:
        return [] if row == AS_IS else shlex.split(row)
    except ValueError as error:
        raise UserError(f"row {row}: {error}") from error


def _measured(config: Config) -> dict[str, Any]:
    """The keys that make losses compare: the seed, the budget and the meaning of the loss."""
    values, noise = config.resolved(), config.dequantization
    return {
        "seed": values["seed"],
        "train": {key: values["train"][key] for key in ("num_steps", "budget", "clock")},
        "data": {key: x for key, x in values["data"].items() if key not in OF_TRAINING},
        "model": {key: values["model"][key] for key in ("context", "context_factor")},
        "dequantization": {"sigma": noise.sigma if noise.name == "gaussian" else 0},
    }


def begin(folder: Path, plan: Plan) -> None:
    """Writes the plan, or compares it with the one that is there, and the base configuration.

    Raises `UserError` if the folder is of another sweep, or holds other files.
    """
    file, content = folder / "sweep.yaml", plan.model_dump(mode="json")
    # Listed first, because another command may begin the same sweep meanwhile.
    others = [each for each in folder.iterdir() if each.name[0] != "."] if folder.exists() else []
    if file.exists():
        if changed := differences(configuration.load_yaml(file), content):
            key, there, here = changed[0]
            raise UserError(
                f"--out {folder}: another sweep, whose {key.removeprefix('base.')} is {there!r}, "
                f"not {here!r}; give another folder"
            )
    elif others:
        raise UserError(f"--out {folder}: holds other files than a sweep's; give another folder")
    make_folder_of(file)
    for path, values in ((file, content), (folder / "config.yaml", plan.base)):
        write_atomically(path, yaml.safe_dump(values, sort_keys=False).encode())

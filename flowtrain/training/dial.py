"""The dial: a configuration for the data at hand, this machine, a budget and a purpose."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowtrain import config as configuration
from flowtrain.checkpoints.build import build_flow
from flowtrain.config import Config
from flowtrain.data.named import section_named, source
from flowtrain.data.splits import DataSet, Split, sampled
from flowtrain.datasets import base, folder
from flowtrain.errors import UserError
from flowtrain.system import distributed
from flowtrain.system.capacity import left
from flowtrain.system.console import console, duration
from flowtrain.training.dial_rules import (
    CAUSAL,
    EXTREMES,
    FAMILIES,
    FEW,
    GLOW,
    LEAST_STEPS,
    PASSES,
    PASSES_OF_FEW,
    SIDES,
    VALIDATED,
    VALIDATIONS,
    Colours,
    Purpose,
    Size,
)
from flowtrain.training.dry_run import prepared, seconds_of_a_step
from flowtrain.training.step import activations_of_an_image

LOOKED_AT = 200  # images, for their size, colours and values
ROOM = 4  # the activations of a step may take this part of the free memory
FASTER = 0.8  # float32 is chosen if a step takes at most this part of the time of bf16

Values = dict[str, Any]


def configured(
    name: str,
    budget: str,
    purpose: Purpose,
    settings: Sequence[str],
    run_dir: Path,
    device: torch.device,
) -> Config:
    """The configuration of `flowtrain train NAME --budget TIME --for PURPOSE`: that in `run_dir`,
    from an earlier command, or else a new choice. `settings` (`KEY=VALUE`) have the last word,
    also on the budget.

    Raises `UserError` as `choose` does, for a wrong `budget`, and if the run in `run_dir` was for
    other data or another purpose.
    """
    own = [each for each in settings if each.partition("=")[0].strip() == "train.budget"]
    of_time = configuration.override({"train": {"budget": budget}}, own)
    length = configuration.parse(of_time, "--budget").train.budget
    assert length is not None
    path = run_dir / "config.yaml"
    # Perhaps only one machine has the run directory.
    values = distributed.from_main(lambda: configuration.load_yaml(path) if path.exists() else None)
    if values is None:
        return choose(name, length, purpose, settings, device)
    where = f"DATA {name}"
    chosen = configuration.parse(values, str(path), trust_code=True).train
    lengths = [] if chosen.budget is None else [f"train.budget={length}"]
    model = dict(FAMILIES[purpose].sizes["colour"][0].model)
    wanted = configuration.override({"data": _named(name), "model": model}, settings)
    here = configuration.parse(wanted, where, trust_code=True)
    values = configuration.override(values, [*lengths, *settings])
    there = configuration.parse(values, str(path), trust_code=True)
    if source(there.data) != source(here.data):
        raise UserError(f"{where}: {path} is of other data; give another --run-dir")
    if there.model.name != here.model.name:
        raise UserError(
            f"--for {purpose}: {path} has the model {there.model.name}; give another --run-dir"
        )
    console.print(f"as chosen before: {path}")
    if chosen.num_steps is not None and there.train.num_steps == chosen.num_steps:
        console.print(
            f"length: {chosen.num_steps:,} steps, to which --budget does not apply; to train "
            "longer, add train.num_steps=STEPS --extend"
        )
    return there


def choose(
    name: str, budget: float, purpose: Purpose, settings: Sequence[str], device: torch.device
) -> Config:
    """The configuration for the data NAME and `budget` seconds. Each decision is printed.

    `settings` (`KEY=VALUE`) have the last word. A few steps of each size give the speed. All
    processes must call this.

    Raises `UserError` for data that are no images, or if the smallest size does not fit.
    """
    family, where = FAMILIES[purpose], f"DATA {name}"
    keys_given = {each.partition("=")[0].strip() for each in settings}
    with distributed.main_process_first():  # it may list a large folder, and download
        values: Values = {"data": _section(name, "data.size" in keys_given)}
        configuration.override(values, [each for each in settings if each.startswith("data.")])
        data = DataSet(configuration.parse(values, where, trust_code=True).data)
        levels = data.kind.require_bins(
            f"{where}: these are not images; choose a configuration (--config)"
        )
        train = data.split("train")
    (channels, height, width), count = data.shape, len(train) + len(data.split("validation"))
    colours: Colours = "grey" if channels == 1 else "colour"
    few = count * math.prod(data.shape) < FEW
    console.print(f"data: {count:,} {colours} images of {height}x{width} pixels")
    console.print(f"model: {family.description}")
    values["data"] |= _data_keys(data, train, count)
    sizes = family.sizes[colours]
    own_train = family.few if few else family.train[colours]
    batch = min(own_train["batch_size"], len(train))
    values["train"] = own_train | {"batch_size": batch, "budget": budget}
    if family is GLOW and not few:
        values["dequantization"] = _dequantization(train, levels)

    def config(size: Size, **keys: Any) -> Config:
        own = {section: dict(of_section) for section, of_section in values.items()}
        own |= {"model": _model(size, data, where), "train": own["train"] | keys}
        return configuration.parse(configuration.override(own, settings), where, trust_code=True)

    seen = count - VALIDATED if config(sizes[0]).data.validation == VALIDATED else len(train)

    def enough(step: Step) -> int:
        """Steps, of which more would not help."""
        passes = PASSES_OF_FEW if few else PASSES
        return max(LEAST_STEPS, passes * seen // _images_of(step))

    batch_given = not keys_given.isdisjoint({"train.batch_size", "train.accumulate"})

    def step(size: Size, precision: str) -> Step | None:
        return _measured(config(size, precision=precision), data, device, not batch_given)

    size, found = sizes[0], step(sizes[0], "fp32")
    if found is None:
        images = "the batch given" if batch_given else "one image"
        raise UserError(f"{where}: a step of {images} does not fit into the memory")
    if not few and (fast := step(size, "bf16")) and found.seconds > FASTER * fast.seconds:
        found = fast
    console.print(f"precision: {found.precision}")
    for larger in () if few else sizes[1:]:
        reason = "does not fit into the memory"
        try:
            after = step(larger, found.precision)
        except UserError as error:
            after, reason = None, f"is not possible: {error}"
        if after and (steps := min(int(budget / after.seconds), enough(after))) < larger.steps:
            reason = f"would have {steps:,} steps, and needs {larger.steps:,}"
            after = None
        if after is None:
            console.print(f"not larger: width {larger.model['width']} {reason}")
            break
        size, found = larger, after
    steps = max(1, int(budget / found.seconds))
    console.print(
        f"size: width {size.model['width']}, {found.seconds:.2g} s a step, so {steps:,} steps in "
        f"{duration(budget)}"
    )
    keys: Values = dataclasses.asdict(found)
    del keys["seconds"]
    length_given = not keys_given.isdisjoint({"train.budget", "train.num_steps"})
    if enough(found) < steps and not length_given:
        keys["num_steps"] = steps = enough(found)
        passes = round(steps * _images_of(found) / seen)
        console.print(f"length: {steps:,} steps, or {passes:,} passes, as more would not help")
        del values["train"]["budget"]
    if "train.num_steps" in keys_given:
        steps = config(size).train.num_steps or steps
    every = _round(steps / VALIDATIONS)
    # A causal flow takes long for a picture, so the one at the end must do.
    pictured = 10 * _round(steps) if family is CAUSAL else 2 * every
    keys |= {"validate_every": every, "checkpoint_every": every, "sample_every": pictured}
    keys["warmup_steps"] = min(config(size).train.warmup_steps, steps // 10)
    return config(size, log_every=min(100, max(10, every // 10)), **keys)


@dataclass(frozen=True)
class Step:
    """A step of training that fits into the memory: its keys of `train`, and its time."""

    precision: str
    batch_size: int
    accumulate: int
    seconds: float


def _images_of(step: Step) -> int:
    """Over all processes."""
    return step.batch_size * step.accumulate * distributed.world()


def _measured(
    config: Config, data: DataSet, device: torch.device, divides: bool = True
) -> Step | None:
    """A step with its batch divided (`train.accumulate`) until the activations fit. None if one
    image, or a batch that must not be divided, does not fit. All processes find the same.
    """
    flow, train = build_flow(config, data.shape, data.num_bins).to(device), config.train
    image = max(1, *distributed.all_gather_object(activations_of_an_image(flow, config)))
    free = min(distributed.all_gather_object(left(device)))
    batch, parts = train.batch_size, train.accumulate
    if free < image * (ROOM if divides else batch):
        return None
    while divides and batch > free // (ROOM * image):
        batch, parts = batch // 2, 2 * parts
    keys = {"batch_size": batch, "accumulate": parts}
    config = config.model_copy(update={"train": train.model_copy(update=keys)})
    state, reason = None, ""
    try:
        state = prepared(config, data, device)
    except UserError as error:  # perhaps of this process alone
        reason = str(error)
    if reasons := [each for each in distributed.all_gather_object(reason) if each]:
        raise UserError(reasons[0])
    assert state is not None
    seconds = seconds_of_a_step(state, batch * parts)
    return Step(train.precision, batch, parts, max(distributed.all_gather_object(seconds)))


def _named(name: str) -> Values:
    return section_named(name, configuration.parse({}).data, (3, SIDES[0], SIDES[0]), "DATA")


def _section(name: str, size_given: bool) -> Values:
    """The `data` section of a NAME on a command line. A folder's images decide size and colour."""
    section, path = _named(name), Path(name)
    if section["name"] != "folder":
        return section
    if not path.is_dir():
        raise UserError(f"DATA {name}: one image is not enough; give a folder of images")
    files = [path / file.name for file in folder.files_of(path.resolve(), "")]
    readable: list[tuple[Path, np.ndarray]] = []
    for file in (files[i] for i in sampled(len(files), LOOKED_AT)):
        pixels = base.decoded(file, (3, SIDES[0], SIDES[0]), "crop")
        if not isinstance(pixels, str):
            readable.append((file, pixels))
    if not readable:
        raise UserError(f"DATA {name}: none of {len(files):,} images can be read")
    side = int(statistics.median(base.shorter_side(file) for file, _ in readable))
    size = next((each for each in SIDES if each <= side), side)
    grey = all((pixels == pixels[:1]).all() for _, pixels in readable)
    if not size_given:
        console.print(f"size: {size} pixels, as half of the images have a side of {side} or more")
    return section | {"size": size, "channels": 1 if grey else 3}


def _data_keys(data: DataSet, train: Split, count: int) -> Values:
    """Further keys of `data`, unless they are given."""
    own, found = data.config, Values()
    if count >= 10 * VALIDATED and own.validation == configuration.parse({}).data.validation:
        found["validation"] = VALIDATED
    if own.flip is None and "path" in own.options() and data.shape[0] == 3:
        console.print("flips: half of the images in training (data.flip=false: none)")
        found["flip"] = True
    if data.num_bins == 256 and _is_binary(train):
        console.print("levels: 2, because all values are 0 or 255 (data.n_bits: 1)")
        found["n_bits"] = 1
    return found


def _is_binary(train: Split) -> bool:
    blocks = range(0, len(train), LOOKED_AT)
    return all(
        bool(((pixels == 0) | (pixels == 255)).all())
        for pixels in (train.take(np.arange(i, min(i + LOOKED_AT, len(train)))) for i in blocks)
    )


def _dequantization(train: Split, levels: int) -> Values:
    """Variational noise, and the logit for images with many black and white values."""
    pixels = train.sample(LOOKED_AT).take(slice(None))
    extreme = ((pixels == 0) | (pixels == levels - 1)).float().mean().item()
    if extreme < EXTREMES:
        return {"name": "variational"}
    console.print(f"logit: {100 * extreme:.0f}% of the values are the smallest or the largest")
    return {"name": "variational", "transform": "logit", "alpha": 1e-5}


def _model(size: Size, data: DataSet, where: str) -> Values:
    """The `model` section. A Glow halves the sides at most three times, to 2 pixels or more.

    Raises `UserError` for sides that cannot be halved.
    """
    if size.model["name"] != "glow":
        return dict(size.model)
    _, height, width = data.shape
    factors = [2**n for n in (1, 2, 3) if height % 2**n == width % 2**n == 0]
    levels = sum(min(height, width) >= 2 * factor for factor in factors)
    if not levels:
        raise UserError(
            f"{where}: a Glow needs even sides of 4 pixels or more, not {height}x{width}"
        )
    return size.model | {"levels": levels, "steps": size.model["steps"][:levels]}


def _round(steps: float) -> int:
    """A period in steps: one or two digits, and zeros."""
    unit: int = 10 ** max(0, int(math.log10(max(1, steps))) - 1)
    return max(1, unit * round(steps / unit))

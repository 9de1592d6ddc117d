"""The keys of a configuration that hold for every data set and model, by section."""

import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from flowtrain.types import Period, Policy, Positive, Steps


def _absolute(path: Path) -> Path:
    """Makes a path absolute, so that a run finds its data again from any folder."""
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("no path has a null character")
        return path.expanduser().absolute()
    except RuntimeError as error:  # ~nobody
        raise ValueError(str(error)) from error


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: object, info: ValidationInfo) -> object:
        """pydantic would take `true` for 1, and refuse a folder named 2024."""
        assert info.field_name is not None
        kinds = _types_in(cls.model_fields[info.field_name].annotation)
        values = value if isinstance(value, list) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(v, bool) for v in values):
            raise PydanticCustomError("boolean", "expected a number, not a boolean")
        return str(value) if Path in kinds and type(value) is int else value


def _types_in(annotation: object) -> set[object]:
    """The types in an annotation, with the types of `Literal` values."""
    parts = typing.get_args(annotation)
    if not parts:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return set().union(*map(_types_in, parts))


class Component(Section):
    """A section whose `name` is a module, and whose further keys are that module's options."""

    section: ClassVar[str]
    package: ClassVar[str]  # flowtrain.PACKAGE has the modules
    arguments: ClassVar[set[str]]  # arguments of `build` that are no options
    option_names: ClassVar[list[str]] = []
    name: str

    def options(self) -> dict[str, Any]:
        """The options of the module's `build` with their values."""
        return {key: getattr(self, key) for key in self.option_names}


class Data(Component):
    """The data set, how it is split, and how its images are augmented."""

    section, package = "data", "datasets"
    arguments = {"root", "split", "seed"}
    name: str = Field(
        "digits",
        description="The data set: a module of flowtrain.datasets, or a module of your own by its "
        "dotted name.",
    )
    root: AbsolutePath = Field(
        Path("data"), validate_default=True, description="Folder of downloaded data sets."
    )
    validation: NonNegativeFloat = Field(
        0.1, description="Training images to hold out for model selection: a count, or a share < 1."
    )
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed that chooses the held-out images."
    )
    n_bits: Annotated[int, Field(ge=1, le=8)] = Field(
        8,
        description="Colour depth to which 8-bit images are reduced: 5 in Glow's CelebA-HQ setup.",
    )
    flip: bool | None = Field(
        None,
        description="Flip training images horizontally at random. With null, the data set decides.",
    )
    shift: Annotated[int, Field(ge=0, le=2**16)] = Field(
        0, description="Shift training images at random by up to this many pixels."
    )
    max_in_memory: NonNegativeFloat = Field(
        4.0,
        description="Largest training set, in GiB, that is held on the device. Threads read larger "
        "ones and, on a CPU, mapped files.",
    )
    workers: Annotated[int, Field(ge=0, le=1000)] = Field(
        2, description="Threads that read a training set not held on the device."
    )

    @property
    def resize_policy(self) -> Policy:
        """The policy for images of another size: the data set's, or `crop`."""
        policy: Policy = self.options().get("resize", "crop")
        return policy


class Model(Component):
    """The normalizing flow."""

    section, package = "model", "models"
    # Those of `build`, given by keyword or position.
    arguments = {"shape", "num_bins", "classes", "context"}
    name: str = Field(
        "glow",
        description="The model: a module of flowtrain.models, or a module of your own by its "
        "dotted name.",
    )
    classes: Annotated[int, Field(ge=0, le=2**16)] = Field(
        0,
        description="Number of classes; 0 trains without labels. Each has its own prior "
        "(`class_prior`), or is an input of the networks (causal, jet, tarflow). The training loss "
        "is given the class, validation and evaluation are not.",
    )
    class_prior: Literal["coarsest", "all"] = Field(
        "coarsest",
        description="Levels of the latent with a prior for each class, if networks do not see it.",
    )
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Probability that an image loses its label in training, for networks with the "
        "class as an input and `sample --guidance`; 0.1 is usual.",
    )
    context: Literal["none", "downsample", "grey"] = Field(
        "none",
        description="Part of the image that conditions all networks and likelihoods: a smaller "
        "image (super-resolution), or its brightness (colorization).",
    )
    context_factor: Literal[2, 4] = Field(
        2, description="Factor by which the sides of a `downsample` context are shorter."
    )


class Dequantization(Section):
    """How integers become real numbers."""

    name: Literal["uniform", "variational", "gaussian"] = Field(
        "uniform",
        description="The noise: uniform, variational (from a flow given the image), or gaussian, "
        "for a density of noisy images without bits/dim.",
    )
    sigma: Annotated[float, Field(gt=0, le=1)] = Field(
        0.05, description="Standard deviation of Gaussian noise, if black is 0 and white 1."
    )
    steps: Positive = Field(4, description="Steps in the flow of variational noise.")
    width: Positive = Field(
        32, description="Channels in the hidden layers of that flow's networks."
    )
    transform: Literal["center", "logit"] = Field(
        "center", description="Transform after the noise: subtraction of 1/2, or the logit."
    )
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.05, description="Margin of the logit at 0 and 1."
    )


# Its time is linear in the length of the text.
_DURATION = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*(s|sec|m|min|h|hours?)?")


def _seconds(value: object) -> object:
    """Converts `30min`, `90s`, `1.5h` or a number of seconds to seconds."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if not match:
        raise ValueError("expected a duration such as 90s, 30min or 1.5h")
    unit = (match[2] or "s")[0]
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[unit]


Duration = Annotated[PositiveFloat, BeforeValidator(_seconds, json_schema_input_type=float | str)]


def _off(value: object) -> object:
    """YAML reads `off` as false."""
    return "off" if value is False else value


LoggerName = Literal["tensorboard", "wandb"]


def _listed(value: object) -> object:
    """A single word stands for a list of one."""
    return [value] if isinstance(value, str) else value


def _once(names: list[LoggerName]) -> list[LoggerName]:
    if len(set(names)) < len(names):
        raise ValueError("one of them is named twice")
    return names


Loggers = Annotated[
    list[LoggerName],
    BeforeValidator(_listed, json_schema_input_type=LoggerName | list[LoggerName]),
    AfterValidator(_once),
]


class Train(Section):
    """Optimization, and periods in steps, which may exceed the run. The defaults did best for most
    models of images (docs/lab/experiments.md).
    """

    num_steps: Period | None = Field(
        None, description="Optimizer steps. Give either this or `budget`."
    )
    budget: Duration | None = Field(
        1800.0,
        description="Time: seconds, or with a unit, such as 90s, 30min or 1.5h. The default holds "
        "without `num_steps`.",
    )
    clock: Literal["wall", "processor"] = Field(
        "wall",
        description="Clock of `budget`: wall-clock time with validation and samples, or, on a CPU, "
        "processor time of the steps alone, summed over threads.",
    )
    batch_size: Positive = Field(64, description="Images per forward pass, in each process.")
    accumulate: Positive = Field(
        1, description="Forward passes whose gradients make one optimizer step."
    )
    lr: PositiveFloat = Field(5e-3, description="Peak learning rate.")
    warmup_steps: Steps = Field(
        50, description="Steps over which the learning rate rises linearly from 0."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear",
        description="Learning rate after the warm-up: constant, or a decay to 0 at the end, which "
        "with a budget begins at 0 s.",
    )
    optimizer: Literal["adam", "adamw", "adamax", "muon"] = Field(
        "muon",
        description="The optimizer. `muon` uses Muon for matrices of the conditioners, and AdamW "
        "for the rest.",
    )
    weight_decay: NonNegativeFloat = Field(
        0.0,
        description="Weight decay, for convolutions and linear layers of the conditioners alone.",
    )
    clip_norm: NonNegativeFloat = Field(
        50.0,
        description="Largest norm of the gradient; 0 does not clip. The default acts on outliers "
        "alone.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of the conditioners. The rest of the flow is float32."
    )
    memory: Literal["store", "checkpoint", "reversible"] = Field(
        "store",
        description="Memory for the backward pass: `store` keeps all activations, `checkpoint` the "
        "inputs of layers, and `reversible` the output, from which inverses recompute the rest.",
    )
    compile: Annotated[Literal["off", "layers", "step"], BeforeValidator(_off)] = Field(
        "off",
        description="Use of `torch.compile`: off, for the layers with a network (equal shapes "
        "share code), or for the whole forward and backward pass of a step. The first batch is "
        "compared with eager code.",
    )
    cuda_graph: bool = Field(
        False,
        description="Record the forward and backward pass of the first step as a CUDA graph, and "
        "replay it in the others. The first batch is compared with eager code.",
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="Decay of the averaged weights. 0 keeps no average."
    )
    max_non_finite: Steps = Field(
        5, description="Non-finite steps that a run survives. One more ends it with exit code 1."
    )
    log_every: Period = Field(50, description="Steps between lines of metrics.")
    validate_every: Period = Field(
        500, description="Steps between evaluations on the validation split."
    )
    checkpoint_every: Period = Field(500, description="Steps between checkpoints.")
    keep_checkpoints: Steps = Field(
        1, description="Numbered checkpoints to keep, besides last and best."
    )
    sample_every: Period = Field(500, description="Steps between sample grids.")
    logger: Loggers = Field(
        ["tensorboard"],
        description="Loggers for charts and pictures besides `metrics.jsonl`, or none (`[]`). "
        "`tensorboard` writes to the run directory (`tensorboard --logdir runs`), and `wandb` "
        "(the extra `wandb`) to `RUN/wandb` (`wandb sync RUN/wandb/offline-run-*`, or the "
        "printed address).",
    )

    @model_validator(mode="before")
    @classmethod
    def _steps_instead_of_the_default_budget(cls, values: object) -> object:
        if isinstance(values, Mapping) and values.get("num_steps") is not None:
            return {"budget": None, **values}
        return values

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.num_steps is None) == (self.budget is None):
            given = "both are given" if self.num_steps is not None else "neither is given"
            raise ValueError(f"give one of train.num_steps and train.budget: {given}")
        return self


class Config(Section):
    """A whole run. `data` and `model` also hold the options of the modules that they name."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed of weights, image order and noise."
    )
    data: Data
    model: Model
    dequantization: Dequantization
    train: Train

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain data for YAML and JSON."""
        return self.model_dump(mode="json")

    def yaml(self) -> str:
        return yaml.safe_dump(self.resolved(), sort_keys=False)

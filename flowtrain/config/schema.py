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
        0.1,
        description="Number of training images held out for model selection: a count, or a "
        "fraction below 1.",
    )
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed of the choice of held-out images. It is independent of `seed`."
    )
    n_bits: Annotated[int, Field(ge=1, le=8)] = Field(
        8,
        description="Reduce the colour depth of 8-bit images to this many bits, for example 5 as "
        "in Glow's CelebA-HQ setup.",
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
        description="Largest training set in GiB that is held on the device. Threads read a larger "
        "one as needed. On a CPU, mapped files are never held.",
    )
    workers: Annotated[int, Field(ge=0, le=1000)] = Field(
        2, description="Number of threads that read a training set not held on the device."
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
        description="Number of classes. Each has its own prior (`class_prior`), or is an input of "
        "the networks (causal, jet, tarflow). 0 trains without labels. The training loss is of an "
        "image given its class. Validation and evaluation are of the image alone.",
    )
    class_prior: Literal["coarsest", "all"] = Field(
        "coarsest",
        description="The levels whose latents have a prior for each class, if the networks do not "
        "see it.",
    )
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Probability that an image loses its label in training, for models whose "
        "networks see the class. They then also learn images without a class, which "
        "`sample --guidance` needs; 0.1 is usual. Validation and evaluation still report the mean "
        "over the classes.",
    )
    context: Literal["none", "downsample", "grey"] = Field(
        "none",
        description="Part of the image that is an input of all networks: none, the image with "
        "shorter sides (super-resolution), or its brightness (colorization). All likelihoods are "
        "then conditional on it.",
    )
    context_factor: Literal[2, 4] = Field(
        2, description="Factor by which the sides of a `downsample` context are shorter."
    )


class Dequantization(Section):
    """How integers become real numbers."""

    name: Literal["uniform", "variational", "gaussian"] = Field(
        "uniform",
        description="The noise that is added: uniform, or variational, from a flow given the "
        "image. `gaussian` is for pictures: the model is then a density of noisy images, and has "
        "no bits/dim.",
    )
    sigma: Annotated[float, Field(gt=0, le=1)] = Field(
        0.05,
        description="Standard deviation of Gaussian noise (gaussian only), where 0 is black and 1 "
        "is white. TarFlow's 0.05 to 0.15 are for images in [-1, 1], and are 0.025 to 0.075 here.",
    )
    steps: Positive = Field(
        4, description="Number of steps in the flow of the noise (variational only)."
    )
    width: Positive = Field(
        32,
        description="Number of channels in the hidden layers of that flow's networks (variational "
        "only).",
    )
    transform: Literal["center", "logit"] = Field(
        "center",
        description="Transform after the noise: `center` subtracts 1/2, `logit` is the logit.",
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
    """Optimization, and how often things happen. Periods are in steps; a period longer than the run
    is legal. The defaults are those that did best for most models of images
    (docs/lab/experiments.md).
    """

    num_steps: Period | None = Field(
        None, description="Number of optimizer steps. Give either this or `budget`."
    )
    budget: Duration | None = Field(
        1800.0,
        description="Time: seconds, or with a unit, such as 90s, 30min or 1.5h. The default holds "
        "unless `num_steps` is given.",
    )
    clock: Literal["wall", "processor"] = Field(
        "wall",
        description="The time of a run, which `budget` limits: `wall` is wall-clock time with "
        "validation and samples. `processor` is the processor time of the steps alone, summed over "
        "threads, without the time that other processes take. It needs a CPU.",
    )
    batch_size: Positive = Field(
        64, description="Number of images per forward pass, in each process."
    )
    accumulate: Positive = Field(
        1, description="Number of forward passes whose gradients make one optimizer step."
    )
    lr: PositiveFloat = Field(5e-3, description="Peak learning rate.")
    warmup_steps: Steps = Field(
        50, description="Number of steps over which the learning rate rises linearly from 0."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear",
        description="Learning rate after the warm-up: `constant`, or a `linear` or `cosine` decay "
        "to 0 at the end. With a budget, the decay begins at 0 s.",
    )
    optimizer: Literal["adam", "adamw", "adamax", "muon"] = Field(
        "muon",
        description="The optimizer. `muon` uses Muon for the weights of the conditioners that are "
        "matrices, and AdamW for the rest. A planar flow has only the rest.",
    )
    weight_decay: NonNegativeFloat = Field(
        0.0,
        description="Weight decay. It acts only on the weights of the conditioners' convolutions "
        "and linear layers.",
    )
    clip_norm: NonNegativeFloat = Field(
        50.0,
        description="Largest norm of the gradient. 0 does not clip. The default acts only on "
        "outliers.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of the conditioners. The rest of the flow is float32."
    )
    memory: Literal["store", "checkpoint", "reversible"] = Field(
        "store",
        description="Memory for the backward pass: `store` keeps all activations, `checkpoint` "
        "keeps the inputs of the layers, and `reversible` keeps only the output, from which the "
        "inverse recomputes them.",
    )
    compile: Annotated[Literal["off", "layers", "step"], BeforeValidator(_off)] = Field(
        "off",
        description="Use of `torch.compile`: off, for the layers with a network (those of one "
        "shape share the code), or for the whole forward and backward pass of a step. The first "
        "batch is compared with the computation without it.",
    )
    cuda_graph: bool = Field(
        False,
        description="Record the forward and backward pass of the first step as a CUDA graph, and "
        "replay it in the others. It needs a CUDA device; without one, `--dry-run` times no step. "
        "The first batch is compared with the computation without it.",
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="Decay of the averaged weights. 0 keeps no average."
    )
    max_non_finite: Steps = Field(
        5,
        description="Number of non-finite steps that a run survives. One more stops it with exit "
        "code 1.",
    )
    log_every: Period = Field(50, description="Steps between lines of metrics.")
    validate_every: Period = Field(
        500, description="Steps between evaluations on the validation split."
    )
    checkpoint_every: Period = Field(500, description="Steps between checkpoints.")
    keep_checkpoints: Steps = Field(
        1, description="Number of numbered checkpoints to keep, besides last and best."
    )
    sample_every: Period = Field(500, description="Steps between sample grids.")
    logger: Loggers = Field(
        ["tensorboard"],
        description="Loggers for charts and pictures besides `metrics.jsonl`, or none (`[]`). "
        "`tensorboard` writes to the run directory (`tensorboard --logdir runs`), and `wandb` "
        "(the extra `wandb`) to `RUN/wandb` (`wandb sync RUN/wandb/offline-run-*`, or the "
        "printed address). A resumed run may change it.",
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
        0, description="Seed of the weights, of the order of the images and of the noise."
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

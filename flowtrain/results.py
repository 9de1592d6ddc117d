"""What the files of a run hold: `summary.json`, `metrics.jsonl` and `evaluate-<split>.json`.

`train` and `evaluate` write them through these types, and `compare` and `report` read them so.
"""

from typing import Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

UNKNOWN = "?"  # unit in the files of an earlier version
LARGEST = 1e300  # number, so that sums and charts do not overflow


def earlier(*names: str) -> Any:
    """A field with the names that it had in files of earlier versions, its own first."""
    return Field(validation_alias=AliasChoices(*names))


class File(BaseModel):
    """The keys of a file, in its order. Where it is read, other keys are ignored."""

    model_config = ConfigDict(allow_inf_nan=False, frozen=True)

    @model_validator(mode="after")
    def _require_usual_numbers(self) -> Self:
        for key, value in self:
            if isinstance(value, int | float) and abs(value) > LARGEST:
                raise ValueError(f"{key} is too large")
        return self

    def content(self) -> dict[str, Any]:
        """What is written: the keys that were given a value."""
        return self.model_dump(exclude_unset=True)


class Summary(File):
    """`summary.json`: the run at its last checkpoint."""

    step: int
    images: int  # seen in training
    seconds: float  # by `train.clock`: wall-clock, with validation and samples, or of the processor
    finished: bool
    unit: str = UNKNOWN  # of the losses: bits/dim, nats for real values, nats/dim for noisy images
    best_validation_loss: float | None = earlier(
        *(f"best_validation_{name}" for name in ("loss", "nats_per_dim", "nats", "bits_per_dim"))
    )
    best_validation_bits_per_dim: float | None  # the same, None without bits
    best_step: int | None
    parameters: int
    non_finite_steps: int
    # Training and validation images that are equal to an earlier one.
    duplicates: int | None = None
    edition: str | None = None  # which of several data sets of one name this is
    versions: dict[str, str]
    device: str
    machine: str = UNKNOWN  # the processor, or the GPU


class Row(File):
    """A line of `metrics.jsonl`. What layers report about a training step follows as more keys."""

    model_config = ConfigDict(extra="allow")

    step: int
    images: int
    seconds: float
    split: Literal["train", "validation"]
    # In the unit of the summary. None where it was not finite.
    loss: float | None = earlier("loss", "nats_per_dim", "nats", "bits_per_dim")
    bits_per_dim: float | None  # the same, None without bits
    grad_norm: float | None = None  # before clipping; this and the rest are given in training only
    lr: float | None = None
    images_per_second: float | None = None  # of training alone


class Evaluation(File):
    """`evaluate-<split>.json`, and files such as `evaluate-16-draws-<split>.json`. Figures that
    are not finite are None.

    The keys without a default are in the files of all versions.
    """

    bound: str  # elbo, iwbo, exact, or density (of noisy images, without bits)
    draws: int = earlier("draws", "samples")  # of the noise
    sigma: float | None = None  # of the noise of noisy images; given only there
    unit: str = UNKNOWN  # of the losses: bits/dim, nats for real values, nats/dim for noisy images
    # Of `bound`, or minus the mean log-density. With standard errors over images, and over draws of
    # the noise.
    loss: float | None = earlier("loss", "nats_per_dim", "bits_per_dim")
    loss_stderr: float | None = earlier("loss_stderr", "nats_per_dim_stderr", "bits_per_dim_stderr")
    loss_stderr_draws: float | None = None
    bits_per_dim: float | None  # the loss, None without bits
    bits_per_dim_stderr: float | None
    elbo_bits_per_dim: float | None = None
    elbo_bits_per_dim_stderr: float | None = None
    elbo_bits_per_dim_stderr_draws: float | None = None
    nats_per_image: float | None
    nats_per_image_stderr: float | None = None
    loss_given_class: float | None = None  # class-conditional models, on labelled data
    classes: int | None = None  # of a class-conditional model: the loss is of the mean over them
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    num_images: int
    duplicates: int | None = None  # images that are equal to an earlier one of these
    # Images that are equal to one of the training split. None if those are not at hand.
    duplicates_of_training: int | None = None
    # The part of each image that likelihoods are conditional on. None for whole images.
    given: str | None = None
    sides: int = 1  # P(x) is the mean over so many sides of the image (`flow/sides.py`)
    dims: int | None = None
    levels: int | None = None
    sampling: str | None = None  # one pass, or sequential: one entry after the other
    split: str
    dataset: str
    edition: str | None = None  # which of several data sets of one name this is
    weights: str
    step: int
    seed: int | None = None
    non_finite_images: int | None = None
    non_finite_indices: list[int] = []
    max_reconstruction_error: float | None = None
    checkpoint: str | None = None
    model: str | None = None  # `checkpoints.load.model_hash`; an earlier version has none

    @property
    def way(self) -> str:
        """The measure without the split: nothing, or `mirror`, `16 draws`, `mirror, 16 draws`."""
        mirror, draws = self.sides > 1, self.draws > 1
        return ", ".join(["mirror"] * mirror + [f"{self.draws} draws"] * draws)

    @property
    def options(self) -> str:
        """The options of `evaluate` for this measure, each behind a space."""
        mirror, draws = self.sides > 1, self.draws > 1
        return " --mirror" * mirror + f" --draws {self.draws}" * draws

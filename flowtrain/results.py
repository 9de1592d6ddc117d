"""What the files of a run hold: `summary.json`, `metrics.jsonl` and `evaluate-<split>.json`.

`train` and `evaluate` write them through these types, and `compare` and `report` read them so.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class File(BaseModel):
    """The keys of a file, in its order. Where it is read, other keys are ignored."""

    model_config = ConfigDict(allow_inf_nan=False, frozen=True)

    def content(self) -> dict[str, Any]:
        """What is written: the keys that were given a value."""
        return self.model_dump(exclude_unset=True)


class Summary(File):
    """`summary.json`: the run at its last checkpoint."""

    step: int
    images: int  # seen in training
    seconds: float  # wall-clock, with validation and samples
    finished: bool
    best_validation_bits_per_dim: float | None
    best_validation_nats: float | None = None  # given for real-valued data only
    best_validation_nats_per_dim: float | None = None  # given for densities of noisy images only
    best_step: int | None
    parameters: int
    non_finite_steps: int
    # Training and validation images that are equal to an earlier one.
    duplicates: int | None = None
    edition: str | None = None  # which of several data sets of one name this is
    versions: dict[str, str]
    device: str

    @property
    def unit(self) -> str:
        """The unit of the run's losses."""
        if "best_validation_nats_per_dim" in self.model_fields_set:
            return "nats/dim"
        return "nats" if "best_validation_nats" in self.model_fields_set else "bits/dim"

    @property
    def best(self) -> float | None:
        """The best validation loss, in `unit`."""
        return {
            "nats/dim": self.best_validation_nats_per_dim,
            "nats": self.best_validation_nats,
            "bits/dim": self.best_validation_bits_per_dim,
        }[self.unit]


class Row(File):
    """A line of `metrics.jsonl`. What layers report about a training step follows as more keys."""

    model_config = ConfigDict(extra="allow")

    step: int
    images: int
    seconds: float
    split: Literal["train", "validation"]
    bits_per_dim: float | None  # None where it was not finite, and where a density has no bits
    nats: float | None = None  # given for real-valued data only
    nats_per_dim: float | None = None  # given for densities of noisy images only
    grad_norm: float | None = None  # before clipping; this and the rest are given in training only
    lr: float | None = None
    images_per_second: float | None = None  # of training alone

    @property
    def loss(self) -> float | None:
        """In bits/dim, nats or nats/dim; None where it was not finite."""
        found = (self.bits_per_dim, self.nats, self.nats_per_dim)
        return next((loss for loss in found if loss is not None), None)


class Evaluation(File):
    """`evaluate-<split>.json`. Figures that are not finite are None.

    The keys without a default are in the files of all versions.
    """

    bits_per_dim: float | None  # of `bound`; with the standard error over images
    bits_per_dim_stderr: float | None
    bound: str  # elbo, iwbo, exact, or density: that of noisy images, which has no bits
    samples: int
    sigma: float | None = None  # of the noise of noisy images; this and the next three only there
    nats_per_dim: float | None = None  # minus the mean log-density, also over draws of the noise
    nats_per_dim_stderr: float | None = None
    nats_per_dim_stderr_draws: float | None = None
    bits_per_dim_stderr_draws: float | None = None  # standard error over draws of the noise
    elbo_bits_per_dim: float | None = None
    elbo_bits_per_dim_stderr: float | None = None
    elbo_bits_per_dim_stderr_draws: float | None = None
    nats_per_image: float | None
    nats_per_image_stderr: float | None = None
    bits_per_dim_given_class: float | None = None  # class-conditional models, on labelled data
    nats_given_class: float | None = None
    nats_per_dim_given_class: float | None = None
    classes: int | None = None  # of a class-conditional model: the loss is of the mean over them
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    num_images: int
    duplicates: int | None = None  # images that are equal to an earlier one of these
    # Images that are equal to one of the training split. None if those are not at hand.
    duplicates_of_training: int | None = None
    # What part of each image the likelihoods are conditional on, in words. None for whole images.
    given: str | None = None
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
    model: str | None = (
        None  # its hash (`checkpoints.load.model_hash`); an earlier version has none
    )

    @property
    def loss(self) -> tuple[float | None, float | None]:
        """The loss with its standard error: nats for real-valued data, nats/dim for noisy images,
        otherwise bits/dim.
        """
        if self.bound == "density":
            return self.nats_per_dim, self.nats_per_dim_stderr
        if self._is_density:
            return self.nats_per_image, self.nats_per_image_stderr
        return self.bits_per_dim, self.bits_per_dim_stderr

    @property
    def _is_density(self) -> bool:
        """Whether the data are real-valued: they have no levels and no bits."""
        return self.bound == "exact" and self.levels is None

    def content(self) -> dict[str, Any]:
        values = super().content()
        if self._is_density or self.bound == "density":
            return values
        return {"bound": self.bound, "samples": self.samples} | values  # these two first

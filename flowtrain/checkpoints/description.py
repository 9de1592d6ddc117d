"""The description in a checkpoint: everything but the tensors."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, model_validator

from flowtrain.types import Side, Steps


@dataclass
class Progress:
    """How far a run is, in plain numbers. They are stored in the checkpoint."""

    step: Steps = 0
    images: Steps = 0
    seconds: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    best: FiniteFloat | None = None  # validation loss, in the unit of the kind of data
    best_step: Steps | None = None
    lr_scale: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    non_finite: Steps = 0
    averaged: Steps = 0  # updates of the average of the weights
    finished: bool = False  # including the last validation and the last samples
    window_loss: FiniteFloat = 0.0  # sum of the training loss since the last row of metrics
    window_steps: Steps = 0  # steps in that sum


class Origin(BaseModel):
    """The part of the description that every format has."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    format: int
    versions: dict[str, str]


class Description(Origin):
    """The description in this format. The checkpoint of a run has the last four, a model alone, as
    in an archive, has none. `flowtrain.config.parse` checks `config`.
    """

    config: dict[str, Any]
    shape: tuple[Side, Side, Side]  # (C, H, W)
    levels: Annotated[int, Field(ge=2, le=256)] | None  # None: real values
    step: Steps
    data: dict[str, Any] = {}  # the fingerprint of the data set
    processes: PositiveInt = 1
    threads: PositiveInt | None = None  # of torch, in process 0
    progress: Progress | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Description":
        progress = self.progress
        if progress is not None and progress.step != self.step:
            raise ValueError(f"it is of step {self.step}, its progress of {progress.step}")
        if progress is not None and progress.best is not None and progress.best_step is None:
            raise ValueError("its progress has no step of its best loss")
        if self.levels is not None and self.shape[0] not in (1, 3):
            raise ValueError(f"its shape has {self.shape[0]} channels, and images have 1 or 3")
        return self

"""Verifies a run: its data, its log, and its figures, which are measured again."""

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowtrain.checkpoints import record
from flowtrain.checkpoints.format import SUFFIX, read
from flowtrain.checkpoints.load import LoadedModel, run_of
from flowtrain.checkpoints.record import Record
from flowtrain.data.splits import DataSet, SplitName
from flowtrain.datasets import base
from flowtrain.errors import UserError, cut
from flowtrain.evaluation.evaluate import evaluate
from flowtrain.evaluation.score import mean_loss
from flowtrain.results import Evaluation
from flowtrain.system.console import counted, duration, figure, silent
from flowtrain.system.files import require_regular

# The largest difference of a figure on another processor, in bits/dim. Rounding alone changes it
# by about 1e-5, and the rows of the leaderboard have three digits.
TOLERANCE = 5e-4
SPLITS = ("train", "validation")  # of a log


@dataclass(frozen=True)
class Benchmark:
    """A data set of the leaderboard, whose images are known by `identity`."""

    title: str
    train: str  # of all training images, with those held out for validation
    test: str
    targets: tuple[float, ...]  # bits/dim that a run takes some time to reach, the largest first


BENCHMARKS = (
    Benchmark(
        "CIFAR-10",
        "f1a8ba0c962c6129f8b882f3f15f9a11cf3d18cdd4a74d2b0428a0660c710fc3",
        "c763797a5a940ba040a1b9ca5c66521ee20832c02755c3c17239acff72cef1d1",
        (3.5, 3.3, 3.2),
    ),
    Benchmark(
        "MNIST",
        "cd0f88556bb8ef13f0361a753a18c7fa7575da3e59d4c9f4abeea1083cff6ffa",
        "52c069f245e41849a9bb6bf53a7b34e17b746ac923f1cad4aad42b3e28773827",
        (1.0,),
    ),
)


@dataclass(frozen=True)
class Verified:
    """A row of the leaderboard."""

    run: str
    model: str
    data: str
    test: Evaluation
    images: int  # seen in training
    seconds: float  # wall-clock, with validation and samples
    parameters: int
    machine: str
    # Seconds until the validation figure was at most so many bits/dim; None if it never was.
    reached: dict[float, float | None]

    @property
    def row(self) -> str:
        times = (
            f"{bits:g}: {'-' if seconds is None else duration(seconds)}"
            for bits, seconds in self.reached.items()
        )
        mirrored = ", mirrored" * (self.test.sides > 1)
        cells = (
            *(f"`{self.run}`", self.model, self.data),
            f"{figure(self.test.loss, self.test.loss_stderr)}, {self.test.bound}{mirrored}",
            *(duration(self.seconds), "; ".join(times)),
            *(f"{self.images:,}", f"{self.parameters:,}", self.machine),
        )
        # A stranger's run names itself and its machine, and must add no cell and no row.
        plain = (cut(cell, 300).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(plain)} |"


def verify(
    model: LoadedModel, data: DataSet, progress: Callable[[int, int], None] = silent
) -> Verified:
    """Verifies the run of a loaded model on the data that it was trained on.

    The log must agree with the checkpoints, the data with a benchmark and with the training's
    fingerprint, and the figures in the run with those measured here. The fingerprint and the log
    are what the run directory claims: a forged run is found only where its parts disagree.

    Raises `UserError` with the first reason against the run.
    """
    run = run_of(model.checkpoint.path)
    found = record.read(run)
    summary, meta = found.summary, model.checkpoint.meta
    _require_log(found, model)
    benchmark = _benchmark(run, model, data)
    best = summary.best_validation_loss
    validation = mean_loss(model.flow, data.split("validation"), seed=model.config.seed, side=0)
    _require_equal(run, "best validation figure", best, validation)
    test, _ = evaluate(model, data, "test", progress=progress)
    if test.duplicates_of_training:
        raise UserError(
            f"{run}: {test.duplicates_of_training} test images are equal to a training image"
        )
    if (known := found.tests.get(test.way)) is not None and known.num_images == test.num_images:
        _require_equal(run, "test figure", known.loss, test.loss)
    validations = [row for row in found.rows if row.split == "validation"]
    threads = meta["threads"]  # which early versions did not write
    of_machine = f", {counted(threads * meta['processes'], 'thread')}" if threads else ""
    reached = {
        bits: next((r.seconds for r in validations if r.loss is not None and r.loss <= bits), None)
        for bits in benchmark.targets
    }
    return Verified(
        run=run.resolve().name,
        model=model.config.model.name,
        data=benchmark.title,
        test=test,
        images=summary.images,
        seconds=summary.seconds,
        parameters=sum(each.numel() for each in model.flow.parameters()),
        machine=summary.machine + of_machine,
        reached=reached,
    )


def identity(data: DataSet, *names: SplitName) -> str:
    """SHA-256 of all images of some splits, as stored, in any order."""
    splits = [data.split(name) for name in names]
    rows = [row for each in splits for row in base.digests(each.pixels, each.indices)]
    return hashlib.sha256(b"".join(sorted(row.tobytes() for row in rows))).hexdigest()


def _benchmark(run: Path, model: LoadedModel, data: DataSet) -> Benchmark:
    test = identity(data, "test")
    found = next((each for each in BENCHMARKS if each.test == test), None)
    if found is None or data.reduced_to is not None:
        titles = " or ".join(each.title for each in BENCHMARKS)
        raise UserError(f"{run}: not evaluated on the test split of {titles} with 256 levels")
    if identity(data, "train", "validation") != found.train:
        raise UserError(
            f"{run}: not trained on the training split of {found.title}, but on other images"
        )
    if not data.matches(model.checkpoint.meta.get("data") or {"content": None}):
        raise UserError(f"{run}: the checkpoint was trained on other images than its data here")
    return found


def _require_log(found: Record, model: LoadedModel) -> None:
    """Raises `UserError` unless summary, metrics and last checkpoint agree on a finished run."""
    run, summary = found.path, found.summary
    if not summary.finished:
        raise UserError(f"{run}: not a finished run")
    if model.config.train.clock != "wall":
        raise UserError(f"{run}: no wall-clock time (train.clock is {model.config.train.clock})")
    if "tensorboard" not in (names := model.config.train.logger):
        raise UserError(f"{run}: no log of TensorBoard (train.logger is {names})")
    if model.flow.image_context is not None or model.flow.kind.no_bits:
        raise UserError(f"{run}: no bits/dim of whole images")
    losses = [row.loss for row in found.rows if row.split == "validation" and row.loss is not None]
    times = [row.seconds for row in found.rows]
    last = read(run / "checkpoints" / f"last{SUFFIX}").meta["progress"] or {}
    keys = ("step", "images", "seconds", "finished", "best_step")
    agreement = {
        "last checkpoint": all(last.get(key) == getattr(summary, key) for key in keys),
        "best validation figure": min(losses, default=None)
        == summary.best_validation_loss
        == summary.best_validation_bits_per_dim,
        "last step": max((row.step for row in found.rows), default=0) == summary.step,
        "times": times == sorted(times) and max(times, default=0) <= summary.seconds,
        "losses in the log of TensorBoard": all(_are_in_events(found, split) for split in SPLITS),
    }
    for name, agrees in agreement.items():
        if not agrees:
            raise UserError(f"{run}: its files disagree on the {name}")


def _are_in_events(found: Record, split: str) -> bool:
    """Whether the losses of a split are, by step, as in TensorBoard's event files, in float32."""
    # It warns of the steps that a resumed run logged twice, and leaves the first ones out.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    require_regular(found.path)  # TensorBoard would wait for the writer of a pipe
    try:
        events = EventAccumulator(str(found.path), size_guidance={"scalars": 0}).Reload()
    except DecodeError:
        return False
    tag = f"{split}/loss"
    points = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    logged = {point.step: point.value for point in points if math.isfinite(point.value)}
    rows = [row for row in found.rows if row.split == split]
    losses = {row.step: row.loss for row in rows if row.loss is not None}
    return losses.keys() == logged.keys() and all(
        math.isclose(loss, logged[step], rel_tol=1e-6) for step, loss in losses.items()
    )


def _require_equal(run: Path, name: str, claimed: float | None, measured: float | None) -> None:
    if claimed is None or measured is None or abs(claimed - measured) > TOLERANCE:
        raise UserError(f"{run}: its {name} is {claimed}, but its best checkpoint has {measured}")

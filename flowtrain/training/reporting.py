"""Metrics, validation, samples and checkpoints of a run."""

import math
import shlex
import statistics
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from flowtrain.bijections import Continuous
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.description import Progress
from flowtrain.checkpoints.format import Checkpoint
from flowtrain.config import Config
from flowtrain.data.splits import Split
from flowtrain.errors import RunError, UserError
from flowtrain.evaluation.layers import log_scale_ranges
from flowtrain.evaluation.score import mean_loss
from flowtrain.flow.flow import Flow
from flowtrain.pictures import draw
from flowtrain.pictures.conditional import of_split
from flowtrain.pictures.sample import decode
from flowtrain.results import Row, Summary
from flowtrain.system import distributed
from flowtrain.system.console import ProgressBar, console, duration
from flowtrain.system.device import machine
from flowtrain.system.random import Stream, generator, uniform
from flowtrain.training.run_directory import RunDirectory
from flowtrain.training.state import State
from flowtrain.training.stop import Clock

RANGES_BATCH = 64  # images on which the ranges of log-scales are measured


def validate(state: State, run: RunDirectory, validation: Split, note: Callable[..., None]) -> bool:
    """Measures the loss of the validation images, with a call of `note` after each batch. Returns
    whether it is the best so far.
    """
    if len(validation) == 0:
        return False
    progress = state.progress
    flow = state.ema_flow
    loss = mean_loss(flow, validation, seed=state.config.seed, progress=note)
    finite = math.isfinite(loss)
    run.log(_row(progress, "validation", **_losses(flow, loss if finite else None)))
    _log_ranges(state, run, validation)
    best = finite and (progress.best is None or loss < progress.best)
    console.print(
        f"step {progress.step}: validation {loss:.4f} {flow.kind.unit}{' (best)' if best else ''}"
    )
    if best:
        progress.best, progress.best_step = loss, progress.step
    return best


def _row(progress: Progress, split: Literal["train", "validation"], **figures: Any) -> Row:
    return Row(
        step=progress.step, images=progress.images, seconds=progress.seconds, split=split, **figures
    )


def _losses(flow: Flow, loss: float | None) -> dict[str, float | None]:
    """A loss by its names in files: in the unit of the kind, and in bits/dim if there are any."""
    return {"loss": loss, "bits_per_dim": None if flow.kind.no_bits else loss}


@distributed.main_only
def _log_ranges(state: State, run: RunDirectory, validation: Split) -> None:
    x = validation.sample(RANGES_BATCH).take(slice(None)).to(state.flow.device)
    noise = uniform(x.shape, state.config.seed, Stream.EVALUATION, device=x.device)
    ranges = log_scale_ranges(state.ema_flow, x, noise)
    # TensorBoard sorts groups by name, and these come last.
    charts = {f"z_log_scale_min/{name}": low for name, (low, _) in ranges.items()}
    charts |= {f"z_log_scale_max/{name}": high for name, (_, high) in ranges.items()}
    run.chart(charts, state.progress.step)


@distributed.main_only
def sample(state: State, run: RunDirectory, beside: Split, note: Callable[..., None]) -> None:
    """Saves a picture of samples. All steps have the same latents, so images can be followed. It
    calls `note` now and then.
    """
    z = state.flow.draw_latents(
        state.flow.kind.picture_count, generator(state.config.seed, Stream.LATENTS)
    )
    flow, seed = state.ema_flow, state.config.seed
    try:
        labels, contexts = flow.classes_in_turn(len(z)), of_split(flow, beside, len(z))
        latents = flow.latents_of_classes(z)
        samples = decode(flow, latents, note, labels, context=contexts)
        picture = draw.drawing(flow, lambda: beside).samples(samples, 8, seed)
    except (FloatingPointError, UserError) as error:
        console.print(f"step {state.progress.step}: no picture of samples: {error}")
        return
    run.save_sample(state.progress.step, picture)


def log(state: State, run: RunDirectory, grad_norm: float, rate: float, clock: Clock) -> None:
    """Writes and prints a row of training metrics. The loss is the mean since the last row."""
    progress, config = state.progress, state.config.train
    loss = progress.window_loss / progress.window_steps
    progress.window_loss, progress.window_steps = 0.0, 0
    speed = clock.images_per_second(begin_anew=True)
    figures: dict[str, Any] = {"grad_norm": grad_norm, "lr": rate, "images_per_second": speed}
    figures |= _losses(state.flow, loss) | solver_metrics(state.flow)
    run.log(_row(progress, "train", **figures))
    if not console.is_terminal:
        clipped = f" (clipped to {config.clip_norm:g})" if 0 < config.clip_norm < grad_norm else ""
        console.print(
            f"step {_steps(state)}: train {loss:.4f} {state.flow.kind.unit}  {speed:.0f} images/s  "
            f"{duration(clock.seconds_left())} left  lr {rate:.2e}  gradient {grad_norm:.2f}"
            f"{clipped}"
        )


def show(state: State, loss: float, clock: Clock, bar: ProgressBar) -> None:
    """Moves the bar, or prints a line now and then. `loss` belongs to the last known step."""
    train, progress = state.config.train, state.progress
    text = (
        f"{duration(clock.seconds_left())} left  step {_steps(state)}  {loss:.3f} "
        f"{state.flow.kind.unit}  {clock.images_per_second(begin_anew=False):.0f} images/s"
    )
    if train.num_steps is not None:
        bar(progress.step, train.num_steps, text)
    else:
        assert train.budget is not None
        bar(min(progress.seconds, train.budget), train.budget, text)


def _steps(state: State) -> str:
    num_steps = state.config.train.num_steps
    return f"{state.progress.step}" + ("" if num_steps is None else f"/{num_steps}")


def solver_metrics(flow: nn.Module) -> dict[str, float]:
    """The function evaluations of the last forward pass and the tolerances, averaged over the
    continuous layers; empty without such layers.
    """
    found = [
        (float(layer.evaluations), layer.rtol, layer.atol)
        for layer in flow.modules()
        if isinstance(layer, Continuous)
    ]
    means = map(statistics.fmean, zip(*found, strict=True))
    return dict(zip(("function_evaluations", "rtol", "atol"), means, strict=False))


@distributed.main_only
def save(
    state: State, run: RunDirectory, *, numbered: bool, best: bool = False, wait: bool = False
) -> None:
    """Writes the last checkpoint and `summary.json`. See `RunDirectory.save_last`."""
    device = state.flow.device
    where = {"device": str(device), "machine": machine(device)}
    versions = checkpoint_format.versions()
    summary = _summary(state.flow, state.progress, state.data, versions, where)
    run.save_last(
        state.meta(),
        state.tensors(),
        summary,
        keep=state.config.train.keep_checkpoints,
        numbered=numbered,
        best=best,
        wait=wait,
    )


@distributed.main_only
def bring_up_to_date(
    run: RunDirectory, saved: Checkpoint, config: Config, flow: Flow, device: torch.device
) -> None:
    """Makes all files of the run directory follow from its last checkpoint, `saved`. A kill just
    after it was written leaves the rest as it was before.
    """
    progress = Progress(**saved.meta["progress"])
    run.tidy_metrics(progress.step)
    run.prune(progress.step, config.train.keep_checkpoints)
    found = run.summary()
    here = {"device": str(device), "machine": machine(device)}
    where = {key: str(found.get(key, value)) for key, value in here.items()}
    wanted = _summary(flow, progress, saved.meta["data"], saved.meta["versions"], where)
    if found != wanted:
        run.write_json("summary.json", wanted)


def _summary(
    flow: Flow,
    progress: Progress,
    data: dict[str, Any],
    versions: dict[str, str],
    where: dict[str, str],
) -> dict[str, Any]:
    equal, edition = data.get("duplicates", 0), data.get("edition")
    losses = _losses(flow, progress.best)
    others: dict[str, Any] = {f"best_validation_{key}": loss for key, loss in losses.items()}
    others |= {"edition": edition} if isinstance(edition, str) else {}
    return Summary(
        step=progress.step,
        images=progress.images,
        seconds=progress.seconds,
        finished=progress.finished,
        unit=flow.kind.unit,
        best_step=progress.best_step,
        parameters=sum(p.numel() for p in flow.parameters()),
        non_finite_steps=progress.non_finite,
        duplicates=equal if isinstance(equal, int) else 0,
        versions=versions,
        device=where["device"],
        machine=where["machine"],
        **others,
    ).content()


@distributed.main_only
def require_finite_end(run: RunDirectory, step: int) -> None:
    """Raises `RunError` if the validation at the end of a run, at `step`, was not finite."""
    row = run.last_validation()
    if row is not None and row.step == step and row.loss is None:
        raise RunError(
            f"{run.path}: finished at step {step}, but its last validation loss is not finite. "
            "The checkpoints are saved; best is of the best finite validation, if there was one. "
            "Lower train.lr, set train.clip_norm, or use more train.warmup_steps"
        )


def announce_end(state: State, run: RunDirectory) -> None:
    """Prints the result of a run, where it is, and what can be done with it."""
    progress, path = state.progress, shlex.quote(str(run.path))
    best = "no validation images"
    if progress.best is not None:
        unit, context = state.flow.kind.unit, state.flow.image_context
        given = "" if context is None else f", given {context.words},"
        best = f"{progress.best:.3f} {unit}{given} on the validation images"
        if progress.best_step != progress.step:
            best += f" (at step {progress.best_step:,}, the best)"
    console.print(
        f"finished: {best}; {progress.step:,} steps in {duration(progress.seconds)}, {run.path}"
    )
    for command, what in (
        ("evaluate", "likelihood of the test images"),
        ("sample", "a picture of samples"),
        ("report", "one page about the run"),
    ):
        console.print(f"  {f'flowtrain {command} {path}':40}  {what}")

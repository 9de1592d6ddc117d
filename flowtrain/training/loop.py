"""The training loop: steps, validation, checkpoints, signals, and rollback."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable

import torch

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.build import build_flow
from flowtrain.config import Config
from flowtrain.data.batches import Batches
from flowtrain.data.splits import DataSet, Split, fingerprint_of
from flowtrain.errors import Interrupted, RunError
from flowtrain.evaluation.layers import first_non_finite
from flowtrain.system import distributed, torchrun
from flowtrain.system.console import ProgressBar, console
from flowtrain.training import loggers, reporting
from flowtrain.training.delayed_metrics import DelayedMetrics, StepMetrics
from flowtrain.training.optim import copies_of_weights, learning_rate
from flowtrain.training.resume import announce, checkpoint_to_resume, require_same_everywhere, start
from flowtrain.training.run_directory import RunDirectory
from flowtrain.training.state import State
from flowtrain.training.step import (
    dequantization_noise,
    optimizer_step,
    require_memory,
    require_trainable,
    train_step,
)
from flowtrain.training.stop import Clock, Stop, signals

FIRST_LINE = 2.0  # seconds until the log shows that training goes on


def fit(
    config: Config,
    run: RunDirectory,
    device: torch.device,
    resume: str = "auto",
    init_from: str | None = None,
    until: float = 1.0,
) -> None:
    """Trains to the end, to the share `until` of its length, or until a signal. In each case
    everything is saved in `run`, also after the terminal is closed.

    Raises:
        Interrupted: after a signal.
        UserError: for a configuration, data set or checkpoint that does not fit.
        RunError: after too many non-finite steps, after a last validation that was not finite, or
            if the run directory cannot be written.
    """
    console.outlives_terminal = True
    loggers.require(config.train.logger)
    with distributed.main_process_first():  # it may list a large folder
        data = DataSet(config.data)
    flow = build_flow(config, data.shape, data.num_bins, copies_of_weights(config.train, device))
    require_trainable(flow, config, device)
    with run.locked():
        saved = checkpoint_to_resume(config, run, resume)
        if saved is not None and resume == "auto" and saved.meta["progress"]["finished"]:
            reporting.bring_up_to_date(run, saved, config, flow, device)
            reporting.require_finite_end(run, saved.meta["step"])
            console.print(f"{run.path} is finished (step {saved.meta['step']}): nothing to do")
            return
        flow = flow.to(device)
        require_memory(flow, config, device)
        console.print(f"reading {config.data.name}")
        with distributed.main_process_first():  # it may download
            images = config.train.batch_size * config.train.accumulate
            batches = Batches(data, config, images, device)
            validation = data.split("validation")
        fingerprint = data.fingerprint
        if batches.labels is not None:
            fingerprint["labels"] = fingerprint_of(batches.labels)
        require_same_everywhere(config, fingerprint)
        state = start(config, flow, fingerprint, saved, init_from, batches)
        # Until here a signal ends the process at once, because there is nothing to save.
        with signals() as stop:
            run.begin(config)
            run.cut_back(state.progress.step, config)
            announce(state, run, data, batches, saved)
            if saved is None or saved.path != run.last:
                # `last` may not exist yet, or be later than the checkpoint that was resumed from.
                if distributed.from_main(run.best_step) != state.progress.best_step:
                    # `best` is missing, or of steps that are not part of this run.
                    state.progress.best = state.progress.best_step = None
                reporting.save(state, run, numbered=False, wait=True)
            else:
                reporting.bring_up_to_date(run, saved, config, state.flow, device)
            distributed.barrier()  # an error in writing has been raised by now
            advice = (
                f"{run.last} is the last checkpoint, and sound: the same command continues from it"
            )
            with (
                torchrun.losing_a_process(advice),
                contextlib.closing(batches),
                ProgressBar("training", FIRST_LINE) as bar,
            ):
                _loop(state, run, batches, validation, stop, bar, until)
                run.saving.finish()
        if not (state.progress.finished or stop.signum):
            console.print(f"paused at step {state.progress.step}: --until {until:g}")
            return
        if not state.progress.finished:
            console.print(f"stopped by {stop.name} at step {state.progress.step}; saved {run.last}")
            console.print("the same command continues from there")
            raise Interrupted(stop.signum)
        reporting.require_finite_end(run, state.progress.step)
        reporting.announce_end(state, run)


def _loop(
    state: State,
    run: RunDirectory,
    batches: Batches,
    validation: Split,
    stop: Stop,
    bar: ProgressBar,
    until: float,
) -> None:
    config = state.config.train
    clock = Clock(state)
    metrics = DelayedMetrics(state, clock, stop)
    # A run whose budget is used up still takes the step that ends it.
    paused = until < 1 and state.reached_end(metrics.seconds, until)
    stopped = bool(stop.signum) or paused
    while not (state.progress.finished or stopped):
        run.saving.raise_error()
        progress = state.progress  # another object after a rollback
        x, labels = batches.at(progress.images)
        loss, grad_norm = train_step(state, x, labels)
        rate = learning_rate(config, progress.step, metrics.seconds) * progress.lr_scale
        state.set_learning_rate(rate)
        optimizer_step(state, grad_norm)
        metrics.send(loss, grad_norm, rate)
        progress.step += 1
        progress.images += batches.all_processes
        metrics.receive(leaving=1)  # while the device works on this step

        # By the clock that all processes share.
        pauses, ends = (state.reached_end(metrics.seconds, share) for share in (until, 1.0))
        logs, validates, periodic = (
            pauses or progress.step % every == 0
            for every in (config.log_every, config.validate_every, config.checkpoint_every)
        )
        samples = ends or progress.step % config.sample_every == 0
        due = logs or validates or samples or periodic or stop.signum or metrics.failed
        if due:
            metrics.receive(leaving=0)
        clock.tick(batches.all_processes)
        if metrics.last is not None and metrics.failed is None:
            reporting.show(state, metrics.last.loss, clock, bar)
        if not due:
            continue
        assert metrics.last is not None
        # A finite gradient may still take a weight to infinity. Such a state is never saved.
        if metrics.failed is None and not state.weights_are_finite():
            metrics.failed = dataclasses.replace(
                metrics.last, step=progress.step, images=progress.images
            )
        if metrics.failed is not None:
            _roll_back(state, run, batches, metrics.failed)
            metrics.last = metrics.failed = None
            clock.skip()
            stopped = bool(stop.signum)
            continue

        progress.finished = ends
        if logs:
            reporting.log(state, run, metrics.last.grad_norm, metrics.last.rate, clock)
            bar.wait()
        best = False
        if validates:
            note = _saving_on_a_signal(state, run, stop, pauses)
            best = reporting.validate(state, run, validation, note)
        if samples:
            note = _saving_on_a_signal(state, run, stop, pauses, best)
            beside = validation if len(validation) else batches.source
            reporting.sample(state, run, beside, note)
        stopped = bool(stop.signum) or pauses
        clock.skip()
        if periodic or best or stopped:
            # A kill must not leave a `best` of later steps than `last`.
            reporting.save(state, run, numbered=periodic, best=best, wait=stopped)
        if validates or samples or periodic:
            distributed.barrier()  # an exchange of tensors waits for process 0 only so long
        clock.skip()


def _saving_on_a_signal(
    state: State, run: RunDirectory, stop: Stop, pauses: bool, best: bool = False
) -> Callable[..., None]:
    """A function to call during a validation or a picture, whose end the user may not wait for. It
    saves once after a signal, also after one before this call. Where a run pauses or ends, the
    validation is a part of the state.
    """
    saved = pauses

    def note(*done: float) -> None:
        nonlocal saved
        if (stop.asked or stop.signum) and not saved:
            saved = True
            reporting.save(state, run, numbered=False, best=best, wait=True)

    note()
    return note


def _roll_back(state: State, run: RunDirectory, batches: Batches, failed: StepMetrics) -> None:
    """After a non-finite loss, gradient or weight: writes evidence, restores the last checkpoint,
    and halves the learning rate.

    Raises `RunError` if this has happened more than `train.max_non_finite` times.
    """
    now = state.progress
    state.progress = dataclasses.replace(now, step=failed.step, images=failed.images)
    x, labels = batches.at(state.progress.images)
    if not failed.finite:
        train_step(state, x, labels)  # the gradient may be that of the step after it
    noise = dequantization_noise(state.config, failed.images + distributed.rank() * len(x), x)
    size = state.config.train.batch_size  # more may not fit into memory
    parts = zip(x.split(size), noise.split(size), strict=True)
    own = [first_non_finite(state.flow, *part) for part in parts]
    found = itertools.chain(*distributed.all_gather_object(own))
    # All processes have the same gradient. A non-finite output is found only by the process that
    # has the image, so it is more precise.
    layers = sorted(filter(None, found), key=lambda layer: layer.startswith("gradient"))
    layer = layers[0] if layers else None
    where = layer or "no layer, when computed again in float32"
    events = now.non_finite + 1
    figures = {"step": failed.step, "loss": str(failed.loss), "grad_norm": str(failed.grad_norm)}
    figures |= {"lr": failed.rate, "first_non_finite": layer}
    evidence = run.write_json(f"non-finite-{events}.json", figures)
    console.print(
        f"step {failed.step}: loss {failed.loss}, gradient norm {failed.grad_norm}: first not "
        f"finite: {where} ({evidence})"
    )
    run.saving.finish()
    last = checkpoint_format.read_by_main(lambda: run.last)
    assert last is not None
    state.restore(last)
    lr_scale = now.lr_scale / 2
    state.progress = dataclasses.replace(
        state.progress, seconds=now.seconds, non_finite=events, lr_scale=lr_scale
    )
    run.cut_back(state.progress.step, state.config)
    reporting.save(state, run, numbered=False, wait=True)
    distributed.barrier()  # the checkpoint is written
    limit = state.config.train.max_non_finite
    if events > limit:
        raise RunError(
            f"{run.path}: stopped at step {failed.step}: {events} steps not finite "
            f"(train.max_non_finite: {limit}); the first value that was not: {where}. The "
            f"checkpoints are from before. Evidence: {evidence}. Lower train.lr, set "
            "train.clip_norm, or use more train.warmup_steps"
        )
    console.print(
        f"rolled back to step {state.progress.step}, with the learning rate times {lr_scale:g}"
    )

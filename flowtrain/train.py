"""Training: the loop, resuming, signals, and what happens to a number that is not finite."""

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from flowtrain import checkpoint, images
from flowtrain.checkpoint import Checkpoint
from flowtrain.config import Config, differences
from flowtrain.console import ProgressBar, console, duration
from flowtrain.data import Batches, DataSet, Split
from flowtrain.dequantize import draw_noise
from flowtrain.device import Stream, generator
from flowtrain.diagnostics import first_non_finite, log_scale_ranges
from flowtrain.errors import RunError, UserError
from flowtrain.evaluate import mean_bits_per_dim
from flowtrain.flow import Flow, bits_per_dim, initialize
from flowtrain.memory import memory_mode
from flowtrain.optim import average, build_optimizer, learning_rate
from flowtrain.run import RunDirectory
from flowtrain.state import State

SAMPLES = 64  # in a sample grid
RANGES_BATCH = 64  # images on which log-scale ranges are measured

# Where the data lie and how they are read may change between two parts of a run; what they are may not.
FREE_KEYS = {"data.root", "data.path", "data.max_in_memory", "data.workers"}


class Interrupted(Exception):
    """Training was stopped by a signal, after saving."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def train_step(state: State, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the mean bits/dim of a batch; returns the loss and the gradient's norm, 0-dimensional.

    `x` holds `accumulate` times `batch_size` images. The noise belongs to the seed and the step.
    """
    config = state.config.train
    noise = draw_noise(x.shape, _noise_generator(state), x.device)
    state.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=x.device)
    for part, part_noise in zip(x.split(config.batch_size), noise.split(config.batch_size), strict=True):
        with memory_mode(config.memory):  # also for what the backward pass computes again
            with _precision(config.precision, x.device):
                log_prob = state.flow(part, part_noise).total
            part_loss = bits_per_dim(log_prob, state.flow.dims).sum() / len(x)
            part_loss.backward()
        loss = loss + part_loss.detach()
    gradients = [p.grad for p in state.flow.parameters() if p.grad is not None]
    return loss, torch.nn.utils.get_total_norm(gradients)


def _noise_generator(state: State) -> torch.Generator:
    return generator(state.config.seed, Stream.DEQUANTIZATION, state.progress.step)


def _precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 for the conditioners; the data path casts back and does its own products in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def fit(
    config: Config,
    run: RunDirectory,
    device: torch.device,
    resume: str = "auto",
    init_from: str | None = None,
) -> None:
    """Trains to the end, or raises `Interrupted` after a signal, with everything saved in `run`.

    Raises:
        UserError: for a configuration, data set or checkpoint that does not fit.
        RunError: after too many steps that were not finite, or where the disk is full.
    """
    data = DataSet(config.data)
    flow = checkpoint.build_flow(config, data.shape, data.levels)
    with run.locked():
        saved = _checkpoint_to_resume(config, run, resume)
        if saved is not None and resume == "auto" and saved.meta["progress"]["finished"]:
            console.print(f"{run.path} is finished (step {saved.meta['step']}): nothing to do")
            return
        console.print(f"reading {config.data.name}")
        train_config = config.train
        batches = Batches(data, config, train_config.batch_size * train_config.accumulate, device)
        validation = data.split("validation")
        state = _start(config, flow.to(device), data.fingerprint, saved, init_from, batches)
        # Until here a signal ends the process at once: there is nothing to save.
        with _signals() as stop:
            run.begin(config)
            run.cut_back(state.progress.step, config)
            _announce(state, run, data, batches, saved)
            if saved is None or saved.path.resolve() != run.last.resolve():
                # The last good state, from the start: `last` may not exist yet, or be later than the one resumed from.
                if not run.best.exists():
                    state.progress.best = state.progress.best_step = None  # it was another run's
                _save(state, run, numbered=False)
            with ProgressBar("training", seconds_between_lines=math.inf) as bar:
                _loop(state, run, batches, validation, stop, bar)
        if not state.progress.finished:
            console.print(f"stopped by {stop.name} at step {state.progress.step}; saved {run.last}")
            console.print("the same command goes on from there")
            raise Interrupted(stop.signum)
        console.print(f"finished: {run.path} (checkpoints/, samples/, metrics.jsonl, summary.json, TensorBoard events)")


def _loop(
    state: State, run: RunDirectory, batches: Batches, validation: Split, stop: "_Stop", bar: ProgressBar
) -> None:
    config = state.config.train
    clock = _Clock(state)
    while not state.progress.finished and not stop.signum:
        for x in batches.starting_at(state.progress.step):
            rate = learning_rate(config, state.progress.step, state.progress.seconds) * state.progress.lr_scale
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            loss, grad_norm = train_step(state, x)
            if not math.isfinite(loss.item() + grad_norm.item()):
                _go_back(state, run, x, loss.item(), grad_norm.item(), rate)
                break  # the order of the batches starts again from the step that was restored
            if config.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(state.flow.parameters(), config.clip_norm, grad_norm)
            state.optimizer.step()
            progress = state.progress
            if state.average is not None:
                state.average.update_parameters(state.flow)
                progress.averaged += 1
            progress.step += 1
            progress.images += len(x)
            progress.window_bits += loss.item()
            progress.window_steps += 1
            clock.tick(len(x))
            ends = state.reached_end()
            validates = ends or progress.step % config.validate_every == 0
            periodic = ends or progress.step % config.checkpoint_every == 0
            # A finite gradient may still have taken a weight to infinity: no such state is ever saved.
            if (validates or periodic or stop.signum) and not state.weights_are_finite():
                _go_back(state, run, x, loss.item(), grad_norm.item(), rate)
                break
            progress.finished = ends
            if ends or progress.step % config.log_every == 0:
                _log(state, run, grad_norm.item(), rate, clock, bar)
            if validates:
                _validate(state, run, validation)
            if ends or progress.step % config.sample_every == 0:
                _sample(state, run)
            clock.skip()
            if periodic or stop.signum:
                _save(state, run, numbered=periodic)
            if ends or stop.signum:
                break


def _validate(state: State, run: RunDirectory, validation: Split) -> None:
    if len(validation) == 0:
        return
    progress = state.progress
    bits = mean_bits_per_dim(state.evaluated, validation, seed=state.config.seed)
    row = {"step": progress.step, "images": progress.images, "seconds": progress.seconds, "split": "validation"}
    run.log({**row, "bits_per_dim": bits if math.isfinite(bits) else None})
    x = validation.take(slice(0, RANGES_BATCH)).to(state.flow.device)
    noise = draw_noise(x.shape, generator(state.config.seed, Stream.EVALUATION), x.device)
    for name, (low, high) in log_scale_ranges(state.evaluated, x, noise).items():
        run.tensorboard.add_scalar(f"validation_log_scale_min/{name}", low, progress.step)
        run.tensorboard.add_scalar(f"validation_log_scale_max/{name}", high, progress.step)
    best = math.isfinite(bits) and (progress.best is None or bits < progress.best)
    console.print(f"step {progress.step}: validation {bits:.4f} bits/dim{' (best)' if best else ''}")
    if best:
        progress.best, progress.best_step = bits, progress.step
        checkpoint.write(run.best, state.meta(), state.tensors())


def _sample(state: State, run: RunDirectory) -> None:
    """A grid from latents that are the same all along, so that one sees each image take shape."""
    z = state.flow.draw_latents(SAMPLES, generator(state.config.seed, Stream.LATENTS))
    try:
        samples = state.evaluated.decode(z)
    except FloatingPointError as error:
        console.print(f"step {state.progress.step}: no sample grid: {error}")
        return
    picture = images.grid(samples, state.flow.levels, columns=8)
    images.save_png(run.samples / f"step-{state.progress.step:08d}.png", picture)
    run.tensorboard.add_image("samples", picture, state.progress.step)


def _log(state: State, run: RunDirectory, grad_norm: float, rate: float, clock: "_Clock", bar: ProgressBar) -> None:
    progress, config = state.progress, state.config.train
    done: float
    total: float
    bits = progress.window_bits / progress.window_steps
    progress.window_bits, progress.window_steps = 0.0, 0
    speed = clock.images_per_second()
    row = {"step": progress.step, "images": progress.images, "seconds": progress.seconds, "split": "train"}
    run.log({**row, "bits_per_dim": bits, "grad_norm": grad_norm, "lr": rate, "images_per_second": speed})
    if config.num_steps is not None:
        done, total = progress.step, config.num_steps
        left = progress.seconds / max(progress.step, 1) * (total - done)
        of = f"/{total}"
    else:
        assert config.budget is not None
        done, total, of = progress.seconds, config.budget, ""
        left = total - done
    text = f"{bits:.4f} bits/dim  {speed:.0f} images/s  {duration(left)} left"
    bar(done, total, text)
    if not console.is_terminal:
        console.print(f"step {progress.step}{of}: train {text}  lr {rate:.2e}  gradient {grad_norm:.2f}")


def _save(state: State, run: RunDirectory, numbered: bool) -> None:
    run.save_last(state.meta(), state.tensors(), state.config.train.keep_checkpoints, numbered)
    progress = state.progress
    run.write_json(
        "summary.json",
        {
            "step": progress.step,
            "images": progress.images,
            "seconds": progress.seconds,
            "finished": state.progress.finished,
            "best_validation_bits_per_dim": progress.best,
            "best_step": progress.best_step,
            "parameters": sum(p.numel() for p in state.flow.parameters()),
            "non_finite_steps": progress.non_finite,
            "versions": checkpoint.versions(),
            "device": str(state.flow.device),
        },
    )


def _go_back(state: State, run: RunDirectory, x: Tensor, loss: float, grad_norm: float, rate: float) -> None:
    """After a loss or gradient that is not finite: evidence, the last good state, half the rate; or the end."""
    failed_step = state.progress.step
    layer = first_non_finite(state.flow, x, draw_noise(x.shape, _noise_generator(state), x.device))
    where = layer or "no layer, when computed again in float32"
    events = state.progress.non_finite + 1
    evidence = run.write_json(
        f"non-finite-{events}.json",
        {"step": failed_step, "loss": str(loss), "grad_norm": str(grad_norm), "lr": rate, "first_non_finite": layer},
    )
    console.print(f"step {failed_step}: loss {loss}, gradient norm {grad_norm}: first not finite: {where} ({evidence})")
    lr_scale = state.progress.lr_scale / 2
    # The best checkpoint stays, though it may be of a later step.
    kept = {key: getattr(state.progress, key) for key in ("seconds", "best", "best_step")}
    state.restore(checkpoint.read(run.last))
    state.progress = dataclasses.replace(state.progress, **kept, non_finite=events, lr_scale=lr_scale)
    run.cut_back(state.progress.step, state.config)
    _save(state, run, numbered=False)
    limit = state.config.train.max_non_finite
    if events > limit:
        raise RunError(
            f"{run.path}: stopped at step {failed_step}: {events} steps not finite (train.max_non_finite: {limit}); "
            f"the first value that was not: {where}. The checkpoints are from before. Evidence: {evidence}. "
            "Lower train.lr, set train.clip_norm, or use more train.warmup_steps"
        )
    console.print(f"back at step {state.progress.step}, with the learning rate times {lr_scale:g}")


# --- starting and resuming --------------------------------------------------------------------------------------------


def _checkpoint_to_resume(config: Config, run: RunDirectory, resume: str) -> Checkpoint | None:
    if resume == "never":
        if run.holds_a_run():
            raise UserError(f"--resume never: {run.path} holds a run; choose another --run-dir, or remove it")
        return None
    if resume == "auto":
        if not run.last.exists():
            return None
        saved = checkpoint.read(run.last)
    else:
        path = checkpoint.find(resume)
        saved = checkpoint.read(path)
        if run.holds_a_run() and path.resolve().parent != run.checkpoints.resolve():
            raise UserError(
                f"--resume {resume}: {run.path} holds another run; choose another --run-dir, "
                "or leave --resume out to go on with that run"
            )
    for key, there, here in differences(saved.meta["config"], config.resolved()):
        # From a checkpoint that the user names, another schedule may be asked for; never another model or other data.
        if key in FREE_KEYS or (resume != "auto" and key.startswith("train.") and key != "train.optimizer"):
            continue
        raise UserError(
            f"{key}: {saved.path} has {there!r}, this command {here!r}: to start anew choose another --run-dir; "
            "to go on, use the run's configuration"
        )
    if (saved.meta["config"]["train"]["ema"] > 0) != (config.train.ema > 0):
        raise UserError(f"train.ema: {saved.path} was trained with {saved.meta['config']['train']['ema']}")
    return saved


def _start(
    config: Config,
    flow: Flow,
    fingerprint: dict[str, Any],
    saved: Checkpoint | None,
    init_from: str | None,
    batches: Batches,
) -> State:
    """The state of step 0, or of a checkpoint."""
    if saved is None:
        if init_from is not None:
            checkpoint.load_weights(flow, checkpoint.read(checkpoint.find(init_from)))
        x = next(batches.starting_at(0))
        initialize(flow, x, draw_noise(x.shape, generator(config.seed, Stream.DEQUANTIZATION), x.device))
    averaged = average(flow, config.train.ema) if config.train.ema else None
    state = State(config, flow, build_optimizer(flow, config.train), averaged, fingerprint)
    if saved is not None:
        changed = differences(saved.meta["data"], fingerprint)
        if changed:
            key, there, here = changed[0]
            raise UserError(
                f"data: not the images that {saved.path} was trained on: {key} was {there!r} and is {here!r}"
            )
        state.restore(saved)
        # A checkpoint that the user names may be of a run that was to be shorter, or longer.
        if config.train.num_steps is not None or not state.reached_end():
            state.progress.finished = state.reached_end()
    return state


def _announce(state: State, run: RunDirectory, data: DataSet, batches: Batches, saved: Checkpoint | None) -> None:
    parameters = sum(p.numel() for p in state.flow.parameters())
    fingerprint = state.data
    console.print(
        f"{state.config.model.name}: {parameters:,} parameters on {batches.device}; {data.config.name}: "
        f"{fingerprint['train']:,} images to train on, {fingerprint['validation']:,} to validate, "
        f"{'x'.join(map(str, data.shape))}, {data.levels} levels{', streamed' if batches.streams else ''}"
    )
    if saved is None:
        console.print(f"run directory: {run.path}")
    else:
        console.print(f"run directory: {run.path}, going on from {saved.path} at step {state.progress.step}")


# --- signals and time -------------------------------------------------------------------------------------------------


class _Stop:
    """The signal that asked for the end, 0 before."""

    signum: int = 0

    @property
    def name(self) -> str:
        return signal.Signals(self.signum).name

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        # Not through rich, which may be in the middle of printing, or of an import.
        with contextlib.suppress(OSError):  # nobody reads
            os.write(1, f"{self.name}: finishing the step and saving\n".encode())


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()
    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class _Clock:
    """Adds the wall-clock time to the progress, and measures the speed of training alone."""

    def __init__(self, state: State):
        self.state = state
        self.last = time.perf_counter()
        self.window_images = 0
        self.window_seconds = 0.0

    def _elapsed(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        self.state.progress.seconds += elapsed
        return elapsed

    def tick(self, images: int) -> None:
        """A step is done."""
        self.window_seconds += self._elapsed()
        self.window_images += images

    def skip(self) -> None:
        """Something else is done: validation, a grid. It counts as time of the run, not of training."""
        self._elapsed()

    def images_per_second(self) -> float:
        speed = self.window_images / max(self.window_seconds, 1e-9)
        self.window_images, self.window_seconds = 0, 0.0
        return speed

"""Training: the loop, resuming, signals, and what happens to a number that is not finite."""

import contextlib
import dataclasses
import hashlib
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from flowtrain import config as configuration
from flowtrain.bijections import MaskedAutoregressive
from flowtrain.bijections.memory import Mode, memory_mode
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import find, load_weights
from flowtrain.config import Config, differences
from flowtrain.data.batches import Batches
from flowtrain.data.splits import DataSet, Split, levels_in_words
from flowtrain.errors import Interrupted, RunError, UserError
from flowtrain.evaluation.layers import first_non_finite, log_scale_ranges
from flowtrain.evaluation.score import mean_loss
from flowtrain.flow.dequantize import draw_noise
from flowtrain.flow.flow import Flow, initialize
from flowtrain.optim import Average, build_optimizers, learning_rate
from flowtrain.pictures import draw, grid
from flowtrain.run import RunDirectory
from flowtrain.state import State
from flowtrain.system import distributed
from flowtrain.system.console import ProgressBar, console, duration
from flowtrain.system.device import send
from flowtrain.system.random import Stream, generator

STOPPING = (signal.SIGINT, signal.SIGTERM)
RANGES_BATCH = 64  # images on which log-scale ranges are measured

# Where the data lie and how they are read may change between two parts of a run; what they are may not.
FREE_KEYS = {"data.root", "data.path", "data.max_in_memory", "data.workers"}
# These may too, where with the number of processes they come to as many images a step.
SPLIT_KEYS = {"train.batch_size", "train.accumulate"}
NOISE_BLOCK = 512  # images whose noise comes from one generator


def train_step(state: State, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of a batch's mean loss (see `Flow.loss`); returns it and the gradient's norm, 0-dimensional.

    `x` holds `accumulate` times `batch_size` images: this process's part of the batch, as the loss is its part's. The
    gradient is that of the batch of all processes. The noise belongs to the seed and the step. With `labels` `(B,)` the
    loss is that of the class-conditional likelihood.
    """
    config = state.config.train
    noise = _noise(state.config, state.progress.step, x, distributed.rank() * len(x))
    state.zero_grad()
    loss = torch.zeros((), device=x.device)
    left = len(x)
    parts = [x.split(config.batch_size), noise.split(config.batch_size)]
    parts.append([None] * len(parts[0]) if labels is None else labels.split(config.batch_size))
    for part, part_noise, part_labels in zip(*parts, strict=True):
        left -= len(part)
        with distributed.accumulating(state.parallel, more=left > 0), memory_mode(config.memory):
            with _precision(config.precision, x.device):
                log_prob = state.parallel(part, part_noise, part_labels).total
            part_loss = state.flow.loss(log_prob).sum() / len(x)
            part_loss.backward()
        loss = loss + part_loss.detach()
    gradients = [p.grad for p in state.flow.parameters() if p.grad is not None]
    return loss, torch.nn.utils.get_total_norm(gradients)


def optimizer_step(state: State, grad_norm: Tensor) -> None:
    """Moves the weights along the gradient, clipped to the configured norm, and their average after them."""
    if state.config.train.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(state.flow.parameters(), state.config.train.clip_norm, grad_norm)
    for optimizer in state.optimizers:
        optimizer.step()
    if state.average is not None:
        state.average.update(state.progress.averaged)
        state.progress.averaged += 1


def _noise(config: Config, step: int, x: Tensor, start: int) -> Tensor:
    """The noise for `x`, the images from `start` on of the batch of all processes in a step.

    A generator serves a block of images, so that a process draws little beside its own part, however many there are.
    """
    stop = start + len(x)
    blocks = []
    for block in range(start // NOISE_BLOCK, math.ceil(stop / NOISE_BLOCK)):
        count = min(stop - block * NOISE_BLOCK, NOISE_BLOCK)
        random = generator(config.seed, Stream.DEQUANTIZATION, step, *([block] if block else []))
        blocks.append(draw_noise((count, *x.shape[1:]), random, torch.device("cpu")))
    return send(torch.cat(blocks)[start % NOISE_BLOCK :], x.device)


def _precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 for the conditioners; the data path casts back and does its own products in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


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
    flow = build_flow(config, data.shape, data.levels)
    require_trainable(flow, config)
    with run.locked():
        saved = _checkpoint_to_resume(config, run, resume)
        if saved is not None and resume == "auto" and saved.meta["progress"]["finished"]:
            console.print(f"{run.path} is finished (step {saved.meta['step']}): nothing to do")
            return
        console.print(f"reading {config.data.name}")
        with distributed.one_first():  # it may download
            batches = Batches(data, config, config.train.batch_size * config.train.accumulate, device)
            validation = data.split("validation")
        fingerprint = data.fingerprint
        if batches.labels is not None:
            fingerprint["labels"] = hashlib.sha256(batches.labels.numpy().data).hexdigest()
        _require_same_everywhere(config, fingerprint)
        state = _start(config, flow.to(device), fingerprint, saved, init_from, batches)
        # Until here a signal ends the process at once: there is nothing to save.
        with _signals() as stop:
            run.begin(config)
            run.cut_back(state.progress.step, config)
            _announce(state, run, data, batches, saved)
            if saved is None or saved.path.resolve() != run.last.resolve():
                # The last good state, from the start: `last` may not exist yet, or be later than the one resumed from.
                if not distributed.from_main(run.best.exists):
                    state.progress.best = state.progress.best_step = None  # it was another run's
                _save(state, run, numbered=False)
            distributed.ready()  # what could not be written has been said
            advice = f"{run.last} is the last checkpoint, and good: the same command goes on from there"
            with (
                distributed.losing_a_process(advice),
                ProgressBar("training", seconds_between_lines=math.inf) as bar,
            ):
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
        for x, labels in batches.labelled_from(state.progress.step, state.progress.images):
            own_loss, gradient = train_step(state, x, labels)
            loss, grad_norm = _agree(state, clock, stop, own_loss, gradient)
            rate = learning_rate(config, state.progress.step, state.progress.seconds) * state.progress.lr_scale
            if not math.isfinite(loss + grad_norm):
                _go_back(state, run, x, loss, grad_norm, rate)
                break  # the order of the batches starts again from the step that was restored
            state.set_learning_rate(rate)
            optimizer_step(state, gradient)
            progress = state.progress
            progress.step += 1
            progress.images += batches.all_processes
            progress.window_loss += loss
            progress.window_steps += 1
            ends = state.reached_end()  # by the time that all have agreed on
            clock.tick(batches.all_processes)
            validates = ends or progress.step % config.validate_every == 0
            periodic = ends or progress.step % config.checkpoint_every == 0
            # A finite gradient may still have taken a weight to infinity: no such state is ever saved.
            if (validates or periodic or stop.signum) and not state.weights_are_finite():
                _go_back(state, run, x, loss, grad_norm, rate)
                break
            if stop.signum and validates and not ends:
                _save(state, run, numbered=False)  # at once: who asks for the end may not wait for a validation
            progress.finished = ends
            if ends or progress.step % config.log_every == 0:
                _log(state, run, grad_norm, rate, clock, bar)
            if validates:
                _validate(state, run, validation)
            if ends or progress.step % config.sample_every == 0:
                _sample(state, run, validation if len(validation) else batches.source)
            clock.skip()
            if periodic or stop.signum:
                _save(state, run, numbered=periodic)
                clock.skip()
            if ends or stop.signum:
                break


def _agree(state: State, clock: "_Clock", stop: "_Stop", loss: Tensor, grad_norm: Tensor) -> tuple[float, float]:
    """What all processes go by from here on: the batch's loss, the gradient's norm, process 0's clock, any signal."""
    means = [value / distributed.world() for value in torch.stack([loss, grad_norm]).tolist()]  # waits for the device
    clock.tick()
    seconds = state.progress.seconds if distributed.is_main() else 0.0
    asked = [float(stop.asked == signum) for signum in STOPPING]
    loss_mean, norm_mean, state.progress.seconds, *asked = distributed.total([*means, seconds, *asked])
    stop.signum = next((signum for signum, count in zip(STOPPING, asked, strict=True) if count), 0)
    return loss_mean, norm_mean


def _validate(state: State, run: RunDirectory, validation: Split) -> None:
    if len(validation) == 0:
        return
    progress = state.progress
    flow = state.evaluated
    loss = mean_loss(flow, validation, seed=state.config.seed)
    row = {"step": progress.step, "images": progress.images, "seconds": progress.seconds, "split": "validation"}
    run.log({**row, "bits_per_dim": None, flow.metric: loss if math.isfinite(loss) else None})
    _log_ranges(state, run, validation)
    best = math.isfinite(loss) and (progress.best is None or loss < progress.best)
    console.print(f"step {progress.step}: validation {loss:.4f} {flow.unit}{' (best)' if best else ''}")
    if best:
        progress.best, progress.best_step = loss, progress.step
        run.save_best(state.meta(), state.tensors())


@distributed.main_only
def _log_ranges(state: State, run: RunDirectory, validation: Split) -> None:
    x = validation.take(slice(0, RANGES_BATCH)).to(state.flow.device)
    noise = draw_noise(x.shape, generator(state.config.seed, Stream.EVALUATION), x.device)
    for name, (low, high) in log_scale_ranges(state.evaluated, x, noise).items():
        run.tensorboard.add_scalar(f"validation_log_scale_min/{name}", low, state.progress.step)
        run.tensorboard.add_scalar(f"validation_log_scale_max/{name}", high, state.progress.step)


@distributed.main_only
def _sample(state: State, run: RunDirectory, beside: Split) -> None:
    """A picture from latents that are the same all along, so that one sees each image take shape."""
    z = state.flow.draw_latents(draw.default_count(state.flow), generator(state.config.seed, Stream.LATENTS))
    flow, seed = state.evaluated, state.config.seed
    try:
        samples = flow.decode(flow.place(z))
        picture = draw.samples(flow, samples, 8, seed, lambda: beside.take(slice(0, draw.POINTS)))
    except (FloatingPointError, UserError) as error:
        console.print(f"step {state.progress.step}: no picture of samples: {error}")
        return
    grid.save_png(run.samples / f"step-{state.progress.step:08d}.png", picture)
    run.tensorboard.add_image("samples", picture, state.progress.step)


def _log(state: State, run: RunDirectory, grad_norm: float, rate: float, clock: "_Clock", bar: ProgressBar) -> None:
    progress, config = state.progress, state.config.train
    done: float
    total: float
    loss = progress.window_loss / progress.window_steps
    progress.window_loss, progress.window_steps = 0.0, 0
    speed = clock.images_per_second()
    row = {"step": progress.step, "images": progress.images, "seconds": progress.seconds, "split": "train"}
    gradient = {"grad_norm": grad_norm, "clip_norm": config.clip_norm}
    loss_row = {"bits_per_dim": None, state.flow.metric: loss}
    run.log({**row, **loss_row, **gradient, "lr": rate, "images_per_second": speed, **_of_layers(state.flow)})
    if config.num_steps is not None:
        done, total = progress.step, config.num_steps
        left = progress.seconds / max(progress.step, 1) * (total - done)
        of = f"/{total}"
    else:
        assert config.budget is not None
        done, total, of = progress.seconds, config.budget, ""
        left = total - done
    text = f"{loss:.4f} {state.flow.unit}  {speed:.0f} images/s  {duration(left)} left"
    bar(done, total, text)
    if not console.is_terminal:
        clipped = f" (clipped to {config.clip_norm:g})" if 0 < config.clip_norm < grad_norm else ""
        console.print(f"step {progress.step}{of}: train {text}  lr {rate:.2e}  gradient {grad_norm:.2f}{clipped}")


def _of_layers(flow: Flow) -> dict[str, float]:
    """What layers with a method `metrics() -> dict[str, float]` say of the last step; the mean of those who say it."""
    said: dict[str, list[float]] = {}
    for module in flow.modules():
        if (metrics := getattr(module, "metrics", None)) is not None:
            for name, value in metrics().items():
                said.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in said.items()}


@distributed.main_only
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
            "best_validation_bits_per_dim": None,
            f"best_validation_{state.flow.metric}": progress.best,
            "best_step": progress.best_step,
            "parameters": sum(p.numel() for p in state.flow.parameters()),
            "non_finite_steps": progress.non_finite,
            "versions": checkpoint_format.versions(),
            "device": str(state.flow.device),
        },
    )


def _go_back(state: State, run: RunDirectory, x: Tensor, loss: float, grad_norm: float, rate: float) -> None:
    """After a loss or gradient that is not finite: evidence, the last good state, half the rate; or the end."""
    failed_step = state.progress.step
    noise = _noise(state.config, failed_step, x, distributed.rank() * len(x))
    layers = [layer for layer in distributed.exchange(first_non_finite(state.flow, x, noise)) if layer]
    # A gradient is that of all processes, an output that of the one with the image to blame.
    layer = next((layer for layer in layers if not layer.startswith("gradient")), layers[0] if layers else None)
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
    last = checkpoint_format.read_by_main(lambda: run.last)
    assert last is not None
    state.restore(last)
    state.progress = dataclasses.replace(state.progress, **kept, non_finite=events, lr_scale=lr_scale)
    run.cut_back(state.progress.step, state.config)
    _save(state, run, numbered=False)
    distributed.ready()  # when that is done
    limit = state.config.train.max_non_finite
    if events > limit:
        raise RunError(
            f"{run.path}: stopped at step {failed_step}: {events} steps not finite (train.max_non_finite: {limit}); "
            f"the first value that was not: {where}. The checkpoints are from before. Evidence: {evidence}. "
            "Lower train.lr, set train.clip_norm, or use more train.warmup_steps"
        )
    console.print(f"back at step {state.progress.step}, with the learning rate times {lr_scale:g}")


# --- starting and resuming --------------------------------------------------------------------------------------------


def is_trainable(flow: Flow, memory: Mode, precision: str) -> bool:
    """Whether this memory mode gives the flow right gradients."""
    autoregressive = any(isinstance(module, MaskedAutoregressive) for module in flow.modules())
    return not (autoregressive and memory == "reversible" and precision == "bf16")


def require_trainable(flow: Flow, config: Config) -> None:
    """Raises `UserError` for a memory mode that would give this flow wrong gradients."""
    if not is_trainable(flow, config.train.memory, config.train.precision):
        raise UserError(
            "train.memory: reversible computes the input of an autoregressive layer again in float32, but its output "
            "was computed in bf16: set train.precision=fp32, or another train.memory"
        )


def _require_same_everywhere(config: Config, fingerprint: dict[str, Any]) -> None:
    """Raises `UserError` where the processes of several machines have other configurations or images."""
    described = distributed.exchange({**config.resolved(), "images": fingerprint})
    for rank, other in enumerate(described):
        for key, here, there in differences(described[0], other):
            if key not in FREE_KEYS:
                raise UserError(f"{key}: process 0 has {here!r}, process {rank} {there!r}")


def _path_to_resume(run: RunDirectory, resume: str) -> Path | None:
    if resume == "never":
        if run.holds_a_run():
            raise UserError(f"--resume never: {run.path} holds a run; choose another --run-dir, or remove it")
        return None
    if resume == "auto":
        return run.last if run.last.exists() else None
    path = find(resume)
    if run.holds_a_run() and path.resolve().parent != run.checkpoints.resolve():
        raise UserError(
            f"--resume {resume}: {run.path} holds another run; choose another --run-dir, "
            "or leave --resume out to go on with that run"
        )
    return path


def _checkpoint_to_resume(config: Config, run: RunDirectory, resume: str) -> Checkpoint | None:
    saved = checkpoint_format.read_by_main(lambda: _path_to_resume(run, resume))
    if saved is None:
        return None
    free = set(FREE_KEYS)
    if _images_of_a_step(saved.meta["config"]["train"], saved.meta.get("processes", 1)) == _images_of_a_step(
        config.resolved()["train"], distributed.world()
    ):
        free |= SPLIT_KEYS
    # With the defaults of keys that are newer than the checkpoint.
    earlier = configuration.parse(saved.meta["config"], str(saved.path)).resolved()
    for key, there, here in differences(earlier, config.resolved()):
        # From a checkpoint that the user names, another schedule may be asked for; never another model or other data.
        if key in free or (resume != "auto" and key.startswith("train.") and key != "train.optimizer"):
            continue
        raise UserError(
            f"{key}: {saved.path} has {there!r}, this command {here!r}: to start anew choose another --run-dir; "
            "to go on, use the run's configuration"
        )
    if (saved.meta["config"]["train"]["ema"] > 0) != (config.train.ema > 0):
        raise UserError(f"train.ema: {saved.path} was trained with {saved.meta['config']['train']['ema']}")
    return saved


def _images_of_a_step(train: dict[str, Any], processes: int) -> int:
    return train["batch_size"] * train["accumulate"] * processes


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
        _initialize(config, flow, init_from, batches)
        distributed.copy_from_main(flow)
    averaged = Average(flow, config.train.ema) if config.train.ema else None
    state = State(config, flow, build_optimizers(flow, config.train), averaged, fingerprint)
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


@distributed.main_only
def _initialize(config: Config, flow: Flow, init_from: str | None, batches: Batches) -> None:
    if init_from is not None:
        load_weights(flow, checkpoint_format.read(find(init_from)))
    x = batches.first_of_all()
    initialize(flow, x, _noise(config, step=0, x=x, start=0))


def _announce(state: State, run: RunDirectory, data: DataSet, batches: Batches, saved: Checkpoint | None) -> None:
    parameters = sum(p.numel() for p in state.flow.parameters())
    fingerprint = state.data
    processes = f", {distributed.world()} processes" if distributed.world() > 1 else ""
    console.print(
        f"{state.config.model.name}: {parameters:,} parameters on {batches.device}{processes}; {data.config.name}: "
        f"{fingerprint['train']:,} images to train on, {fingerprint['validation']:,} to validate, "
        f"{'x'.join(map(str, data.shape))}, {levels_in_words(data.levels)}{', streamed' if batches.streams else ''}"
    )
    if saved is None:
        console.print(f"run directory: {run.path}")
    else:
        console.print(f"run directory: {run.path}, going on from {saved.path} at step {state.progress.step}")


# --- signals and time -------------------------------------------------------------------------------------------------


class _Stop:
    """The signal that asked for the end, 0 before: `asked` this process, `signum` all of them."""

    asked: int = 0
    signum: int = 0

    @property
    def name(self) -> str:
        return signal.Signals(self.signum).name

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        first = not self.asked
        self.asked = signum
        if distributed.world() == 1:  # nobody to agree with
            self.signum = signum
        # torchrun hands on to every process what it gets, and Ctrl-C reaches them anyway.
        if not distributed.is_main() or (distributed.world() > 1 and not first):
            return
        # Not through rich, which may be in the middle of printing, or of an import.
        with contextlib.suppress(OSError):  # nobody reads
            os.write(1, f"{signal.Signals(signum).name}: finishing the step and saving\n".encode())


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()
    before = {signum: signal.signal(signum, stop) for signum in STOPPING}
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

    def tick(self, images: int = 0) -> None:
        """A part of a step is done, the last one with its number of images."""
        self.window_seconds += self._elapsed()
        self.window_images += images

    def skip(self) -> None:
        """Something else is done: validation, a grid. It counts as time of the run, not of training."""
        self._elapsed()

    def images_per_second(self) -> float:
        speed = self.window_images / max(self.window_seconds, 1e-9)
        self.window_images, self.window_seconds = 0, 0.0
        return speed

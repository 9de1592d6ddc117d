"""Starting a run, or resuming one from a checkpoint."""

import contextlib
import json
import shlex
from pathlib import Path
from typing import Any, Literal

from flowtrain import config as configuration
from flowtrain.bijections import Continuous
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import find, load_weights
from flowtrain.config import Config, Data, Model, Train, component_name, differences
from flowtrain.data.batches import Batches
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError, cut, shown
from flowtrain.flow.flow import Flow, initialize
from flowtrain.system import distributed
from flowtrain.system.console import console, counted, duration
from flowtrain.system.threads import as_before
from flowtrain.training.optim import EMA, build_optimizers
from flowtrain.training.run_directory import RunDirectory
from flowtrain.training.state import State
from flowtrain.training.step import dequantization_noise

SHOWN = 3  # checkpoints in the message about a damaged one; each is read to check it

# These may differ between two parts of a run: where the data lie and how they are read, how a step
# is computed, and where its charts go.
FREE_KEYS = {"data.root", "data.path", "data.max_in_memory", "data.workers"}
FREE_KEYS |= {"train.compile", "train.cuda_graph", "train.logger"}

# In place of a word of `--resume`: resume the last checkpoint with another length of the run.
EXTEND = "--extend"
LENGTH_KEYS = {"train.num_steps", "train.budget"}

# These may change if, with the number of processes, a step has as many images as before.
SPLIT_KEYS = {"train.batch_size", "train.accumulate"}


def require_same_everywhere(config: Config, fingerprint: dict[str, Any]) -> None:
    """Raises `UserError` if several processes have different configurations or images."""
    described = distributed.all_gather_object({**config.resolved(), "images": fingerprint})
    for rank, other in enumerate(described):
        for key, here, there in differences(described[0], other):
            # The gradients of a CUDA graph are averaged in one piece, others in several.
            if key not in FREE_KEYS - {"train.cuda_graph"}:
                raise UserError(f"{key}: process 0 has {here!r}, process {rank} {there!r}")


def _path_to_resume(run: RunDirectory, resume: str) -> Path | None:
    if resume == "never":
        if run.holds_a_run():
            raise UserError(
                f"--resume never: {run.path} holds a run; choose another --run-dir, or remove it"
            )
        return None
    if resume in ("auto", EXTEND):
        if run.last.exists():
            return run.last
        if any(run.checkpoints.glob(f"*{checkpoint_format.SUFFIX}")):
            raise UserError(f"{run.last}: it is missing\n{_sound_checkpoints(run, resume)}")
        if resume == EXTEND:
            raise UserError(f"--extend: {run.path} holds no run to continue")
        return None
    path = find(resume)
    if run.last.exists() and path.resolve().parent != run.checkpoints.resolve():
        raise UserError(
            f"--resume {resume}: {run.path} holds another run; choose another --run-dir, "
            "or leave --resume out to continue that run"
        )
    # One name for one file, because other processes cannot look.
    return run.last if path.resolve() == run.last.resolve() else path


def checkpoint_to_resume(config: Config, run: RunDirectory, resume: str) -> Checkpoint | None:
    """The checkpoint for `--resume`; None for a new run.

    Raises `UserError` if the checkpoint or the run directory does not fit the configuration.
    """
    try:
        saved = checkpoint_format.read_by_main(lambda: _path_to_resume(run, resume))
    except UserError as error:
        if resume not in ("auto", EXTEND):
            raise
        if not distributed.is_main():
            distributed.barrier()  # process 0, which has the files, ends all with its message
        if not run.last.exists():
            raise
        raise UserError(f"{error}\n{_sound_checkpoints(run, resume)}") from error
    if saved is None:
        return None
    if saved.meta["progress"] is None:
        raise UserError(
            f"{saved.path}: it holds only a model, and no state of training to continue; "
            f"--init-from starts a run from its weights"
        )
    if resume == EXTEND:
        _require_longer(config.train, saved)
    # The rest of the configuration is only parsed if the names equal this command's.
    for base in (Data, Model):
        there, here = component_name(base, saved.meta["config"]), getattr(config, base.section).name
        if there != here:
            raise _other_values(saved.path, [(f"{base.section}.name", there, here)])
    earlier = _earlier(saved)
    before = _images_of_a_step(earlier.train, saved.meta["processes"])
    now = _images_of_a_step(config.train, distributed.world())
    free = FREE_KEYS | (SPLIT_KEYS if before == now else set())
    changed = [each for each in _changes(earlier, config) if each[0] not in free]
    # With --extend, or with a checkpoint that the user names, the schedule may change.
    if wrong := [each for each in changed if resume == "auto" or not _is_schedule(each[0])]:
        raise _other_values(saved.path, wrong)
    if (earlier.train.ema > 0) != (config.train.ema > 0):
        raise UserError(f"train.ema: {saved.path} was trained with {earlier.train.ema}")
    return saved


def _require_longer(train: Train, saved: Checkpoint) -> None:
    step, seconds = saved.meta["step"], saved.meta["progress"]["seconds"]
    if train.num_steps is not None and train.num_steps <= step:
        raise UserError(f"--extend: {saved.path} is at step {step}: give a larger train.num_steps")
    if train.budget is not None and train.budget <= seconds:
        raise UserError(
            f"--extend: {saved.path} has used {duration(seconds)}: give a larger train.budget"
        )


def _sound_checkpoints(run: RunDirectory, resume: str) -> str:
    """Advice for a damaged last checkpoint: up to `SHOWN` sound ones of the run, newest first, and
    the command that resumes the newest.
    """
    files = [run.best, *run.checkpoints.glob(f"step-*{checkpoint_format.SUFFIX}")]
    written = [file for file in files if file.is_file()]
    sound: list[tuple[int, Path]] = []
    for file in sorted(written, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(UserError):
            sound.append((checkpoint_format.read(file).meta["step"], file))
        if len(sound) == SHOWN:
            break
    if not sound:
        return "no other checkpoint of this run is sound: to start anew, remove the directory"
    step, newest = max(sound, key=lambda pair: pair[0])
    named = ", ".join(f"{file.name} (step {step})" for step, file in sound)
    where = "in place of --extend" if resume == EXTEND else "to the command"
    return (
        f"sound checkpoints of this run: {named}\n"
        f"to continue from step {step}, add --resume {shlex.quote(str(newest))} {where}"
    )


Change = tuple[str, object, object]  # a key, its value in the checkpoint, and in this command


def _changes(earlier: Config, config: Config) -> list[Change]:
    return differences(earlier.resolved(), config.resolved())


def _is_schedule(key: str) -> bool:
    return key.startswith("train.") and key not in ("train.optimizer", "train.clock")


def _other_values(path: Path, changes: list[Change]) -> UserError:
    extend = all(_is_schedule(key) for key, _, _ in changes)
    return UserError(
        f"{path} was trained with {_words(changes, 1)}, and this command has {_words(changes, 2)}\n"
        f"to continue this run, give its values"
        + (", or add --extend for those of this command" if extend else "")
        + "; to start anew, choose another --run-dir"
    )


def _words(changes: list[Change], which: Literal[1, 2]) -> str:
    """The values on one side as `KEY=VALUE` for a command line. Of the two keys for the length of a
    run, only one has a value.
    """
    return " ".join(
        f"{key}={_word(key, change[which])}"
        for change in changes
        if (key := change[0]) not in LENGTH_KEYS or change[which] is not None
    )


def _word(key: str, value: object) -> str:
    if key == "train.budget":
        return f"{str(value).removesuffix('.0')}s"
    return shlex.quote(cut(value if isinstance(value, str) else json.dumps(value)))


def _earlier(saved: Checkpoint) -> Config:
    """The configuration of a checkpoint, with the defaults of keys that are newer than it. Its data
    set and model are this command's, which the user trusts.
    """
    return configuration.parse(saved.meta["config"], str(saved.path), trust_code=True)


def _images_of_a_step(train: Train, processes: int) -> int:
    return train.batch_size * train.accumulate * processes


def start(
    config: Config,
    flow: Flow,
    fingerprint: dict[str, Any],
    saved: Checkpoint | None,
    init_from: str | None,
    batches: Batches,
) -> State:
    """The state of step 0, or of a checkpoint. Raises `UserError` if the data have changed."""
    if saved is None:
        _initialize(config, flow, init_from, batches)
        distributed.copy_from_main(flow)
    ema = EMA(flow, config.train.ema) if config.train.ema else None
    state = State(config, flow, build_optimizers(flow, config.train), ema, fingerprint)
    if saved is not None:
        changed = differences(saved.meta["data"], fingerprint)
        if changed:
            key, there, here = changed[0]
            raise UserError(
                f"data: not the images that {saved.path} was trained on: {cut(key)} was "
                f"{shown(there)} and is {shown(here)}"
            )
        state.restore(saved)
        saved.tensors.clear()  # their memory is free for the run
        # With another number of processes, sums differ in any case.
        if state.flow.device.type == "cpu" and saved.meta["processes"] == distributed.world():
            threads = saved.meta["threads"]
            if threads and (said := as_before(threads)):
                console.print(said, style="dim")
        # A checkpoint that the user names may belong to a shorter or longer schedule.
        ended = state.reached_end(state.progress.seconds)
        if config.train.num_steps is not None or not ended:
            state.progress.finished = ended
    return state


@distributed.main_only
def _initialize(config: Config, flow: Flow, init_from: str | None, batches: Batches) -> None:
    if init_from is not None:
        found = checkpoint_format.read(find(init_from))
        try:
            weights = load_weights(flow, found)
        except UserError as error:
            advice = "name its configuration by --config, and your data by data.name and data.path"
            raise UserError(f"--init-from: {error}: {advice}") from None
        console.print(
            f"--init-from: starts from the {weights} weights of {found.path}, step "
            f"{found.meta['step']:,}"
        )
    x = batches.first_of_all(flow.initialization_images)
    initialize(flow, x, dequantization_noise(config, 0, x))


def announce(
    state: State, run: RunDirectory, data: DataSet, batches: Batches, saved: Checkpoint | None
) -> None:
    """Prints model, data, and run directory."""
    parameters = sum(p.numel() for p in state.flow.parameters())
    fingerprint, context = state.data, state.flow.image_context
    given = "" if context is None else f" of images given {context.words}"
    processes = f", {distributed.world()} processes" if distributed.world() > 1 else ""
    console.print(
        f"{state.config.model.name}{given}: {parameters:,} parameters on "
        f"{batches.device}{processes}; {data.config.name}: {fingerprint['train']:,} images to "
        f"train on, {fingerprint['validation']:,} to validate, {'x'.join(map(str, data.shape))}, "
        f"{data.kind.words}{', streamed' if batches.streams else ''}"
    )
    if data.kind.num_bins is not None and (reason := state.flow.kind.no_bits):
        console.print(f"no bits/dim: {reason}; losses are in {state.flow.kind.unit}")
    if edition := fingerprint.get("edition"):
        console.print(edition)
    if equal := fingerprint.get("duplicates"):
        console.print(
            f"{equal:,} of these images equal an earlier one; equal images are either all "
            f"trained on or all held out"
        )
    in_a_step, in_all = batches.all_processes, len(batches.source)
    if in_a_step > in_all:
        console.print(
            f"a step takes {in_a_step:,} images, so each of the {in_all:,} to train on "
            f"{in_a_step / in_all:,.1f} times on average"
        )
    if saved is None:
        console.print(f"run directory: {run.path}")
        return
    console.print(
        f"run directory: {run.path}, continued from {saved.path} at step {state.progress.step}"
    )
    changes = _changes(_earlier(saved), state.config)
    if changes := [each for each in changes if each[0] not in FREE_KEYS | SPLIT_KEYS]:
        console.print(f"changed from {_words(changes, 1)} to {_words(changes, 2)}")
    if (scale := state.progress.lr_scale) < 1:
        events = counted(state.progress.non_finite, "rollback")
        console.print(f"after {events}, the learning rate is multiplied by {scale:g}")
    for line in _new_division(state, saved):
        console.print(line)


def _new_division(state: State, saved: Checkpoint) -> list[str]:
    """The effect of a different batch split than in `saved`: of another number of processes,
    `train.batch_size` or `train.accumulate`.
    """
    now, world = state.config.train, distributed.world()
    before, processes = _earlier(saved).train, saved.meta["processes"]
    if (processes, before.batch_size, before.accumulate) == (world, now.batch_size, now.accumulate):
        return []
    there, here = _images_of_a_step(before, processes), _images_of_a_step(now, world)
    division = (
        f"saved by {processes} process{'es' * (processes > 1)} of {before.batch_size} x "
        f"{before.accumulate} images (train.batch_size x train.accumulate), now {world} of "
        f"{now.batch_size} x {now.accumulate}: "
    )
    if there == here:
        # The examples of a batch share the steps of the solver.
        solver = any(isinstance(layer, Continuous) for layer in state.flow.modules())
        changes = "results within the tolerances of the solver" if solver else "rounding only"
        if now.budget is not None:
            changes += "; train.budget counts seconds, so the number of steps may change"
        return [
            f"{division}a step takes {here:,} images as before, the same ones in the same order, "
            f"with the same noise and augmentation, which changes {changes}"
        ]
    used = state.progress.images
    follows = "train.lr is not scaled, and follows the clock of train.budget as before"
    if now.num_steps is not None:
        left = max(0, now.num_steps - state.progress.step)
        follows = (
            f"train.lr is not scaled, and follows the steps as before: the {left:,} steps left "
            f"take {left * here:,} images, not {left * there:,}"
        )
    return [
        f"{division}a step takes {here:,} images, not {there:,}: another run from here on",
        f"the order goes on after the {used:,} images already used, and none is skipped or "
        f"repeated; noise and augmentation of the images go on with it; {follows}",
    ]

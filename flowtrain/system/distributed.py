"""Several processes that train or evaluate one model. With one process, every function here returns
what it is given, or does nothing.

torchrun says in the environment how many processes there are and which one this is. They talk in
two ways. Tensors go through torch's process group (gloo on the CPU, nccl between GPUs). Small
facts, and the news of a failure, go through the store by which the processes found each other. So
a failure is heard even if the others wait for something else. All then end with the exit code of
the process that failed, and only that process prints its message. A process that can no longer say
that it has failed falls silent, which the others notice (`pulse.py`).
"""

import contextlib
import functools
import gc
import hashlib
import json
import logging
import math
import os
import re
import signal
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import ParamSpec, TypeVar, cast

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from flowtrain.errors import EndedElsewhere, Interrupted, RunError, UserError, exit_code
from flowtrain.system import pulse
from flowtrain.system.console import console

P = ParamSpec("P")
T = TypeVar("T")

FAILED = "failed"  # the store's key for the exit code of the first process to fail
MEETING_TIMEOUT = 600.0  # seconds
COLLECTIVE_TIMEOUT = 600.0  # seconds; more than one machine compiles longer than another
LINGER = 1.0  # seconds; torchrun sends SIGTERM to all others once one has ended with an error
GRACE = 5.0  # seconds in which a process that has lost another can end by itself
ENDING = 20.0  # seconds in which a process that has failed can; torchrun kills it after 30
CHUNK = 2**28  # bytes sent at a time

# Parts of torch's messages when the other end of a connection is gone.
_LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)


@dataclass
class _Group:
    store: dist.Store
    rank: int
    world: int
    heart: pulse.Pulse | None = None  # None only in tests
    exchanges: int = 0  # so far; the same number on every process
    advice: str = ""  # for the message about a lost process
    lost: str = ""  # that message, once there is one


_group: _Group | None = None  # None if there is one process


def launched() -> bool:
    """Whether torchrun, or a launcher like it, has started this process as one of several."""
    try:
        return int(os.environ.get("WORLD_SIZE", 1)) > 1 and int(os.environ.get("RANK", -1)) >= 0
    except ValueError:
        return False


def world() -> int:
    """How many processes work together."""
    return _group.world if _group else 1


def rank() -> int:
    """The number of this process, from 0."""
    return _group.rank if _group else 0


def is_main() -> bool:
    """Whether this is process 0, which writes and prints."""
    return rank() == 0


def main_only(function: Callable[P, None]) -> Callable[P, None]:
    """Decorates a function that writes: process 0 calls it, the others do nothing."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_main():
            function(*args, **kwargs)

    return wrapped


def local_rank() -> int:
    """The number of this process on its machine, which is the number of its GPU.

    Raises:
        UserError: if the environment does not say it.
    """
    return int(_variable("LOCAL_RANK")) if _group else 0


def local_world() -> int:
    """How many of the processes are on this machine, or 1 if the launcher does not say it."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(value) if _group and value.isdigit() else 1


def _variable(name: str) -> str:
    value = os.environ.get(name, "")
    if not value or (name != "MASTER_ADDR" and not value.isdigit()):
        raise UserError(
            f"{name}: is {value!r} in the environment, where RANK is {os.environ['RANK']} and "
            f"WORLD_SIZE {os.environ['WORLD_SIZE']}: start several processes with torchrun"
        )
    return value


# --- from the start to the end --------------------------------------------------------------------


@contextlib.contextmanager
def setup() -> Iterator[None]:
    """Joins the processes of torchrun for one command. With one process it does nothing.

    The processes leave together, process 0 last. If one fails, all end with its exit code. The
    failed one raises its own error and the others raise `EndedElsewhere`, so that the message is
    printed once.

    Raises:
        UserError: if the environment is incomplete.
        RunError: if the others cannot be reached, or one is lost on the way.
    """
    global _group
    if not launched():
        yield
        return
    _group = _join()
    if not is_main():
        console.quiet = True
        logging.getLogger("flowtrain").setLevel(logging.ERROR)
    try:
        with losing_a_process():
            try:
                yield
            except Interrupted:  # All processes were.
                _leave()
                raise
            _leave()
    except Interrupted:
        raise
    except BaseException as error:
        raise _failed(error) from error
    finally:
        _fall_silent()
        _group = None
        if dist.is_initialized():
            dist.destroy_process_group()


def _join() -> _Group:
    with _reaching_the_others():
        store, rank, world = next(rendezvous("env://"))
        meeting = _meeting(store, rank, world)
        # A connection of its own, because the processes wait for each other with the first one.
        own = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
        heart = pulse.Pulse(dist.PrefixStore(meeting, own), rank, world, _end_without)
        return _Group(dist.PrefixStore(meeting, store), rank, world, heart)


@contextlib.contextmanager
def _reaching_the_others() -> Iterator[None]:
    """Says which address was tried, where a `RunError` ends this process."""
    address = f"{_variable('MASTER_ADDR')}:{_variable('MASTER_PORT')}"
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot reach the others "
            f"through MASTER_ADDR:MASTER_PORT {address}: {str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Nothing reaches standard output. Gloo writes there in some versions of torch, such as 2.9."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def connect(device: torch.device) -> None:
    """Joins the processes for tensors on the CPU and on this device, which has been set.

    A process that takes longer than `COLLECTIVE_TIMEOUT` for its part of an exchange is lost.
    """
    if _group is None or dist.is_initialized():
        return
    between_gpus = {"cuda": "nccl", "xpu": "xccl"}.get(device.type)
    backend = "gloo" if between_gpus is None else f"cpu:gloo,{device.type}:{between_gpus}"
    with _reaching_the_others(), _no_output():
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", _group.store),
            rank=_group.rank,
            world_size=_group.world,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT),
            device_id=None if between_gpus is None else device,
        )


def _meeting(store: dist.Store, rank: int, world: int) -> str:
    """A name for these processes together, which no earlier ones had.

    torchrun's store outlives a restart of the processes, and so does what the last ones wrote, such
    as their addresses. So each process brings a new word, and process 0 collects the words until
    all have agreed to the same list.

    Raises:
        RunError: if some processes do not come.
    """
    own = uuid.uuid4().hex
    store.set(f"word/{rank}", own)
    give_up = time.monotonic() + MEETING_TIMEOUT
    while time.monotonic() < give_up:
        if rank == 0 and store.check([f"word/{other}" for other in range(world)]):
            store.set(
                "words", " ".join(store.get(f"word/{other}").decode() for other in range(world))
            )
        words = store.get("words") if store.check(["words"]) else b""
        if own.encode() in words.split():
            name = hashlib.sha256(words).hexdigest()
            store.set(f"{name}/yes/{rank}", "")
            if rank == 0 and store.check([f"{name}/yes/{other}" for other in range(world)]):
                store.set(f"{name}/all", "")
            if store.check([f"{name}/all"]):
                return name
        time.sleep(0.01)
    minutes = MEETING_TIMEOUT / 60
    raise RunError(
        f"process {rank} of {world} has waited {minutes:g} minutes for the others to start"
    )


@contextlib.contextmanager
def losing_a_process(advice: str = "") -> Iterator[None]:
    """Turns the error of a connection whose other end is gone into a `RunError` that says so, with
    advice.
    """
    if _group is not None and advice:
        _group.advice = f"; {advice}"
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if _group is None or not (
            isinstance(error, dist.DistError | ConnectionError) or _LOST.search(str(error))
        ):
            raise
        raise RunError(
            f"process {rank()} of {world()} has lost another process of this run: it was killed, "
            f"or its machine cannot be reached{_group.advice}"
        ) from error


def _end_without(silent: list[int]) -> None:
    """Ends this process, because others are silent. It is called in a thread.

    The main thread raises the error if it waits for the store. It cannot if it waits in torch for a
    tensor of a lost process, or if the store is lost.
    """
    assert _group is not None
    others = f"process{'es' * (len(silent) > 1)} {', '.join(map(str, silent))}"
    _group.lost = (
        f"process {rank()} of {world()} has heard nothing of {others} for {pulse.SILENCE:g} s: "
        f"killed or stopped, or on a machine that cannot be reached{_group.advice}"
    )
    _end_soon(_group.lost, RunError.exit_code, GRACE)


def _end_soon(message: str, code: int, grace: float) -> None:
    """Ends this process with a message if it has not ended by itself after `grace` seconds."""
    group = _group
    if group is None or group.heart is None or group.heart.over.wait(grace):
        return
    first: list[bool] = []

    def claim() -> None:
        own = json.dumps([group.rank, code])
        first.append(group.store.compare_set(FAILED, "", own).decode() == own)

    thread = threading.Thread(target=claim, daemon=True)  # the store may not answer
    thread.start()
    thread.join(pulse.ANSWER)
    if first != [False]:  # otherwise another process has said what the matter is
        os.write(2, f"flowtrain: {message}\n".encode())
    if group.rank == 0:
        time.sleep(pulse.ANSWER)  # it may hold the store, which the others ask who has said it
    os._exit(code)


def _fall_silent() -> None:
    if _group is not None and _group.heart is not None:
        _group.heart.stop()


def _leave() -> None:
    """Returns when process 0 is done. On process 0, which may hold the store, it returns when all
    know that.
    """
    assert _group is not None
    if is_main():
        _say("left")
        _wait(_keys("left"))
    else:
        _wait(["left/0"])
        _fall_silent()  # before process 0, which may hold the store, is gone
        _say("left")


def _failed(error: BaseException) -> BaseException:
    """The error to raise when `error` ends this process: the same, or `EndedElsewhere` if another
    process failed first.

    It returns when all have failed, or after a moment.
    """
    assert _group is not None
    failure = error
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would change the exit code
    # The end of what runs on a GPU may be waited for in vain.
    threading.Thread(
        target=_end_soon, args=(str(error), exit_code(error), ENDING), daemon=True
    ).start()
    with contextlib.suppress(RuntimeError):  # The store may be lost with its process.
        own = json.dumps([rank(), exit_code(error)])
        first, code = json.loads(_group.store.compare_set(FAILED, "", own))
        if first != rank():
            failure = EndedElsewhere(code)
        _hang_up(error)
        _say("failed")
        if is_main():  # It leaves last, because it may hold the store.
            _linger(_keys("failed"))
            here = [other for other in range(1, world()) if _group.store.check([f"failed/{other}"])]
            _say("over")
            _linger([f"gone/{other}" for other in here])
        else:
            _linger(["over/0"])
            _say("gone")
    return failure


def _linger(keys: list[str]) -> None:
    """Waits for these keys, but not for long, because the process that sets them may be lost."""
    assert _group is not None
    give_up = time.monotonic() + (LINGER if is_main() else 2 * LINGER)
    while not _group.store.check(keys) and time.monotonic() < give_up:
        time.sleep(0.01)


def _hang_up(error: BaseException) -> None:
    """Closes the connections of the process group, so that the processes that wait for a tensor of
    this one notice its end.

    The connections close when nothing refers to the group any more. DistributedDataParallel, in the
    frames of the error, would.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


# --- small facts, through the store ---------------------------------------------------------------


def exchange(value: T) -> list[T]:
    """The values of all processes (plain data, sent as JSON), by rank. Waits for all.

    Raises:
        EndedElsewhere: if one has failed.
    """
    if _group is None:
        return [value]
    _group.exchanges += 1
    name = str(_group.exchanges)
    _say(name, value)
    _wait(_keys(name))
    return [json.loads(_group.store.get(key)) for key in _keys(name)]


def ready() -> None:
    """Waits until all processes are here. Raises `EndedElsewhere` if one has failed."""
    exchange(None)


def from_main(function: Callable[[], T]) -> T:
    """The result (plain data) of `function`, which only process 0 calls. An error ends all."""
    value = exchange(function() if is_main() else None)[0]
    return cast(T, value)


@contextlib.contextmanager
def one_first() -> Iterator[None]:
    """Lets process 0 go first, then the first process of every other machine, then all others.

    So a download, or filling a cache, is done once per disk, whether the machines share disks or
    not.
    """
    turn = 0 if is_main() else 1 if local_rank() == 0 else 2
    for _ in range(turn):
        ready()
    yield
    for _ in range(turn, 2):
        ready()


def _say(name: str, value: object = None) -> None:
    assert _group is not None
    _group.store.set(f"{name}/{_group.rank}", json.dumps(value))


def _keys(name: str) -> list[str]:
    return [f"{name}/{other}" for other in range(world())]


def _wait(keys: list[str]) -> None:
    """Waits for these keys. It polls instead of letting the store wait, so that signals and the
    failure of another process are noticed.
    """
    assert _group is not None
    pause = 0.001
    while not _group.store.check(keys):
        if _group.store.check([FAILED]):
            raise EndedElsewhere(json.loads(_group.store.get(FAILED))[1])
        if _group.lost:
            raise RunError(_group.lost)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


# --- tensors, through the process group -----------------------------------------------------------


def total_later(on_device: Tensor, on_host: list[float]) -> Callable[[], list[float]]:
    """Begins to sum numbers over all processes: those of a 1-dimensional tensor on the training
    device, and those of the host.

    Neither the host nor the steps on the device wait for it. The function that is returned waits,
    and gives the sums in this order, in float64, the same numbers everywhere.
    """
    if _group is None:
        read = _read_later(on_device, None)
        return lambda: [*read(), *on_host]
    pinned = on_device.device.type == "cuda"
    numbers = torch.tensor(on_host, dtype=torch.float64, pin_memory=pinned)
    values = torch.cat([on_device.double(), numbers.to(on_device.device, non_blocking=True)])
    return _read_later(values, dist.all_reduce(values, async_op=True))


def _read_later(values: Tensor, work: dist.Work | None) -> Callable[[], list[float]]:
    """A function that gives the numbers of `values`, when `work` on them is done.

    On a GPU, a stream of its own waits for the work, and copies them to pinned memory.
    """
    if values.device.type != "cuda":

        def read() -> list[float]:
            if work is not None:
                work.wait()
            return values.tolist()

        return read

    aside = _aside(values.device)
    aside.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(aside):
        if work is not None:
            work.wait()  # the stream does, not the host
        host = values.to("cpu", non_blocking=True)
        copied = aside.record_event()
    values.record_stream(aside)

    def read_copy() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read_copy


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def share(count: int) -> range:
    """Which of `count` things belong to this process. The parts are contiguous and as equal as
    possible, and may be empty.
    """
    return range(count * rank() // world(), count * (rank() + 1) // world())


def gather(part: Tensor, count: int) -> Tensor:
    """Joins the parts of all processes, `(K, len(share(count)))` on the CPU, to `(K, count)`."""
    if _group is None:
        return part
    longest = math.ceil(count / world())
    padded = part.new_zeros(part.shape[0], longest)
    padded[:, : part.shape[1]] = part
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    lengths = [
        count * (other + 1) // world() - count * other // world() for other in range(world())
    ]
    return torch.cat([part[:, :length] for part, length in zip(parts, lengths, strict=True)], dim=1)


def bytes_from_main(function: Callable[[], bytes]) -> bytes:
    """The bytes that `function` returns, which only process 0 calls. An error ends all."""
    data = function() if is_main() else b""
    if _group is None:
        return data
    size = exchange(len(data))[0]
    buffer = torch.empty(size, dtype=torch.uint8)
    if is_main():
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    for chunk in torch.split(buffer, CHUNK):
        dist.broadcast(chunk, 0)
    return buffer.numpy().tobytes()


def copy_from_main(module: nn.Module) -> None:
    """Gives all processes the weights and buffers of process 0, whatever the differences between
    machines.
    """
    if _group is not None:
        tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        data = bytes_from_main(lambda: safetensors.torch.save(tensors))
        module.load_state_dict(safetensors.torch.load(data))


def parallel(flow: nn.Module) -> nn.Module:
    """`flow` for training: its backward pass averages the gradients of all processes.

    All processes call this with the same weights.
    """
    if _group is None:
        return flow
    ready()
    # torch has a new name for broadcast_buffers and warns about the old one.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return DistributedDataParallel(flow, broadcast_buffers=False, gradient_as_bucket_view=True)


def average(tensor: Tensor) -> None:
    """Replaces a tensor, on any device, by its mean over all processes."""
    if _group is not None:
        dist.all_reduce(tensor)
        tensor /= world()


def accumulating(flow: nn.Module, more: bool) -> contextlib.AbstractContextManager[None]:
    """The context of one forward and backward pass of the result of `parallel`. If `more` passes
    follow in the same step, the averaging waits for them.
    """
    if more and isinstance(flow, DistributedDataParallel):
        return flow.no_sync()
    return contextlib.nullcontext()

"""Several processes that train or evaluate one model: what they agree about, and nothing where
there is one.

torchrun says in the environment how many processes there are and which one this is. They talk in
two ways. Tensors go through torch's process group (gloo on the CPU, nccl between GPUs). Small
facts, and the news that one has failed, go through the store by which they found each other: so one
that fails while the others wait for something else is heard all the same, and all end with its exit
code and its one message.
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
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from flowtrain.errors import EndedElsewhere, Interrupted, RunError, UserError, exit_code
from flowtrain.system.console import console

P = ParamSpec("P")
T = TypeVar("T")

FAILED = "failed"  # the store's key for the exit code of the first process to fail
MEETING_TIMEOUT = 600.0  # seconds
# seconds; torchrun sends SIGTERM to all others as soon as it sees one that has ended badly
LINGER = 1.0
CHUNK = 2**28  # bytes sent at a time

# What torch says where the other end of a connection is gone.
_LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)


@dataclass
class _Group:
    store: dist.Store
    rank: int
    world: int
    exchanges: int = 0  # so far; the same number on every process


_group: _Group | None = None  # none where there is one process


def launched() -> bool:
    """Whether this is one of several processes that torchrun, or another launcher in its way, has
    started.
    """
    try:
        return int(os.environ.get("WORLD_SIZE", 1)) > 1 and int(os.environ.get("RANK", -1)) >= 0
    except ValueError:
        return False


def world() -> int:
    """How many processes work together."""
    return _group.world if _group else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return _group.rank if _group else 0


def is_main() -> bool:
    """Whether this is process 0, the one that writes and prints."""
    return rank() == 0


def main_only(function: Callable[P, None]) -> Callable[P, None]:
    """For what writes: process 0 does it, the others do nothing."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_main():
            function(*args, **kwargs)

    return wrapped


def local_rank() -> int:
    """Which process of this machine this is: the number of its GPU. Raises `UserError` where
    nothing says so.
    """
    return int(_variable("LOCAL_RANK")) if _group else 0


def local_world() -> int:
    """How many of the processes are on this machine, as far as the launcher says so."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(value) if _group and value.isdigit() else 1


def _variable(name: str) -> str:
    value = os.environ.get(name, "")
    if not value or (name != "MASTER_ADDR" and not value.isdigit()):
        raise UserError(
            f"{name}: is {value!r} in the environment, where RANK is {os.environ['RANK']} and "
            f"WORLD_SIZE "
            f"{os.environ['WORLD_SIZE']}: start several processes with torchrun"
        )
    return value


# --- from the start to the end --------------------------------------------------------------------


@contextlib.contextmanager
def setup() -> Iterator[None]:
    """Joins the processes of torchrun for one command; where there is one, does nothing.

    They leave together: process 0 last, and where one fails, all with its exit code. That one
    raises its own error, the others `EndedElsewhere`, so that a message that concerns all is
    printed once.

    Raises:
        UserError: where the environment is incomplete.
        RunError: where the others cannot be reached, or one is lost on the way.
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
            except Interrupted:  # all of them were
                _leave()
                raise
            _leave()
    except Interrupted:
        raise
    except BaseException as error:
        raise _failed(error) from error
    finally:
        _group = None
        if dist.is_initialized():
            dist.destroy_process_group()


def _join() -> _Group:
    address = f"{_variable('MASTER_ADDR')}:{_variable('MASTER_PORT')}"
    backend = (
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    )
    try:
        store, rank, world = next(rendezvous("env://"))
        store = dist.PrefixStore(_meeting(store, rank, world), store)
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot reach the others "
            f"through "
            f"MASTER_ADDR:MASTER_PORT {address}: {str(error).splitlines()[0]}"
        ) from error
    return _Group(dist.PrefixStore("flowtrain", store), rank, world)


def _meeting(store: dist.Store, rank: int, world: int) -> str:
    """A name for these processes together, which no others had before them. Raises `RunError` if
    some do not come.

    torchrun's store outlives a restart of the processes, and with it what the last ones wrote, such
    as their addresses. So each brings a word of its own, and process 0 goes on asking until all
    have agreed to the same words.
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
    raise RunError(
        f"process {rank} of {world} has waited {MEETING_TIMEOUT / 60:g} minutes for the others to "
        f"start"
    )


@contextlib.contextmanager
def losing_a_process(advice: str = "") -> Iterator[None]:
    """Turns the error of a communication whose other end is gone into a `RunError` that says so,
    with some advice.
    """
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if world() == 1 or not (
            isinstance(error, dist.DistError | ConnectionError) or _LOST.search(str(error))
        ):
            raise
        message = (
            f"process {rank()} of {world()} has lost another process of this run: it was killed, "
            f"or its machine cannot "
            "be reached"
        )
        raise RunError(f"{message}; {advice}" if advice else message) from error


def _leave() -> None:
    """Returns when process 0 is done, and on process 0 when all know it: it may be the one that
    holds the store.
    """
    assert _group is not None
    if is_main():
        _say("left")
        _wait(_keys("left"))
    else:
        _wait(["left/0"])
        _say("left")


def _failed(error: BaseException) -> BaseException:
    """What to raise for an error that ends this process: itself, or `EndedElsewhere` if another one
    failed before.

    Returns when all have failed, or a moment later.
    """
    assert _group is not None
    failure = error
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would change the exit code
    with contextlib.suppress(RuntimeError):  # the store may have been with the process that is lost
        own = json.dumps([rank(), exit_code(error)])
        first, code = json.loads(_group.store.compare_set(FAILED, "", own))
        if first != rank():
            failure = EndedElsewhere(code)
        _hang_up(error)
        _say("failed")
        if is_main():  # leaves last: it may be the one that holds the store
            _linger(_keys("failed"))
            here = [other for other in range(1, world()) if _group.store.check([f"failed/{other}"])]
            _say("over")
            _linger([f"gone/{other}" for other in here])
        else:
            _linger(["over/0"])
            _say("gone")
    return failure


def _linger(keys: list[str]) -> None:
    """Waits for these keys, but not for long: who should set them may be lost."""
    assert _group is not None
    give_up = time.monotonic() + (LINGER if is_main() else 2 * LINGER)
    while not _group.store.check(keys) and time.monotonic() < give_up:
        time.sleep(0.01)


def _hang_up(error: BaseException) -> None:
    """Closes the process group's connections: those that wait for a tensor of this process find out
    that it is gone.

    They do when nothing refers to the group any more, such as DistributedDataParallel in the frames
    of the error.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    dist.destroy_process_group()
    gc.collect()


# --- small facts, through the store ---------------------------------------------------------------


def exchange(value: Any = None) -> list[Any]:
    """What each process gives here (plain data, sent as JSON), by rank. Waits for all.

    Raises `EndedElsewhere` where one has failed.
    """
    if _group is None:
        return [value]
    _group.exchanges += 1
    name = str(_group.exchanges)
    _say(name, value)
    _wait(_keys(name))
    return [json.loads(_group.store.get(key)) for key in _keys(name)]


def ready() -> None:
    """Waits until all are here. Raises `EndedElsewhere` where one has failed instead."""
    exchange()


def from_main(function: Callable[[], T]) -> T:
    """What `function` returns on process 0 (plain data), which alone calls it; an error there ends
    all.
    """
    value: T = exchange(function() if is_main() else None)[0]
    return value


@contextlib.contextmanager
def one_first() -> Iterator[None]:
    """Process 0 goes first, then the first process of every other machine, then all the rest.

    For what fills a cache or downloads: it is done once, whether the machines share their disks or
    not.
    """
    turn = 0 if is_main() else 1 if local_rank() == 0 else 2
    for _ in range(turn):
        ready()
    yield
    for _ in range(turn, 2):
        ready()


def _say(name: str, value: Any = None) -> None:
    assert _group is not None
    _group.store.set(f"{name}/{_group.rank}", json.dumps(value))


def _keys(name: str) -> list[str]:
    return [f"{name}/{other}" for other in range(world())]


def _wait(keys: list[str]) -> None:
    """Looks again and again, where the store could wait itself: so signals are heard, and the
    failure of another.
    """
    assert _group is not None
    pause = 0.001
    while not _group.store.check(keys):
        if _group.store.check([FAILED]):
            raise EndedElsewhere(json.loads(_group.store.get(FAILED))[1])
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


# --- tensors, through the process group -----------------------------------------------------------


def total(values: list[float]) -> list[float]:
    """The sums over all processes, in float64: the same numbers everywhere. Alone, the values as
    they are.
    """
    if _group is None:
        return values
    numbers = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(numbers)
    return numbers.tolist()


def share(count: int) -> range:
    """Which of `count` things are this process's: parts that follow each other, as equal as can be,
    perhaps empty.
    """
    return range(count * rank() // world(), count * (rank() + 1) // world())


def gather(part: Tensor, count: int) -> Tensor:
    """The parts of all, `(K, len(share(count)))` on the CPU, put together to `(K, count)`."""
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
    """What `function` returns on process 0, which alone calls it; an error there ends all."""
    data = function() if is_main() else b""
    if _group is None:
        return data
    size = exchange(len(data))[0]
    buffer = torch.empty(size, dtype=torch.uint8)
    if is_main():
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    for chunk in buffer.split(CHUNK):
        dist.broadcast(chunk, 0)
    return buffer.numpy().tobytes()


def copy_from_main(module: nn.Module) -> None:
    """Gives all processes the weights and buffers of process 0: no difference between machines can
    part them then.
    """
    if _group is not None:
        tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        module.load_state_dict(
            safetensors.torch.load(bytes_from_main(lambda: safetensors.torch.save(tensors)))
        )


def parallel(flow: nn.Module) -> nn.Module:
    """`flow` to be called in training: its backward pass averages the gradients of all processes.

    To be called by all of them with the same weights. Alone it is the flow itself.
    """
    if _group is None:
        return flow
    ready()
    # of a new name for broadcast_buffers
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return DistributedDataParallel(flow, broadcast_buffers=False, gradient_as_bucket_view=True)


def accumulating(flow: nn.Module, more: bool) -> contextlib.AbstractContextManager:
    """Around a forward and backward pass of `parallel`'s result: if there are `more`, the averaging
    waits for those.
    """
    return (
        flow.no_sync()
        if more and isinstance(flow, DistributedDataParallel)
        else contextlib.nullcontext()
    )

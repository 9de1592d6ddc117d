"""Joins the processes that torchrun has started for one command, and ends them together.

torchrun sets the number of processes, and the number of this one, in the environment. If one fails,
all end with its exit code, and only that process prints its message. A killed process stops sending
heartbeats; the others detect it (`heartbeat.py`).
"""

import contextlib
import functools
import gc
import hashlib
import json
import logging
import os
import re
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from flowtrain.errors import EndedElsewhere, Interrupted, RunError, exit_code
from flowtrain.system import distributed, heartbeat
from flowtrain.system.console import console
from flowtrain.system.distributed import FAILED, Group, environment

MEETING_SECONDS = 600.0
COLLECTIVE_SECONDS = 600.0  # more than one machine compiles longer than another
LINGER_SECONDS = 1.0  # torchrun sends SIGTERM to all others once one has ended with an error
GRACE_SECONDS = 5.0  # a process that has lost another can end by itself meanwhile
ENDING_SECONDS = 20.0  # a process that has failed can end meanwhile; torchrun kills it after 30

# Parts of torch's messages when the other end of a connection is gone.
_LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)


def launched() -> bool:
    """Whether torchrun, or a launcher like it, has started this process as one of several."""
    try:
        return int(os.environ.get("WORLD_SIZE", 1)) > 1 and int(os.environ.get("RANK", -1)) >= 0
    except ValueError:
        return False


@contextlib.contextmanager
def setup() -> Iterator[None]:
    """Joins the processes of torchrun for one command. With one process it does nothing.

    The processes leave together, process 0 last. If one fails, it raises its own error and the
    others `EndedElsewhere`, so all end with its exit code, and the message is printed once.

    Raises:
        UserError: if the environment is incomplete.
        RunError: if the others cannot be reached, or one is lost on the way.
    """
    if not launched():
        yield
        return
    group = distributed.group = _join()
    if not distributed.is_main():
        console.quiet = True
        logging.getLogger("flowtrain").setLevel(logging.ERROR)
    try:
        with losing_a_process():
            try:
                yield
            except Interrupted:  # All processes were.
                _leave(group)
                raise
            _leave(group)
    except Interrupted:
        raise
    except BaseException as error:
        raise _failed(group, error) from error
    finally:
        _stop_heartbeat(group)
        distributed.group = None
        if dist.is_initialized():
            dist.destroy_process_group()


def _join() -> Group:
    with _reaching_the_others():
        store, rank, world = next(rendezvous("env://"))
        meeting = _meeting(store, rank, world)
        # A second connection, because the processes wait for each other with the first one.
        own = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
        group = Group(dist.PrefixStore(meeting, store), rank, world)
        lost = functools.partial(_end_without, group)
        group.heartbeat = heartbeat.Heartbeat(dist.PrefixStore(meeting, own), rank, world, lost)
        return group


@contextlib.contextmanager
def _reaching_the_others() -> Iterator[None]:
    """Adds the address to the error if the store cannot be reached there."""
    address = f"{environment('MASTER_ADDR')}:{environment('MASTER_PORT')}"
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot reach the others "
            f"through MASTER_ADDR:MASTER_PORT {address}: {str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Discards standard output, where Gloo writes in some versions of torch, such as 2.9."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def connect(device: torch.device) -> None:
    """Joins the processes for tensors on the CPU and on this device, which has been set. A process
    that takes longer than `COLLECTIVE_SECONDS` for a collective is lost.
    """
    group = distributed.group
    if group is None or dist.is_initialized():
        return
    between_gpus = {"cuda": "nccl", "xpu": "xccl"}.get(device.type)
    backend = "gloo" if between_gpus is None else f"cpu:gloo,{device.type}:{between_gpus}"
    with _reaching_the_others(), _no_output():
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", group.store),
            rank=group.rank,
            world_size=group.world,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
            device_id=None if between_gpus is None else device,
        )


def _meeting(store: dist.Store, rank: int, world: int) -> str:
    """A name for this group of processes, different from earlier ones. torchrun's store, with all
    that the last processes wrote, outlives a restart of the processes. So each process brings a new
    word, and process 0 collects the words until all have agreed to the same list. Raises `RunError`
    if some processes do not come.
    """
    own = uuid.uuid4().hex
    store.set(f"word/{rank}", own)
    give_up = time.monotonic() + MEETING_SECONDS
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
    minutes = MEETING_SECONDS / 60
    raise RunError(
        f"process {rank} of {world} has waited {minutes:g} minutes for the others to start"
    )


@contextlib.contextmanager
def losing_a_process(advice: str = "") -> Iterator[None]:
    """Turns the error of a connection whose other end is gone into a `RunError` with advice."""
    group = distributed.group
    if group is not None and advice:
        group.advice = f"; {advice}"
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if group is None or not (
            isinstance(error, dist.DistError | ConnectionError) or _LOST.search(str(error))
        ):
            raise
        raise RunError(
            f"process {group.rank} of {group.world} has lost another process of this run: it was "
            f"killed, or its machine cannot be reached{group.advice}"
        ) from error


def _end_without(group: Group, lost: list[int]) -> None:
    """Ends this process, because others send no heartbeats. It is called in a thread. The main
    thread raises the error if it waits for the store. It cannot if it waits in torch for a lost
    process, or if the store is lost.
    """
    others = f"process{'es' * (len(lost) > 1)} {', '.join(map(str, lost))}"
    group.lost = (
        f"process {group.rank} of {group.world} has had no heartbeat from {others} for "
        f"{heartbeat.TIMEOUT_SECONDS:g} s: killed or stopped, or on a machine that cannot be "
        f"reached{group.advice}"
    )
    _end_soon(group, group.lost, RunError.exit_code, GRACE_SECONDS)


def _end_soon(group: Group, message: str, code: int, grace_seconds: float) -> None:
    """Ends this process with a message if it does not end by itself meanwhile."""
    if group.heartbeat is None or group.heartbeat.over.wait(grace_seconds):
        return
    first: list[bool] = []

    def claim() -> None:
        own = json.dumps([group.rank, code])
        first.append(group.store.compare_set(FAILED, "", own).decode() == own)

    thread = threading.Thread(target=claim, daemon=True)  # the store may not answer
    thread.start()
    thread.join(heartbeat.STORE_SECONDS)
    if first != [False]:  # otherwise another process has printed its message
        os.write(2, f"flowtrain: {message}\n".encode())
    if group.rank == 0:
        time.sleep(heartbeat.STORE_SECONDS)  # it may hold the store, which the others still read
    os._exit(code)


def _stop_heartbeat(group: Group, done: bool = True) -> None:
    if group.heartbeat is not None:
        group.heartbeat.stop(done)


def _leave(group: Group) -> None:
    """Returns when process 0 is done, and on process 0, which may hold the store, when all others
    have read that.
    """
    if group.rank == 0:
        group.put("left")
        group.wait(group.keys("left"))
    else:
        group.wait(["left/0"])
        _stop_heartbeat(group)  # before process 0, which may hold the store, is gone
        group.put("left")


def _failed(group: Group, error: BaseException) -> BaseException:
    """The error to raise when `error` ends this process: the same, or `EndedElsewhere` if another
    process failed first. It returns when all have failed, or after a moment.
    """
    failure = error
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would change the exit code
    # Work on a GPU may never end.
    ending = (group, str(error), exit_code(error), ENDING_SECONDS)
    threading.Thread(target=_end_soon, args=ending, daemon=True).start()
    with contextlib.suppress(RuntimeError):  # The store may be lost with its process.
        own = json.dumps([group.rank, exit_code(error)])
        first, code = json.loads(group.store.compare_set(FAILED, "", own))
        if first != group.rank:
            failure = EndedElsewhere(code)
        _hang_up(error)
        group.put("failed")
        if group.rank == 0:  # It leaves last, because it may hold the store.
            _linger(group, group.keys("failed"), LINGER_SECONDS)
            here = [key for key in group.keys("failed")[1:] if group.store.check([key])]
            group.put("over")
            _linger(group, [key.replace("failed", "gone") for key in here], LINGER_SECONDS)
        else:
            _linger(group, ["over/0"], 2 * LINGER_SECONDS)
            group.put("gone")
    _stop_heartbeat(group, done=False)
    return failure


def _linger(group: Group, keys: list[str], seconds: float) -> None:
    """Waits for these keys, but not for long, because the process that sets them may be lost."""
    give_up = time.monotonic() + seconds
    while not group.store.check(keys) and time.monotonic() < give_up:
        time.sleep(0.01)


def _hang_up(error: BaseException) -> None:
    """Closes the connections of the process group, so that processes that wait for a tensor of this
    one notice its end. They close once nothing refers to the group. DistributedDataParallel, in the
    frames of the error, would.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()

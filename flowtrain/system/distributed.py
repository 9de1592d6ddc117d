"""Several processes that train or evaluate one model. With one process, every function here returns
its argument, or does nothing.

Tensors go through torch's process group (gloo on the CPU, nccl between GPUs). Plain data, and
failures, go through the store by which the processes found each other (`torchrun.py`), because
torch's own `all_gather_object` and `barrier` end by a time limit, and notice no failure elsewhere.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flowtrain.errors import EndedElsewhere, RunError, UserError
from flowtrain.system.heartbeat import Heartbeat

P = ParamSpec("P")
T = TypeVar("T")

FAILED = "failed"  # the store's key for the exit code of the first process to fail
CHUNK_BYTES = 2**28  # sent at a time


@dataclass
class Group:
    """The processes of a command, and the store of torchrun by which they found each other."""

    store: dist.Store
    rank: int
    world: int
    heartbeat: Heartbeat | None = None  # None only in tests
    gathered: int = 0  # objects so far; the same number on every process
    advice: str = ""  # for the message about a lost process
    lost: str = ""  # that message, once there is one

    def put(self, name: str, value: object = None) -> None:
        """Stores plain data under this name and the number of this process."""
        self.store.set(f"{name}/{self.rank}", json.dumps(value))

    def keys(self, name: str) -> list[str]:
        return [f"{name}/{other}" for other in range(self.world)]

    def wait(self, keys: list[str]) -> None:
        """Waits for these keys, polling, so that signals and failures are noticed. Raises
        `EndedElsewhere` if another process has failed, `RunError` if one is lost.
        """
        pause = 0.001
        while not self.store.check(keys):
            if self.store.check([FAILED]):
                raise EndedElsewhere(json.loads(self.store.get(FAILED))[1])
            if self.lost:
                raise RunError(self.lost)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)


group: Group | None = None  # None if there is one process; `torchrun.setup` sets it


def world() -> int:
    """How many processes work together."""
    return group.world if group else 1


def rank() -> int:
    """The number of this process, from 0."""
    return group.rank if group else 0


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
    """The number of this process on its machine, which is the number of its GPU. Raises `UserError`
    if the environment lacks it.
    """
    return int(environment("LOCAL_RANK")) if group else 0


def local_world() -> int:
    """Number of processes on this machine, or 1 if the launcher does not set it."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(value) if group and value.isdigit() else 1


def environment(name: str) -> str:
    """A variable that torchrun sets. Raises `UserError` if it is missing or no number."""
    value = os.environ.get(name, "")
    if not value or (name != "MASTER_ADDR" and not value.isdigit()):
        raise UserError(
            f"{name}: is {value!r} in the environment, where RANK is {os.environ['RANK']} and "
            f"WORLD_SIZE {os.environ['WORLD_SIZE']}: start several processes with torchrun"
        )
    return value


# --- plain data, through the store ----------------------------------------------------------------


def all_gather_object(value: T) -> list[T]:
    """The values of all processes (plain data, sent as JSON), by rank. Raises as `Group.wait`."""
    if group is None:
        return [value]
    group.gathered += 1
    name = str(group.gathered)
    group.put(name, value)
    group.wait(group.keys(name))
    return [json.loads(group.store.get(key)) for key in group.keys(name)]


def barrier() -> None:
    """Waits until all processes are here. Raises as `Group.wait`."""
    all_gather_object(None)


def from_main(function: Callable[[], T]) -> T:
    """The result (plain data) of `function`, which only process 0 calls. An error ends all."""
    return cast(T, all_gather_object(function() if is_main() else None)[0])


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Lets process 0 go first, then the first process of every other machine, then all others. So a
    download or a cache is made once per disk, whether the machines share disks or not.
    """
    turn = 0 if is_main() else 1 if local_rank() == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(turn, 2):
        barrier()


# --- tensors, through the process group -----------------------------------------------------------


def total_later(on_device: Tensor, on_host: list[float]) -> Callable[[], list[float]]:
    """Begins to sum numbers over all processes: a 1-dimensional tensor on the training device, and
    numbers of the host. Neither the host nor the steps on the device wait for it. The returned
    function waits, and gives the sums in this order, in float64, the same everywhere.
    """
    if group is None:
        read = _read_later(on_device, None)
        return lambda: [*read(), *on_host]
    pinned = on_device.device.type == "cuda"
    numbers = torch.tensor(on_host, dtype=torch.float64, pin_memory=pinned)
    values = torch.cat([on_device.double(), numbers.to(on_device.device, non_blocking=True)])
    return _read_later(values, dist.all_reduce(values, async_op=True))


def _read_later(values: Tensor, work: dist.Work | None) -> Callable[[], list[float]]:
    """A function that gives `values` after `work` on them. On a GPU, a stream of its own waits for
    the work, and copies them to pinned memory.
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


def shard(count: int) -> range:
    """The share of this process in `count` things: contiguous, as equal as possible."""
    return range(count * rank() // world(), count * (rank() + 1) // world())


def gather(part: Tensor, count: int) -> Tensor:
    """Joins the parts of all processes, `(K, len(shard(count)))` on the CPU, to `(K, count)`."""
    if group is None:
        return part
    barrier()  # torch waits for a slower process only so long
    longest = math.ceil(count / world())
    padded = part.new_zeros(part.shape[0], longest)
    padded[:, : part.shape[1]] = part
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    ends = [count * other // world() for other in range(world() + 1)]
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    return torch.cat([part[:, :length] for part, length in zip(parts, lengths, strict=True)], dim=1)


def bytes_from_main(function: Callable[[], bytes]) -> bytes:
    """The bytes that `function` returns, which only process 0 calls. An error ends all."""
    data = function() if is_main() else b""
    if group is None:
        return data
    size = all_gather_object(len(data))[0]
    buffer = torch.empty(size, dtype=torch.uint8)
    if is_main():
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    for chunk in torch.split(buffer, CHUNK_BYTES):
        dist.broadcast(chunk, 0)
    return buffer.numpy().tobytes()


def copy_from_main(module: nn.Module) -> None:
    """Gives all processes the weights and buffers of process 0."""
    if group is not None:
        tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        data = bytes_from_main(lambda: safetensors.torch.save(tensors))
        module.load_state_dict(safetensors.torch.load(data))


def parallel(flow: nn.Module) -> nn.Module:
    """`flow` for training: its backward pass averages the gradients of all processes, which call
    this with the same weights.
    """
    if group is None:
        return flow
    barrier()
    # torch has a new name for broadcast_buffers and warns about the old one.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return DistributedDataParallel(flow, broadcast_buffers=False, gradient_as_bucket_view=True)


def average(tensor: Tensor) -> None:
    """Replaces a tensor, on any device, by its mean over all processes."""
    if group is not None:
        dist.all_reduce(tensor)
        tensor /= world()


def accumulating(flow: nn.Module, more: bool) -> contextlib.AbstractContextManager[None]:
    """The context of a forward and backward pass of the result of `parallel`. The averaging waits
    if `more` passes follow in this step.
    """
    if more and isinstance(flow, DistributedDataParallel):
        return flow.no_sync()
    return contextlib.nullcontext()

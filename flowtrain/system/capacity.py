"""How much memory a device has left, and how much a computation takes."""

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from flowtrain.errors import UserError
from flowtrain.system import distributed
from flowtrain.system.device import NUMBERED, synchronize

_UNLIMITED = 2**63 - 1


def available(device: torch.device) -> int:
    """Bytes that can still be allocated. On the CPU, the limit of a container counts."""
    if device.type in NUMBERED:
        module = torch.get_device_module(device)
        # torch holds some memory for further tensors.
        unused = module.memory_reserved(device) - module.memory_allocated(device)
        return int(module.mem_get_info(device)[0] + unused)
    return min([int(psutil.virtual_memory().available), *map(_of_the_group, _control_groups())])


def left(device: torch.device) -> int:
    """Bytes that this process may still allocate. The processes of a machine share its memory."""
    free = available(device)
    return free // distributed.local_world() if device.type == "cpu" else free


def require(needed: int, what: str, device: torch.device | None = None) -> None:
    """Raises `UserError` if so many bytes are not left, by default of the host. `what` begins the
    message: the option, its value, and the use of the memory.
    """
    free = left(device or torch.device("cpu"))
    if needed > free:
        shown = min(needed, 2**70)  # a number of any length may be asked for
        raise UserError(
            f"{what} at least {shown / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are "
            f"available: lower it"
        )


def total() -> int:
    """Bytes of memory of this machine, or of the container, if that has less."""
    limits = (limit for each in _control_groups() if (limit := _limit(each)) is not None)
    return min([int(psutil.virtual_memory().total), *limits])


def _limit(cgroup: Path) -> int | None:
    return _number(cgroup, "memory.max", "memory.limit_in_bytes")


def _number(cgroup: Path, *names: str) -> int | None:
    """The number in the first of these files that has one: version 2 and 1 have other names."""
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # ValueError: max
            return int((cgroup / name).read_text())
    return None


def _control_groups(
    mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[Path]:
    """The folders of this process's control groups for memory (version 2, and version 1 if it has
    the memory) and of the groups above them. In a container, each is just its mount.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = mount / controllers
            group = root / path.strip("/")
            found += [each for each in (group, *group.parents) if each.is_relative_to(root)]
    return found


def _of_the_group(cgroup: Path) -> int:
    limit, used = _limit(cgroup), _number(cgroup, "memory.current", "memory.usage_in_bytes")
    if limit is None or used is None:
        return _UNLIMITED
    try:
        # Pages of files count as used, but the system drops them when memory is needed.
        statistics = dict(map(str.split, (cgroup / "memory.stat").read_text().splitlines()))
    except (OSError, ValueError):
        return _UNLIMITED
    # The numbers of version 1 are without the groups below, unless they begin with "total".
    names = ("active_file", "inactive_file")
    files = sum(int(statistics.get(f"total_{x}", statistics.get(x, 0))) for x in names)
    return max(0, limit - used + files)


def moments(run: Callable[[], object], device: torch.device) -> list[int]:
    """Bytes of tensors beyond those that exist before `run`, at their peak in each operation, of
    which scratch memory for each image is a part. On a GPU, only the largest of these numbers.
    """
    if device.type in NUMBERED:
        module = torch.get_device_module(device)
        synchronize(device)
        module.reset_peak_memory_stats(device)
        before = module.memory_allocated(device)
        run()
        return [int(module.max_memory_allocated(device) - before)]
    # Otherwise the profiler reports its stages on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = trace.profiler.kineto_results.events()  # in order of time
    found, size, begins = [0], 0, False
    for event in events:
        if event.name() != "[memory]":
            begins = True
            continue
        size += event.nbytes()
        if begins:
            found.append(size)
        found[-1], begins = max(found[-1], size), False
    return found


class _Enough(Exception):
    """Autograd keeps more than is of interest."""


def kept(run: Callable[[], object], most: float = math.inf) -> int:
    """Bytes of tensors that autograd keeps for a backward pass at the peak of `run`, such as a
    forward pass. It is stopped when they are more than `most`, and that number is returned.
    """
    holders: dict[int, int] = {}  # how many parts of the graph keep each piece of memory
    now = largest = 0

    class Kept:
        """A tensor for as long as autograd keeps it."""

        def __init__(self, tensor: Tensor):
            nonlocal now, largest
            self.tensor = tensor.detach()  # otherwise an output would hold its own graph
            storage = tensor.untyped_storage()
            self.key, self.nbytes = storage.data_ptr(), storage.nbytes()
            holders[self.key] = holders.get(self.key, 0) + 1
            if holders[self.key] == 1:
                now += self.nbytes
                largest = max(largest, now)
            if now > most:
                raise _Enough

        def __del__(self) -> None:
            nonlocal now
            holders[self.key] -= 1
            if holders[self.key] == 0:
                now -= self.nbytes

    with saved_tensors_hooks(Kept, lambda kept: kept.tensor), contextlib.suppress(_Enough):
        result = run()  # it holds the graph
        del result
    return largest

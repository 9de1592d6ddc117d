"""Devices: what `--device` names, and how tensors get there."""

import platform
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.errors import UserError
from flowtrain.system import distributed, nvidia, torchrun
from flowtrain.system.console import console

NAMES = "auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"
NUMBERED = ("cuda", "xpu")  # a machine may have several of these


def resolve(name: str) -> torch.device:
    """The device that one of `NAMES` stands for. Several processes on a machine have one GPU each:
    the only one that the process sees, or the one of its local rank. The processes are then joined
    for tensors on their devices. Raises `UserError` for any other name, if the machine has no such
    device, or if `auto` would leave a GPU unused because torch cannot use it.
    """
    asked = f"--device {name}"
    kind, colon, index = name.partition(":")
    if kind not in ("auto", "cpu", "mps", *NUMBERED) or (
        colon and not (kind in NUMBERED and index.isdigit())
    ):
        raise UserError(f"{asked}: expected {NAMES}")
    if kind == "auto":
        kind = _best(asked)
    elif kind != "cpu" and not _available(kind):
        raise UserError(f"{asked}: {_why_not(kind)}; use --device cpu")
    if kind in NUMBERED and index and int(index) >= (count := _count(kind)):
        raise UserError(f"{asked}: there are {count} {kind.upper()} devices, numbered from 0")
    if distributed.world() > 1:
        device = _of_this_process(asked, kind, index)
    else:
        device = torch.device(f"{kind}:{index}" if index else kind)
    if kind == "cuda":
        name, built = torch.cuda.get_device_name(device), torch.cuda.get_arch_list()
        capability = torch.cuda.get_device_capability(device)
        # ROCm has other names of architectures.
        reason = None if torch.version.hip else nvidia.without_kernels(name, capability, built)
        if reason is not None:
            raise UserError(f"{asked}: {reason}")
        # float32 means float32: cuDNN's default rounds the inputs of convolutions to 10 bits.
        torch.backends.cudnn.allow_tf32 = False
    torchrun.connect(device)
    return device


def _available(kind: str) -> bool:
    module = torch.backends.mps if kind == "mps" else getattr(torch, kind)
    with warnings.catch_warnings(action="ignore"):  # `_why_not` has the same, and more
        return bool(module.is_available())


def _count(kind: str) -> int:
    count: int = getattr(torch, kind).device_count()
    return count


def _best(asked: str) -> str:
    for kind in ("cuda", "xpu", "mps"):
        if _available(kind):
            return kind
    if found := nvidia.find():
        raise UserError(
            f"{asked}: {nvidia.why_unusable(found)}. To compute without a GPU: --device cpu"
        )
    return "cpu"


def _why_not(kind: str) -> str:
    if kind == "cuda" and (found := nvidia.find()):
        return nvidia.why_unusable(found)
    given = " (docker run --gpus all gives a container the GPUs)" if nvidia.in_container() else ""
    return (
        f"this machine, or this build of torch, has no {kind.upper()} device"
        f"{given if kind == 'cuda' else ''}"
    )


def _of_this_process(asked: str, kind: str, index: str) -> torch.device:
    """The device of one of several processes. Raises `UserError` if two of them would share a GPU,
    or have devices of different kinds.
    """
    if index or kind == "mps":
        raise UserError(
            f"{asked}: there are {distributed.world()} processes; expected auto, cpu, cuda or xpu"
        )
    own, number = [kind, ""], 0
    if kind in NUMBERED:
        count, local_rank = _count(kind), distributed.local_rank()
        # Some launchers show each process its own device alone, as Slurm does for --gpus-per-task.
        number = local_rank if local_rank < count else 0
        properties = getattr(torch, kind).get_device_properties(number)
        # Identifies a device, however a process numbers them.
        own[1] = f"{platform.node()} {getattr(properties, 'uuid', number)}"
    before = distributed.all_gather_object(own)[: distributed.rank()]
    for rank, other in enumerate(before):
        if other[0] != kind:
            raise UserError(
                f"{asked}: process {rank} has {other[0]}, process {distributed.rank()} {kind}: "
                "name a device that every machine has"
            )
        if kind in NUMBERED and other == own:
            raise UserError(
                f"{asked}: processes {rank} and {distributed.rank()} have the same "
                f"{kind.upper()} device ({count} visible, local rank {local_rank}): start no more "
                "processes than devices (--nproc-per-node)"
            )
    if kind not in NUMBERED:
        return torch.device(kind)
    device = torch.device(kind, number)
    getattr(torch, kind).set_device(device)
    return device


def machine(device: torch.device) -> str:
    """The name of a GPU, or of the processor with its vector instructions."""
    if device.type in NUMBERED:
        return str(getattr(torch, device.type).get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    name = names[0] if names else platform.machine()
    return f"{name} ({', '.join(wide)})" if wide else name


def mention_slow_bf16(precision: str, device: torch.device) -> None:
    """Prints a line if an x86 processor computes in bf16 but has no instructions for it."""
    name = machine(device)
    if device.type == "cpu" and precision == "bf16" and "avx2" in name and "bf16" not in name:
        console.print(
            "train.precision=bf16: this processor has no instructions for it, so steps may take "
            "many times as long as with train.precision=fp32"
        )


def mention_unused(name: str, device: torch.device) -> None:
    """Prints a line if other GPUs stay unused, with the command that uses all of them. `name` is
    the value of `--device`: a device with a number was chosen.
    """
    if distributed.world() > 1 or device.type not in NUMBERED or ":" in name:
        return
    count = _count(device.type)
    if count > 1:
        # Beside an interpreter that is not on the PATH, torchrun is not either.
        known = shutil.which("torchrun") is not None
        launcher = ["torchrun"] if known else [sys.executable, "-m", "torch.distributed.run"]
        line = [*launcher, "--standalone", "--nproc-per-node", str(count), "-m", "flowtrain"]
        console.print(f"1 of {count} GPUs is used; to use all: {shlex.join(line + sys.argv[1:])}")


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device. A GPU fetches it from pinned memory, and the host does not wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has computed all that it was given."""
    if device.type in NUMBERED:
        torch.get_device_module(device).synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()

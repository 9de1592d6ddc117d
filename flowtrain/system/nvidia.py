"""NVIDIA GPUs of the machine, also those that torch cannot use: a build for CPUs, an old driver."""

import contextlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from flowtrain.errors import cut

ROOT = Path("/")  # of the file system
NVIDIA_SMI_SECONDS = 20.0  # it wakes the driver, which takes seconds on a machine of 8 GPUs
WHERE_BUILDS_ARE = (
    "docs/servers.md lists drivers and builds of torch, pytorch.org/get-started/locally their "
    "commands"
)


@dataclass(frozen=True)
class Found:
    """The GPUs that this process may use, whether or not CUDA works."""

    count: int
    driver: str = ""  # its version, such as 535.183.01, if nvidia-smi tells it


def find() -> Found | None:
    """The NVIDIA GPUs of this process, or None. GPUs hidden by CUDA_VISIBLE_DEVICES or by the
    container do not count. A container without `--gpus` has the driver in /proc, but no device
    files.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return None
    if program := shutil.which("nvidia-smi"):
        found = _ask(program)
        if found is not None:
            return found if found.count else None
    count = _device_files()
    if not count and not in_container():
        count = len(list((ROOT / "proc/driver/nvidia/gpus").glob("*")))
    return Found(count) if count else None


def in_container() -> bool:
    """Whether this process runs in a container of Docker, Podman or Kubernetes."""
    marks = (ROOT / ".dockerenv", ROOT / "run/.containerenv")
    return any(mark.exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in os.environ


def why_unusable(found: Found) -> str:
    """Why torch cannot use these GPUs (`torch.cuda.is_available()` is false), and what helps."""
    gpus = f"{found.count} NVIDIA GPU{'s' * (found.count > 1)}"
    driver = f" with driver {found.driver}" if found.driver else ""
    reason = "is not built for CUDA"
    if torch.version.cuda is not None:
        reason = f"for CUDA {torch.version.cuda} cannot use them: {_message()}"
    torch_ = f"torch {torch.__version__}"
    return f"this machine has {gpus}{driver}, but {torch_} {reason}. {WHERE_BUILDS_ARE}"


def without_kernels(name: str, capability: tuple[int, int], architectures: list[str]) -> str | None:
    """Why this build of torch cannot compute on a GPU, or None if it can.

    Args:
        name: the GPU's.
        capability: major and minor number of the GPU's compute capability.
        architectures: those that torch is built for, such as `sm_90` or `compute_90`.
    """
    major, minor = capability
    for each in architectures:
        kind, _, number = each.partition("_")
        digits = re.match(r"\d+", number)
        if digits is None:
            continue
        there = divmod(int(digits[0]), 10)
        later = kind == "compute" and there <= capability  # compiled when it is first used
        if later or (kind == "sm" and there[0] == major and there[1] <= minor):
            return None
    return (
        f"torch {torch.__version__} has no code for {name} (sm_{major}{minor}), only for "
        f"{' '.join(architectures)}. {WHERE_BUILDS_ARE}"
    )


def _message() -> str:
    """torch's error when it starts CUDA, without its advice on downloads."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        text = re.split(r"\s+(?:Please update|Alternatively|CUDA kernel errors)", str(error))[0]
        return cut(text, 200).rstrip(".")
    return "it finds no device"


def _ask(program: str) -> Found | None:
    """The GPUs that nvidia-smi lists; None if it fails, which proves nothing."""
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and all(re.match(r"\d+(\.\d+)+$", line) for line in lines):
        return Found(len(lines), lines[0] if lines else "")
    return Found(0) if "No devices" in done.stdout + done.stderr else None


def _device_files() -> int:
    """Number of the files of GPUs that this process may open. A job without GPUs may open none."""
    count = 0
    for file in (ROOT / "dev").glob("nvidia[0-9]*"):
        if file.name[len("nvidia") :].isdigit():
            with contextlib.suppress(OSError):
                os.close(os.open(file, os.O_RDONLY))
                count += 1
    return count

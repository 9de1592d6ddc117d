"""NVIDIA GPUs as the machine shows them, also where CUDA does not work: the driver is too old for
torch, or torch is a build for CPUs.
"""

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
SECONDS_FOR_NVIDIA_SMI = 20.0  # it wakes the driver, which takes seconds on a machine of 8 GPUs

# For each generation of CUDA: the oldest driver that runs all of it, and torch's wheels for it.
# https://docs.nvidia.com/deploy/cuda-compatibility, https://github.com/pytorch/pytorch/issues/190385
DRIVERS = {13: 580, 12: 525}
WHEELS = {13: "cu130", 12: "cu126 (of torch 2.14 or older)"}
OLDEST = min(DRIVERS)


@dataclass(frozen=True)
class Found:
    """The GPUs that this process was given. It has access to them, whether or not CUDA works."""

    count: int
    driver: str  # its version, such as 535.183.01; empty where it is not known


def find() -> Found | None:
    """The NVIDIA GPUs of this process, or None.

    Those that CUDA_VISIBLE_DEVICES or the container hides do not count: who hides them wants the
    CPU. A container without `--gpus` sees the driver in /proc, but has no device files.
    """
    if _hidden(os.environ.get("CUDA_VISIBLE_DEVICES")):
        return None
    if program := shutil.which("nvidia-smi"):
        found = _ask(program)
        if found is not None:
            return found if found.count else None
    count = len(_device_files())
    if not count and not in_container():
        count = len(list((ROOT / "proc/driver/nvidia/gpus").glob("*")))
    return Found(count, _driver_in_proc()) if count else None


def in_container() -> bool:
    """Whether this process runs in a container of Docker, Podman or Kubernetes."""
    marks = (ROOT / ".dockerenv", ROOT / "run/.containerenv")
    return any(mark.exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in os.environ


def why_unusable(found: Found) -> str:
    """Why torch cannot use these GPUs, and what to do, as two sentences.

    To be called where `torch.cuda.is_available()` is false.
    """
    gpus = f"{found.count} NVIDIA GPU{'s' * (found.count > 1)}"
    driver = f"driver {found.driver}" if found.driver else "a driver of unknown version"
    built = _generation()
    said = "" if built is None else _message()
    runs = _cuda_of(found.driver) or _cuda_in(said)
    if built is None:
        reason = f"torch {torch.__version__} is not built for CUDA"
    else:
        reason = f"torch {torch.__version__} for CUDA {torch.version.cuda} cannot use them: {said}"
    return f"there are {gpus} with {driver}, but {reason}. {_advice(built, runs)}"


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
        if kind == "compute" and there <= capability:  # compiled when it is first used
            return None
        if kind == "sm" and there[0] == major and there[1] <= minor:
            return None
    return (
        f"torch {torch.__version__} has no code for {name} (sm_{major}{minor}), only for "
        f"{' '.join(architectures)}. Install {_wheel(OLDEST if major < 8 else max(WHEELS))}"
    )


def _wheel(cuda: int) -> str:
    where = "pytorch.org/get-started/locally, or docs/servers.md for Docker"
    return f"torch's wheel {WHEELS[cuda]}, see {where}"


def _generation() -> int | None:
    """The generation of CUDA that torch is built for."""
    return None if torch.version.cuda is None else int(torch.version.cuda.partition(".")[0])


def _advice(built: int | None, runs: int | None) -> str:
    """What to do, given the generations that torch is built for, and the newest of the driver."""
    if built is not None and runs is not None and runs >= built:
        return "The driver is new enough: see what nvidia-smi says, or restart the machine"
    # Most drivers run the oldest one.
    known = OLDEST if runs is None else max(OLDEST, min(runs, max(WHEELS)))
    wheel = _wheel(known)
    if runs is not None and runs < OLDEST:
        return f"Update the driver to {DRIVERS[OLDEST]} or newer, and install {wheel}"
    newer = f"; or update the driver to {DRIVERS[built]} or newer" if built in DRIVERS else ""
    return f"Install {wheel}{newer}"


def _cuda_of(driver: str) -> int | None:
    """The newest CUDA that a driver runs; `OLDEST - 1` for one that is older than all builds."""
    number = _major(driver)
    if number is None:
        return None
    return next((cuda for cuda, oldest in DRIVERS.items() if number >= oldest), OLDEST - 1)


def _cuda_in(message: str) -> int | None:
    """The same from torch's words about a driver that is too old: `(found version 12020)`."""
    match = re.search(r"found version (\d+)", message)
    return int(match[1]) // 1000 if match else None


def _message() -> str:
    """What torch says when it starts CUDA, without its advice on what to download."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        text = re.split(r"\s+(?:Please update|Alternatively|CUDA kernel errors)", str(error))[0]
        return cut(text, 200).rstrip(".")
    return "it finds no device"


def _hidden(visible: str | None) -> bool:
    """Whether this value of CUDA_VISIBLE_DEVICES hides all devices."""
    return visible is not None and visible.strip() in ("", "-1", "NoDevFiles")


def _ask(program: str) -> Found | None:
    """What nvidia-smi knows; None where it does not answer, which says nothing."""
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=SECONDS_FOR_NVIDIA_SMI, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and all(_major(line) for line in lines):
        return Found(len(lines), lines[0] if lines else "")
    return Found(0, "") if "No devices" in done.stdout + done.stderr else None


def _device_files() -> list[Path]:
    """The files of the GPUs that this process may open. A job without GPUs may open none."""
    files = [
        file for file in (ROOT / "dev").glob("nvidia[0-9]*") if file.name[len("nvidia") :].isdigit()
    ]
    opened = []
    for file in files:
        with contextlib.suppress(OSError):
            os.close(os.open(file, os.O_RDONLY))
            opened.append(file)
    return opened


def _driver_in_proc() -> str:
    with contextlib.suppress(OSError):
        text = (ROOT / "proc/driver/nvidia/version").read_text()
        if match := re.search(r"\s(\d{3,}(?:\.\d+)+)\s", text):
            return match[1]
    return ""


def _major(driver: str) -> int | None:
    match = re.match(r"(\d+)(\.\d+)+$", driver)
    return int(match[1]) if match else None

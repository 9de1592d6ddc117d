"""NVIDIA GPUs that CUDA does not reach, on machines that are made of a few files."""

import os

import pytest
import torch

from flowtrain.system import nvidia
from flowtrain.system.nvidia import Found

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/ "
    "Alternatively, go to: https://pytorch.org to install a PyTorch version for your driver."
)


class Machine:
    """A root folder, and the programs on the PATH."""

    def __init__(self, root):
        self.root = root
        (root / "bin").mkdir()

    def file(self, path, text=""):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def driver(self, version="535.183.01", gpus=1):
        self.file(
            "proc/driver/nvidia/version",
            f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Sun May 12 19:39:15 UTC "
            "2024\nGCC version:  gcc version 12.2.0 (Debian)\n",
        )
        for i in range(gpus):
            self.file(f"proc/driver/nvidia/gpus/0000:0{i}:00.0/information")

    def devices(self, *names):
        for name in names:
            self.file(f"dev/{name}")

    def nvidia_smi(self, says, code=0):
        program = self.file("bin/nvidia-smi", f"#!/bin/sh\necho '{says}'\nexit {code}\n")
        program.chmod(0o755)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(nvidia, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDA_VISIBLE_DEVICES", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    return Machine(tmp_path)


# --- which GPUs there are -------------------------------------------------------------------------


def test_none(machine):
    assert nvidia.find() is None


def test_by_the_files_of_the_driver(machine):
    machine.driver(gpus=2)
    machine.devices("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm")
    assert nvidia.find() == Found(2)


def test_a_machine_makes_device_files_when_they_are_first_used(machine):
    machine.driver(gpus=4)
    assert nvidia.find() == Found(4)


@pytest.mark.parametrize("mark", [".dockerenv", "run/.containerenv", None])
def test_a_container_without_gpus_sees_the_driver_all_the_same(machine, mark, monkeypatch):
    machine.driver()
    if mark is None:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    else:
        machine.file(mark)
    assert nvidia.in_container() and nvidia.find() is None
    machine.devices("nvidia3")  # one that it was given
    assert nvidia.find() == Found(1)


def test_device_files_that_may_not_be_opened_belong_to_other_jobs(machine, monkeypatch):
    machine.file(".dockerenv")
    machine.devices("nvidia0", "nvidia1")
    opened = os.open

    def refusing(path, *rest):
        if str(path).endswith("nvidia0"):
            raise PermissionError(1, "Operation not permitted")
        return opened(path, *rest)

    monkeypatch.setattr(nvidia.os, "open", refusing)
    assert nvidia.find() == Found(1)


def test_nvidia_smi_knows_best(machine):
    machine.driver(gpus=8)
    machine.devices("nvidia0", "nvidia1")
    machine.nvidia_smi("550.54.15\n550.54.15\n550.54.15")
    assert nvidia.find() == Found(3, "550.54.15")
    machine.nvidia_smi("No devices were found", 6)
    assert nvidia.find() is None


@pytest.mark.parametrize(
    "says, code",
    [
        ("Failed to initialize NVML: Driver/library version mismatch", 18),
        ("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver", 9),
        ("something else", 0),
    ],
)
def test_a_failure_of_nvidia_smi_says_nothing(machine, says, code):
    machine.nvidia_smi(says, code)
    assert nvidia.find() is None
    machine.devices("nvidia0")
    assert nvidia.find() == Found(1)


def test_nvidia_smi_that_hangs_says_nothing(machine, monkeypatch):
    machine.file("bin/nvidia-smi", "#!/bin/sh\nexec /bin/sleep 60\n").chmod(0o755)
    machine.devices("nvidia0")
    monkeypatch.setattr(nvidia, "NVIDIA_SMI_SECONDS", 0.1)
    assert nvidia.find() == Found(1)


@pytest.mark.parametrize(
    "value, hidden", [("", True), ("-1", True), ("0", False), ("GPU-a", False)]
)
def test_hidden_gpus_do_not_count(machine, value, hidden, monkeypatch):
    machine.devices("nvidia0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert (nvidia.find() is None) == hidden


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cuda, error, reason",
    [
        (None, None, "is not built for CUDA"),
        (
            "13.0",
            TOO_OLD,
            "for CUDA 13.0 cannot use them: The NVIDIA driver on your system is too "
            "old (found version 12040)",
        ),
        ("12.6", "Error 802: system not yet ready", "cannot use them: Error 802: system not yet"),
        ("12.6", None, "for CUDA 12.6 cannot use them: it finds no device"),
    ],
)
def test_why_torch_cannot_use_a_gpu(monkeypatch, cuda, error, reason):
    def init():
        if error is not None:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", init)
    message = nvidia.why_unusable(Found(8, "580.65.06"))
    assert message.startswith("this machine has 8 NVIDIA GPUs with driver 580.65.06, but torch ")
    assert reason in message and message.endswith(f". {nvidia.WHERE_BUILDS_ARE}")
    assert "URL" not in message and "Alternatively" not in message
    assert nvidia.why_unusable(Found(1)).startswith("this machine has 1 NVIDIA GPU, but torch ")


def test_code_for_the_gpu(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    built = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
    for capability in [(7, 5), (8, 0), (8, 9), (9, 0), (12, 1), (13, 0)]:
        assert nvidia.without_kernels("GPU", capability, built) is None
    assert nvidia.without_kernels("V100", (7, 0), built) == (
        "torch 2.13.0+cu130 has no code for V100 (sm_70), only for sm_75 sm_80 sm_86 sm_90 sm_100 "
        f"sm_120 compute_120. {nvidia.WHERE_BUILDS_ARE}"
    )
    assert nvidia.without_kernels("B200", (10, 0), ["sm_80", "sm_90a"]) is not None

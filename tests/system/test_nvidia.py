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


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Gives this machine GPUs in /proc, in /dev, and by the text of nvidia-smi."""
    monkeypatch.setattr(nvidia, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDA_VISIBLE_DEVICES", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)

    def become(driver=0, devices=(), nvidia_smi=None, code=0, mark=None):
        files = [f"proc/driver/nvidia/gpus/0000:0{i}:00.0/information" for i in range(driver)]
        files += [f"dev/{name}" for name in (*devices, "nvidiactl")] + [mark or ".none"]
        for path in files:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        if nvidia_smi is not None:
            (tmp_path / "bin").mkdir(exist_ok=True)
            program = tmp_path / "bin" / "nvidia-smi"
            program.write_text(f"#!/bin/sh\n{nvidia_smi}\nexit {code}\n")
            program.chmod(0o755)

    return become


@pytest.mark.parametrize(
    "there, found",
    [
        ({}, None),
        ({"driver": 2, "devices": ["nvidia0", "nvidia1", "nvidia-uvm"]}, Found(2)),
        ({"driver": 4}, Found(4)),  # device files are made when they are first used
        # A container sees the driver, but only the device files that it was given.
        *[({"driver": 1, "mark": mark}, None) for mark in (".dockerenv", "run/.containerenv")],
        ({"driver": 1, "mark": ".dockerenv", "devices": ["nvidia3"]}, Found(1)),
        ({"driver": 8, "nvidia_smi": "echo 550.54.15; echo 550.54.15"}, Found(2, "550.54.15")),
        ({"driver": 8, "nvidia_smi": "echo No devices were found", "code": 6}, None),
        # A failure of nvidia-smi proves nothing.
        ({"nvidia_smi": "echo Failed to initialize NVML", "code": 18}, None),
        ({"nvidia_smi": "echo 550.54.15", "code": 9, "devices": ["nvidia0"]}, Found(1)),
        ({"nvidia_smi": "echo something else", "devices": ["nvidia0"]}, Found(1)),
        ({"nvidia_smi": "exec /bin/sleep 60", "devices": ["nvidia0"]}, Found(1)),
    ],
)
def test_which_gpus_there_are(machine, there, found, monkeypatch):
    if "sleep" in there.get("nvidia_smi", ""):
        monkeypatch.setattr(nvidia, "NVIDIA_SMI_SECONDS", 0.1)
    machine(**there)
    assert nvidia.find() == found
    assert nvidia.in_container() == ("mark" in there)


def test_gpus_of_others_and_hidden_ones(machine, monkeypatch):
    machine(devices=["nvidia0", "nvidia1"], driver=2)
    for value, hidden in (("", True), ("-1", True), ("NoDevFiles", True), ("0", False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert (nvidia.find() is None) == hidden
    opened = os.open

    def refusing(path, *rest):  # a device of another job
        if str(path).endswith("nvidia0"):
            raise PermissionError(1, "Operation not permitted")
        return opened(path, *rest)

    monkeypatch.setattr(nvidia.os, "open", refusing)
    assert nvidia.find() == Found(1)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert nvidia.in_container() and nvidia.find() == Found(1)


@pytest.mark.parametrize(
    "cuda, error, reason",
    [
        (None, None, "is not built for CUDA"),
        ("13.0", TOO_OLD, "for CUDA 13.0 cannot use them: The NVIDIA driver on your system is too "
         "old (found version 12040)"),
        ("12.6", "Error 802: system not yet ready", "cannot use them: Error 802: system not yet"),
        ("12.6", None, "for CUDA 12.6 cannot use them: it finds no device"),
    ],
)  # fmt: skip
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
    assert nvidia.without_kernels("B200", (10, 0), ["sm_80", "sm_90a", "other"]) is not None

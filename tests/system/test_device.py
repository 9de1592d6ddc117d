"""`--device` on machines that this one is not."""

import os
import sys
import types
import warnings

import pytest
import torch
import torch.distributed as dist

from flowtrain.cli import base
from flowtrain.errors import UserError
from flowtrain.system import device as devices
from flowtrain.system import distributed, nvidia, torchrun

EXPECTED = ": expected auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"
NONE = "this machine, or this build of torch, has no"


@pytest.fixture
def machine(monkeypatch):
    """Gives this machine devices of each kind, as numbers of them, and GPUs that torch misses."""
    chosen = []

    def become(cuda=0, xpu=0, mps=0, unusable=None, capability=(9, 0), first_uuid=0):
        def properties(number):
            return types.SimpleNamespace(uuid=f"GPU-{first_uuid + number}")

        for kind, count in (("cuda", cuda), ("xpu", xpu)):
            module = getattr(torch, kind)
            monkeypatch.setattr(module, "is_available", lambda count=count: count > 0)
            monkeypatch.setattr(module, "device_count", lambda count=count: count)
            monkeypatch.setattr(module, "set_device", chosen.append)
            monkeypatch.setattr(module, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps > 0)
        monkeypatch.setattr(nvidia, "find", lambda: unusable)
        monkeypatch.setattr(nvidia, "in_container", lambda: False)
        return chosen

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    become()
    return become


@pytest.mark.parametrize(
    "there, name, expected",
    [
        ({}, "auto", "cpu"),
        ({"cuda": 2}, "auto", "cuda"),
        ({"xpu": 1}, "auto", "xpu"),
        ({"mps": 1}, "auto", "mps"),
        ({"cuda": 1, "xpu": 1, "mps": 1}, "auto", "cuda"),
        ({"xpu": 1, "unusable": nvidia.Found(1, "470.1")}, "auto", "xpu"),
        ({"cuda": 2}, "cpu", "cpu"),
        *[({"cuda": 2, "xpu": 2}, name, name) for name in ("cuda", "cuda:1", "xpu", "xpu:1")],
        ({"cuda": 2, "mps": 1}, "mps", "mps"),
    ],
)
def test_the_device_of_a_name(machine, there, name, expected):
    machine(**there)
    assert devices.resolve(name) == torch.device(expected)
    # float32 stays float32 in convolutions, too.
    assert torch.backends.cudnn.allow_tf32 is not expected.startswith("cuda")


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "xpu:1", "mps"])
def test_the_device_of_a_command_is_the_current_one(machine, name):
    chosen = machine(cuda=2, xpu=2, mps=1)
    assert base.device_of(name) == torch.device(name)
    assert chosen == [torch.device(name)] * (":" in name)


@pytest.mark.parametrize(
    "there, name, message",
    [
        *[({}, name, EXPECTED) for name in ("gpu", "mps:0", "auto:0", "cuda:")],
        *[({}, name, f"{NONE} CUDA device; use --device cpu") for name in ("cuda", "cuda:7")],
        *[({}, name, f"{NONE} {name.upper()} device; use --device cpu") for name in ("xpu", "mps")],
        ({"cuda": 2}, "cuda:2", "there are 2 CUDA devices, numbered from 0"),
        ({"xpu": 1}, "xpu:1", "there are 1 XPU devices, numbered from 0"),
        # A GPU is never left unused in silence. Who wants the CPU can have it.
        *[({"unusable": nvidia.Found(1)}, name, "1 GPU, bad driver") for name in ("auto", "cuda")],
        *[({"cuda": 1, "capability": (7, 0)}, name,
           r"has no code for H100 .sm_70., only for sm_80 sm_90") for name in ("auto", "cuda")],
    ],
)  # fmt: skip
def test_devices_that_are_not_there(machine, there, name, message, monkeypatch):
    monkeypatch.setattr(nvidia, "why_unusable", lambda found: f"{found.count} GPU, bad driver")
    machine(**there)
    with pytest.raises(UserError, match=f"^--device {name}: .*{message}|{name}{message}") as raised:
        devices.resolve(name)
    assert "\n" not in str(raised.value)
    assert "unusable" not in there or "--device cpu" in str(raised.value)
    assert devices.resolve("cpu") == torch.device("cpu")


def test_containers_rocm_and_warnings(machine, monkeypatch, recwarn):
    machine(cuda=1, capability=(7, 0))
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")  # whose architectures have other names
        assert devices.resolve("auto") == torch.device("cuda")
    machine()

    def is_available():
        warnings.warn("CUDA initialization: The NVIDIA driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(nvidia, "in_container", lambda: True)
    with pytest.raises(UserError, match="no CUDA device .docker run --gpus all gives"):
        devices.resolve("cuda")
    with pytest.raises(UserError, match="no XPU device; use"):
        devices.resolve("xpu")
    assert devices.resolve("auto") == torch.device("cpu") and not recwarn.list


@pytest.mark.parametrize(
    "cpuinfo, name",
    [
        ("model name\t: A B\nflags\t\t: sse avx2 amx_bf16\n", "A B (avx2, amx_bf16)"),
        ("Features\t: fp asimd\n", "aarch64"),
    ],
)
def test_the_name_of_a_processor(cpuinfo, name, monkeypatch):
    monkeypatch.setattr(devices.Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr(devices.platform, "machine", lambda: "aarch64")
    assert devices.machine(torch.device("cpu")) == name


@pytest.mark.parametrize(
    "flags, precision, slow",
    [
        ("avx2 avx512f", "bf16", True),
        ("avx2", "fp32", False),
        ("avx2 avx512_bf16", "bf16", False),
        ("", "bf16", False),  # not x86, or an old one
    ],
)
def test_bf16_without_instructions_is_mentioned(flags, precision, slow, monkeypatch, capsys):
    monkeypatch.setattr(devices.Path, "read_text", lambda path: f"flags\t\t: sse {flags}\n")
    devices.mention_slow_bf16(precision, torch.device("cpu"))
    assert ("train.precision=fp32" in capsys.readouterr().out) is slow


def test_apples_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for name in ("mps", "cpu"):
        devices.synchronize(torch.device(name))
    assert waited == ["mps"]


def test_gpus_that_stay_unused(machine, monkeypatch):
    lines = []
    monkeypatch.setattr(devices.console, "print", lines.append)
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/bin/{name}")
    machine(cuda=8, xpu=2)
    words = ["train", "--set", "data.path=my images.npz", "--device", "cuda"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/flowtrain", *words])
    devices.mention_unused("auto", torch.device("cuda"))
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/flowtrain", "evaluate"])
    devices.mention_unused("xpu", torch.device("xpu"))
    assert lines == [
        "1 of 8 GPUs is used; to use all: torchrun --standalone --nproc-per-node 8 -m flowtrain "
        "train --set 'data.path=my images.npz' --device cuda",
        f"1 of 2 GPUs is used; to use all: {sys.executable} -m torch.distributed.run --standalone "
        "--nproc-per-node 2 -m flowtrain evaluate",
    ]
    for name in ("cuda:3", "cpu", "mps"):  # the first was chosen
        devices.mention_unused(name, torch.device(name))
    machine(cuda=1, xpu=8)
    devices.mention_unused("auto", torch.device("cuda:0"))
    machine(cuda=8)
    monkeypatch.setattr(distributed, "group", distributed.Group(dist.HashStore(), 0, 8))
    devices.mention_unused("auto", torch.device("cuda:0"))
    assert len(lines) == 2


@pytest.fixture
def process(monkeypatch):
    """Makes this process one of several, which have answered as `others` before it."""
    joined = []
    monkeypatch.setattr(torchrun, "connect", joined.append)

    def become(rank, world, local_rank, others):
        monkeypatch.setattr(distributed, "group", distributed.Group(dist.HashStore(), rank, world))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        after = [["?", "?"]] * (world - rank - 1)
        monkeypatch.setattr(distributed, "all_gather_object", lambda own: [*others, own, *after])
        return joined

    return become


def gpu(number, kind="cuda"):
    return [kind, f"{os.uname().nodename} GPU-{number}"]


@pytest.mark.parametrize(
    "there, start, expected",
    [
        *[({kind: 4}, (3, 8, 3, [gpu(n, kind) for n in range(3)]), f"{kind}:3")
          for kind in ("cuda", "xpu")],
        # Slurm's --gpus-per-task=1: the only device of every process is number 0.
        ({"cuda": 1, "first_uuid": 3}, (3, 8, 3, [gpu(n) for n in range(3)]), "cuda:0"),
        # Equal numbers on two machines
        ({"cuda": 1}, (1, 2, 0, [["cuda", "another-machine GPU-0"]]), "cuda:0"),
        ({}, (1, 2, 1, [["cpu", ""]]), "cpu"),  # which the processes share
    ],
)  # fmt: skip
def test_devices_of_several_processes(machine, process, there, start, expected):
    chosen, joined, device = machine(**there), process(*start), torch.device(expected)
    for name in ("auto", device.type):
        assert devices.resolve(name) == device
    assert joined == [device] * 2 and chosen == [device] * 2 * (expected != "cpu")


@pytest.mark.parametrize(
    "there, name, others, message",
    [
        ({"cuda": 2}, "cuda", [gpu(0), gpu(1)], r"processes 0 and 2 have the same CUDA device \(2 "
         r"visible, local rank 2\): start no more processes than devices \(--nproc-per-node\)$"),
        ({}, "auto", [["cuda", ""]] * 2, "process 0 has cuda, process 2 cpu: name a device that"),
        ({"cuda": 3}, "auto", [["cpu", ""]] * 2, "process 0 has cpu, process 2 cuda: name a"),
        *[({"cuda": 2, "xpu": 2, "mps": 1}, name, [], "there are 3 processes; expected auto, cpu, ")
          for name in ("cuda:1", "mps", "xpu:0")],
    ],
)  # fmt: skip
def test_devices_that_several_processes_cannot_have(machine, process, there, name, others, message):
    machine(**there)
    process(2, 3, 2, others)
    with pytest.raises(UserError, match=f"^--device {name}: {message}"):
        devices.resolve(name)


@pytest.mark.parametrize(
    "device, backend",
    [("cpu", "gloo"), ("cuda:3", "cpu:gloo,cuda:nccl"), ("xpu:1", "cpu:gloo,xpu:xccl")],
)
def test_the_processes_are_joined_for_their_devices(device, backend, monkeypatch):
    joined, device = [], torch.device(device)
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: joined.append((a, k)))
    torchrun.connect(device)  # one process: nothing to join
    assert joined == []
    monkeypatch.setattr(distributed, "group", distributed.Group(dist.HashStore(), 2, 4))
    torchrun.connect(device)
    (((given,), options),) = joined
    assert given == backend and options["device_id"] == (None if device.type == "cpu" else device)
    assert (options["rank"], options["world_size"]) == (2, 4)
    assert 60 <= options["timeout"].total_seconds() <= 1800
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    torchrun.connect(device)
    assert len(joined) == 1

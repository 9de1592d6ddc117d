"""`--device` on machines that this one is not."""

import os
import sys
import types

import pytest
import torch
import torch.distributed as dist

from flowtrain.cli import base
from flowtrain.errors import UserError
from flowtrain.system import device as devices
from flowtrain.system import distributed, nvidia, torchrun

H100 = types.SimpleNamespace
BUILT = ["sm_80", "sm_90"]


@pytest.fixture
def machine(monkeypatch):
    """Gives this machine devices of each kind, as numbers of them, and GPUs that torch misses."""
    chosen = []

    def become(cuda=0, xpu=0, mps=0, unusable=None, capability=(9, 0), first_uuid=0):
        for kind, count in (("cuda", cuda), ("xpu", xpu)):
            module = getattr(torch, kind)
            monkeypatch.setattr(module, "is_available", lambda count=count: count > 0)
            monkeypatch.setattr(module, "device_count", lambda count=count: count)
            monkeypatch.setattr(module, "set_device", chosen.append)
            monkeypatch.setattr(
                module, "get_device_properties", lambda i: H100(uuid=f"GPU-{first_uuid + i}")
            )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps > 0)
        monkeypatch.setattr(nvidia, "find", lambda: unusable)
        monkeypatch.setattr(nvidia, "in_container", lambda: False)
        return chosen

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    become()
    return become


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "there, expected",
    [
        ({}, "cpu"),
        ({"cuda": 2}, "cuda"),
        ({"xpu": 1}, "xpu"),
        ({"mps": 1}, "mps"),
        ({"cuda": 1, "xpu": 1, "mps": 1}, "cuda"),
        ({"xpu": 1, "unusable": nvidia.Found(1, "470.1")}, "xpu"),
    ],
)
def test_auto(machine, there, expected):
    machine(**there)
    assert devices.resolve("auto") == torch.device(expected)
    assert devices.resolve("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "xpu", "xpu:1", "mps"])
def test_named(machine, name):
    machine(cuda=2, xpu=2, mps=1)
    assert devices.resolve(name) == torch.device(name)
    # float32 stays float32 in convolutions, too.
    assert torch.backends.cudnn.allow_tf32 is not name.startswith("cuda")


@pytest.mark.parametrize(
    "name, message",
    [
        ("gpu", "--device gpu: expected auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"),
        ("mps:0", "--device mps:0: expected auto"),
        ("auto:0", "--device auto:0: expected auto"),
        ("cuda:", "--device cuda:: expected auto"),
        ("cuda", "--device cuda: this machine, or this build of torch, has no CUDA device; use "),
        ("cuda:7", "has no CUDA device; use --device cpu"),
        ("xpu", "has no XPU device; use --device cpu"),
        ("mps", "has no MPS device; use --device cpu"),
    ],
)
def test_what_is_not_there(machine, name, message):
    with pytest.raises(UserError) as raised:
        devices.resolve(name)
    assert message in str(raised.value)


def test_a_number_that_is_too_high(machine):
    machine(cuda=2, xpu=1)
    for name, count in [("cuda:2", "2 CUDA"), ("xpu:1", "1 XPU")]:
        with pytest.raises(UserError, match=f"{name}: there are {count} devices, numbered from 0"):
            devices.resolve(name)


def test_a_container_that_was_given_no_gpus(machine, monkeypatch):
    monkeypatch.setattr(nvidia, "in_container", lambda: True)
    with pytest.raises(UserError, match="no CUDA device .docker run --gpus all gives"):
        devices.resolve("cuda")
    assert devices.resolve("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_torch_cannot_use(machine, name, monkeypatch):
    """It is never left unused in silence. Who wants the CPU can have it."""
    machine(unusable=nvidia.Found(1, "470.1"))
    monkeypatch.setattr(nvidia, "why_unusable", lambda found: f"{found.count} GPU, bad driver")
    with pytest.raises(UserError) as raised:
        devices.resolve(name)
    assert f"--device {name}: 1 GPU, bad driver" in str(raised.value)
    assert "--device cpu" in str(raised.value) and "\n" not in str(raised.value)
    assert devices.resolve("cpu") == torch.device("cpu")


def test_a_gpu_that_this_build_of_torch_has_no_code_for(machine, monkeypatch):
    machine(cuda=1, capability=(7, 0))
    for name in ("auto", "cuda"):
        with pytest.raises(UserError, match="has no code for H100 .sm_70., only for sm_80 sm_90"):
            devices.resolve(name)
    monkeypatch.setattr(torch.version, "hip", "6.4")  # whose architectures have other names
    assert devices.resolve("auto") == torch.device("cuda")


def test_a_warning_of_torch_is_not_shown_beside_the_error(machine, monkeypatch, recwarn):
    def is_available():
        import warnings

        warnings.warn("CUDA initialization: The NVIDIA driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    devices.resolve("auto")
    assert not recwarn.list


# --- GPUs that stay unused ------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(devices.console, "print", lines.append)
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/bin/{name}")
    return lines


def test_one_gpu_of_eight(machine, said, monkeypatch):
    machine(cuda=8)
    words = ["train", "--set", "data.path=my images.npz", "--device", "cuda"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/flowtrain", *words])
    base.mention_unused("auto", torch.device("cuda"))
    assert said == [
        "1 of 8 GPUs is used; to use all: torchrun --standalone --nproc-per-node 8 -m flowtrain "
        "train --set 'data.path=my images.npz' --device cuda"
    ]


def test_without_torchrun_on_the_path(machine, said, monkeypatch):
    machine(xpu=2)
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    devices.mention_unused("xpu", torch.device("xpu"), ["evaluate"])
    assert said == [
        f"1 of 2 GPUs is used; to use all: {sys.executable} -m torch.distributed.run --standalone "
        "--nproc-per-node 2 -m flowtrain evaluate"
    ]


def test_nothing_is_said_where_nothing_is_unused(machine, said, monkeypatch):
    machine(cuda=1, xpu=8)
    devices.mention_unused("auto", torch.device("cuda:0"), [])
    machine(cuda=8)
    devices.mention_unused("cuda:3", torch.device("cuda:3"), [])  # chosen
    devices.mention_unused("cpu", torch.device("cpu"), [])
    devices.mention_unused("mps", torch.device("mps"), [])
    monkeypatch.setattr(distributed, "group", distributed.Group(dist.HashStore(), 0, 8))
    devices.mention_unused("auto", torch.device("cuda:0"), [])
    assert said == []


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture
def process(monkeypatch):
    """Makes this process one of several, which have answered as `others` before it."""
    joined = []
    monkeypatch.setattr(torchrun, "connect", joined.append)

    def become(rank, world, local_rank=None, others=()):
        monkeypatch.setattr(distributed, "group", distributed.Group(dist.HashStore(), rank, world))
        monkeypatch.setenv("LOCAL_RANK", str(rank if local_rank is None else local_rank))
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setattr(
            distributed,
            "all_gather_object",
            lambda own: [*others, own, *[["?", "?"]] * (world - rank - 1)],
        )
        return joined

    return become


def gpu(number, kind="cuda"):
    return [kind, f"{os.uname().nodename} GPU-{number}"]


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_each_process_has_the_gpu_of_its_local_rank(machine, process, kind):
    chosen = machine(**{kind: 4})
    joined = process(3, 8, others=[gpu(n, kind) for n in range(3)])
    for name in ("auto", kind):
        assert devices.resolve(name) == torch.device(f"{kind}:3")
    assert chosen == joined == 2 * [torch.device(f"{kind}:3")]


def test_each_process_sees_its_own_gpu_alone(machine, process):
    """Slurm's --gpus-per-task=1: the only device of every process is number 0."""
    chosen = machine(cuda=1, first_uuid=3)
    joined = process(3, 8, others=[gpu(n) for n in range(3)])
    assert devices.resolve("auto") == torch.device("cuda:0")
    assert chosen == joined == [torch.device("cuda:0")]


def test_more_processes_than_gpus(machine, process):
    machine(cuda=2)
    process(2, 3, others=[gpu(0), gpu(1)])
    with pytest.raises(UserError) as raised:
        devices.resolve("cuda")
    assert str(raised.value) == (
        "--device cuda: processes 0 and 2 have the same CUDA device (2 visible, local rank 2): "
        "start no more processes than devices (--nproc-per-node)"
    )


def test_equal_numbers_on_two_machines_are_no_matter(machine, process):
    machine(cuda=1)
    process(1, 2, local_rank=0, others=[["cuda", "another-machine GPU-0"]])
    assert devices.resolve("auto") == torch.device("cuda:0")


@pytest.mark.parametrize("there, own", [({}, "cpu"), ({"cuda": 1}, "cuda")])
def test_devices_of_different_kinds(machine, process, there, own):
    machine(**there)
    other = "cuda" if own == "cpu" else "cpu"
    process(1, 2, others=[[other, ""]])
    with pytest.raises(UserError, match=f"auto: process 0 has {other}, process 1 {own}: name a"):
        devices.resolve("auto")


def test_the_processes_share_a_cpu(machine, process):
    joined = process(1, 2, others=[["cpu", ""]])
    assert devices.resolve("auto") == torch.device("cpu") and joined == [torch.device("cpu")]


@pytest.mark.parametrize("name", ["cuda:1", "mps", "xpu:0"])
def test_devices_for_one_process_only(machine, process, name):
    machine(cuda=2, xpu=2, mps=1)
    process(0, 2)
    with pytest.raises(UserError, match=f"{name}: there are 2 processes; expected auto, cpu, cuda"):
        devices.resolve(name)


# --- how they are joined --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, backend, bound",
    [
        ("cpu", "gloo", None),
        ("cuda:3", "cpu:gloo,cuda:nccl", torch.device("cuda:3")),
        ("xpu:1", "cpu:gloo,xpu:xccl", torch.device("xpu:1")),
    ],
)
def test_the_processes_are_joined_for_their_devices(device, backend, bound, monkeypatch):
    joined = []
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: joined.append((a, k)))
    torchrun.connect(torch.device(device))  # one process: nothing to join
    assert joined == []
    monkeypatch.setattr(distributed, "group", distributed.Group(dist.HashStore(), 2, 4))
    torchrun.connect(torch.device(device))
    (((given,), options),) = joined
    assert given == backend and options["device_id"] == bound
    assert (options["rank"], options["world_size"]) == (2, 4)
    assert 60 <= options["timeout"].total_seconds() <= 1800
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    torchrun.connect(torch.device(device))
    assert len(joined) == 1

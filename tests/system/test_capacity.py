"""The memory that is left."""

import types
from unittest import mock

import pytest
import torch

from flowtrain.errors import UserError
from flowtrain.system import capacity


def test_memory_limits_of_control_groups(tmp_path):
    """Of the own group and of those above it; files are given up when memory is needed."""

    def limit(folder, maximum, used=100, files=30):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{maximum}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\nactive_file 9\ninactive_file {files - 9}\n")

    own = tmp_path / "cgroup"
    own.write_text("1:name=x:/other\n0::/slurm/job/step\n")
    mount = tmp_path / "fs"
    limit(mount / "slurm" / "job", 1000)
    limit(mount / "slurm" / "job" / "step", "max")
    limit(mount / "slurm", 5000)
    groups = capacity._control_groups(mount, own)
    assert groups == [mount / "slurm/job/step", mount / "slurm/job", mount / "slurm", mount]
    assert min(map(capacity._of_the_group, groups)) == 930
    assert [capacity._limit(group) for group in groups[:3]] == [None, 1000, 5000]
    own.write_text("0::/\n")  # of a container
    limit(mount, 500, used=600)
    assert list(map(capacity._of_the_group, capacity._control_groups(mount, own))) == [0]
    assert capacity._control_groups(mount, tmp_path / "nothing") == []

    own.write_text("5:cpu,cpuacct:/job/1\n4:memory:/job/1\n0::/\n")  # version 1, and no limit by 2
    (mount / "memory.max").unlink()
    old = mount / "memory"
    (old / "job" / "1").mkdir(parents=True)
    for folder, maximum in ((old, 2**63 - 4096), (old / "job", 800), (old / "job" / "1", 900)):
        (folder / "memory.limit_in_bytes").write_text(f"{maximum}\n")
        (folder / "memory.usage_in_bytes").write_text("100\n")
        (folder / "memory.stat").write_text(
            "inactive_file 5\ntotal_active_file 9\ntotal_inactive_file 21\n"
        )
    groups = capacity._control_groups(mount, own)
    assert groups == [old / "job/1", old / "job", old, mount]
    assert min(map(capacity._of_the_group, groups)) == 730
    assert min(filter(None, map(capacity._limit, groups))) == 800
    assert capacity.total() > 2**28 and capacity.available(torch.device("cpu")) <= capacity.total()


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_memory_of_a_gpu(kind, monkeypatch):
    """What is free, and what torch holds and does not use. The peak is beyond what was there."""
    run, waited = mock.Mock(), []
    module = types.SimpleNamespace(
        mem_get_info=lambda device: (1000, 5000),
        memory_reserved=lambda device: 300,
        memory_allocated=lambda device: 250,
        max_memory_allocated=lambda device: 900 if run.called else 10**9,
        reset_peak_memory_stats=lambda device: None,
        synchronize=waited.append,
    )
    monkeypatch.setattr(torch, "get_device_module", {torch.device(kind, 1): module}.__getitem__)
    device = torch.device(kind, 1)
    assert capacity.available(device) == capacity.left(device) == 1050
    assert capacity.moments(run, device) == [650] and waited == [device]


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(capacity, "left", lambda device: 2**30)
    capacity.require(2**30, "--num-images 5: they need")
    for needed in (2**31, 10**400):
        with pytest.raises(UserError, match=r"need at least [\d,]+\.0 GiB, and 1\.0 GiB are avail"):
            capacity.require(needed, "--num-images 6: they need")


def test_what_autograd_keeps():
    """Each piece of memory counts once, for as long as a graph holds it."""
    x = torch.ones(1000, requires_grad=True)  # 4,000 bytes

    def squares(times):
        y = x
        for _ in range(times):
            y = y * y  # keeps y, twice
        return y

    assert capacity.kept(lambda: squares(1)) == 4000
    assert capacity.kept(lambda: squares(3)) == 12000
    assert capacity.kept(lambda: [squares(3), squares(3)]) == 20000  # x is the same
    assert capacity.kept(lambda: [squares(3).sum().item() for _ in range(5)]) == 12000
    assert capacity.kept(lambda: x.exp().exp()) == 8000  # outputs, which are freed too
    assert capacity.kept(lambda: [x.exp().exp().sum().item() for _ in range(5)]) == 8000
    assert capacity.kept(lambda: squares(9), most=8000) == 12000  # it is stopped
    with torch.no_grad():
        assert capacity.kept(lambda: squares(3)) == 0

    # The gradient is right meanwhile: a continuous flow needs one within its forward pass.
    y, found = torch.tensor([2.0], requires_grad=True), []

    def run():
        (slope,) = torch.autograd.grad((y**3).sum(), y, create_graph=True)
        found.extend(torch.autograd.grad(slope.sum(), y))

    capacity.kept(run)
    assert found[0].item() == 12

"""Tensors without numbers, also on CUDA on a machine without a GPU: what waits for them raises.

torch's `FakeTensorMode` computes shapes, types and devices only. It raises where a program needs a
number: `.item()`, `bool(tensor)`, the shape of `x[mask]`. `Waiting` raises for copies between the
host and a GPU that are not asynchronous, because the host waits for them, too.
"""

import contextlib
import ctypes
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")

COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
# An operator without a result, which torch does not know how to fake.
UNKNOWN = {torch.ops.aten._fused_sgd_.default}


class Counting(TorchDispatchMode):
    """Counts the calls of operators."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[operator] += 1
        return operator(*args, **(kwargs or {}))


class Waiting(TorchDispatchMode):
    """Raises `AssertionError` for an operator that has tensors on both sides.

    A tensor with one number may stay on the CPU. It travels with the call.
    """

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = None if operator in UNKNOWN else operator(*args, **kwargs)
        leaves = tree_leaves((args, kwargs, result))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.device.type for tensor in tensors if tensor.ndim or operator in COPIES}
        asynchronous = operator in COPIES and (kwargs.get("non_blocking") or args[2:] == (True,))
        if len(kinds) > 1 and not asynchronous:
            raise AssertionError(f"{operator} waits: it has tensors on {sorted(kinds)}")
        return result


@contextlib.contextmanager
def fake_tensors(monkeypatch):
    """The context in which all new tensors are fake, and `CUDA` is a device."""
    _make_cuda_known()
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # old ones ask a driver for a GPU
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # fake ones cannot
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    with FakeTensorMode(), Waiting():
        yield


def _make_cuda_known():
    """autograd needs the guard of a tensor's device. A torch for the CPU has none for CUDA, and
    without a GPU the guard fails. The meta device's guard, which does nothing, takes its place.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    if not torch.cuda.is_available():
        guards[cuda] = guards[meta]


def moved(module, device):
    """The module with fake parameters and buffers. Any other tensor of it stays as it is."""
    for part in module.modules():
        for name, value in [*part.named_parameters(recurse=False), *part.named_buffers("", False)]:
            fake = torch.empty(value.shape, dtype=value.dtype, device=device)
            if isinstance(value, nn.Parameter):
                fake = nn.Parameter(fake)
            setattr(part, name, fake)
    return module

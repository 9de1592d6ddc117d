"""A device that this machine does not have: it computes on the CPU, with real numbers, and raises
where a tensor would be one that the device cannot hold.

Its name is `meta`, because torch lets any build have tensors there.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

NAME = "meta"


class _There(torch.Tensor):
    """A tensor on the device, around one on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        if inner.dtype == torch.float64:
            raise TypeError("the device has no float64")
        strides, offset = inner.stride(), inner.storage_offset()
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides, offset, dtype=inner.dtype, device=NAME
        )
        self.inner = inner
        return self

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    given = []
    tree_map_only(_There, given.append, (args, kwargs))
    there = bool(given)
    if (device := kwargs.get("device")) is not None:
        there = torch.device(device).type == NAME
        kwargs = {**kwargs, "device": "cpu"}
    args, kwargs = tree_map_only(_There, lambda tensor: tensor.inner, (args, kwargs))
    result = func(*args, **kwargs)
    for tensor in given:
        if result is tensor.inner:  # in place
            return tensor
    return tree_map_only(torch.Tensor, _There, result) if there else result


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _by_way_of_the_cpu(make):
    """For functions that copy numbers to a device where no mode sees it."""

    def made(data, *, device=None, **options):
        tensor = make(data, **options)
        return tensor if device is None else tensor.to(device)

    return made


@contextlib.contextmanager
def device_without_float64() -> Iterator[torch.device]:
    """The device, for as long as the context lasts. Autocast is off there."""
    with (
        _Mode(),
        mock.patch("torch.tensor", _by_way_of_the_cpu(torch.tensor)),
        mock.patch("torch.as_tensor", _by_way_of_the_cpu(torch.as_tensor)),
        mock.patch("torch.autocast", lambda *args, **kwargs: contextlib.nullcontext()),
        mock.patch("torch.is_autocast_enabled", lambda kind: False),
    ):
        yield torch.device(NAME)

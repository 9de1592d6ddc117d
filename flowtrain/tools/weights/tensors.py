"""The tensors in a file of `torch.save`, read without running anything in it."""

import io
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtrain.checkpoints.format import DTYPES, largest
from flowtrain.errors import UserError, cut
from flowtrain.system.files import content_of

WHOLE = ("state_dict", "model", "net")  # where files keep the tensors, beside an optimizer


def _words(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


class Tensors:
    """Tensors by name. Each is taken once, as float64, if it has the expected shape.

    `where` begins the messages of the `UserError` that methods raise. A mapping of a project takes
    all tensors that it needs, and `finish` refuses those that are left.
    """

    def __init__(self, where: str, tensors: Mapping[str, Tensor]):
        self.where = where
        self.left = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def side(self, name: str, dim: int = 0) -> int:
        """A side of a tensor: the first one is the number of output channels of a convolution."""
        shape = self._get(name).shape
        return shape[dim] if shape else 0

    def count(self, prefix: str) -> int:
        """The number of parts `PREFIX0.*`, `PREFIX1.*`, ..., at least 1."""
        names = [name.removeprefix(prefix) for name in self.left if name.startswith(prefix)]
        there = {name.partition(".")[0] for name in names}
        count = next(i for i in range(len(there) + 1) if str(i) not in there)
        if not count:
            raise UserError(f"{self.where}: it has no tensors {prefix}0.*")
        return count

    def take(self, name: str, *shape: int) -> Tensor:
        tensor = self._get(name)
        if tensor.shape != shape:
            raise UserError(
                f"{self.where}: {name} is {_words(tensor.shape)}, expected {_words(shape)}: it is "
                f"of another architecture, or of other images (give its data as KEY=VALUE)"
            )
        if not tensor.is_floating_point() or not tensor.double().isfinite().all():
            raise UserError(f"{self.where}: {name} has values that are not finite reals")
        return self.left.pop(name).double()

    def drop(self, *names: str) -> None:
        """Leaves out constants of the architecture."""
        for name in names:
            self._get(name)
            del self.left[name]

    def require_set(self, name: str) -> None:
        """Takes a flag, which has to be true: a layer was initialized from data."""
        if not self._get(name).any():
            raise UserError(f"{self.where}: {name} is 0: the model was never trained")
        del self.left[name]

    def finish(self) -> None:
        if self.left:
            names = ", ".join(map(cut, sorted(self.left)[:3]))
            raise UserError(
                f"{self.where}: the architecture has no tensor {names} (of {len(self.left)} more)"
            )

    def _get(self, name: str) -> Tensor:
        if name not in self.left:
            raise UserError(f"{self.where}: it has no tensor {name}")
        return self.left[name]


def _is_plain(tensor: Tensor) -> bool:
    plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.dtype in DTYPES
    return plain and tensor.device.type == "cpu"  # and not "meta", without values


def _require_bounded(data: bytes) -> None:
    """Raises `ValueError` for a file that may take more memory than its size: compressed parts, or
    a `bytearray`, which torch would make of any length.
    """
    if b"bytearray\n" in data:  # as pickle names it
        raise ValueError
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
                raise ValueError


def read(path: Path, where: str) -> Tensors:
    """The tensors of a `state_dict()` in a file, without the prefix of DataParallel.

    Raises `UserError` if there is anything else in it than tensors and plain values. Such a file
    could run code, so it is never unpickled.
    """
    data = content_of(path, largest())
    try:
        _require_bounded(data)
        with warnings.catch_warnings(action="ignore"):  # of other pickles: the error is enough
            content: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises almost any of them
        raise UserError(
            f"{path}: not a file of torch.save with tensors alone (it is damaged, or has Python "
            f"objects, which are never loaded): save the model's state_dict()"
        ) from error
    for key in WHOLE:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and _is_plain(tensor)
        for name, tensor in content.items()
    ):
        raise UserError(f"{path}: holds no state_dict(), which is tensors by name")
    if sum(tensor.numel() * tensor.element_size() for tensor in content.values()) > len(data):
        raise UserError(f"{path}: its tensors are larger than the file")
    return Tensors(where, {name.removeprefix("module."): x for name, x in content.items()})

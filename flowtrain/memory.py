"""`train.memory`: what a backward pass keeps of the forward pass."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

Mode = Literal["store", "checkpoint"]

_mode: ContextVar[Mode] = ContextVar("mode", default="store")


@contextlib.contextmanager
def memory_mode(mode: Mode) -> Iterator[None]:
    """Within it, `Sequential` keeps its layers' activations, or only their inputs (Chen et al. 2016).

    A context, like autocast: it belongs to a computation, not to a model.
    """
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def recomputes() -> bool:
    """Whether layers are to be computed again in the backward pass."""
    return _mode.get() == "checkpoint"

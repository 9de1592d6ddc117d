"""Dropout (Srivastava et al. 2014) without random state."""

from collections.abc import Callable

import torch
from torch import Tensor

Drop = Callable[[Tensor], Tensor]

MULTIPLIERS = (-2048144789, -1028477387)  # 0x85ebca6b and 0xc2b2ae35
RESOLUTION = 2**16  # a probability is rounded to a multiple of 1 / RESOLUTION


def keep_all(x: Tensor) -> Tensor:
    return x


class Dropout:
    """Sets entries of `(B, ...)` to zero with a probability, and scales the others up.

    The masks are a function of `example` `(B, ...)`, real numbers with dequantization noise, and of
    the number of earlier calls. So they change with the step, and stay the same when it is computed
    again, after resuming, in another process or batch.
    """

    def __init__(self, probability: float, example: Tensor):
        dropped = min(round(probability * RESOLUTION), RESOLUTION - 1)
        self.end = dropped - RESOLUTION // 2  # of the 16-bit integers that stand for dropped
        self.scale = RESOLUTION / (RESOLUTION - dropped)
        bits = example.detach().float().contiguous().flatten(1).view(torch.int32)
        places = torch.arange(bits.shape[1], dtype=torch.int32, device=bits.device)
        self.keys = _mixed(_mixed(places) ^ bits).sum(dim=1, dtype=torch.int32)  # modulo 2**32

    def __call__(self, x: Tensor) -> Tensor:
        self.keys = _mixed(self.keys + 1)
        count = x[0].numel()
        places = torch.arange(-(-count // 2), dtype=torch.int32, device=x.device)
        numbers = _mixed(_mixed(places) ^ self.keys[:, None]).view(torch.int16)[:, :count]
        return (x * self.scale).masked_fill((numbers < self.end).reshape(x.shape), 0)


def _mixed(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3: nearby int32 to numbers that look random."""
    first, second = MULTIPLIERS
    x = (x ^ _shifted(x, 16)).mul_(first)
    x.bitwise_xor_(_shifted(x, 13)).mul_(second)
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """int32 to the right, with zeros from the left as in unsigned integers."""
    return (x >> bits).bitwise_and_(2 ** (32 - bits) - 1)

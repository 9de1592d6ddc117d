"""Random numbers that depend on a key alone, not on earlier draws."""

import enum
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class Stream(enum.IntEnum):
    """What random numbers are for. Each purpose has its own stream under one seed."""

    WEIGHTS = 0
    ORDER = 1
    AUGMENTATION = 2
    DEQUANTIZATION = 3
    LATENTS = 4
    EVALUATION = 5
    PAIRS = 6
    LABELS = 7
    POSTERIOR = 8


def generator(seed: int, stream: Stream, *key: int) -> torch.Generator:
    """A generator of the CPU that depends on its arguments alone. `key` is for example the step, or
    an image's index. So a checkpoint needs no generator state.
    """
    state = np.random.SeedSequence([seed, int(stream), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Code of others draws from the global generators of torch and numpy, which get this seed, and
    afterwards their state from before. With None, nothing changes.
    """
    if seed is None:
        yield
        return
    before = np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(before)


CPU = torch.device("cpu")
# Devices for which numpy draws on the host: on a CPU it is 20 times as fast as torch's operations.
# On MPS and XPU the operations of `philox` were never tried.
HOST_DRAWS = ("cpu", "mps", "xpu")
# Numbers computed at a time: they stay in the cache of the host, or take about 70 bytes each of a
# GPU.
AT_A_TIME_ON_HOST, AT_A_TIME = 2**17, 2**22


def uniform(
    shape: tuple[int, ...],
    seed: int,
    stream: Stream,
    first: int = 0,
    draw: int = 0,
    device: torch.device = CPU,
) -> Tensor:
    """Uniform numbers in [0, 1) for the images `first`, `first + 1`, ... of a sequence: float32
    `(B, ...)`, multiples of 2**-24.

    An image's numbers depend on the seed, the stream, the draw, its position and its shape. So they
    are the same, bit for bit, on every device and in every batch.

    They come from Philox4x64-10, a counter-based generator (Salmon et al. 2011, "Parallel Random
    Numbers: As Easy as 1, 2, 3", section 3.3). A block is eight words of 32 bits, whose upper 24
    bits are the numbers. The counter is the number of the block, and the draw. A CUDA device
    computes `philox`. For `HOST_DRAWS`, numpy's generator gives the same words.
    """
    entries = math.prod(shape[1:])
    blocks = math.ceil(entries / 8)  # of an image
    key = np.random.SeedSequence([seed, int(stream)]).generate_state(2, np.uint64)
    by_host = device.type in HOST_DRAWS
    at_a_time = max(1, (AT_A_TIME_ON_HOST if by_host else AT_A_TIME) // max(1, entries))
    parts = []
    for start in range(0, shape[0], at_a_time):
        count = min(at_a_time, shape[0] - start)
        begins, ends = (first + start) * blocks, (first + start + count) * blocks
        if by_host:
            upper = _upper_by_numpy(begins, ends, draw, key).to(device)
        else:
            upper = philox(torch.arange(begins, ends, device=device), draw, key) >> 8
        parts.append(upper.view(count, 8 * blocks).narrow(1, 0, entries).to(torch.float32))
    numbers = torch.cat(parts) if parts else torch.empty(shape, device=device)
    return numbers.view(shape).mul_(2.0**-24)


def _upper_by_numpy(begins: int, ends: int, draw: int, key: np.ndarray) -> Tensor:
    """The upper 24 bits of the words of these blocks, int32 `(8 * blocks,)`."""
    # numpy adds 1 to the counter before it computes a block.
    counter = ((draw << 64) + begins - 1) % 2**256
    words = np.random.Philox(counter=counter, key=key).random_raw(4 * (ends - begins))
    halves = words.astype("<u8", copy=False).view("<u4")  # the lower half first
    halves >>= 8
    return torch.from_numpy(halves.view(np.int32))


WORD = 2**32 - 1  # the largest word of 32 bits
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B  # what a round adds to the key
ROUNDS = 10


def philox(index: Tensor, draw: int, key: np.ndarray) -> Tensor:
    """Philox4x64-10 of the counters `(index, draw, 0, 0)`: int64 `(N, 8)`, words of 32 bits.
    `index` is int64 `(N,)`, not negative. No operation leaves int64, because overflow is undefined
    in C++: a compiler that fuses them could give other numbers. (torch has a Philox of its own, but
    no stable interface to it, and none for the CPU.)
    """
    keys, multipliers = _constants(key, index.device)
    zeros = torch.zeros_like(index)
    # The halves of words, (2, 2, N): lower and upper half, then words 0 and 2, or 1 and 3.
    even = torch.stack([index & WORD, zeros, index >> 32, zeros]).view(2, 2, -1)
    odd = torch.stack([zeros + draw, zeros, zeros, zeros]).view(2, 2, -1)
    for round_key in keys.unbind():
        # (half of the word, half of the multiplier, word, N), above -2**63
        products = even.unsqueeze(1) * multipliers
        upper_ll, upper_lh, upper_hl, _ = (products >> 32).flatten(0, 1).unbind()
        lower_ll, lower_lh, lower_hl, _ = (products & WORD).flatten(0, 1).unbind()
        even_l, even_h = even.unbind()
        middle = upper_ll + lower_lh + lower_hl
        high = products.select(0, 1).select(0, 1) + upper_lh + upper_hl + (middle >> 32) + even_l
        low_words = torch.stack([lower_ll, middle & WORD])
        high_words = torch.stack([high & WORD, (high >> 32) + even_h])
        even, odd = high_words.flip(1) ^ odd ^ round_key, low_words.flip(1)
    words = torch.stack([even, odd], dim=2)  # (half, 2, 2, N), words in order
    return words.flatten(1, 2).permute(2, 1, 0).reshape(-1, 8)


def _constants(key: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """The keys of the rounds, `(ROUNDS, 2, 2, 1)`, and the multipliers, `(2, 2, 1)`, in halves. A
    multiplier M is `M - 2**64`, in two halves between -2**31 and 0. `philox` adds the missing
    `2**64` times the word.
    """
    words = [
        [(int(word) + i * weyl) % 2**64 for word, weyl in zip(key, WEYL, strict=True)]
        for i in range(ROUNDS)
    ]
    values = [[[word & WORD for word in each], [word >> 32 for word in each]] for each in words]
    lower = [(word & WORD) - 2**32 for word in MULTIPLIERS]
    upper = [(word >> 32) + 1 - 2**32 for word in MULTIPLIERS]
    constants = torch.tensor([*values, [lower, upper]]).unsqueeze(-1)
    keys, multipliers = constants.to(device, non_blocking=True).split([ROUNDS, 1])
    return keys, multipliers.squeeze(0)

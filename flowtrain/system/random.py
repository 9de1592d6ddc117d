"""Random generators that depend on a key alone, not on earlier draws."""

import enum

import numpy as np
import torch


class Stream(enum.IntEnum):
    """What random numbers are for. Each purpose has its own stream under one seed."""

    WEIGHTS = 0
    ORDER = 1
    AUGMENTATION = 2
    DEQUANTIZATION = 3
    LATENTS = 4
    EVALUATION = 5
    PAIRS = 6


def generator(
    seed: int, stream: Stream, *key: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator that depends on its arguments alone. `key` is for example the step, or an image's
    index.

    So a checkpoint needs no generator state, and neither batch size nor device changes the draws.
    """
    state = np.random.SeedSequence([seed, int(stream), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) & (2**63 - 1))

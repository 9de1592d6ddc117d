"""Noise as a function of a key: Philox, on every device, and the quality of its numbers."""

import math

import numpy as np
import pytest
import torch

from flowtrain.system import random
from flowtrain.system.random import Stream, philox, uniform

# Random123's kat_vectors for philox4x64 with 10 rounds: counter, key, result.
PI = 0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89
KNOWN = [
    ((0,) * 4, (0, 0), "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ((2**64 - 1,) * 4, (2**64 - 1,) * 2,
     "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    (PI, (0x452821E638D01377, 0xBE5466CF34E90C6C),
     "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6"),
]  # fmt: skip


def words_of(counter, key):
    """Philox4x64-10 by whole numbers of any length, as words of 32 bits."""
    a, b, c, d = counter
    key = list(key)
    for _ in range(random.ROUNDS):
        of_a, of_c = a * random.MULTIPLIERS[0], c * random.MULTIPLIERS[1]
        a, b, c, d = of_c >> 64 ^ b ^ key[0], of_c % 2**64, of_a >> 64 ^ d ^ key[1], of_a % 2**64
        key = [(word + weyl) % 2**64 for word, weyl in zip(key, random.WEYL, strict=True)]
    return [half for word in (a, b, c, d) for half in (word % 2**32, word >> 32)]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_known_answers(counter, key, expected):
    expected = [int(word, 16) for word in expected.split()]
    halves = [half for word in expected for half in (word % 2**32, word >> 32)]
    assert words_of(counter, key) == halves
    key = np.array(key, np.uint64)
    index = [0, 1, 2**32 - 1, 2**32, 0x243F6A8885A308D3, 2**63 - 1]
    for draw in (0, 1, 2**32 - 1):
        found = philox(torch.tensor(index), draw, key).tolist()
        assert found == [words_of((i, draw, 0, 0), map(int, key)) for i in index]


def by_hand(shape, seed, stream, first, draw):
    """The upper 24 bits of the words of as many blocks as an image needs, for each image."""
    entries = math.prod(shape[1:])
    blocks = math.ceil(entries / 8)
    key = np.random.SeedSequence([seed, int(stream)]).generate_state(2, np.uint64)
    images = []
    for image in range(first, first + shape[0]):
        counters = range(image * blocks, (image + 1) * blocks)
        words = [word for i in counters for word in words_of((i, draw, 0, 0), map(int, key))]
        images.append([(word >> 8) / 2**24 for word in words[:entries]])
    return torch.tensor(images).view(shape)


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (3, 1, 3, 3), (4, 2, 1, 1), (1, 1, 1, 1)])
def test_every_device_has_the_same_numbers(shape, monkeypatch):
    for key in [(4, Stream.EVALUATION, 0, 0), (2**62, Stream.ORDER, 2**40, 3)]:
        arguments = shape, *key
        expected = by_hand(*arguments)
        for at_a_time in (2**17, 1):  # all, or image by image
            monkeypatch.setattr(random, "AT_A_TIME", at_a_time)
            monkeypatch.setattr(random, "AT_A_TIME_ON_HOST", at_a_time)
            for host in (("cpu",), ()):  # numpy, or the operations of a CUDA device
                monkeypatch.setattr(random, "HOST_DRAWS", host)
                assert torch.equal(uniform(*arguments), expected)
    assert uniform((0, 3, 5, 5), 1, Stream.DEQUANTIZATION).shape == (0, 3, 5, 5)


def test_generators_of_different_keys():
    keys = [(0, Stream.ORDER), (1, Stream.ORDER), (0, Stream.LABELS), (0, Stream.ORDER, 1)]
    drawn = [torch.rand(4, generator=random.generator(*key)) for key in (*keys, keys[0])]
    assert torch.equal(drawn[0], drawn[-1])
    assert len(set(map(tuple, torch.stack(drawn).tolist()))) == len(keys)

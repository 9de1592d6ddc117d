"""Noise as a function of a key: Philox, on every device, and the quality of its numbers."""

import math

import numpy as np
import pytest
import torch
from helpers import compiles
from torch._subclasses.fake_tensor import FakeTensorMode

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
    """Of whole numbers, of numpy, whose counter is one less, and of torch."""
    expected = [int(word, 16) for word in expected.split()]
    halves = [half for word in expected for half in (word % 2**32, word >> 32)]
    assert words_of(counter, key) == halves
    as_one = sum(word << 64 * i for i, word in enumerate(counter))
    key = np.array(key, np.uint64)
    of_numpy = np.random.Philox(counter=(as_one - 1) % 2**256, key=key).random_raw(4)
    assert of_numpy.tolist() == expected
    index = [0, 1, 2**32 - 1, 2**32, 0x243F6A8885A308D3, 2**63 - 1]
    for draw in (0, 1, 2**32 - 1):
        found = philox(torch.tensor(index), draw, key).tolist()
        assert found == [words_of((i, draw, 0, 0), map(int, key)) for i in index]


def of_cuda(monkeypatch, *arguments, **options):
    """The numbers by the operations that a CUDA device computes, on the CPU."""
    monkeypatch.setattr(random, "HOST_DRAWS", ())
    return uniform(*arguments, **options)


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (3, 1, 3, 3), (4, 2, 1, 1), (1, 1, 1, 1)])
def test_every_device_has_the_same_numbers(shape, monkeypatch):
    for first, draw in [(0, 0), (2**40, 3)]:
        of_host = uniform(shape, 4, Stream.EVALUATION, first, draw)
        assert torch.equal(of_cuda(monkeypatch, shape, 4, Stream.EVALUATION, first, draw), of_host)
        for name in ("AT_A_TIME", "AT_A_TIME_ON_HOST"):
            monkeypatch.setattr(random, name, 1)  # image by image
        assert torch.equal(uniform(shape, 4, Stream.EVALUATION, first, draw), of_host)
        assert torch.equal(of_cuda(monkeypatch, shape, 4, Stream.EVALUATION, first, draw), of_host)
        monkeypatch.undo()


def test_an_image_has_its_noise_in_every_batch():
    assert uniform((0, 3, 5, 5), 1, Stream.DEQUANTIZATION).shape == (0, 3, 5, 5)
    whole = uniform((20, 3, 5, 5), 1, Stream.DEQUANTIZATION, first=100)
    for begins, ends in [(0, 1), (0, 7), (7, 20)]:
        part = uniform((ends - begins, 3, 5, 5), 1, Stream.DEQUANTIZATION, first=100 + begins)
        assert torch.equal(part, whole[begins:ends])


def test_each_key_has_other_numbers():
    shape = (50, 3, 8, 8)
    drawn = [uniform(shape, seed, Stream.EVALUATION) for seed in (0, 1, 2**62)]
    drawn += [uniform(shape, 0, Stream.DEQUANTIZATION)]
    drawn += [uniform(shape, 0, Stream.EVALUATION, **key) for key in ({"draw": 1}, {"first": 50})]
    flat = torch.stack(drawn).flatten(1).double()
    correlations = torch.corrcoef(flat) - torch.eye(len(drawn))
    assert correlations.abs().max() < 5 / math.sqrt(flat.shape[1])


# --- quality --------------------------------------------------------------------------------------
# Seeds are fixed, so these tests never fail by chance. A test passes where a statistic is within
# five standard deviations of what independent uniform numbers have.


def a_million():
    return uniform((340, 3, 32, 32), 0, Stream.DEQUANTIZATION)


def test_numbers_are_multiples_of_2_to_the_minus_24_in_0_to_1():
    numbers = a_million()
    assert numbers.dtype == torch.float32 and numbers.min() >= 0 and numbers.max() < 1
    assert numbers.double().max() <= 1 - 2.0**-24
    scaled = numbers.double() * 2**24
    assert torch.equal(scaled, scaled.round())
    odd = scaled % 2  # the last bit
    assert abs(odd.mean().item() - 0.5) < 5 * 0.5 / math.sqrt(numbers.numel())


def test_all_bins_are_equally_full():
    numbers, bins = a_million(), 1024
    expected = numbers.numel() / bins
    chi_squared = ((numbers.histc(bins, 0, 1) - expected).square() / expected).sum().item()
    assert abs(chi_squared - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_neighbours_are_independent(axis):
    """Pairs of numbers, in images that follow each other and in each direction of an image, fill
    32 x 32 cells equally.
    """
    numbers = a_million().movedim(axis, 0)
    pairs = 32 * (32 * numbers[:-1]).floor() + (32 * numbers[1:]).floor()
    expected = pairs.numel() / 1024
    chi_squared = ((pairs.histc(1024, 0, 1023) - expected).square() / expected).sum().item()
    # Pairs that overlap are not independent. That changes the variance of the statistic little.
    assert abs(chi_squared - 1023) < 6 * math.sqrt(2 * 1023)


def test_entries_of_a_block_and_images_are_uncorrelated():
    numbers = uniform((20_000, 1, 4, 4), 3, Stream.EVALUATION).flatten(1).double()
    apart = torch.corrcoef(numbers.T) - torch.eye(16)
    assert apart.abs().max() < 5 / math.sqrt(len(numbers))
    of_images = torch.corrcoef(uniform((64, 3, 64, 64), 3, Stream.EVALUATION).flatten(1).double())
    assert (of_images - torch.eye(64)).abs().max() < 5 / math.sqrt(3 * 64 * 64)


# --- on a device ----------------------------------------------------------------------------------


def test_no_value_is_read_from_the_device():
    """A fake tensor has no values: reading one raises."""
    with FakeTensorMode():
        noise = uniform((3, 3, 5, 5), 0, Stream.EVALUATION, 7, device=torch.device("cuda"))
    assert noise.device.type == "cuda" and noise.shape == (3, 3, 5, 5)


@compiles
@pytest.mark.run  # takes seconds
def test_it_traces_in_one_graph():
    key = np.array(KNOWN[2][1], np.uint64)
    index = torch.arange(100)
    traced = torch.compile(philox, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(index, 3, key), philox(index, 3, key))

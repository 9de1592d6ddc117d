"""Streams: the bits that the first images borrow, and images that cannot be coded."""

import time
from unittest.mock import Mock

import pytest
import torch
from coding_helpers import RGB, affine_flow, causal_flow, smooth

from flowtrain.tools.archive.codec import Coder, coder_of
from flowtrain.tools.archive.stack import Exhausted, Stack, random_words
from flowtrain.tools.archive.streams import (
    MOST_CARRIERS,
    EncodedStream,
    decode_stream,
    encode_stream,
    estimate,
)
from flowtrain.tools.archive.threads import in_threads

pytest.importorskip("constriction")


def round_trip(coder: Coder, x: torch.Tensor, borrowed: int) -> EncodedStream:
    ticks: list[int] = []
    sides = torch.zeros(len(x), dtype=torch.long)
    stream = encode_stream(coder, x, list(range(len(x))), borrowed, ticks.append, sides)
    assert len(set(stream.images)) == len(stream.images) and sum(ticks) >= len(x)
    back = decode_stream(
        coder, stream.words, stream.described, lambda count: None, sides[stream.images]
    )
    assert torch.equal(back, x[stream.images])
    return stream


@pytest.mark.parametrize("borrowed", [16, 1200, 5000])
def test_a_stream_that_borrows_more_than_it_has_begins_again(borrowed):
    coder, x = coder_of(affine_flow((3, 8, 8))), smooth(40, (3, 8, 8))
    stream = round_trip(coder, x, borrowed)
    chunks = stream.described.chunks
    assert sorted(stream.images) == list(range(40))
    assert 0 < stream.described.carriers < 40 and max(chunks) > min(chunks)
    with pytest.raises(Exhausted):
        coder.encode(x[:1], Stack(random_words(10)))


def test_random_bits_are_borrowed_if_images_are_too_small_to_carry():
    x = torch.full((50, 1, 8, 8), 7, dtype=torch.uint8)
    stream = round_trip(coder_of(affine_flow((1, 8, 8))), x, 50_000)
    assert len(stream.images) == 50
    assert stream.described.carriers == MOST_CARRIERS and stream.initial_bits >= 50_000


def test_an_image_that_cannot_be_coded_is_left_out_of_its_stream():
    x = smooth(30, (3, 8, 8)) // 8 + 112
    x[20, 0, 0, 0] = 255
    coder = coder_of(affine_flow((3, 8, 8), slope=150.0))
    stream = round_trip(coder, x, 4000)
    assert 20 not in stream.images and len(stream.images) == 29
    assert estimate(coder, x[18:22]).borrowed > 0 and estimate(coder, x[20:21]) is None


def test_a_stream_of_a_causal_flow_begins_with_nothing():
    coder, x = coder_of(causal_flow(RGB)), smooth(150, RGB)
    for count, chunks in ((150, [128, 22]), (1, [1])):
        stream = round_trip(coder, x[:count], 0)
        assert (stream.initial_bits, stream.described.carriers) == (0, 0)
        assert stream.described.chunks == chunks


def test_the_first_stream_that_fails_ends_all():
    def slow(tick):
        for _ in range(2000):
            time.sleep(0.005)
            tick(1)
            ticks.append(1)

    torch.set_num_threads(2)
    ticks, fails = [], Mock(side_effect=ValueError("the second"))
    with pytest.raises(ValueError, match="the second"):
        in_threads([slow, fails], 1, lambda done, total: None)
    assert len(ticks) < 2000

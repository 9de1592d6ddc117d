"""Streams: what the first images borrow, and what cannot be coded."""

import pytest
import torch
from coding_helpers import affine_flow, smooth

from flowtrain.tools.archive.codec import Codec
from flowtrain.tools.archive.stack import Exhausted, Stack, random_words
from flowtrain.tools.archive.streams import (
    MOST_CARRIERS,
    EncodedStream,
    decode_stream,
    encode_stream,
)

pytest.importorskip("constriction")


def round_trip(codec: Codec, x: torch.Tensor, borrowed: int) -> EncodedStream:
    stream = encode_stream(codec, x, list(range(len(x))), borrowed, lambda count: None)
    assert len(set(stream.images)) == len(stream.images)
    back = decode_stream(codec, stream.words, stream.description(), lambda count: None)
    assert torch.equal(back, x[stream.images])
    return stream


@pytest.mark.parametrize("borrowed", [16, 1200, 5000])
def test_a_stream_that_borrows_more_than_it_has_begins_again(borrowed):
    codec, x = Codec(affine_flow((3, 8, 8))), smooth(40, (3, 8, 8))
    stream = round_trip(codec, x, borrowed)
    assert sorted(stream.images) == list(range(40))
    assert 0 < stream.carriers < 40 and max(stream.chunks) > min(stream.chunks)
    with pytest.raises(Exhausted):
        codec.encode(x[:1], Stack(random_words(10)))


def test_random_bits_are_borrowed_where_images_are_too_small_to_carry():
    x = torch.full((50, 1, 8, 8), 7, dtype=torch.uint8)
    stream = round_trip(Codec(affine_flow((1, 8, 8))), x, 50_000)
    assert len(stream.images) == 50
    assert stream.carriers == MOST_CARRIERS and stream.initial_bits >= 50_000


def test_an_image_that_cannot_be_coded_is_left_out_of_its_stream():
    x = smooth(30, (3, 8, 8)) // 8 + 112
    x[20, 0, 0, 0] = 255
    stream = round_trip(Codec(affine_flow((3, 8, 8), slope=150.0)), x, 4000)
    assert 20 not in stream.images and len(stream.images) == 29

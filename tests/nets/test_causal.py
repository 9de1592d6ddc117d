"""Blocks of causal networks: what each token depends on, and the two ways of computing it."""

import itertools

import pytest
import torch
from helpers import perturb, seeded, tiny_flow

from flowtrain.nets.causal_blocks import (
    AttentionBlock,
    ConvolutionBlock,
    PixelAttentionBlock,
    PixelConvolutionBlock,
)
from flowtrain.nets.coarse import CoarseStream
from flowtrain.nets.dropout import keep_all
from flowtrain.nets.masked import MaskedLinear
from flowtrain.nets.token_head import _layer
from flowtrain.nets.window import Window

KINDS = ["convolution", "pixel convolution", "attention", "pixel attention", "coarse"]
SIZES = [(5, 6), (6, 3), (8, 5), (3, 1)]
WIDTH, PIXELS = 6, 4


def within(token, other, above, beside):
    (i, j), (k, n) = token, other
    return i - k <= above and abs(n - j) <= beside


def seen_by(kind, token, other):
    """Whether a block of a kind may, and so does, look from a token at another."""
    (i, j), (k, n) = token, other
    if kind in ("convolution", "pixel convolution"):
        return other <= token and within(token, other, 1, 1)
    if kind in ("attention", "pixel attention"):
        return other <= token
    cell, other_cell = (i // 2 - 1, j // 2), (k // 2, n // 2)
    # Two blocks of cells, of which each sees one row above and the cells beside it.
    return other_cell[0] <= cell[0] and within(cell, other_cell, 2, 2) or other == token


def block_of(kind, size):
    block = {
        "convolution": lambda: ConvolutionBlock(WIDTH, Window(1, 1, ahead=1)),
        "pixel convolution": lambda: PixelConvolutionBlock(WIDTH, Window(1, 1, ahead=1), PIXELS),
        "attention": lambda: AttentionBlock(WIDTH),
        "pixel attention": lambda: PixelAttentionBlock(WIDTH, PIXELS, size),
        "coarse": lambda: CoarseStream(WIDTH, 2, size),
    }[kind]()
    return perturb(block, 0.5).double()


def features(size, batch=1, dtype=torch.float64):
    """Features, and the pixels of the same tokens."""
    both = torch.randn(batch, *size, WIDTH + PIXELS, generator=seeded(), dtype=dtype)
    return both.split([WIDTH, PIXELS], dim=-1)


def seen_tokens(function, x):
    """Which tokens each token's output depends on, `(N, N)`."""
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x).sum(dim=0), x)
    return jacobian.abs().amax(dim=(2, 3, 6)).flatten(2).flatten(0, 1) > 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_depends_on_earlier_tokens_only(kind, size):
    block = block_of(kind, size)
    x, pixels = features(size, 5)  # every ReLU is active in one of them
    seen = seen_tokens(lambda x: block(x, keep_all, pixels), x)
    places = list(itertools.product(*map(range, size)))
    wanted = [[seen_by(kind, token, other) for other in places] for token in places]
    assert torch.equal(seen, torch.tensor(wanted))
    assert not seen.triu(1).any()
    if kind.startswith("pixel"):
        seen = seen_tokens(lambda pixels: block(x, keep_all, pixels), pixels)
        assert torch.equal(seen, torch.tensor(wanted).tril(-1))


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_token_after_the_other_gives_the_same(kind, size):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        block, (x, pixels) = block_of(kind, size).to(dtype), features(size, 3, dtype)
        known, columns = torch.zeros(PIXELS, 3, dtype=dtype), []
        by_token = block.by_token(known, size)
        for i, j in itertools.product(*map(range, size)):
            columns.append(by_token.column(x[:, i, j].T, i, j).T)
            known.copy_(pixels[:, i, j].T)
        found, wanted = torch.stack(columns, dim=1).view_as(x), block(x, keep_all, pixels)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        assert not torch.equal(found, x)
    block.last.weight.zero_()  # as at the start
    block.last.bias.zero_()
    assert torch.equal(block(x, keep_all, pixels), x)


def test_pixel_attention_depends_on_distances_and_temperature():
    """The products of queries and keys, if all tokens are alike but for their places."""
    block = block_of("pixel attention", (5, 6))
    alike = [torch.ones(1, 30, n).double() for n in (WIDTH, PIXELS, WIDTH)]

    def products():  # with the tokens (0, 0), (0, 1), ...
        queries, keys, _ = block.after(*alike, slice(None))
        return (queries @ keys.mT)[0, 0, :, 1:].view(5, 6, -1)

    found = products()
    for token in range(29):  # the turns are float32
        i, j = divmod(token, 6)
        moved = found[i:, j:, token]
        torch.testing.assert_close(moved, found[: 5 - i, : 6 - j, 0], rtol=0, atol=1e-5)
    assert found[..., 0].diff(dim=0).abs().min() > 1e-3 < found[..., 0].diff(dim=1).abs().min()
    block.inverse_temperature.data *= 2
    assert torch.equal(products(), 2 * found)


@pytest.mark.parametrize(
    "blocks, attention, downsample, order",
    [(3, 0, 0, "ccc"), (6, 2, 0, "ccaccacc"), (6, 1, 2, "cccdaccc"), (1, 3, 1, "daaac")],
)
def test_the_order_of_blocks(blocks, attention, downsample, order):
    flow = tiny_flow("causal", (1, 6, 6), blocks=blocks, attention=attention, downsample=downsample)
    letters = {ConvolutionBlock: "c", AttentionBlock: "a", CoarseStream: "d"}
    found = flow.bijection.conditioner.blocks
    assert "".join(letters[type(block)] for block in found) == order
    assert sum(len(block.blocks) for block in found if type(block) is CoarseStream) == downsample
    for width, heads in ((32, 1), (64, 2), (100, 2)):  # about 32 channels for each
        assert AttentionBlock(width).heads == heads


@pytest.mark.parametrize("tokens_last", [False, True])
def test_a_layer_of_two_inputs_is_linear_and_has_its_gradient(tokens_last):
    layer = MaskedLinear(torch.rand(4, 5, generator=seeded()) < 0.7).double()
    x, features = (torch.randn(2, 3, n, generator=seeded(n)).double() for n in (3, 2))
    inputs = x.requires_grad_(), features.requires_grad_(), *layer.parameters()

    def run(x, features, *_):
        return _layer(layer, x, features, tokens_last)

    expected = layer(torch.cat([x, features], dim=-1))
    torch.testing.assert_close(run(*inputs), expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (run(*inputs), expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)

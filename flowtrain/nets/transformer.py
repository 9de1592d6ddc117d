"""Transformers over tokens: a causal one (TarFlow), and one that sees all tokens (Jet)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.token_autoregressive import NextParameters, TokenConditioner
from flowtrain.nets.attention import KeysAndValues, heads_of
from flowtrain.nets.causal_blocks import zero_linear

HEAD = 64  # channels of an attention head, about
EXPANSION = 4  # hidden units of the network behind each attention, per channel


class TransformerLayer(nn.Module):
    """Self-attention and a network of one hidden layer, both after normalization and added.

    It maps tokens `(B, N, C)` to the same shape (Vaswani et al. 2017; pre-norm).
    """

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, EXPANSION * width),
            nn.GELU(),
            nn.Linear(EXPANSION * width, width),
        )

    def forward(self, x: Tensor, kept: KeysAndValues | None = None) -> Tensor:
        """`x` are all tokens, or the next one, for which keys and values are `kept`."""
        parts = self.queries_keys_values(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        if kept is None:
            mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        else:
            mixed = kept.attend(queries, keys, values)
        x = x + self.projection(mixed.transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(x)
        return y


class _Transformer(nn.Module):
    """A linear map into the network, learned positions, and layers.

    A context `(B, K)` adds to the features; the mean of the unit vectors stands for an unknown one.
    """

    def __init__(
        self,
        entries: int,
        tokens: int,
        width: int,
        layers: int,
        deviation: float,
        context_channels: int,
        causal: bool,
    ):
        super().__init__()
        self.first = nn.Linear(entries, width)
        self.position = nn.Parameter(deviation * torch.randn(tokens, width))
        self.context: nn.Linear | None = None
        if context_channels:
            self.context = nn.Linear(context_channels, width, bias=False)
            nn.init.normal_(self.context.weight, std=deviation)
        self.heads = heads_of(width, HEAD)
        self.layers = nn.ModuleList(
            TransformerLayer(width, self.heads, causal) for _ in range(layers)
        )

    def begin(self, tokens: Tensor, places: slice, context: Tensor | None) -> Tensor:
        """The first features of tokens `(B, N, E)` in these places, `(B, N, C)`."""
        h: Tensor = self.first(tokens)
        added = self.position[places]
        if self.context is not None:
            if context is None:
                added = added + self.context.weight.mean(dim=1)
            else:
                added = added + self.context(context.flatten(1))[:, None]
        return h + added.to(h.dtype)

    def features(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Tokens `(B, E, H, W)` to features `(B, N, C)`."""
        h = self.begin(x.flatten(2).mT, slice(None), context)
        for layer in self.layers:
            h = layer(h)
        return h


class CausalTransformer(_Transformer, TokenConditioner):
    """The conditioner of TarFlow (section 2.3): a causal transformer, and a zero linear map.

    The output at a token is for the next one. So the first token's parameters are zero.
    """

    def __init__(
        self,
        entries: int,
        parameters_per_entry: int,
        tokens: int,
        width: int,
        layers: int,
        context_channels: int = 0,
    ):
        super().__init__(entries, tokens, width, layers, 0.01, context_channels, causal=True)
        self.last = zero_linear(width, parameters_per_entry * entries)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parameters: Tensor = self.last(self.features(x, context))
        moved = F.pad(parameters[:, :-1], (0, 0, 1, 0))
        return moved.mT.reshape(x.shape[0], -1, *x.shape[2:])

    def by_token(self, batch: int, context: Tensor | None = None) -> NextParameters:
        return _ByToken(self, batch, context)


class _ByToken:
    """See `NextParameters`. It keeps the keys and values of each layer."""

    def __init__(self, net: CausalTransformer, batch: int, context: Tensor | None):
        self.net, self.batch, self.context = net, batch, context
        tokens, width = net.position.shape
        shape = (batch, net.heads, width // net.heads)
        self.kept = [KeysAndValues(tokens, shape, net.position) for _ in net.layers]
        self.known = 0

    def __call__(self, before: Tensor | None) -> Tensor:
        if before is None:
            return self.net.position.new_zeros(self.batch, self.net.last.out_features)
        places = slice(self.known, self.known + 1)
        h = self.net.begin(before[:, None], places, self.context)
        for layer, kept in zip(self.net.layers, self.kept, strict=True):
            h = layer(h, kept)
        self.known += 1
        parameters: Tensor = self.net.last(h)[:, 0]
        return parameters


class VisionTransformer(_Transformer):
    """The conditioner of Jet (section 3): a transformer whose tokens see each other, layer norm,
    and a zero linear map, from `(B, E, H, W)` to `(B, E', H, W)`.
    """

    def __init__(
        self,
        entries: int,
        outputs: int,
        tokens: int,
        width: int,
        layers: int,
        context_channels: int = 0,
    ):
        deviation = 1 / math.sqrt(width)
        super().__init__(entries, tokens, width, layers, deviation, context_channels, causal=False)
        self.norm = nn.LayerNorm(width)
        self.last = zero_linear(width, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parameters: Tensor = self.last(self.norm(self.features(x, context)))
        return parameters.mT.reshape(x.shape[0], -1, *x.shape[2:])

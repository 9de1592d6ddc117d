"""Number of attention heads, and a cache of keys and values."""

import torch
from torch import Tensor
from torch.nn import functional as F


def heads_of(width: int, channels: int) -> int:
    """The number of heads, of about `channels` each, that divides the width evenly."""
    return next(n for n in range(max(1, width // channels), 0, -1) if width % n == 0)


class KeysAndValues:
    """Keys and values of the tokens so far, for attention of one token after the other.

    There will be `tokens` of `shape` `(B, heads, C)`, of the type and on the device of `like`.
    """

    def __init__(self, tokens: int, shape: tuple[int, int, int], like: Tensor):
        batch, heads, channels = shape
        self.keys = like.new_empty(batch, heads, tokens, channels)
        self.values = torch.empty_like(self.keys)
        self.known = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The attention of the next token by its query, key and value, all `(B, heads, 1, C)`."""
        if torch.is_grad_enabled():  # autograd's tensors may not be overwritten
            self.keys, self.values = self.keys.clone(), self.values.clone()
        self.keys[:, :, self.known] = key[:, :, 0]
        self.values[:, :, self.known] = value[:, :, 0]
        self.known += 1
        return F.scaled_dot_product_attention(
            query, self.keys[:, :, : self.known], self.values[:, :, : self.known]
        )

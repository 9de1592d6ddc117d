"""A coarse stream of features beside the tokens, for distant dependencies."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.nets.causal_blocks import Block, ConvolutionBlock, norm, norm_of_columns, zero_linear
from flowtrain.nets.dropout import Drop
from flowtrain.nets.window import Window


class CoarseStream(Block):
    """Residual blocks over cells of 2x2 tokens, at a quarter of the cost of blocks over tokens.

    A row of cells is two rows of tokens, and is added to the next two rows of tokens. So all its
    tokens come before these, and the convolutions may see cells to both sides.
    """

    def __init__(self, width: int, blocks: int, size: tuple[int, int]):
        super().__init__()
        self.first = nn.Linear(4 * width, width)
        window = Window(1, 1, ahead=2)
        self.blocks = nn.ModuleList(ConvolutionBlock(width, window) for _ in range(blocks))
        self.last = zero_linear(width, 4 * width)

    def forward(self, x: Tensor, drop: Drop, pixels: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows = (height - 1) // 2  # of cells that are added to any token
        seen = F.pad(norm(x[:, : 2 * rows]), (0, 0, 0, width % 2))
        cells = seen.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
        h = self.first(cells.transpose(2, 3).flatten(3))
        for block in self.blocks:
            h = block(h, drop, pixels)
        parts = self.last(norm(h)).unflatten(3, (2, 2, -1)).transpose(2, 3)
        added = parts.flatten(3, 4).flatten(1, 2)[:, : height - 2, :width]
        return x + F.pad(added, (0, 0, 0, 0, 2, 0))

    def by_token(self, pixels: Tensor, size: tuple[int, int]) -> "_CoarseByToken":
        return _CoarseByToken(self, pixels, size)


class _CoarseByToken:
    """See `BlockByToken`. A row of cells is computed before the first token that it is added to."""

    def __init__(self, stream: CoarseStream, pixels: Tensor, size: tuple[int, int]):
        self.stream = stream
        self.weight, self.bias = stream.first.weight, stream.first.bias[:, None]
        cells = -(-size[1] // 2)
        blocks: list[ConvolutionBlock] = list(stream.blocks)  # type: ignore[arg-type]
        self.blocks = [block.by_token(pixels, (0, cells)) for block in blocks]
        # Cells, then row, column and channels of their tokens.
        self.seen = self.weight.new_zeros(cells, 2, 2, len(self.weight), pixels.shape[1])
        self.added = torch.zeros_like(self.seen)

    def column(self, x: Tensor, i: int, j: int) -> Tensor:
        if i > 0 and i % 2 == 0 and j == 0:
            self._next_cells()
        self.seen[j // 2, i % 2, j % 2] = norm_of_columns(x)
        return x + self.added[j // 2, i % 2, j % 2]

    def _next_cells(self) -> None:
        cells = [torch.addmm(self.bias, self.weight, each.flatten(0, 2)) for each in self.seen]
        for block in self.blocks:
            for j, cell in enumerate(cells):
                block.write(cell, j)
            cells = [block.read(cell, j) for j, cell in enumerate(cells)]
        weight, bias = self.stream.last.weight, self.stream.last.bias[:, None]
        for added, cell in zip(self.added, cells, strict=True):
            added.copy_(torch.addmm(bias, weight, norm_of_columns(cell)).view_as(added))

"""The given parts of images from which a flow samples, and pictures with both."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import Split
from flowtrain.datasets.base import open_image
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow

CONTEXTS = 8  # test images of which a part is given


def of_split(flow: Flow, split: Split, count: int) -> Tensor | None:
    """The contexts of the first `count` images of a split, in turn if it has fewer: uint8
    `(count, C', H', W')`. None for a model of images by themselves.
    """
    if flow.image_context is None:
        return None
    return flow.context_of(split.take(np.arange(count) % len(split)))


def of_file(path: Path, model: LoadedModel) -> tuple[Tensor, str]:
    """The context in an image file, uint8 `(1, C', H', W')`, and its origin in words.

    A file of the size of a `downsample` context is one as it is. Any other is brought to the
    model's shape by the `resize_policy` of its data first. Raises `UserError`.
    """
    flow, policy = model.flow, model.config.data.resize_policy
    if (context := flow.image_context) is None:
        raise UserError(f"--image {path}: the model is not given an image (model.context is none)")
    (_, height, width), (_, low, narrow) = flow.shape, context.shape
    if context.kind == "downsample":
        try:
            pixels = open_image(path, context.shape, context.num_bins, "exact")
            return torch.from_numpy(pixels)[None], f"{path} as it is, {low}x{narrow}"
        except UserError:  # it has another size, or it is no image
            pass
    x = torch.from_numpy(open_image(path, flow.shape, context.num_bins, policy))[None]
    how = "grey" if context.kind == "grey" else f"reduced to {low}x{narrow}"
    return context.of(x), f"{path} at {height}x{width}, {how}"


def rows(flow: Flow, contexts: Tensor, drawn: Tensor, temperatures: int) -> Tensor:
    """Rows of a context and its N samples, `(T K (N + 1), C, H, W)`, from samples
    `(T K N, C, H, W)` at T temperatures for each of K contexts.
    """
    assert flow.image_context is not None
    given = flow.image_context.shown(contexts).repeat(temperatures, 1, 1, 1)
    samples = drawn.unflatten(0, (len(given), -1))
    return torch.cat([given[:, None], samples], dim=1).flatten(0, 1)

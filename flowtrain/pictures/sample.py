"""Samples at several temperatures."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow
from flowtrain.system import capacity
from flowtrain.system.random import Stream, generator

ROW = 300  # bytes of a tensor, beside its values


def sample(
    flow: Flow,
    num: int,
    temperatures: Sequence[float],
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    classes: Sequence[int] = (),
) -> Tensor:
    """`num` images for each temperature, uint8 `(len(temperatures) * num, C, H, W)`.

    All temperatures use the same latents. These are drawn on the CPU, image by image, so the first
    ones depend on the seed alone. With `classes`, a class-conditional model samples `num` images
    for each temperature and class, again from the same latents.

    Raises `UserError` for a class that the model does not have, and before anything is drawn where
    the images would not fit into memory.
    """
    rows = num * max(1, len(classes))
    capacity.require(
        num * (ROW + 4 * flow.latent_dims)
        + rows * (4 * flow.latent_dims + flow.dims * len(temperatures)),
        f"--num {num}",
    )
    z = flow.draw_latents(num, generator(seed, Stream.LATENTS))
    for label in classes:
        if not flow.classes:
            raise UserError(
                f"--classes {label}: the model is not class-conditional (model.classes is 0)"
            )
        if not 0 <= label < flow.classes:
            raise UserError(f"--classes {label}: the model has the classes 0..{flow.classes - 1}")
    labels = torch.tensor(classes).repeat_interleave(num) if classes else None
    images = []
    for temperature in temperatures:
        latents = flow.place(temperature * z.repeat(max(1, len(classes)), 1), labels)
        for part in torch.split(latents, flow.kind.decode_batch):
            images.append(flow.decode(part).cpu())
            progress(sum(map(len, images)), len(latents) * len(temperatures))
    return torch.cat(images)


def npz(
    flow: Flow, drawn: Tensor, temperatures: Sequence[float], seed: int, classes: Sequence[int] = ()
) -> bytes:
    """The images that `sample` has drawn as an .npz file, channels last, with the temperature of
    each and, where `classes` were asked for, its class.
    """
    num = len(drawn) // (len(temperatures) * max(1, len(classes)))
    arrays: dict[str, Any] = {
        "images": drawn.movedim(1, -1).numpy(),
        "temperature": np.repeat(temperatures, len(drawn) // len(temperatures)),
    }
    if classes:
        arrays["classes"] = np.tile(np.repeat(classes, num), len(temperatures))
    arrays |= {"seed": seed, **flow.kind.npz()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()

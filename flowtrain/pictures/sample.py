"""Samples at several temperatures."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.bijections.inverses import Iterating, WithProgress, iterates, sequential_layers
from flowtrain.errors import UserError
from flowtrain.flow.flow import NO_SIGMA, Flow
from flowtrain.flow.passes import denoising_batch_size, sampling_batch_size
from flowtrain.flow.sides import sides_of
from flowtrain.system import capacity
from flowtrain.system.console import silent
from flowtrain.system.random import Stream, generator


def sample(
    flow: Flow,
    num: int,
    temperatures: Sequence[float],
    seed: int,
    progress: Callable[[float, int], None] = silent,
    classes: Sequence[int] = (),
    iterate: bool = False,
    guidance: float | None = None,
    denoise: bool = False,
    contexts: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """`num` images for each temperature, uint8 `(len(temperatures) * num, C, H, W)`.

    All temperatures use the same latents, of which the first depend on the seed alone, and with
    `flow.sides` the same side. From these come also `num` images for each of the `classes` or of
    the `contexts` `(K, C', H', W')`, which a model with an `image_context` needs. With `iterate`,
    sequential layers compute all entries at once, until they do not change any more. `guidance` and
    `denoise` as in `Flow.decode`. A long job draws parts: their latents and classes in turn are a
    function of the seed and of `first`, the number of images before.

    Raises `UserError` for options that do not fit the model, and for samples without room.
    """
    if iterate and not iterates(flow.bijection):
        why = "and none needs it: its samples take one pass"
        if flow.bijection.inverse_is_sequential:
            why = "only entry by entry"
        raise UserError(f"--method jacobi: no layer of the model has it, {why}")
    if guidance is not None and (reason := flow.unguided):
        raise UserError(f"--guidance {guidance:g}: {reason}")
    if denoise and flow.dequantizer.sigma is None:
        raise UserError(f"--denoise: {NO_SIGMA}")
    groups = max(1, len(classes)) if contexts is None else len(contexts)
    count = num * len(temperatures) * groups
    pixels = flow.dims * (4 if flow.num_bins is None else 1)
    capacity.require(
        # Latents as drawn and as placed, and images in parts and as a whole.
        4 * (1 + groups) * num * flow.latent_dims + 2 * count * pixels,
        f"--num-images {num}: {count:,} samples need",
    )
    z = flow.draw_latents(num, generator(seed, Stream.LATENTS, first))
    for label in classes:
        if not flow.classes:
            raise UserError(
                f"--classes {label}: the model is not class-conditional (model.classes is 0)"
            )
        if not 0 <= label < flow.classes:
            raise UserError(f"--classes {label}: the model has the classes 0..{flow.classes - 1}")
    labels = flow.classes_in_turn(first + num)
    if classes:
        labels = torch.tensor(classes).repeat_interleave(num)
    elif labels is not None:
        labels = labels[first:]
    sides = sides_of(z, flow.sides).repeat(groups)
    given = None if contexts is None else contexts.repeat_interleave(num, dim=0)
    images = []
    for i, temperature in enumerate(temperatures):
        latents = flow.latents_of_classes(temperature * z.repeat(groups, 1), labels)

        def note(done: float, before: int = i * len(latents)) -> None:
            progress(before + done, count)

        drawn = decode(flow, latents, note, labels, iterate, guidance, denoise, given, sides)
        images.append(drawn)
    return torch.cat(images)


def decode(
    flow: Flow,
    z: Tensor,
    progress: Callable[[float], None] = lambda done: None,
    labels: Tensor | None = None,
    iterate: bool = False,
    guidance: float | None = None,
    denoise: bool = False,
    context: Tensor | None = None,
    sides: Tensor | None = None,
) -> Tensor:
    """Latents `(B, D)` to images `(B, C, H, W)` on the CPU, as many at a time as memory allows.

    See `Flow.decode`, and `sample` for `iterate`. `progress` gets the number of images that are
    done, in tenths if a part takes long.
    """
    images = []
    at_a_time = denoising_batch_size(flow) if denoise else sampling_batch_size(flow)
    layers = sequential_layers(flow.bijection)
    executor = Iterating if iterate else WithProgress
    for start in range(0, len(z), at_a_time):
        stop = min(start + at_a_time, len(z))

        def note(share: float, start: int = start, stop: int = stop) -> None:
            progress(round(start + share * (stop - start), 1))

        others = (labels, context, sides)
        of_part, given, its = (None if of is None else of[start:stop] for of in others)
        run = executor(note, layers)
        part = flow.decode(z[start:stop], of_part, run, guidance, denoise, given, its)
        images.append(part.cpu())
        progress(stop)
    return torch.cat(images)


def npz(
    flow: Flow,
    drawn: Tensor,
    temperatures: Sequence[float],
    seed: int,
    classes: Sequence[int] = (),
    contexts: Tensor | None = None,
    **others: object,
) -> bytes:
    """The result of `sample` as an .npz file, channels last, with the temperature of each image and
    its class or its context, if there are any. `others` are further arrays or numbers.
    """
    num = len(drawn) // (len(temperatures) * max(1, len(classes)))
    arrays: dict[str, Any] = {
        "images": drawn.movedim(1, -1).numpy(),
        "temperature": np.repeat(temperatures, len(drawn) // len(temperatures)),
    }
    if classes:
        arrays["classes"] = np.tile(np.repeat(classes, num), len(temperatures))
    if contexts is not None:
        repeated = contexts.repeat_interleave(num // len(contexts), dim=0)
        arrays["context"] = repeated.repeat(len(temperatures), 1, 1, 1).movedim(1, -1).numpy()
    arrays |= {"seed": seed, **flow.kind.npz(), **others}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()

"""Diagnosis of a trained flow: are its layers invertible in floating point, and log-dets right?"""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.system.console import silent
from flowtrain.system.random import Stream, generator, uniform
from flowtrain.tools.doctor.findings import IMAGES, NOISE, SAMPLES, Finding, Notes
from flowtrain.tools.doctor.layers import check_layers, check_noise, check_weights, learns_noise
from flowtrain.tools.doctor.log_dets import check_log_dets
from flowtrain.tools.doctor.round_trips import check_likelihood, round_trip

BATCH_SIZE = 64


@torch.no_grad()
def examine(
    model: LoadedModel,
    data: DataSet,
    *,
    num_images: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] = silent,
) -> list[Finding]:
    """All findings about a model, on `num_images` test images, noise images and samples each.

    A model that raises, or whose values are not finite, has findings like any other.

    Raises:
        UserError: if the data do not have the model's shape and levels, or have no test image. Also
            for points of a surface: noise is off it, and Jacobians are not square.
    """
    flow = model.flow
    if flow.kind.on_surface:
        raise UserError(
            f"{model.checkpoint.path}: the data are points of a surface, for which there are no "
            f"checks"
        )
    data.require(flow.shape, flow.num_bins, model.checkpoint.path)
    split = data.split("test")
    if len(split) == 0:
        raise UserError("data: the test split is empty")
    x = split.sample(num_images, seed).take(slice(None))
    noise = uniform(x.shape, seed, Stream.EVALUATION, device=x.device)
    random_images = flow.kind.uniform_like(x, generator(seed, Stream.EVALUATION))
    levels = flow.kind.levels_per_unit(x)
    z = flow.latents_of_classes(flow.draw_latents(len(x), generator(seed, Stream.LATENTS))).cpu()

    precise = copy.deepcopy(flow).cpu().double()  # on the CPU: some accelerators have no float64
    notes = Notes()
    done, total = 0, (10 if learns_noise(flow) else 7) * -(-len(x) // BATCH_SIZE) + 1

    def in_batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        nonlocal done
        for parts in zip(*(tensor.split(BATCH_SIZE) for tensor in tensors), strict=True):
            yield parts
            done += 1
            progress(done, total)

    check_weights(flow, notes)
    for kind, images in ((IMAGES, x), (NOISE, random_images)):
        for part, u in in_batches(images, noise):
            run = partial(flow.to_latents, part.to(flow.device), u.to(flow.device))
            check_layers(flow, run, "forward pass", kind, notes)
    for part, images in in_batches(z, x):
        context = flow.conditioning(len(part), context=flow.context_of(images))
        run = partial(
            flow.bijection.run, direction="inverse", x=part.to(flow.device), context=context
        )
        check_layers(flow, run, "inverse pass", SAMPLES, notes)
    if learns_noise(flow):
        for kind, images in ((IMAGES, x), (NOISE, random_images), (SAMPLES, x)):
            for part, u in in_batches(images, noise):
                check_noise(flow, part.to(flow.device), u.to(flow.device), kind, notes)
    for kind, images in ((IMAGES, x), (NOISE, random_images)):
        exact = sum(
            round_trip(flow, precise, part, None, levels, kind, notes)
            for (part,) in in_batches(images)
        )
        if not flow.kind.exact:
            notes.add("images that come back exactly", exact / len(x), inputs=kind)
    for part, images in in_batches(z, x):
        round_trip(flow, precise, images, part, levels, SAMPLES, notes)
    reported = [check_likelihood(flow, precise, part, u, notes) for part, u in in_batches(x, noise)]
    if flow.num_bins is not None and not flow.kind.no_bits:
        bits = flow.loss(torch.cat(reported)).mean()
        notes.add("likelihood", bits / math.log2(flow.num_bins), inputs=IMAGES)
    check_log_dets(model, x[:1], noise[:1], notes)
    progress(total, total)
    return list(notes.findings.values())

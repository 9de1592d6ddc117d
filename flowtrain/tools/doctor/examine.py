"""Diagnosis of a trained flow: are its layers invertible in floating point, and log-dets right?"""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flowtrain import config as configuration
from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow
from flowtrain.flow.inputs import Batch, as_tensor
from flowtrain.foreign.contract import Foreign
from flowtrain.foreign.model import ForeignModel
from flowtrain.system.console import silent
from flowtrain.system.random import Stream, generator, uniform
from flowtrain.tools.doctor.contract import (
    check_batch,
    check_constancy,
    check_figure,
    check_log_prob,
    check_noise_bits,
)
from flowtrain.tools.doctor.findings import IMAGES, NOISE, SAMPLES, Finding, Notes
from flowtrain.tools.doctor.integral import check_integral
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

    Raises:
        UserError: if the data do not have the model's shape and levels, or have no test image. Also
            as `examine_on`.
    """
    data.require(model.flow.shape, model.flow.num_bins, model.checkpoint.path)
    split = data.split("test")
    if len(split) == 0:
        raise UserError("data: the test split is empty")
    x = split.sample(num_images, seed).take(slice(None))
    return examine_on(x, model, seed=seed, progress=progress)


@torch.no_grad()
def examine_on(
    x: Tensor, model: LoadedModel, *, seed: int = 0, progress: Callable[[int, int], None] = silent
) -> list[Finding]:
    """All findings about a model on images `x` `(B, C, H, W)`, as many noise images, and samples.

    A model that raises, or whose values are not finite, has findings like any other.
    """
    flow = model.flow
    noise = uniform(x.shape, seed, Stream.EVALUATION, device=x.device)
    random_images = flow.kind.uniform_like(x, generator(seed, Stream.EVALUATION))
    levels = flow.kind.levels_per_unit(x)
    z = flow.latents_of_classes(flow.draw_latents(len(x), generator(seed, Stream.LATENTS))).cpu()

    notes = Notes()
    if isinstance(flow, ForeignModel):
        check_constancy(flow, x, noise, notes)
    precise = copy.deepcopy(flow).cpu().double()  # on the CPU: some accelerators have no float64
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
        words = ""
        if isinstance(flow, ForeignModel):
            words = f"{bits:.4f} bits/dim, where the flow takes {flow.contract.words}"
        notes.add("likelihood", bits / math.log2(flow.num_bins), inputs=IMAGES, reason=words)
    check_integral(flow, x, z, notes)
    if isinstance(flow, ForeignModel):
        assert isinstance(precise, ForeignModel)
        check_batch(precise, x, noise, notes)
        check_log_prob(precise, x, noise, notes)
        if flow.num_bins is not None:
            check_noise_bits(flow, random_images, noise, notes)
            check_figure(flow, x, random_images, seed, notes)
    check_log_dets(model, x[:1], noise[:1], notes)
    progress(total, total)
    return list(notes.findings.values())


def check(flow: Flow | Foreign, x: Batch, seed: int = 0) -> list[Finding]:
    """All findings about a copy of a flow on images `x`. See `flowtrain.check`."""
    flow = copy.deepcopy(flow)
    if isinstance(flow, Foreign):
        flow = ForeignModel(flow)
    images = as_tensor(x, flow.shape, flow.num_bins)
    flow.dequantizer.check(images)
    described = Checkpoint(Path("the flow"), {}, {})
    model = LoadedModel(
        flow.eval().requires_grad_(False), configuration.parse({}), "raw", described
    )
    return examine_on(images, model, seed=seed)

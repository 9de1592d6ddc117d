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
from flowtrain.foreign.state import copied
from flowtrain.system.console import silent
from flowtrain.system.random import Stream, generator, uniform
from flowtrain.tools.doctor.contract import (
    check_batch,
    check_constancy,
    check_device,
    check_figure,
    check_log_prob,
    check_noise_bits,
)
from flowtrain.tools.doctor.draws import ERRORS, TOGETHER, adds_noise, check_randomness
from flowtrain.tools.doctor.findings import EXTREME, IMAGES, NOISE, SAMPLES, Finding, Notes
from flowtrain.tools.doctor.integral import check_integral
from flowtrain.tools.doctor.layers import check_layers, check_noise, check_weights
from flowtrain.tools.doctor.log_dets import check_log_dets
from flowtrain.tools.doctor.round_trips import check_likelihood, round_trip
from flowtrain.types import Shape

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
        UserError: if the data do not have the model's shape and levels. Also as `examine_on`.
    """
    data.require(model.flow.shape, model.flow.num_bins, model.checkpoint.path)
    split = data.split("test")
    x = split.sample(num_images, seed).take(slice(None))
    printed = isinstance(model.flow, ForeignModel) and model.flow.contract.prints_bits
    train = data.split("train").sample(num_images, seed).take(slice(None)) if printed else None
    return examine_on(x, model, train=train, seed=seed, progress=progress)


@torch.no_grad()
def examine_on(
    x: Tensor,
    model: LoadedModel,
    *,
    train: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = silent,
) -> list[Finding]:
    """All findings about a model on images `x` `(B, C, H, W)`, as many noise images, and samples.
    The figure of a project is also compared with the bits/dim of the images `train`.

    A model that raises, or whose values are not finite, has findings like any other.

    Raises:
        UserError: if the project's figure raises, or is printed and there is only one image.
    """
    flow = model.flow
    if isinstance(flow, ForeignModel) and flow.contract.prints_bits:
        for name, images in (("test", x), ("training", train)):
            if images is not None and len(images) < 2:  # one image has no standard error
                raise UserError(f"bits_per_dim: a printed figure needs two {name} images or more")
    kinds = {IMAGES: x, NOISE: flow.kind.uniform_like(x, generator(seed, Stream.EVALUATION))}
    if flow.num_bins is not None:
        kinds[EXTREME] = extreme_images(flow.shape, flow.num_bins)
    levels, of_images = flow.kind.levels_per_unit(x), EXTREME in kinds
    z = flow.latents_of_classes(flow.draw_latents(len(x), generator(seed, Stream.LATENTS))).cpu()
    passed = {**kinds, SAMPLES: x}
    noises = {kind: uniform(each.shape, seed, Stream.EVALUATION) for kind, each in passed.items()}
    noise = noises[IMAGES]

    notes = Notes()
    if isinstance(flow, ForeignModel):
        check_constancy(flow, x, noise, notes)
        check_randomness(flow, x, noise, notes)
    precise = copy.deepcopy(flow).cpu().double()  # on the CPU: some accelerators have no float64
    learned = flow.dequantizer.learns_noise
    passes, of_extremes = (11, 4) if learned else (8, 3) if of_images else (7, 0)
    done, total = 0, passes * -(-len(x) // BATCH_SIZE) + of_extremes + 1

    def in_batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        nonlocal done
        for parts in zip(*(tensor.split(BATCH_SIZE) for tensor in tensors), strict=True):
            yield parts
            done += 1
            progress(done, total)

    check_weights(flow, notes)
    for kind, images in kinds.items():
        for part, u in in_batches(images, noises[kind]):
            run = partial(flow.to_latents, part.to(flow.device), u.to(flow.device))
            check_layers(flow, run, "forward pass", kind, notes)
    for part, images in in_batches(z, x):
        context = flow.conditioning(len(part), context=flow.context_of(images))
        run = partial(
            flow.bijection.run, direction="inverse", x=part.to(flow.device), context=context
        )
        check_layers(flow, run, "inverse pass", SAMPLES, notes)
    if learned:
        for kind, images in passed.items():
            for part, u in in_batches(images, noises[kind]):
                check_noise(flow, part.to(flow.device), u.to(flow.device), kind, notes)
    for kind, images in kinds.items():
        exact = sum(
            round_trip(flow, precise, part, None, levels, kind, notes)
            for (part,) in in_batches(images)
        )
        if not flow.kind.exact and not adds_noise(flow):
            notes.add("images that come back exactly", exact / len(images), inputs=kind)
    for part, images in in_batches(z, x):
        round_trip(flow, precise, images, part, levels, SAMPLES, notes)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for kind, images in kinds.items() if of_images else [(IMAGES, x)]:
        each = [
            check_likelihood(flow, precise, part, u, kind, notes)
            for part, u in in_batches(images, noises[kind])
        ]
        log_probs, errors = zip(*each, strict=True)
        found[kind] = torch.cat(log_probs), torch.cat(errors)
    if flow.num_bins is not None and not flow.kind.no_bits:
        bits, words = float(flow.loss(found[IMAGES][0]).mean()), ""
        if isinstance(flow, ForeignModel):
            error = float(flow.loss(found[IMAGES][1].norm()).abs()) / len(x) / ERRORS
            words = f" +- {error:.2g}" if flow.is_random else ""
            words = f"{bits:.4f}{words} bits/dim, where the flow takes {flow.contract.words}"
            check_noise_bits(flow, *found[NOISE], notes)
            check_figure(flow, x, kinds[NOISE], train, seed, notes)
        notes.add("likelihood", bits / math.log2(flow.num_bins), inputs=IMAGES, reason=words)
    check_integral(flow, x, z, notes)
    if isinstance(flow, ForeignModel):
        assert isinstance(precise, ForeignModel)
        check_batch(precise, x, noise, notes)
        check_device(precise, x, noise, notes)
        check_log_prob(precise, x, noise, notes)
    for i in range(1 if of_images else min(len(x), TOGETHER)):
        check_log_dets(model, x[i : i + 1], noise[i : i + 1], notes)
    progress(total, total)
    return list(notes.findings.values())


def extreme_images(shape: Shape, num_bins: int) -> Tensor:
    """Images of the lowest level, of the highest, and of both as the two checkerboards: uint8."""
    channels, rows, columns = (torch.arange(size) for size in shape)
    board = (channels[:, None, None] + rows[:, None] + columns) % 2
    white = torch.ones_like(board)
    images = torch.stack([0 * white, white, board, 1 - board])
    return (images * (num_bins - 1)).to(torch.uint8)


@torch.inference_mode(False)  # there are no Jacobians in inference mode
def check(
    flow: Flow | Foreign, x: Batch, seed: int = 0, train: Batch | None = None
) -> list[Finding]:
    """All findings about a copy of a flow on images `x`. See `flowtrain.check`."""
    if not isinstance(flow, Flow | Foreign):
        raise UserError(
            f"{type(flow).__name__}: expected a flow of flowtrain, or flowtrain.Foreign(flow, "
            f"shape=..., num_bins=...)"
        )
    flow = ForeignModel(copied(flow)) if isinstance(flow, Foreign) else copy.deepcopy(flow)
    images = as_tensor(x, flow.shape, flow.num_bins).cpu()
    seen = None if train is None else as_tensor(train, flow.shape, flow.num_bins).cpu()
    for given in (images, seen):
        if given is not None:
            flow.dequantizer.check(given)
    described = Checkpoint(Path("the flow"), {}, {})
    model = LoadedModel(
        flow.eval().requires_grad_(False), configuration.parse({}), "raw", described
    )
    # The caller's bfloat16 would be an error of the flow.
    with torch.autocast(flow.device.type, enabled=False):
        return examine_on(images, model, train=seen, seed=seed)

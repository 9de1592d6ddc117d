"""Stages between latents and data: layer by layer, and for images level by level."""

from functools import singledispatch

import torch
from torch import Tensor

from flowtrain.bijections import Bijection, Continuous, Multiscale, Sequential, Squeeze
from flowtrain.bijections.context import Context
from flowtrain.flow.flow import Flow
from flowtrain.pictures import grid
from flowtrain.pictures.sample import decode
from flowtrain.system import capacity
from flowtrain.system.random import Stream, generator, uniform

STEPS = 8  # steps from noise to an image in a picture, at least
SPREAD = 2.5  # standard deviations of a stage between grey and black, or white


@singledispatch
def stages_of(layer: Bijection, z: Tensor, context: Context | None = None) -> list[Tensor]:
    """`z`, then the result of each layer on the way to `layer.inverse(z)`, without gradients.

    Levels are shown whole: a stage of a `Multiscale` has the latents of the levels to come beside
    its own entries, where they will be among the pixels.
    """
    with torch.no_grad():
        return [z, layer.inverse(z, context)[0]]


@stages_of.register
def _(layer: Continuous, z: Tensor, context: Context | None = None) -> list[Tensor]:
    return layer.stages(z)


@stages_of.register
def _(layer: Sequential, z: Tensor, context: Context | None = None) -> list[Tensor]:
    stages = [z]
    for each in reversed(layer.opened()):
        stages += stages_of(each, stages[-1], context)[1:]
    return stages


@stages_of.register
def _(layer: Multiscale, z: Tensor, context: Context | None = None) -> list[Tensor]:
    finer = layer.split_latents(z)
    x = finer[-1][:, :0]
    stages: list[Tensor] = []
    for level, prior in reversed(layer.steps()):
        x = torch.cat([x, finer.pop()], dim=1)
        for each in (prior, level):
            reached = stages_of(each, x, context)
            stages += [_among(finer, stage) for stage in (reached if not stages else reached[1:])]
            x = reached[-1]
    return stages


def _among(finer: list[Tensor], x: Tensor) -> Tensor:
    """A stage `(B, C, H, W)` of a level, with the latents of the `finer` ones in their places."""
    for latent in reversed(finer):
        x = torch.cat([_unsqueezed(x, latent.shape[-1]), latent], dim=1)
    return x


def _unsqueezed(x: Tensor, width: int) -> Tensor:
    # Halves of a single row of patches (`HalvePixels`) stay narrower.
    while x.shape[-1] < width and x.shape[1] % 4 == 0:
        x = Squeeze().inverse(x)[0]
    return x


def picture(flow: Flow, x: Tensor, seed: int) -> Tensor:
    """How N images `x` `(N, C, H, W)` become noise, and how noise becomes samples: a grid with a
    row for each, uint8 `(3, H', W')`.

    In the upper N rows, the flow carries an image to its latent. A stage is the tensor between two
    layers, in units of its standard deviation. In the lower N rows the latent of a sample grows
    from zero, the most probable one, to its full size: first the coarsest level, then the next.
    Raises `UserError` if there is too little memory.
    """
    levels = len(flow.split_latents(torch.zeros(1, flow.latent_dims)))
    per_level = -(-STEPS // levels)
    columns = 1 + levels * per_level
    layers = sum(isinstance(module, Bijection) for module in flow.modules())
    what = f"--num-images {len(x)}: a picture of {2 * len(x) * columns:,} stages needs"
    grid.require_room(2 * len(x) * columns, flow.shape, columns, what)
    capacity.require(4 * len(x) * flow.dims * layers, what)
    rows = torch.full((2, len(x), columns, *flow.shape), grid.GREY, dtype=torch.uint8)
    down = _to_noise(flow, x, seed)
    chosen = torch.linspace(0, len(down) - 1, min(columns, len(down))).round().long()
    for column, stage in enumerate(chosen.tolist()):
        rows[0, :, column] = down[stage]
    rows[1] = _from_noise(flow, x, seed, per_level)
    return grid.grid(rows.flatten(0, 2), 256, columns)


def _to_noise(flow: Flow, x: Tensor, seed: int) -> list[Tensor]:
    """The images, then each stage on the way to their latents, uint8 `(N, C, H, W)` in 0..255."""
    noise = uniform(x.shape, seed, Stream.DEQUANTIZATION).to(flow.device)
    context = flow.conditioning(len(x), context=flow.context_of(x))
    with torch.no_grad():
        z, _ = flow.to_latents(x.to(flow.device), noise)
    *stages, _ = stages_of(flow.bijection, z, context)
    return [_shown(flow, x), *(_scaled(flow, stage) for stage in reversed(stages))]


def _scaled(flow: Flow, stage: Tensor) -> Tensor:
    if stage.ndim == 4:
        stage = _unsqueezed(stage, flow.shape[-1])
    stage = stage.reshape(-1, *flow.shape).cpu()
    units = (stage - stage.mean()) / stage.std()
    return (255 * (units / (2 * SPREAD) + 0.5).clamp(0, 1)).to(torch.uint8)


def _from_noise(flow: Flow, x: Tensor, seed: int, per_level: int) -> Tensor:
    """Samples with more and more of their latents: uint8 `(N, columns, C, H, W)` in 0..255."""
    noise = flow.draw_latents(len(x), generator(seed, Stream.LATENTS))
    parts = [part.flatten(1) for part in flow.split_latents(noise)]
    time = torch.arange(1 + len(parts) * per_level).to(noise) / per_level  # in levels
    begins = reversed(range(len(parts)))  # the last part, the coarsest, is the first
    grown = [
        part[:, None] * (time - begin).clamp(0, 1)[:, None]
        for part, begin in zip(parts, begins, strict=True)
    ]
    latents = torch.cat(grown, dim=2).flatten(0, 1)
    labels = flow.classes_in_turn(len(x))
    context = flow.context_of(x)
    labels, context = (
        None if each is None else each.repeat_interleave(len(time), dim=0)
        for each in (labels, context)
    )
    images = decode(flow, flow.latents_of_classes(latents, labels), labels=labels, context=context)
    rows: Tensor = _shown(flow, images).unflatten(0, (len(x), len(time)))
    return rows


def _shown(flow: Flow, x: Tensor) -> Tensor:
    return grid.to_8bit(x, flow.kind.require_bins("only images have this picture"))

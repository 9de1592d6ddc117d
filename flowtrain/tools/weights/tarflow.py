"""apple/ml-tarflow: the `Model` of its `transformer_flow.py`, saved by its `train.py`."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowtrain.bijections import ActNorm, Conv1x1LU, Sequential, TokenAutoregressive
from flowtrain.bijections.actnorm import LOG_SCALE_LIMIT
from flowtrain.bijections.base import unbounded
from flowtrain.config import Dequantization
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow
from flowtrain.models.base import patches, tokens_of
from flowtrain.nets.transformer import EXPANSION
from flowtrain.tools.weights.tensors import Tensors
from flowtrain.types import Shape

PATCHES = (1, 2, 4, 8)


@dataclass
class TarFlow:
    """Weights of each block by the names of `CausalTransformer`, and `scale` times the image.

    The first mixing layer multiplies the image by `scale` and takes the entries of a patch to the
    order of `torch.nn.functional.unfold`. The others change nothing.
    """

    options: dict[str, Any]
    blocks: list[dict[str, Tensor]]
    scale: float

    @torch.no_grad()
    def fill(self, flow: Flow) -> None:
        """Sets the weights of a new model with these `options`, in its precision."""
        assert isinstance(flow.bijection, Sequential)
        layers = list(flow.bijection.layers)
        actnorms = [each for each in layers if isinstance(each, ActNorm)]
        convolutions = [each for each in layers if isinstance(each, Conv1x1LU)]
        blocks = [each for each in layers if isinstance(each, TokenAutoregressive)]
        log_scale = torch.tensor(self.scale, dtype=torch.float64).log()
        actnorms[0].log_scale.fill_(unbounded(log_scale, LOG_SCALE_LIMIT))
        entries, patch = len(actnorms[0].shift), self.options["patch"]
        # The entries of a patch, by their number in `unfold`, as flowtrain orders them.
        order = torch.arange(entries, dtype=torch.float64).view(1, -1, patch, patch)
        for layer in patches(patch):
            order = layer(order)[0]
        identity = torch.eye(entries, dtype=torch.float64)
        for number, (actnorm, convolution) in enumerate(zip(actnorms, convolutions, strict=True)):
            actnorm.initialized.fill_(True)
            convolution.set_weight(identity[:, order.flatten().long()] if number == 0 else identity)
            convolution.initialized.fill_(True)
        for block, state in zip(blocks, self.blocks, strict=True):
            block.conditioner.load_state_dict(state)


def read(tensors: Tensors, shape: Shape, dequantization: Dequantization) -> TarFlow:
    """Its images are in [-1, 1]. With uniform noise, they are twice flowtrain's, and with
    Gaussian noise 512/255 times (x / 255 instead of (x + 1/2) / 256).
    """
    blocks, layers = tensors.count("blocks."), tensors.count("blocks.0.attn_blocks.")
    width = tensors.side("blocks.0.proj_in.bias")
    outputs = tensors.side("blocks.0.proj_out.bias")
    patch = math.isqrt(max(1, outputs // (2 * shape[0])))
    if outputs != 2 * shape[0] * patch**2 or patch not in PATCHES:
        raise UserError(
            f"{tensors.where}: its {outputs} outputs are not mean and scale of patches with sides "
            f"of 1, 2, 4 or 8 and {shape[0]} channels (volume-preserving models are not imported)"
        )
    entries, *size = tokens_of(shape, patch)
    tokens = math.prod(size)
    classes = 0
    if "blocks.0.class_embed" in tensors:
        classes = tensors.side("blocks.0.class_embed")
    if not (tensors.take("var", tokens, entries) == 1).all():
        raise UserError(f"{tensors.where}: var is not 1: its latents have learned variances")
    options = {"name": "tarflow", "patch": patch, "width": width, "blocks": blocks}
    options |= {"layers": layers, "bounded": False, "classes": classes}
    states = []
    for number in range(blocks):
        block = f"blocks.{number}."
        tensors.drop(f"{block}attn_mask")
        state = _linear(tensors, f"{block}proj_in.", "first.", entries, width)
        position = tensors.take(f"{block}pos_embed", tokens, width)
        state["position"] = position.flip(0) if number % 2 else position
        if classes:
            embedding = tensors.take(f"{block}class_embed", classes, 1, width)
            state["context.weight"] = embedding[:, 0].T
        for layer in range(layers):
            state |= _layer(tensors, f"{block}attn_blocks.{layer}.", f"layers.{layer}.", width)
        last = _linear(tensors, f"{block}proj_out.", "last.", width, outputs)
        # There, log-scales and means of the inverse come in this order.
        state |= {name: -each.roll(entries, 0) for name, each in last.items()}
        states.append(state)
    scale = 512 / 255 if dequantization.name == "gaussian" else 2.0
    return TarFlow(options, states, scale)


def _layer(tensors: Tensors, theirs: str, ours: str, width: int) -> dict[str, Tensor]:
    attention, mlp, hidden = f"{theirs}attention.", f"{theirs}mlp.", EXPANSION * width
    return {
        **_norm(tensors, f"{attention}norm.", f"{ours}norm.", width),
        **_linear(tensors, f"{attention}qkv.", f"{ours}queries_keys_values.", width, 3 * width),
        **_linear(tensors, f"{attention}proj.", f"{ours}projection.", width, width),
        **_norm(tensors, f"{mlp}norm.", f"{ours}mlp.0.", width),
        **_linear(tensors, f"{mlp}main.0.", f"{ours}mlp.1.", width, hidden),
        **_linear(tensors, f"{mlp}main.2.", f"{ours}mlp.3.", hidden, width),
    }


def _linear(
    tensors: Tensors, theirs: str, ours: str, inputs: int, outputs: int
) -> dict[str, Tensor]:
    weight = tensors.take(f"{theirs}weight", outputs, inputs)
    return {f"{ours}weight": weight, f"{ours}bias": tensors.take(f"{theirs}bias", outputs)}


def _norm(tensors: Tensors, theirs: str, ours: str, width: int) -> dict[str, Tensor]:
    return {f"{ours}{each}": tensors.take(f"{theirs}{each}", width) for each in ("weight", "bias")}

"""Checks of log-determinants against Jacobians, of each layer and of the whole flow."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowtrain.bijections import Bijection
from flowtrain.bijections.base import Direction, Executor
from flowtrain.bijections.context import Context, unguided
from flowtrain.bijections.execution import FUSED, call
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.evaluation.layers import Watching, layers_of
from flowtrain.flow.flow import Flow
from flowtrain.tools.doctor.findings import IMAGES, Notes
from flowtrain.tools.doctor.layers import NOISE_MODEL, LearnedNoise, are_finite, learns_noise

Map = Callable[[Tensor], tuple[Tensor, Tensor]]

PROBES = 4  # draws of signs that show whether a Jacobian is diagonal
JACOBIAN_ROWS = 32  # computed at once, as copies of the image with their activations in float64
LARGEST_JACOBIAN = 4096  # entries of an image, whose Jacobian takes 128 MiB in float64
SIDES = (4, 8, 16, 32, 64)  # of reduced images; below 4 a 3x3 convolution sees mostly padding


def check_log_dets(model: LoadedModel, x: Tensor, noise: Tensor, notes: Notes) -> None:
    """Checks the log-dets in float32 against the Jacobian in float64, per layer and for all layers.

    The Jacobian of the whole flow is with respect to the uniform noise, so it includes the
    dequantizer: q(u|x) is the density of u for uniform noise. A density of real values, or of
    noisy images, has the Jacobian with respect to these.
    """
    flow = reduced(model)
    if flow is None:
        return
    _, height, width = flow.shape
    # The middle of the image, because edges often have one colour.
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    x = x[:, :, top : top + height, left : left + width]
    # Noise stays off the edges of a bin, where it is clipped and has no derivative.
    noise = 0.01 + 0.98 * noise[:, :, top : top + height, left : left + width]
    precise = copy.deepcopy(flow).double()
    bits = 1 / (flow.dims * math.log(2))
    reporting = layers_of(flow)

    where = ""

    def around(
        name: str, layer: Bijection, direction: Direction, given: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        nonlocal where
        where, own = name, unguided(context)
        result = call(layer, direction, given, context)
        if are_finite(given.float()).all():  # otherwise a layer before it is at fault

            def with_copies(copies: Tensor) -> tuple[Tensor, Tensor]:
                same = None if own is None else own.expand(len(copies), *own.shape[1:])
                return call(layer, direction, copies, same)

            low = None if own is None else own.float()
            reported = call(reporting[name], direction, given.float(), low)[1]
            exact = diagonal_log_det if layer.is_discrete else jacobian_log_det
            error = abs(reported.double() - exact(with_copies, given)).max() * bits
            notes.add("log-det", error, name, IMAGES)
        return result

    def whole(one: Flow, copies: Tensor, executor: Executor = FUSED) -> tuple[Tensor, Tensor]:
        images = x.expand(len(copies), -1, -1, -1)
        if one.kind.no_bits:
            context = one.conditioning(len(copies), context=one.context_of(images))
            return one.bijection.run(executor, "forward", copies, context)
        return one.to_latents(images, copies, executor)

    start = flow.dequantizer(x, noise)[0] if flow.kind.no_bits else noise
    try:
        whole(precise, start.double(), Watching(precise, around))
        if learns_noise(flow):
            where = NOISE_MODEL
            learned = LearnedNoise(precise)
            exact = jacobian_log_det(
                lambda copies: learned(copies, x.expand(len(copies), -1, -1, -1)), start.double()
            )
            reported = LearnedNoise(flow)(start, x)[1].double()
            notes.add("log-det", abs(reported - exact).max() * bits, NOISE_MODEL, IMAGES)
        where = ""
        log_det = diagonal_log_det if flow.bijection.is_discrete else jacobian_log_det
        exact = log_det(lambda copies: whole(precise, copies), start.double())
        notes.add(
            "log-det", abs(whole(flow, start)[1].double() - exact).max() * bits, inputs=IMAGES
        )
    except Exception as error:
        notes.failed(("log-det",), error, where, IMAGES)


def jacobian_log_det(function: Map, x: Tensor) -> Tensor:
    """log|det J| of a map at one example `x` `(1, ...)`, by autograd, in nats, shape `()`.

    Examples of a batch do not affect each other. So with copies of `x` as a batch, row i of the
    Jacobian is the gradient of entry i of the i-th copy. (torch's `jacobian` needs one backward
    pass per row, or vmap, which our autograd functions do not support.)
    """
    rows = []
    for part in torch.eye(x.numel(), dtype=x.dtype, device=x.device).split(JACOBIAN_ROWS):
        copies = x.detach().expand(len(part), *x.shape[1:]).clone().requires_grad_()
        with torch.enable_grad():
            z = function(copies)[0]
        rows.append(torch.autograd.grad(z, copies, part.view_as(z))[0].flatten(1))
    log_det: Tensor = torch.linalg.slogdet(torch.cat(rows)).logabsdet
    return log_det


def diagonal_log_det(function: Map, x: Tensor) -> Tensor:
    """`jacobian_log_det` of a map whose Jacobian is diagonal.

    The gradient of a sum of the results with random signs is then the diagonal with these signs.
    If a few draws of the signs disagree, the Jacobian is not diagonal, and the result is NaN.
    """
    signs = torch.randint(2, (PROBES, x.numel()), generator=torch.Generator().manual_seed(0))
    signs = 2 * signs.to(x) - 1
    copies = x.detach().expand(PROBES, *x.shape[1:]).clone().requires_grad_()
    with torch.enable_grad():
        z = function(copies)[0]
    diagonal = torch.autograd.grad(z, copies, signs.view_as(z))[0].flatten(1) * signs
    if not torch.allclose(diagonal, diagonal[:1], rtol=1e-9, atol=1e-12):
        return x.new_full((), math.nan)
    log_det: Tensor = diagonal[0].abs().log().sum()
    return log_det


def reduced(model: LoadedModel) -> Flow | None:
    """The model on the CPU, for the smallest images with which it runs with all its weights.

    A model that is not convolutional fits only its own size. The result is None if that has more
    than `LARGEST_JACOBIAN` entries. A diagonal Jacobian may have any size.
    """
    if model.flow.bijection.is_discrete:
        return copy.deepcopy(model.flow).cpu()
    channels, height, width = model.flow.shape
    for side in SIDES:
        if side < min(height, width):
            try:
                flow = build_flow(model.config, (channels, side, side), model.flow.num_bins)
                flow = flow.eval().requires_grad_(False)
                if _transplant(model.flow, flow):
                    black = torch.zeros(1, *flow.shape)
                    flow(black, black)
                    return flow
            except Exception:  # not a size of this model
                continue
    return copy.deepcopy(model.flow).cpu() if model.flow.dims <= LARGEST_JACOBIAN else None


def _transplant(trained: Flow, flow: Flow) -> bool:
    """Copies the weights if parameters have the same shapes, and all tensors the same names.

    Buffers of another shape belong to the image size, and are not copied.
    """
    weights, own = trained.state_dict(), flow.state_dict()
    shapes = [{name: p.shape for name, p in one.named_parameters()} for one in (trained, flow)]
    if shapes[0] != shapes[1] or weights.keys() != own.keys():
        return False
    flow.load_state_dict(
        {n: weights[n] if weights[n].shape == own[n].shape else own[n] for n in own}
    )
    return True

"""Fixed-point (Jacobi) iteration instead of one entry after the other, in windows of token rows.

All levels of a window are guessed at first. A pass of the networks then finds every level anew from
the distribution that the guesses before it imply, until none changes (Song et al. 2021,
"Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving"). A window's share of
a pass counts, as if a pass could be restricted to the window without loss.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import flowtrain
from flowtrain.bijections.ordinal import OrdinalAutoregressive
from flowtrain.bijections.precision import apply_conditioner


def one_pass(layer: OrdinalAutoregressive, x: Tensor, target: Tensor) -> Tensor:
    """Levels `(B, E, H, W)` anew, from guesses and the targets of F, both of that shape."""
    half = (layer.levels - 1) / 2
    value = x / half - 1
    predicted = layer.prediction(value)
    log_scale = layer.bounded_log_scale()
    seen = torch.cat([value, (value - predicted) * (-log_scale).exp(), predicted], dim=1)
    parameters = apply_conditioner(layer.conditioner, seen)
    rows = parameters.unflatten(1, (-1, x.shape[1])).movedim(0, 2).flatten(2)  # (P, E, B H W)
    distribution = layer.mixture.one_entry(x.device)
    found = []
    for d, scale in enumerate((log_scale.flatten() + math.log(half)).tolist()):
        location = (predicted[:, d].flatten() + 1) * half
        entry = distribution(location, scale, rows[:, d])
        found.append(entry.find(target[:, d].flatten())[0].view_as(x[:, d]))
    return torch.stack(found, dim=1).to(x.dtype)


def jacobi(layer: OrdinalAutoregressive, target: Tensor, rows: int) -> tuple[Tensor, float]:
    """Levels from targets, and the number of passes that the windows' shares add up to."""
    x = torch.full_like(target, layer.levels // 2, dtype=torch.float32)
    height, passes = x.shape[2], 0.0
    for first in range(0, height, rows):
        window = slice(first, first + rows)
        if first:
            x[:, :, window] = x[:, :, first - 1 : first]  # guesses
        while True:
            found = one_pass(layer, x, target)[:, :, window]
            passes += x[:, :, window].shape[2] / height
            changed = not torch.equal(found, x[:, :, window])
            x[:, :, window] = found
            if not changed:
                break
    return x, passes


def seconds(run: Callable[[], object]) -> float:
    """Processor seconds."""
    started = time.process_time()
    run()
    return time.process_time() - started


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a checkpoint or run directory of a causal flow")
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    flow = flowtrain.load(options.model)
    layer = flow.bijection
    assert isinstance(layer, OrdinalAutoregressive)
    z = flow.draw_latents(options.images, torch.Generator().manual_seed(0))
    drawn = flow.decode(z)
    target = F.pixel_unshuffle(torch.special.ndtr(z.double()).view(drawn.shape), layer.token)
    each = seconds(lambda: one_pass(layer, torch.zeros(target.shape), target))
    in_order = seconds(lambda: flow.decode(z))
    print(f"{options.images} images: entry after entry {in_order:.2f} s, one pass {each:.2f} s\n")
    print(
        "| rows of tokens in a window | passes | seconds | levels that differ |\n|---|---|---|---|"
    )
    for rows in (1, 2, 4, target.shape[2]):
        x, passes = jacobi(layer, target, rows)
        differ = (F.pixel_shuffle(x, layer.token) != drawn).sum().item()
        print(f"| {rows} | {passes:.1f} | {passes * each:.1f} | {differ} |", flush=True)


if __name__ == "__main__":
    main()

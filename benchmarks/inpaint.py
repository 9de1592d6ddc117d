"""Missing pixels and super-resolution by numbers: errors against simple fillings, and calibration.

`python benchmarks/inpaint.py MODEL --num-images 8 [--set data.root=DIR]` takes the first images of
a split, and hides the centre, half of the pixels, or the lower half. It prints the error of the
hidden pixels, from the mean of the samples of the posterior, from the mean of the visible pixels,
from the nearest visible pixel, and from OpenCV's Telea (opencv-python-headless). Errors are roots
of mean squares, where 0 is black and 1 is white.

Calibration is the rank of the true value among the samples. Ties are broken at random. If model
and sampler are right, it is uniform: its mean share is 1/2, and a tenth of all ranks is in each
tenth. With `--of-model` the images are samples of the model itself, so that only the sampler can be
wrong. Pixels of an image are no independent cases: standard errors are over images.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints.load import load_model
from flowtrain.cli.base import data_of
from flowtrain.flow.image_context import ImageContext
from flowtrain.latents.constraints import Averages, Constraint, Pixels
from flowtrain.latents.posterior import Effort, sample
from flowtrain.pictures.grid import grid, png

TENTHS = 10


def masks(shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Which pixels are missing, bool `(H, W)`."""
    _, height, width = shape
    centre = torch.zeros(height, width, dtype=torch.bool)
    centre[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    lower = torch.arange(height)[:, None].expand(height, width) >= height // 2
    half = torch.rand(height, width, generator=torch.Generator().manual_seed(0)) < 0.5
    return {"centre": centre, "half": half, "lower": lower}


def visible_mean(x: Tensor, missing: Tensor) -> Tensor:
    return x.float()[:, ~missing].mean(dim=1)[:, None, None].expand(x.shape)


def nearest(x: Tensor, missing: Tensor) -> Tensor:
    known, wanted = (~missing).nonzero(), missing.nonzero()
    closest = torch.cdist(wanted.float(), known.float()).argmin(dim=1)
    filled = x.float().clone()
    filled[:, missing] = filled[:, known[closest, 0], known[closest, 1]]
    return filled


def telea(x: Tensor, missing: Tensor, levels: int) -> Tensor:
    import cv2

    scaled = (x.movedim(0, -1).numpy().astype(np.float32) * 255 / (levels - 1)).round()
    mask = missing.numpy().astype(np.uint8)
    filled = cv2.inpaint(scaled.astype(np.uint8).squeeze(), mask, 3, cv2.INPAINT_TELEA)
    return torch.from_numpy(filled.reshape(scaled.shape)).movedim(-1, 0) * (levels - 1) / 255


def repeated(small: Tensor, factor: int) -> Tensor:
    return small.float().repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def bicubic(small: Tensor, factor: int, levels: int) -> Tensor:
    size = [factor * side for side in small.shape[1:]]
    found = torch.nn.functional.interpolate(small[None].float(), size, mode="bicubic")
    return found[0].clamp(0, levels - 1)


def ranks(found: Tensor, truth: Tensor, generator: torch.Generator) -> Tensor:
    """Ranks of true values `(P,)` among samples `(S, P)`, 0..S, with ties broken at random."""
    below, same = (found < truth).sum(dim=0), (found == truth).sum(dim=0)
    return below + (torch.rand(truth.shape, generator=generator) * (same + 1)).long()


def error(values: list[float]) -> str:
    return f"{np.mean(values):.4f} +- {np.std(values, ddof=1) / len(values) ** 0.5:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--chains", type=int, default=10)
    parser.add_argument("--kept", type=int, default=10, help="samples from each chain")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--masks", default="centre,half,lower", help="also 2x: super-resolution")
    parser.add_argument("--of-model", action="store_true", help="complete the model's own samples")
    parser.add_argument("--out", type=Path, help="a folder for pictures and figures")
    given = parser.parse_args()
    loaded = load_model(given.model, torch.device("cpu"))
    flow = loaded.flow
    levels = flow.levels
    assert levels is not None
    if given.of_model:
        x = flow.sample(given.num_images, generator=torch.Generator().manual_seed(5))
    else:
        data = data_of(loaded, given.set)
        x = data.split(given.split).take(slice(0, given.num_images))
    generator = torch.Generator().manual_seed(0)
    effort = Effort(given.chains, given.steps, given.kept)
    for name in given.masks.split(","):
        errors: dict[str, list[float]] = {}
        tenths, middles, accepted, effective, pictures = [], [], [], [], []
        began = time.monotonic()
        for number, image in enumerate(x):
            others: dict[str, Callable[[], Tensor]]
            constraint: Constraint
            if name == "2x":
                context = ImageContext("downsample", 2, flow.shape, levels)
                small = context.of(image[None])[0]
                constraint, missing = Averages(small, context), torch.ones(flow.shape[1:]) > 0
                shown = repeated(small, 2)
                others = {
                    "repeated": lambda small=small: repeated(small, 2),
                    "bicubic": lambda small=small: bicubic(small, 2, levels),
                }
            else:
                missing = masks(flow.shape)[name]
                constraint = Pixels(image, ~missing.expand(flow.shape), levels)
                shown = torch.where(missing, levels // 2, image)
                others = {
                    "visible mean": lambda image=image, m=missing: visible_mean(image, m),
                    "nearest": lambda image=image, m=missing: nearest(image, m),
                    "Telea": lambda image=image, m=missing: telea(image, m, levels),
                }
            found = sample(flow, constraint, effort, seed=number)
            truth = image[:, missing].flatten().float()
            samples = found.x[:, :, missing].flatten(1).float()
            mean = found.x.float().mean(dim=0)
            for kind, filled in {"posterior mean": lambda mean=mean: mean, **others}.items():
                off = (filled()[:, missing].flatten() - truth) / (levels - 1)
                errors.setdefault(kind, []).append(float(off.square().mean().sqrt()))
            share = (ranks(samples, truth, generator) + 0.5) / (len(samples) + 1)
            tenths.append(torch.histc(share, TENTHS, 0, 1) / len(share))
            middles.append(float(share.mean()))
            accepted += [found.accepted] if found.accepted is not None else []
            effective += [found.effective] if found.effective is not None else []
            rows = [image, shown, *found.x[:: given.kept][:5], mean.round()]
            pictures.append(torch.stack([row.to(torch.uint8) for row in rows]))
        of_images = torch.stack(tenths)
        off = (of_images.mean(dim=0) * TENTHS - 1).abs()
        worst = int(off.argmax())
        deviation = of_images[:, worst].std() / len(x) ** 0.5 * TENTHS
        result = {
            "mask": name,
            "images": len(x),
            "rmse": {kind: error(values) for kind, values in errors.items()},
            "mean rank": error(middles),
            "tenths": [round(float(v), 3) for v in of_images.mean(dim=0)],
            "largest deviation of a tenth": f"{float(off[worst]):.2f} +- {float(deviation):.2f}",
            "accepted": round(float(np.mean(accepted)), 3) if accepted else None,
            "effective samples of a chain": round(float(np.mean(effective)), 2)
            if effective
            else None,
            "seconds for an image": round((time.monotonic() - began) / len(x), 1),
        }
        print(json.dumps(result, indent=1), flush=True)
        if given.out:
            given.out.mkdir(parents=True, exist_ok=True)
            picture = grid(torch.cat(pictures), levels, len(pictures[0]))
            (given.out / f"{name}.png").write_bytes(png(picture))


if __name__ == "__main__":
    main()

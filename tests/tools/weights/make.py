"""Makes the fixtures of `test_weights.py` by the code of the other projects.

    python tests/tools/weights/make.py PROJECT PATH

PATH is a copy of the project, whose code runs here: `git clone https://github.com/NAME` with NAME
rosinality/glow-pytorch, y0ast/Glow-PyTorch, chrischute/glow, VincentStimper/normalizing-flows or
apple/ml-tarflow. A fixture PROJECT.npz has several models. For each, it has the weights (float16),
images `x` and noise `u` in units of 1/256, the log-probability of the images by the project's own
formula (nats), latents, and the images made from them. All is computed in float64.
"""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent


def images(count: int, shape: tuple[int, int, int], levels: int) -> Tensor:
    """Smooth random images, uint8 `(B, C, H, W)`."""
    coarse = torch.rand(count, shape[0], 3, 3)
    smooth = nn.functional.interpolate(coarse, shape[1:], mode="bilinear", align_corners=True)
    noisy = smooth + 0.05 * torch.randn(count, *shape)
    return (noisy.clamp(0, 0.999) * levels).to(torch.uint8)


@torch.no_grad()
def stored(model: nn.Module) -> tuple[np.ndarray, str]:
    """The weights in one array of float16, to which they are rounded here and in the model, and
    their names, shapes and types as JSON. The latter also has the value of a single number.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    many = {name: tensor.half() for name, tensor in state.items() if tensor.numel() > 1}
    model.load_state_dict(state | many)
    model.double()
    index = [
        [
            name,
            list(x.shape),
            str(x.dtype).removeprefix("torch."),
            None if name in many else x.item(),
        ]
        for name, x in state.items()
    ]
    return torch.cat([each.flatten() for each in many.values()]).numpy(), json.dumps(index)


def entries(
    name: str,
    model: nn.Module,
    shape: tuple[int, int, int],
    log_prob: Callable,
    inverse: Callable,
    levels: int = 256,
    steps: int | None = None,
) -> Iterator:
    """The arrays of a model, after a first batch, which sets ActNorm, with every parameter moved,
    and trained briefly unless it is "random". It is moved before, since zeros would stay near zero.

    `log_prob` maps images and noise to nats, `(B,)`, and `inverse` maps latents `(B, D)` in
    flowtrain's order to images in flowtrain's units.
    """
    dims = math.prod(shape)

    def loss() -> Tensor:
        x = images(16, shape, levels)
        return -log_prob(x, torch.rand(x.shape)).mean() / dims

    x = images(4, shape, levels)
    loss()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range((0 if name == "random" else 100) if steps is None else steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.eval()
    weights, index = stored(model)
    u = torch.randint(8, 248, x.shape, dtype=torch.uint8)
    z = torch.randn(2, dims).mul(0.5).half()
    with torch.no_grad():
        found, samples = log_prob(x, u.double() / 256), inverse(z.double())
    print(f"{-found / dims / math.log(2)} bits/dim, samples up to {samples.abs().max():.3g}")
    arrays = {"weights": weights, "index": index, "x": x, "u": u, "z": z}
    arrays |= {"log_prob": found, "samples": samples}
    yield from ((f"{name}/{key}", array) for key, array in arrays.items())


def split(z: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    parts = z.split([math.prod(shape) for shape in shapes], dim=1)
    return [part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]


def rosinality(code: Path) -> Iterator:
    """Each channel, level and coupling; `filter_size` is 512 there."""
    theirs = importlib.import_module("model")
    theirs.AffineCoupling = partial(theirs.AffineCoupling, filter_size=6)

    def made(name, shape, levels, affine, conv_lu):
        model = theirs.Glow(shape[0], 2, 2, affine=affine, conv_lu=conv_lu)
        c, h, w = shape

        def log_prob(x, u):
            # As in train.py: image / n_bins - 0.5, with noise of 1 / n_bins, and calc_loss.
            log_p, log_det, _ = model(x / levels - 0.5 + u / levels)
            return log_p + log_det - math.prod(shape) * math.log(levels)

        def inverse(z):
            return model.reverse(split(z, [(2 * c, h // 2, w // 2), (8 * c, h // 4, w // 4)]))

        return entries(name, model, shape, log_prob, inverse, levels)

    yield from made("random", (1, 8, 8), 32, True, True)
    yield from made("trained", (3, 8, 8), 256, True, False)
    yield from made("additive", (1, 8, 8), 256, False, True)


def y0ast(code: Path) -> Iterator:
    """Both parametrizations of 1x1 convolutions, and all priors of the top."""
    theirs = importlib.import_module("model")
    modules = importlib.import_module("modules")
    given: list[Tensor] = []  # what their code would draw

    def dequantized(x):
        log_det = -math.log(256) * x[0].numel()
        return x + given[0] / 256, torch.full((len(x),), log_det, dtype=given[0].dtype)

    theirs.uniform_binning_correction = dequantized
    modules.gaussian_sample = lambda mean, logs, temperature: mean + logs.exp() * given.pop()

    def made(name, c, coupling, lu, top, classes=0):
        args = ((8, 8, c), 6, 2, 2, 1.0, "invconv", coupling, lu, classes, top, classes > 0)
        model = theirs.Glow(*args)

        def one_hot(count, dtype):
            labels = torch.arange(count) % max(classes, 1)
            return torch.eye(classes, dtype=dtype)[labels] if classes else None

        def log_prob(x, u):
            given[:] = [u]
            # As `preprocess` in datasets.py.
            bits = model(x / 256 - 0.5, one_hot(len(x), u.dtype))[1]
            return -bits * math.log(2) * x[0].numel()

        def inverse(z):
            fine, coarse = split(z, [(2 * c, 4, 4), (8 * c, 2, 2)])
            mean, logs = model.prior(coarse, one_hot(len(z), z.dtype))
            given[:] = [fine]
            return model(z=mean + logs.exp() * coarse, reverse=True)

        return entries(name, model, (c, 8, 8), log_prob, inverse)

    yield from made("random", 1, "affine", True, True)
    yield from made("trained", 3, "affine", False, True)
    yield from made("additive", 1, "additive", True, False)
    yield from made("classes", 1, "affine", True, True, 3)


def normflows(code: Path) -> Iterator:
    """Bases by channel and by entry, and ActNorm inside the networks."""
    nf = importlib.import_module("normflows")
    glow, gaussian = nf.distributions.GlowBase, nf.distributions.DiagGaussian
    of_class = partial(nf.distributions.ClassCondDiagGaussian, num_classes=3)

    def made(name, c, top, base, **options):
        shapes = [(8 * c, 2, 2), (2 * c, 4, 4)]  # coarsest first
        flows = [
            [*(nf.flows.GlowBlock(channels, 6, **options) for _ in range(2)), nf.flows.Squeeze()]
            for channels in (8 * c, 4 * c)
        ]
        bases = [top(shapes[0]), base(shapes[1])]
        logit = nf.transforms.Logit(0.05) if name == "additive" else None
        by_class = name == "classes"
        model = nf.MultiscaleFlow(bases, flows, [nf.flows.Merge()], logit, class_cond=by_class)

        def log_prob(x, u):
            # As in the example: images in [0, 1], and 8 bits for each entry.
            found = model.log_prob((x + u) / 256, torch.arange(len(x)) % 3)
            return found - x[0].numel() * math.log(256)

        def inverse(z):
            parts = split(z, shapes[::-1])[::-1]
            means = []
            for base, part in zip(model.q0, parts, strict=True):
                loc, log_scale = base.loc, base.log_scale
                if model.class_cond:
                    loc, log_scale = (each.movedim(-1, 0)[: len(z)] for each in (loc, log_scale))
                if hasattr(base, "loc_logs"):
                    loc = loc * (3 * base.loc_logs).exp()
                    log_scale = log_scale * (3 * base.log_scale_logs).exp()
                means.append(loc + log_scale.exp() * part)
            model.transform, transform = None, model.transform
            made = model.forward_and_log_det(means)[0]
            model.transform = transform
            return made if transform else made - 0.5

        return entries(name, model, (c, 8, 8), log_prob, inverse)

    yield from made("random", 1, glow, glow, use_lu=True, net_actnorm=True)
    yield from made("trained", 3, gaussian, glow, use_lu=False)
    yield from made("additive", 1, glow, partial(gaussian, trainable=False), scale=False)
    yield from made("classes", 1, of_class, of_class)


def chrischute(code: Path) -> Iterator:
    """Batch normalization by its running statistics, so the random model is trained, too."""
    theirs = importlib.import_module("models.glow.glow")
    util = importlib.import_module("util")
    Tensor.float = lambda self: self  # the inverse of a 1x1 convolution is rounded there

    def made(name, steps):
        model = theirs.Glow(5, 2, 2)

        def log_prob(x, u):
            draw, torch.rand_like = torch.rand_like, lambda x: u
            z, log_det = model(x.to(u.dtype) / 255)
            torch.rand_like = draw
            return torch.stack(
                [-util.NLLLoss()(*each) for each in zip(z[:, None], log_det[:, None], strict=True)]
            )

        def inverse(z):
            # The latents are put together as the image is, which is `squeeze` there.
            fine, coarse = split(z, [(6, 4, 4), (24, 2, 2)])
            joined = torch.cat([coarse, theirs.squeeze(fine)], dim=1)
            return model(theirs.squeeze(theirs.squeeze(joined, True), True), reverse=True)[0]

        return entries(name, model, (3, 8, 8), log_prob, inverse, steps=steps)

    yield from made("random", 3)
    yield from made("trained", 100)


def tarflow(code: Path) -> Iterator:
    """With classes and without. `head_dim` is 64 there; two heads of 8 keep the file small."""
    theirs = importlib.import_module("transformer_flow")
    # They compute norms and scales in float32 at any precision.
    Tensor.float = lambda self: self
    theirs.MetaBlock = partial(theirs.MetaBlock, head_dim=8)

    def made(name, shape, patch, classes):
        model = theirs.Model(shape[0], shape[1], patch, 16, 2, 2, num_classes=classes)
        dims, entry = math.prod(shape), shape[0] * patch**2

        def log_prob(x, u):
            # As in train.py, and evaluate_bpd.py, where log 128 is for images in [-1, 1].
            labels = torch.arange(len(x)) % classes if classes else None
            z, _, log_dets = model((x + u) / 256 * 2 - 1, labels)
            normal = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
            return normal + dims * (log_dets - math.log(128))

        def inverse(z):
            # After an even number of blocks, the tokens of flowtrain are in reversed order.
            tokens = z.view(len(z), entry, -1).flip(2).mT.contiguous()
            return model.reverse(tokens, torch.arange(len(z)) if classes else None) / 2

        return entries(name, model, shape, log_prob, inverse)

    yield from made("random", (1, 6, 6), 2, 0)
    yield from made("trained", (3, 8, 8), 4, 3)


PROJECTS = {each.__name__: each for each in (rosinality, y0ast, normflows, chrischute, tarflow)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("project", choices=PROJECTS)
    parser.add_argument("code", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(options.code))
    torch.manual_seed(0)
    np.random.seed(0)
    file = HERE / f"{options.project}.npz"
    np.savez_compressed(file, **dict(PROJECTS[options.project](options.code)))
    print(f"wrote {file}: {file.stat().st_size / 2**10:.0f} KiB")


if __name__ == "__main__":
    main()

"""One HTML file about a model: configuration, curves, evaluation, samples, paths, reconstructions,
unusual places, nearest training images and health.
"""

import base64
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import flowtrain
from flowtrain.checkpoints import record, zoo
from flowtrain.checkpoints.load import LoadedModel, model_hash, run_of
from flowtrain.data.splits import DataSet, Split
from flowtrain.datasets.base import picture
from flowtrain.errors import RunError, UserError, short
from flowtrain.evaluation.heat import HOTTEST, HeatMaps
from flowtrain.evaluation.heat import picture as heat_picture
from flowtrain.flow.flow import Flow
from flowtrain.flow.passes import fitting_batch_size
from flowtrain.flow.sides import mixture
from flowtrain.latents.nearest import nearest_images
from flowtrain.latents.paths import interpolate
from flowtrain.pictures import conditional, draw, grid
from flowtrain.pictures.sample import sample
from flowtrain.results import Evaluation
from flowtrain.system.console import duration
from flowtrain.tools.doctor.examine import examine
from flowtrain.tools.doctor.findings import VERDICTS, Finding
from flowtrain.tools.report import charts

SHOWN = 8  # reconstructions, and samples with their nearest training images
NEAREST = 3
USUAL = 256  # training images whose bits are the usual ones of a place
COMPARED = 16  # test images that are compared with the training images, like the samples
ROWS = 4  # and columns of a picture of samples
PATHS, STEPS = 4, 8  # paths between test images, and the images of each
FRAMES, WIDTH, HEIGHT = 40, 400, 4000  # of the animation of samples over training, at most
HEALTH = 16  # the health table takes about as long as this many other parts


@dataclass(frozen=True)
class Part:
    """A part of the report: its content, or the reason why there is none."""

    content: Any = None
    problem: str = ""


def part(make: Callable[[], Any]) -> Part:
    """The result of `make`. Missing data or a model that fails do not affect other parts."""
    try:
        return Part(make())
    except (UserError, RunError, FloatingPointError) as error:
        return Part(problem=str(error))


@dataclass(frozen=True)
class Reconstructions:
    """Images `(N, C, H, W)` that were encoded and decoded, the worst first."""

    x: Tensor
    back: Tensor
    exact: int  # number of images that came back unchanged
    largest: int  # the largest difference of a pixel, in levels
    difference: Tensor  # amplified, so that it can be seen
    amplification: int


def _num_bins(flow: Flow) -> int:
    return flow.kind.require_bins(
        "real-valued data are not images; their round trip is in the health table"
    )


def reconstruct(flow: Flow, x: Tensor) -> Reconstructions:
    """Encodes and decodes integers `x` `(N, C, H, W)`.

    Raises `FloatingPointError` if a result is not finite.
    """
    num_bins = _num_bins(flow)
    batches = x.split(fitting_batch_size(flow))
    decoded = [flow.decode(flow.encode(each), context=flow.context_of(each)) for each in batches]
    back = torch.cat(decoded).cpu()
    difference = (back.int() - x.int()).abs()
    by_image = difference.flatten(1).amax(dim=1)  # (N,)
    worst = by_image.argsort(descending=True, stable=True)
    amplification = max(1, num_bins // 4)  # so that one level can be seen
    seen = (amplification * difference).clamp(max=num_bins - 1).to(torch.uint8)
    exact = int((by_image == 0).sum())
    return Reconstructions(
        x[worst], back[worst], exact, int(by_image.max()), seen[worst], amplification
    )


def page(
    model: LoadedModel,
    data: DataSet | str,
    *,
    num_images: int = 64,
    seed: int = 0,
    progress: Callable[[float, float, str], None] = lambda done, total, text: None,
) -> tuple[str, list[str]]:
    """The report of a model as HTML that needs no other file, and one line per missing part.

    `data` is a data set of the model's shape, or the reason why there is none. `metrics.jsonl` and
    the evaluations are read from the run. `num_images` test images are reconstructed, and used for
    the health table.
    """
    flow, run = model.flow, run_of(model.checkpoint.path)
    temperatures = flow.kind.report_temperatures

    def there() -> DataSet:
        if isinstance(data, str):
            raise UserError(data)
        return data

    def test() -> Split:
        return there().split("test")

    def samples(temperature: float) -> Tensor:
        if flow.image_context is None:
            x = sample(flow, flow.kind.report_count, [temperature], seed)
        else:
            contexts = conditional.of_split(flow, test(), ROWS)
            assert contexts is not None
            drawn = sample(flow, ROWS - 1, [temperature], seed, contexts=contexts)
            x = conditional.rows(flow, contexts, drawn, 1)
        return draw.drawing(flow, test).samples(x, ROWS, seed)

    def health() -> list[list[Finding]]:
        def note(done: int, total: int) -> None:
            progress(len(makers) + HEALTH * done // total, len(makers) + HEALTH, "health")

        return by_check(examine(model, there(), num_images=num_images, seed=seed, progress=note))

    makers: dict[str, Callable[[], Any]] = {
        "curves": lambda: _curves(run, flow.kind.unit),
        "evaluations": lambda: _evaluations(run, model.checkpoint.path),
        **{f"samples at {t:g}": functools.partial(samples, t) for t in temperatures},
        "reconstructions": lambda: reconstruct(
            flow, test().sample(num_images, seed).take(slice(None))
        ),
        "paths": lambda: _paths(flow, test()),
        "unusual places": lambda: _unusual(flow, there(), num_images, seed),
        "samples over training": lambda: _over_training(run),
        "nearest training images": lambda: _neighbours(flow, there(), seed),
        "health": health,
    }
    parts = {}
    for done, (name, make) in enumerate(makers.items()):
        progress(done, len(makers) + HEALTH, name)
        parts[name] = part(make)
    progress(1, 1, "")

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "quoted": lambda path: shlex.quote(str(path)),
        "duration": duration,
        "grid": lambda x, columns=1: grid.grid(x, _num_bins(flow), columns),
        "png": lambda pixels: _url("png", grid.png(pixels)),
        "gif": lambda data: _url("gif", data),
    }
    template = environment.from_string(
        Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    )
    html = template.render(
        parts=parts,
        model=model,
        hash=model_hash(model),
        run=run,
        name=run.resolve().name,
        version=flowtrain.__version__,
        parameters=sum(p.numel() for p in flow.parameters()),
        seed=seed,
        temperatures=temperatures,
        values=flow.kind.words,
        mixture=mixture,
        never=sys.float_info.max,  # the bound of a check that is never bad
        shown=SHOWN,
        hottest=HOTTEST,
    )
    return html, [f"{name}: {each.problem}" for name, each in parts.items() if each.problem]


def _curves(run: Path, unit: str) -> dict[str, str]:
    rows = record.read_rows(run / "metrics.jsonl")
    if not rows:
        raise UserError(f"{run / 'metrics.jsonl'}: it has no line yet")
    return charts.curves_svg(rows, unit)


def _evaluations(run: Path, checkpoint: Path) -> list[tuple[Path, Evaluation]]:
    files = sorted(run.glob("evaluate-*.json"))
    if not files:
        command = f"flowtrain evaluate {shlex.quote(zoo.argument(checkpoint))}"
        raise UserError(f"the model has not been evaluated; {command} does it")
    return [(file, record.read_evaluation(file)) for file in files]


def _unusual(flow: Flow, data: DataSet, num_images: int, seed: int) -> Tensor:
    """The test images with the most unusual place, of `num_images`, above their heat maps."""
    num_bins, training = _num_bins(flow), data.split("train").sample(USUAL, seed)
    heat_maps = HeatMaps(flow, training.take(slice(None)).numpy(), seed)
    x = data.split("test").sample(num_images, seed).take(slice(None))
    heat = heat_maps(x.numpy())
    worst = (-heat.max(axis=(1, 2))).argsort()[:SHOWN]
    return heat_picture(x[worst], heat[worst], num_bins, len(worst))


def _neighbours(flow: Flow, data: DataSet, seed: int) -> dict[str, Any]:
    """Samples with their nearest training images, and the typical distance of test images."""
    num_bins, train = _num_bins(flow), data.split("train")
    test = data.split("test")
    contexts = conditional.of_split(flow, test, SHOWN)
    compared = test.sample(COMPARED, seed).take(slice(None))
    drawn = sample(flow, SHOWN if contexts is None else 1, [1.0], seed, contexts=contexts)
    distances, positions = nearest_images(torch.cat([drawn, compared]), train, num_bins, NEAREST)
    return {
        "samples": [
            (one, list(zip(train.take(where).split(1), where.tolist(), near.tolist(), strict=True)))
            for one, near, where in zip(drawn.split(1), distances, positions.numpy(), strict=False)
        ],
        "typical": distances[SHOWN:, 0].median().item(),
        "compared": len(compared),
    }


def by_check(findings: Sequence[Finding]) -> list[list[Finding]]:
    """The findings of each check. Checks and their findings are sorted, the worst first."""
    ordered = sorted(findings, key=lambda each: VERDICTS.index(each.verdict), reverse=True)
    checks: dict[str, list[Finding]] = {}
    for finding in ordered:
        checks.setdefault(finding.check, []).append(finding)
    for found in checks.values():
        found.sort(key=lambda each: (VERDICTS.index(each.verdict), each.severity), reverse=True)
    return list(checks.values())


def _paths(flow: Flow, split: Split) -> Tensor:
    """Paths between the first test images through the latent space, as a picture."""
    count = min(PATHS, len(split) // 2)
    if count == 0:
        raise UserError("a path needs two test images")
    x = split.take(slice(0, 2 * count))
    rows = interpolate(flow, x[:count], x[count:], STEPS)
    return draw.drawing(flow, lambda: split).paths(rows)


def _over_training(run: Path) -> bytes:
    """The run's pictures of samples as an animated GIF, with its last picture shown longest."""
    files = sorted((run / "samples").glob("*.png"))
    if len(files) < 2:
        raise UserError(f"{run / 'samples'} has fewer than two pictures")
    chosen = np.linspace(0, len(files) - 1, min(FRAMES, len(files))).round().astype(int)
    frames: list[Image.Image] = []
    for file in (files[i] for i in chosen):
        try:
            with picture(file) as image:
                size = (WIDTH, min(max(1, image.height * WIDTH // image.width), HEIGHT))
                frames.append(image.convert("RGB").resize(frames[0].size if frames else size))
        except Exception as error:  # a damaged file makes Pillow raise almost anything
            raise UserError(f"{file} cannot be read as an image ({short(error)})") from error
    return grid.gif([*frames, *frames[-1:] * 4], 300)


def _url(kind: str, data: bytes) -> str:
    """A picture file as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

"""Sample quality against bits/dim, for several ways to sample: temperature, guidance, denoising.

    python benchmarks/quality.py glow_cifar_small causal_cifar_small --num-images 1000 \\
        --try "temperature 1" --try "temperature 0.9" --picture docs/quality.png

Each `--try` has options of `flowtrain quality` without their dashes. The bits/dim are of the
samples under their own model.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import flowtrain, markdown, pyplot

EVALUATED = 300  # samples


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--try", dest="ways", action="append", required=True, metavar="OPTIONS")
    parser.add_argument("--num-images", default="1000")
    parser.add_argument("--set", action="append", default=[], metavar="data.KEY=VALUE")
    parser.add_argument("--picture", help="a PNG of FID against bits/dim")
    options = parser.parse_args()
    found = {
        model: [measured(model, way, options.num_images, options.set) for way in options.ways]
        for model in options.models
    }
    titles = ["FID", "KID", "precision", "recall", "density", "coverage", "bits/dim of samples"]
    rows = [
        [model, way, *cells(*row)]
        for model, measurements in found.items()
        for way, row in zip(options.ways, measurements, strict=True)
    ]
    markdown(["model", "sampling", *titles], rows)
    if options.picture:
        draw(found, options.ways, options.picture)


def measured(
    model: str, way: str, count: str, data: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of `flowtrain quality`, and of `flowtrain evaluate` for the samples."""
    words = [f"--{word}" if word.isalpha() else word for word in way.split()]
    with tempfile.TemporaryDirectory() as folder:
        samples, files = Path(folder) / "samples.npz", [Path(folder) / f"{i}.json" for i in (0, 1)]
        flowtrain(
            *("quality", model, "--num-images", count, *words),
            *("--json", str(files[0]), "--out", str(samples), *data),
        )
        flowtrain(
            *("evaluate", model, "--data", str(samples), "--num-images", str(EVALUATED)),
            *("--json", str(files[1])),
        )
        quality, evaluation = (json.loads(file.read_text()) for file in files)
    return quality, evaluation


def cells(quality: dict[str, Any], evaluation: dict[str, Any]) -> list[str]:
    shares = [f"{quality[key]:.2f}" for key in ("precision", "recall", "density", "coverage")]
    kid = f"{quality['kid']:.4f} +- {quality['kid_stderr']:.4f}"
    loss = f"{evaluation['loss']:.2f} +- {evaluation['loss_stderr']:.2f}"
    return [f"{quality['fid']:.3f}", kid, *shares, loss]


def draw(
    found: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]], ways: list[str], path: str
) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    for model, rows in found.items():
        x, y = [row[1]["loss"] for row in rows], [row[0]["fid"] for row in rows]
        axes.plot(x, y, "o-", label=Path(model).name)
        for position, way in zip(zip(x, y, strict=True), ways, strict=True):
            axes.annotate(way, position, (4, 4), textcoords="offset points", fontsize=7)
    first = next(iter(found.values()))[0]
    axes.set(
        xlabel=f"{first[1]['unit']} of samples under their own model",
        ylabel=f"FID of features {first[0]['features']}",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()

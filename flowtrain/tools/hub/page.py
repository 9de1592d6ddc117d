"""The files of a repository on the hub, and its page."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import yaml

import flowtrain
from flowtrain.checkpoints import about, hub, record
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.load import LoadedModel, run_of
from flowtrain.tools.report import charts

FILES = {hub.FILE, "config.yaml", "samples.png", "curves.png", "README.md"}  # of `files`


def files(
    model: LoadedModel, repository: str, licence: str, samples: Callable[[], bytes]
) -> Iterator[tuple[str, bytes]]:
    """The files of a repository `user/name`, by name: the weights in use, their configuration,
    pictures, and the page about them. `samples` draws a PNG.
    """
    meta, tensors = model.alone()
    yield hub.FILE, checkpoint_format.encoded(meta, tensors)
    yield "config.yaml", yaml.safe_dump(meta["config"], sort_keys=False).encode()
    yield "samples.png", samples()
    metrics = run_of(model.checkpoint.path) / "metrics.jsonl"
    rows = record.read_rows(metrics) if metrics.exists() else []
    if rows:
        name = repository.rpartition("/")[2]
        yield "curves.png", charts.losses_png({name: rows}, model.flow.kind.unit)
    yield "README.md", page(model, repository, licence, curves=bool(rows)).encode()


def page(model: LoadedModel, repository: str, licence: str, curves: bool) -> str:
    """The page of a repository: metadata of the hub in YAML, and Markdown."""
    card = about.card_of(model)
    rows = about.table(model)
    rows.setdefault("trained", "flowtrain train --config config.yaml")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = Path(__file__).with_name("page.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        metadata=yaml.safe_dump(_metadata(model, repository, licence), sort_keys=False),
        title=repository.rpartition("/")[2] if card is None else card.title,
        model=model,
        repository=repository,
        rows=rows,
        curves=curves,
        version=flowtrain.__version__,
        trust="." in model.config.model.name or "." in model.config.data.name,
    )


def _metadata(model: LoadedModel, repository: str, licence: str) -> dict[str, Any]:
    """As in https://huggingface.co/docs/hub/model-cards#model-card-metadata."""
    is_images = model.flow.num_bins is not None
    task = "unconditional-image-generation" if is_images else "other"
    measured = [
        {
            "task": {"type": task},
            "dataset": {"type": each.dataset, "name": each.dataset, "split": each.split},
            "metrics": [
                {
                    "type": each.unit.replace("/", "-per-"),
                    "name": f"{each.unit}, {each.likelihood}",
                    "value": round(each.loss, 4),
                }
            ],
        }
        for each in about.figures(model)
    ]
    name = repository.rpartition("/")[2]
    return {
        "license": licence,
        "library_name": "flowtrain",
        "tags": ["normalizing-flow", "density-estimation", model.config.model.name],
        **({"pipeline_tag": task} if is_images else {}),
        **({"model-index": [{"name": name, "results": measured}]} if measured else {}),
    }

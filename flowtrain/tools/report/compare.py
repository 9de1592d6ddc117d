"""Several runs side by side: their losses, time and data, and why losses may not compare."""

import shlex
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowtrain.checkpoints import record
from flowtrain.checkpoints.record import Record
from flowtrain.config import differences
from flowtrain.errors import cut
from flowtrain.flow.sides import mixture
from flowtrain.results import Evaluation, Row, Summary
from flowtrain.tools.report import charts

# Settings without effect on the trained model: the place and reading of images, and outputs.
NO_SETTINGS = {
    *("data.root", "data.max_in_memory", "data.workers", "train.log_every"),
    *("train.checkpoint_every", "train.keep_checkpoints", "train.sample_every"),
}
HELD_OUT = {"data.validation", "data.split_seed"}
# The test images do not depend on these keys.
NOT_THE_TEST_IMAGES = {*NO_SETTINGS, *HELD_OUT, "data.flip", "data.shift"}

# The keys of an evaluation in the JSON of a comparison.
TEST_FIGURES = (
    *("unit", "loss", "loss_stderr", "bits_per_dim", "bits_per_dim_stderr"),
    *("nats_per_image", "nats_per_image_stderr", "sigma"),
    *("bound", "draws", "num_images", "sampling", "split", "dataset", "edition"),
    *("weights", "step", "given", "sides"),
)


@dataclass(frozen=True)
class Result:
    """A row of the table. Figures that the run does not have are None."""

    run: str
    model: str
    data: str
    finished: bool
    parameters: int
    step: int
    images: int  # seen in training, as of the newest row or summary
    seconds: float  # wall-clock, with validation and samples
    unit: str  # of the losses: bits/dim, nats for real-valued data, nats/dim for noisy images
    images_per_second: float | None  # of training alone: the median of the rows
    validation: float | None  # the best
    validation_step: int | None
    tests: dict[str, Evaluation]  # by the title of their column: `test`, `mirror`, `16 draws`


@dataclass(frozen=True)
class Comparison:
    """One row per run, notes for the reader of the table, and the curves as a PNG."""

    results: list[Result]
    notes: list[str]
    picture: bytes

    def content(self) -> dict[str, Any]:
        rows = []
        for each in self.results:
            row = vars(each) | {"test": None, "mirror": None}
            for title, test in row.pop("tests").items():
                row[title] = {key: getattr(test, key) for key in TEST_FIGURES}
            rows.append(row)
        return {"runs": rows, "notes": self.notes}


def compare(paths: Sequence[Path]) -> Comparison:
    """Compares run directories, each of them once. Evaluates nothing.

    Raises `UserError` if one is missing or broken.
    """
    kept: dict[Path, Path] = {}
    for path in paths:
        kept.setdefault(path.resolve(), path)
    records = {
        name: record.read(path)
        for name, path in zip(names(list(kept.values())), kept.values(), strict=True)
    }
    results = [result(name, run) for name, run in records.items()]
    rows = {name: run.rows for name, run in records.items()}
    units = " or ".join(sorted({each.unit for each in results}))
    found = list(notes(results, list(records.values())))
    return Comparison(results, found, charts.losses_png(rows, units))


def names(paths: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's name, or its path if two folders have the same name."""
    short = [path.resolve().name for path in paths]
    return [
        name if short.count(name) == 1 else str(path)
        for name, path in zip(short, paths, strict=True)
    ]


def result(name: str, run: Record) -> Result:
    summary = run.summary
    states: list[Summary | Row] = [summary, *run.rows]
    # The summary is as old as the last checkpoint.
    newest = max(states, key=lambda state: state.seconds)
    speeds = [row.images_per_second for row in run.rows if row.images_per_second is not None]
    validations = [
        (loss, row.step)
        for row in run.rows
        if row.split == "validation" and (loss := row.loss) is not None
    ]
    best = min(validations, default=(summary.best_validation_loss, summary.best_step))
    return Result(
        run=name,
        model=" ".join(filter(None, [run.config["model"]["name"], given(run.config)])),
        data=run.config["data"]["name"],
        finished=summary.finished,
        parameters=summary.parameters,
        step=newest.step,
        images=newest.images,
        seconds=newest.seconds,
        unit=summary.unit,
        images_per_second=statistics.median(speeds) if speeds else None,
        validation=best[0],
        validation_step=best[1],
        tests={way or "test": test for way, test in run.tests.items()},
    )


def titles(results: Sequence[Result]) -> list[str]:
    """The columns of test figures: `test`, and the others that a run has."""
    tests = [each for own in results for each in own.tests.items()]
    tests.sort(key=lambda pair: (pair[1].sides, pair[1].draws))
    return [*dict.fromkeys(["test", *(title for title, _ in tests)])]


def given(config: dict[str, Any]) -> str:
    """The context of a model in words, or nothing for a model of whole images."""
    model = config["model"]  # of an earlier version, it has no such key
    kind = model.get("context", "none")
    factor = f" by {model.get('context_factor')}" if kind == "downsample" else ""
    return "" if kind == "none" else f"given {kind}{factor}"


def notes(results: Sequence[Result], records: Sequence[Record]) -> Iterator[str]:
    """Reasons why losses may not compare, and missing figures, one sentence each."""
    for own, run in zip(results, records, strict=True):
        if run.summary.edition:
            yield f"{own.run}: its data are {cut(run.summary.edition, 200)}"
        if part := given(run.config):
            yield (
                f"{own.run}: its losses are of images {part} (model.context), and compare only "
                f"with such"
            )
        evaluated = run.summary.best_step or run.summary.step  # the step that `evaluate RUN` takes
        if not own.finished:
            yield f"{own.run} is not finished: it is at step {own.step}"
        if own.validation is None:
            yield f"{own.run} has no validation figure"
        command = f"flowtrain evaluate {shlex.quote(str(run.path))}"
        if "test" not in own.tests:
            of = " of one draw" if own.tests else ""
            yield f"{own.run} has no test figure{of}: {command} fills it in"
        for title, figure in own.tests.items():
            its = f"{own.run}: its {title} figure is"
            if figure.sides > 1:
                yield f"{its} {mixture(figure.sides)}"
            if figure.dataset != own.data:
                yield f"{its} of other data than its own ({figure.dataset})"
            elif figure.step != evaluated:
                yield (
                    f"{its} of step {figure.step}, its best checkpoint of step {evaluated}: "
                    f"{command}{figure.options} brings it up to date"
                )
        if not run.rows:
            yield f"{own.run} has no metrics, so no curve"
        if own.unit == "nats/dim":
            yield (
                f"{own.run} has no bits/dim: its losses are densities of noisy images, and compare "
                f"only if dequantization.sigma is the same"
            )
    first, first_name = records[0].config, results[0].run
    for own, run in zip(results[1:], records[1:], strict=True):
        changed = _changes(first, run.config)
        both = f"{own.run} and {first_name}"
        of_data = {key for key in changed if key.startswith("data.")}
        if images := of_data - NOT_THE_TEST_IMAGES:
            listed = _listed(changed, images)
            yield f"{both} have different data ({listed}): their losses do not compare"
        elif of_data & HELD_OUT:
            yield f"{both} hold out different images: their validation does not compare"
        if settings := changed.keys() - NO_SETTINGS:
            yield f"{own.run} differs from {first_name} in {_listed(changed, settings)}"
    for title in titles(results):
        tests = [own.tests[title] for own in results if title in own.tests]
        measured = sorted({(x.dataset, x.bound, x.num_images, x.weights) for x in tests})
        listed = ", ".join(
            f"{count:,} images of {data}: {bound}, {weights} weights"
            for data, bound, count, weights in measured
        )
        if len(measured) > len({test.dataset for test in tests}):
            yield f"the {title} figures were not measured alike ({listed})"
        elif measured:
            yield f"the {title} figures are of {listed}"
    sampling = [{test.sampling for test in own.tests.values()} for own in results]
    for own, ways in zip(results, sampling, strict=True):
        if "sequential" in ways and set.union(*sampling) != {"sequential"}:
            yield f"{own.run} samples one entry after the other"


def _changes(first: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys in which two configurations differ, with both values.

    If the model or the data set differs, only its name is listed, without its options.
    """
    changed = {key: (old, new) for key, old, new in differences(first, other)}
    names = {"data.name", "model.name"} & changed.keys()
    sections = tuple(name.removesuffix("name") for name in names)
    return {
        key: pair for key, pair in changed.items() if key in names or not key.startswith(sections)
    }


def _listed(changed: dict[str, tuple[Any, Any]], keys: Collection[str]) -> str:
    """`train.lr: 0.01 (0.001)`: the run's own value, then the value of the first run."""
    return ", ".join(f"{key}: {new} ({old})" for key, (old, new) in changed.items() if key in keys)

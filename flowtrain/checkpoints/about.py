"""Data, size, training and measured figures of a model, as a table for `flowtrain info`."""

from dataclasses import dataclass
from pathlib import PurePath

from flowtrain.checkpoints import record, zoo
from flowtrain.checkpoints.load import LoadedModel, model_hash, run_of
from flowtrain.flow.flow import Flow
from flowtrain.flow.kinds import Kind
from flowtrain.flow.sides import mixture
from flowtrain.system.console import duration, figure
from flowtrain.types import Shape

LIKELIHOODS = {
    "exact": "exact",
    "elbo": "a bound from one draw of noise",
    "iwbo": "an importance-weighted bound",
    "density": "a density of noisy images",
}


@dataclass(frozen=True)
class Figure:
    """A measured loss of a data set's split."""

    dataset: str
    split: str
    loss: float
    error: float | None  # standard error over images
    unit: str
    images: int
    likelihood: str  # exact, or which bound
    way: str = ""  # `Evaluation.way`

    def __str__(self) -> str:
        value = figure(self.loss, self.error)
        return f"{value} {self.unit} ({self.images:,} images, {self.likelihood})"


def shape_of(shape: Shape, kind: Kind) -> str:
    return f"{'x'.join(map(str, shape))}, {kind.words}"


def size_of(flow: Flow) -> str:
    given = "" if flow.image_context is None else f"given {flow.image_context.words}, "
    size = sum(p.numel() for p in flow.parameters())
    return f"{given}{size:,} parameters, sampling: {flow.sampling}"


def unit_of(flow: Flow) -> str:
    """The unit of the losses, with the context of conditional models."""
    given = "" if flow.image_context is None else f" given {flow.image_context.words}"
    return f"{flow.kind.unit}{given}"


def card_of(model: LoadedModel) -> zoo.Card | None:
    """The card of a trained model that comes with flowtrain."""
    path = model.checkpoint.path
    return zoo.card_of(path.stem) if path.parent == zoo.FOLDER else None


def figures(model: LoadedModel) -> list[Figure]:
    """Measured losses of these weights: of `flowtrain evaluate` in the run, and of the card."""
    unit, found = unit_of(model.flow), {}
    files = sorted(run_of(model.checkpoint.path).glob("evaluate-*.json"))
    own = model_hash(model) if files else None
    for file in files:
        result = record.read_evaluation(file)
        loss, error = result.loss, result.loss_stderr
        if loss is not None and result.model == own:
            name = PurePath(result.dataset).name  # it may be a folder of this machine
            likelihood = LIKELIHOODS.get(result.bound, result.bound)
            likelihood += "" if result.draws == 1 else f" of {result.draws} draws"
            likelihood += f", {mixture(result.sides)}" if result.sides > 1 else ""
            of = name, result.split, loss, error, unit, result.num_images, likelihood
            found[name, result.split, result.way] = Figure(*of, result.way)
    if card := card_of(model):
        name = model.config.data.name
        found[name, "test", ""] = Figure(
            name, "test", card.loss, card.error, unit, card.images, card.likelihood
        )
    return list(found.values())


def table(model: LoadedModel) -> dict[str, str]:
    """Data, shape, size, training, figures and versions of a model."""
    flow, meta = model.flow, model.checkpoint.meta
    rows = {
        "data": f"{model.config.data.name}: {shape_of(flow.shape, flow.kind)}",
        "model": f"{model.config.model.name}, {size_of(flow)}",
    }
    if flow.kind.no_bits and flow.num_bins is not None:
        rows["likelihood"] = f"none: {flow.kind.no_bits} (sigma {flow.dequantizer.sigma})"
    if progress := meta.get("progress"):
        rows["training"] = (
            f"step {meta['step']:,}, {progress['images']:,} images, {duration(progress['seconds'])}"
        )
        # The best checkpoint of a finished run is from before its end.
        summary = run_of(model.checkpoint.path) / "summary.json"
        if summary.exists():
            run = record.read_summary(summary)
            state = "finished" if run.finished else "not finished"
            rows["run"] = f"{state}: {run.step:,} steps, {duration(run.seconds)}"
        if progress["best"] is not None:
            best = f"{progress['best']:.3f} {unit_of(flow)}"
            rows["validation"] = f"{best} at step {progress['best_step']:,}"
    if card := card_of(model):
        rows["trained"] = f"{card.command}, {card.time} on {card.machine}"
        rows["data from"] = f"{card.data} ({card.licence})"
    for each in figures(model):
        rows[", ".join(filter(None, (each.dataset, each.split, each.way)))] = str(each)
    rows["versions"] = ", ".join(f"{name} {v}" for name, v in meta["versions"].items())
    return rows

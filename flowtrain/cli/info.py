"""`flowtrain info`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowtrain.cli import configs as configfiles
from flowtrain.cli.base import TrustOption, command, on_one_process, print_table

if TYPE_CHECKING:
    from flowtrain.flow.flow import Flow
    from flowtrain.flow.kinds import Kind
    from flowtrain.types import Shape

EPILOG = (
    "Examples: [cyan]flowtrain info runs/glow_digits[/cyan], [cyan]flowtrain info "
    "glow_cifar_small[/cyan]"
)
MIB = 2**20


@command
@on_one_process
def info(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|RUN|CONFIG",
            show_default=False,
            help="A checkpoint, a run directory, or a configuration. By default, the newest run in "
            "runs/.",
        ),
    ] = None,
    trust_code: TrustOption = False,
) -> None:
    """Say what a model or a configuration is: data, shape, parameters, figures, versions, size.

    Where a trained model and a configuration have one name, it means the model, and NAME.yaml the
    configuration.
    """
    from flowtrain.checkpoints import zoo

    if what is not None and (
        what.endswith(".yaml")
        or (
            what in configfiles.shipped_configs()
            and what not in zoo.names()
            and not os.path.lexists(what)
        )
    ):
        print_table(_of_config(configfiles.find_config(what)))
    else:
        print_table(_of_model(what, trust_code))


def _of_config(path: Path) -> dict[str, object]:
    from flowtrain.checkpoints.build import build_flow
    from flowtrain.config import load_config
    from flowtrain.data.splits import DataSet
    from flowtrain.system.console import duration

    config = load_config(path)
    data = DataSet(config.data)
    train = config.train
    length = f"{train.num_steps:,} steps" if train.budget is None else duration(train.budget)
    return {
        "configuration": f"{path}: {configfiles.headline(path)}",
        "data": f"{config.data.name}: {_shape(data.shape, data.kind)}",
        "model": f"{config.model.name}, {_size(build_flow(config, data.shape, data.levels))}",
        "training": f"{length}, {train.optimizer}, batches of {train.batch_size}",
    }


def _of_model(model: str | None, trust_code: bool) -> dict[str, object]:
    import torch

    from flowtrain.checkpoints import zoo
    from flowtrain.checkpoints.load import load_model, run_of
    from flowtrain.runs.record import read_evaluation
    from flowtrain.system.console import duration, figure

    loaded = load_model(model, torch.device("cpu"), None, trust_code)
    flow, checkpoint = loaded.flow, loaded.checkpoint
    context = flow.image_context
    unit = flow.kind.unit + ("" if context is None else f" given {context.words}")
    meta = checkpoint.meta
    table: dict[str, object] = {
        "checkpoint": f"{checkpoint.path}: {checkpoint.path.stat().st_size / MIB:,.1f} MiB, "
        f"{loaded.weights} weights",
        "data": f"{loaded.config.data.name}: {_shape(flow.shape, flow.kind)}",
        "model": f"{loaded.config.model.name}, {_size(flow)}",
    }
    if flow.kind.no_bits and flow.levels is not None:
        table["likelihood"] = f"none: {flow.kind.no_bits} (sigma {flow.dequantizer.sigma})"
    if progress := meta.get("progress"):
        state = "finished" if progress["finished"] else "not finished"
        table["training"] = (
            f"step {meta['step']:,}, {progress['images']:,} images, "
            f"{duration(progress['seconds'])}, {state}"
        )
        if progress["best"] is not None:
            table["validation"] = f"{progress['best']:.3f} {unit} at step {progress['best_step']:,}"
    for file in sorted(run_of(checkpoint.path).glob("evaluate-*.json")):
        result = read_evaluation(file)
        value, error = result.loss
        if value is not None:
            table[f"{result.dataset}, {result.split}"] = (
                f"{figure(value, error)} {unit} ({result.num_images:,} images, step "
                f"{result.step:,})"
            )
    if checkpoint.path.parent == zoo.FOLDER:
        card = zoo.card_of(checkpoint.path.stem)
        table["trained"] = f"{card.command}, {card.time} on {card.machine}"
        table["test"] = (
            f"{figure(card.loss, card.error)} {card.unit} ({card.images:,} images, "
            f"{card.likelihood})"
        )
        table["data from"] = f"{card.data} ({card.licence})"
    table["versions"] = ", ".join(f"{name} {v}" for name, v in meta["versions"].items())
    return table


def _shape(shape: "Shape", kind: "Kind") -> str:
    return f"{'x'.join(map(str, shape))}, {kind.words}"


def _size(flow: "Flow") -> str:
    given = "" if flow.image_context is None else f"given {flow.image_context.words}, "
    size = sum(p.numel() for p in flow.parameters())
    return f"{given}{size:,} parameters, sampling: {flow.sampling}"

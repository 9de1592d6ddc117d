"""`flowtrain info`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from flowtrain.cli import configs as configfiles
from flowtrain.cli.base import TrustOption, command, on_one_process, print_table
from flowtrain.errors import UserError

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
            help="A checkpoint, a run directory, a trained model, hf://user/name, or a "
            "configuration. By default, the newest run in runs/.",
        ),
    ] = None,
    trust_code: TrustOption = False,
) -> None:
    """Describe a model or a configuration: data, shape, parameters, figures, versions, size.

    If a trained model and a configuration share a name, NAME is the model and NAME.yaml the
    configuration.
    """
    from flowtrain.checkpoints import zoo

    configs = configfiles.shipped_configs().keys() - zoo.names()
    name = what or ""
    if name.endswith(".yaml") or name in configs and not os.path.lexists(name):
        print_table(_of_config(configfiles.find_config(name)))
        return
    import torch

    from flowtrain.checkpoints import about
    from flowtrain.checkpoints.load import load_model
    from flowtrain.foreign.file import is_foreign

    if is_foreign(name):
        raise UserError(f"{name}: a flow of other code, which has no checkpoint; see doctor")
    loaded = load_model(what, torch.device("cpu"), None, trust_code)
    path = loaded.checkpoint.path
    size = f"{path.stat().st_size / MIB:,.1f} MiB, {loaded.weights} weights"
    print_table({"checkpoint": f"{path}: {size}", **about.table(loaded)})


def _of_config(path: Path) -> dict[str, object]:
    from flowtrain.checkpoints import about
    from flowtrain.checkpoints.build import build_flow
    from flowtrain.config import load_config
    from flowtrain.data.splits import DataSet
    from flowtrain.system.console import duration

    config = load_config(path)
    data = DataSet(config.data)
    train = config.train
    flow = build_flow(config, data.shape, data.num_bins)
    length = f"{train.num_steps:,} steps" if train.budget is None else duration(train.budget)
    return {
        "configuration": f"{path}: {configfiles.headline(path)}",
        "data": f"{config.data.name}: {about.shape_of(data.shape, data.kind)}",
        "model": f"{config.model.name}, {about.size_of(flow)}",
        "training": f"{length}, {train.optimizer}, batches of {train.batch_size}",
    }

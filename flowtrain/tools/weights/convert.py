"""The projects whose models are imported, and a flow with the weights of such a model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowtrain import config as configuration
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.build import build_flow
from flowtrain.config import Config, Dequantization
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError, cut
from flowtrain.flow.flow import Flow
from flowtrain.tools.weights import chrischute, normflows, rosinality, tarflow, y0ast
from flowtrain.tools.weights.glow import Glow
from flowtrain.tools.weights.tarflow import TarFlow
from flowtrain.tools.weights.tensors import Tensors, read
from flowtrain.types import Shape

# From its tensors, the shape of an image, and the preprocessing, to the options of the same model
# here, and its weights.
Reader = Callable[[Tensors, Shape, Dequantization], Glow | TarFlow]

# The reader of each project, and the section `dequantization` for its preprocessing.
PROJECTS: dict[str, tuple[Reader, dict[str, Any]]] = {
    "rosinality": (rosinality.read, {}),
    "y0ast": (y0ast.read, {}),
    "normflows": (normflows.read, {}),
    "chrischute": (chrischute.read, chrischute.DEQUANTIZATION),
    "tarflow": (tarflow.read, {}),
}


def convert(tensors: Tensors, project: str, settings: Sequence[str]) -> tuple[Config, Flow]:
    """A flow in float64 with the weights of a project's model, and its configuration.

    `settings` are `KEY=VALUE` of the data that it was trained on, and of `dequantization`. Raises
    `UserError` if names or shapes of tensors do not fit.
    """
    for text in settings:
        if not text.startswith(("data.", "dequantization.")):
            raise UserError(
                f"--set {cut(text)}: only keys of data and dequantization: the file has the model"
            )
    reader, dequantization = PROJECTS[project]
    values = configuration.override({"dequantization": dict(dequantization)}, settings)
    config = configuration.parse(values, "--set", trust_code=True)
    data = DataSet(config.data)
    data.kind.require_bins(f"--from {project}: its models are of images, and these are real values")
    foreign = reader(tensors, data.shape, config.dequantization)
    tensors.finish()
    config = configuration.parse({**values, "model": foreign.options}, "--set", trust_code=True)
    flow = build_flow(config, data.shape, data.num_bins).double()
    foreign.fill(flow)
    return config, flow


def import_file(path: Path, project: str, settings: Sequence[str], out: Path) -> None:
    """Writes the model in `path` as a checkpoint, in float32. Raises `UserError` as `convert`."""
    tensors = read(path, f"{path}, as a model of {project}")
    config, flow = convert(tensors, project, settings)
    state = flow.float().state_dict()
    described: dict[str, Any] = {"config": config.resolved(), "shape": list(flow.shape)}
    described |= {"levels": flow.num_bins, "step": 0}
    named = {f"model.{name}": tensor for name, tensor in state.items()}
    checkpoint_format.write(out, described, named)

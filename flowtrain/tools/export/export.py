"""Exports a model: its graphs as files, compared with torch before anything is written."""

import importlib.util
import json
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

import flowtrain
from flowtrain.checkpoints import about
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.errors import UserError
from flowtrain.foreign.file import is_foreign
from flowtrain.system import packages
from flowtrain.system.random import Stream, generator
from flowtrain.tools.export.formats import SUFFIX, Format, encoded, runner
from flowtrain.tools.export.graphs import graphs_of
from flowtrain.tools.export.verify import RANDOM, Check, checks, round_trip

FACTS = "model.json"  # `metadata`, for programs that read no ONNX
IMAGES = 64  # of each kind in a comparison
OPSET = 18  # torch translates to this one, and converts to newer ones
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(
    model: LoadedModel,
    to: Format = "onnx",
    images: Tensor | None = None,
    opset: int = OPSET,
    note: Callable[[Check | str], None] = lambda said: None,
) -> dict[str, bytes]:
    """The files of a model by their names: `model.json`, `log_prob.onnx` and so on, in float32.

    Each was run, by onnxruntime or torch, on `images` `(B, C, H, W)` and on random ones, and
    differs from the flow by rounding alone. `note` gets each difference. `decode` gives the images
    back from the latents of `encode`. Models that compute one entry after the other have no
    `decode`; `note` gets the reason.

    Args:
        model: As from `checkpoints.load.load_model`, on the CPU.
        to: `onnx`, or `torch` for programs of `torch.export`.
        images: At least 8 images of the data set, by default samples of the model.
        opset: The version of ONNX's operators.
        note: Called with each check, and each graph that is left out.

    Raises:
        UserError: A package is missing, the likelihood is no graph, torch cannot translate it, or
            the flow is of other code or of images given a part of them.
        RunError: A file differs from torch.
    """
    if is_foreign(str(model.checkpoint.path)):
        raise UserError(f"{model.checkpoint.path}: a flow of other code, which is not exported")
    model.flow.require_no_context(str(model.checkpoint.path))
    if to == "onnx" and any(importlib.util.find_spec(name) is None for name in PACKAGES):
        raise packages.missing("--to onnx", *PACKAGES, extra="onnx")
    flow, kind = model.flow, "test images"
    graphs, left_out = graphs_of(flow, str(model.checkpoint.path))
    facts = metadata(model)
    with warnings.catch_warnings(action="ignore"):  # torch's own; the checks below judge the files
        contents = {
            graph.name: encoded(graph, to, {"graph": graph.name, **facts}, opset)
            for graph in graphs
        }
        runs = {name: runner(content, to) for name, content in contents.items()}
    for name, why in left_out.items():
        note(f"there is no {name}: {why}")
    if images is None:
        images, kind = flow.sample(IMAGES, generator=generator(0, Stream.LATENTS)), "samples"
    noise = flow.kind.uniform_like(images, generator(0, Stream.EVALUATION))
    for x, of in ((images, kind), (noise, RANDOM)):
        for check in checks(flow, graphs, runs, x, of):
            note(check)
            check.require()
    if "decode" in runs:
        check = round_trip(flow, runs, images, kind)
        note(check)
        check.require()
    files = {f"{name}{SUFFIX[to]}": content for name, content in contents.items()}
    return {FACTS: json.dumps(facts, indent=2).encode(), **files}


def metadata(model: LoadedModel) -> dict[str, Any]:
    """Facts about a model for its files: shape, levels (None for reals), unit, likelihood, figures
    and versions.
    """
    flow = model.flow
    return {
        "flowtrain": flowtrain.__version__,
        "shape": list(flow.shape),
        "levels": flow.num_bins,
        "unit": flow.kind.unit,
        "likelihood": "exact" if flow.exact else f"{flow.kind.bound}, from one draw of noise",
        "precision": "float32",
        "weights": model.weights,
        **about.table(model),
    }

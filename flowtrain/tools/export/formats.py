"""Graphs as bytes of a file, and such bytes as functions of arrays again."""

import importlib.util
import io
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowtrain.errors import RunError, short
from flowtrain.system import packages
from flowtrain.tools.export.graphs import Graph

Format = Literal["onnx", "torch"]
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
# Arrays by the names of a graph's inputs, to its outputs in order.
Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]

# Numerators and denominators of the normal quantile, lowest power first: near the middle, and in
# the tails by the root of -log p, up to 5 and above (Wichura 1988, "Algorithm AS 241", PPND7).
MIDDLE = (3.3871327179, 50.434271938, 159.29113202, 59.109374720)
MIDDLE_BELOW = (1.0, 17.895169469, 78.757757664, 67.187563600)
TAIL = (1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103)
TAIL_BELOW = (1.0, 0.73700164250, 0.12021132975)
FAR = (6.6579051150, 3.0812263860, 0.42868294337, 0.017337203997)
FAR_BELOW = (1.0, 0.24197894225, 0.012258202635)


def require_packages(what: str) -> None:
    """Raises `UserError` that begins with `what` unless the packages of the extra are there."""
    names = ("onnx", "onnxscript", "onnxruntime")
    if any(importlib.util.find_spec(name) is None for name in names):
        raise packages.missing(what, *names, extra="onnx")


def normal_quantile(p: Tensor) -> Tensor:
    """`torch.special.ndtri` to about 1e-7, by operations that ONNX has."""
    q = p - 0.5
    r = 0.180625 - q.square()
    middle = q * _ratio(r, MIDDLE, MIDDLE_BELOW)
    r = (-torch.minimum(p, 1 - p).log()).sqrt()
    tail = torch.where(r <= 5, _ratio(r - 1.6, TAIL, TAIL_BELOW), _ratio(r - 5, FAR, FAR_BELOW))
    return torch.where(q.abs() <= 0.425, middle, tail * q.sign())


def _ratio(x: Tensor, above: tuple[float, ...], below: tuple[float, ...]) -> Tensor:
    return _polynomial(x, above) / _polynomial(x, below)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for each in reversed(coefficients[:-1]):
        value = value * x + each
    return value


def sigmoid(x: Tensor) -> Tensor:
    """`x.sigmoid()`. That of onnxruntime is constant below -18, which likelihoods of tails show."""
    return 1 / (1 + (-x).exp())


# torch has no translation of the normal quantile.
DECOMPOSED = {
    torch.ops.aten.special_ndtri.default: normal_quantile,
    torch.ops.aten.sigmoid.default: sigmoid,
}


def encoded(graph: Graph, to: Format, facts: Mapping[str, Any], opset: int) -> bytes:
    """The file of a graph, with `facts` about its model. Raises `RunError` if this version of torch
    cannot translate it.
    """
    program = graph.program()
    if to == "torch":
        for part in program.graph_module.modules():  # with the bodies of loops
            for node in getattr(part, "graph", torch.fx.Graph()).nodes:
                node.meta.pop("stack_trace", None)
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={"model.json": json.dumps(facts)})
        return file.getvalue()
    program = program.run_decompositions(DECOMPOSED)
    try:
        made = torch.onnx.export(
            program,
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise RunError(f"torch {torch.__version__}, {graph.name}: {short(error)}") from error
    assert made is not None
    model = made.model_proto
    _forget_sources(model.graph)
    for key, value in facts.items():
        model.metadata_props.add(
            key=key, value=value if isinstance(value, str) else json.dumps(value)
        )
    content: bytes = model.SerializeToString()
    return content


def _forget_sources(graph: Any) -> None:
    """Removes torch's notes on the origin of each operation, with folders of this machine."""
    for node in graph.node:
        del node.metadata_props[:]
        for attribute in node.attribute:
            _forget_sources(attribute.g)


def runner(content: bytes, to: Format) -> Run:
    """The function of a file, by onnxruntime or torch, on the CPU."""
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, dict(inputs))
    module = torch.export.load(io.BytesIO(content)).module()

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            return [each.numpy() for each in module(*map(torch.from_numpy, inputs.values()))]

    return run

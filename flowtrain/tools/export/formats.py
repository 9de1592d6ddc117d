"""Graphs as bytes of a file, and such bytes as functions of arrays again."""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch

from flowtrain.errors import UserError, short
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


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of torch's operations to ONNX, if torch has none, or a coarse one."""
    from onnxscript import opset18 as op

    def polynomial(x: Any, coefficients: tuple[float, ...]) -> Any:
        value: Any = coefficients[-1]
        for each in reversed(coefficients[:-1]):
            value = op.Add(op.Mul(x, value), each)
        return value

    def ratio(x: Any, above: tuple[float, ...], below: tuple[float, ...]) -> Any:
        return op.Div(polynomial(x, above), polynomial(x, below))

    def normal_quantile(self: Any) -> Any:
        q = op.Sub(self, 0.5)
        middle = op.Mul(q, ratio(op.Sub(0.180625, op.Mul(q, q)), MIDDLE, MIDDLE_BELOW))
        r = op.Sqrt(op.Neg(op.Log(op.Min(self, op.Sub(1.0, self)))))
        near, far = op.Sub(r, 1.6), op.Sub(r, 5.0)
        tail = op.Where(
            op.LessOrEqual(r, 5.0), ratio(near, TAIL, TAIL_BELOW), ratio(far, FAR, FAR_BELOW)
        )
        return op.Where(op.LessOrEqual(op.Abs(q), 0.425), middle, op.Mul(tail, op.Sign(q)))

    def sigmoid(self: Any) -> Any:  # onnxruntime's is constant below -18
        return op.Reciprocal(op.Add(op.Exp(op.Neg(self)), 1.0))

    aten = torch.ops.aten
    return {aten.special_ndtri.default: normal_quantile, aten.sigmoid.default: sigmoid}


def encoded(graph: Graph, to: Format, facts: Mapping[str, Any], opset: int) -> bytes:
    """The file of a graph, with `facts` about its model. Raises `UserError` if this version of
    torch cannot translate it.
    """
    try:
        return _encoded(graph, to, facts, opset)
    except RuntimeError as error:  # all of torch's are
        raise UserError(
            f"{graph.name}: torch {torch.__version__} cannot translate this model: "
            f"{short(error.__cause__ or error)}"
        ) from error


def _encoded(graph: Graph, to: Format, facts: Mapping[str, Any], opset: int) -> bytes:
    program = graph.program()
    if to == "torch":
        for part in program.graph_module.modules():  # with the bodies of loops
            for node in getattr(part, "graph", torch.fx.Graph()).nodes:
                node.meta.pop("stack_trace", None)
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={"model.json": json.dumps(facts)})
        return file.getvalue()
    made = torch.onnx.export(
        program,
        input_names=list(graph.inputs),
        output_names=graph.outputs,
        opset_version=opset,
        custom_translation_table=translations(),
        dynamo=True,
        verbose=False,
    )
    assert made is not None
    model = made.model_proto
    _forget_sources(model.graph)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    for key, value in facts.items():
        model.metadata_props.add(
            key=key, value=value if isinstance(value, str) else json.dumps(value)
        )
    content: bytes = model.SerializeToString()
    return content


def _forget_sources(graph: Any) -> None:
    """Removes torch's notes on the origin of each operation, with folders of this machine."""
    del graph.value_info[:]  # shapes, which onnxruntime derives itself
    for node in graph.node:
        del node.metadata_props[:]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_sources(attribute.g)


def runner(content: bytes, to: Format) -> Run:
    """The function of a file, by onnxruntime or torch, on the CPU.

    Raises `UserError` if this version of onnxruntime refuses it, such as one with newer operators.
    """
    if to == "onnx":
        import onnxruntime

        try:
            session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no other class in common
            raise UserError(
                f"onnxruntime {onnxruntime.__version__} refuses the graph: {short(error, 500)}"
            ) from error
        return lambda inputs: session.run(None, dict(inputs))
    module = torch.export.load(io.BytesIO(content)).module()

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            return [each.numpy() for each in module(*map(torch.from_numpy, inputs.values()))]

    return run

"""int8 constants: ONNX Runtime's quantizers, on the nodes that are named to them.

    Conv            static: u8 activations with ranges seen in calibration, s8 weights with one scale per output channel;
                    a Relu or Clip that alone reads the answer is what its codes leave, and no node of its own
    MatMul, Gemm    dynamic: ranges of the activation measured at run time, s8 weights,
                    one scale per output column: the columns of a factor differ as much as the singular values do
    Gather          the embedding table in s8 with one scale per row; the rows that are read are dequantized

Weights that lie on these grids already, as refitted ones do, come out as they are: the largest entry of a row keeps the
largest code, so the scale that the tools find is the one it was fitted with.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from ..graphs.running import watching
from .products import inner_reads

#: The opset from which on a channel can have a scale of its own.
CHANNELS_FROM = 13
#: Tables below this many bytes are not worth the extra nodes.
MIN_TABLE_BYTES = 16_384
_MATRIX_OPS = ("MatMul", "Gemm")


class _Feeds(CalibrationDataReader):  # type: ignore[misc]
    """The calibration inputs, one batch after the other."""

    def __init__(self, batches: Sequence[dict[str, np.ndarray]]) -> None:
        self._left: Iterator[dict[str, np.ndarray]] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the tools from talking: they warn through the root logger, and would give it a handler for good."""
    root, sink, level = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(sink)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        root.removeHandler(sink)


def static_convs(
    model: onnx.ModelProto,
    convs: Sequence[str],
    batches: Sequence[dict[str, np.ndarray]],
    held: Sequence[onnx.TensorProto],
    branches: Collection[str],
    scratch: Path,
) -> onnx.ModelProto:
    """Wrap the nodes `convs` in QuantizeLinear/DequantizeLinear pairs with the ranges seen in `batches`.

    `branches`: names of the nodes of adapters, the additions that end them included.
    """
    if not convs or not batches:
        return model
    # While calibrating, slots are inputs without a default: feed what the default would have been.
    empty = {t.name: numpy_helper.to_array(t) for t in held}
    feeds = [{**b, **empty} for b in batches]
    ranges = _narrowed(model, _cut_later(model.graph, convs, branches), feeds)
    onnx.save(model, scratch / "float.onnx")
    quantize_static(
        str(scratch / "float.onnx"), str(scratch / "convs.onnx"), _Feeds(feeds),
        quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv", *_CUTS], per_channel=True,
        nodes_to_quantize=[*convs, *_cuts(model.graph, convs)], extra_options={"TensorQuantOverrides": ranges},
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
    )  # fmt: skip
    return _sorted(onnx.load(scratch / "convs.onnx"))


def _sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put nodes after what the graphs inside them read, which the tools do not look at."""
    if not inner_reads(model.graph):
        return model
    made = ir.from_proto(model)
    made.graph.sort()
    return ir.to_proto(made)


#: What cuts a range off: codes of u8 do that, too.
_CUTS = ("Relu", "Clip")


def _cuts(graph: onnx.GraphProto, convs: Collection[str]) -> list[str]:
    """Return the nodes that cut off what one of `convs` makes, and nothing else reads: the codes are then of what is left.

    Were a convolution's own answer coded, a Clip at 6 after answers of up to 40 would be left with few of them.
    """
    made = {n.output[0] for n in graph.node if n.name in set(convs)}
    ends = _ends(graph)
    return [n.name for n in graph.node if n.input and n.input[0] in made and _keeps_zero(n, ends, graph)]


def _ends(graph: onnx.GraphProto) -> dict[str, tuple[float, float]]:
    """Return what the nodes that cut off leave, by name; not of those whose ends are computed."""
    constants = {t.name: t for t in graph.initializer} | {
        n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute[0].HasField("t")
    }
    found = {n.name: (0.0, math.inf) for n in graph.node if n.op_type == "Relu"}
    for node in (n for n in graph.node if n.op_type == "Clip" and not n.attribute):
        names = [*node.input[1:], "", ""][:2]
        if all(not n or n in constants for n in names):
            low, high = (float(numpy_helper.to_array(constants[n])) if n else math.inf for n in names)
            found[node.name] = -math.inf if names[0] == "" else low, high
    return found


def _keeps_zero(node: onnx.NodeProto, ends: Mapping[str, tuple[float, float]], graph: onnx.GraphProto) -> bool:
    """Return whether codes cut off as the node does, which alone reads what it cuts: a range of u8 has zero in it."""
    low, high = ends.get(node.name, (1.0, 1.0))
    return low <= 0 <= high and _readers(graph, node.input[0]) == [node]


def _readers(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto | None]:
    """Return what reads a value, a node for each time it does; None for the graph's outputs and graphs inside."""
    found: list[onnx.NodeProto | None] = [n for n in graph.node for i in n.input if i == name]
    outside = {o.name for o in graph.output} | inner_reads(graph)
    return [*found, None] if name in outside else found


def _cut_later(
    graph: onnx.GraphProto, convs: Collection[str], branches: Collection[str]
) -> dict[str, tuple[float, float]]:
    """Return the answers of `convs` that are cut off once adapters have added to them, and what is left then."""
    ends, found = _ends(graph), {}
    for node in (n for n in graph.node if n.name in set(convs)):
        value, readers = node.output[0], _readers(graph, node.output[0])
        while (
            len(readers) == 1 and (r := readers[0]) is not None and r.name in branches and r.op_type in ("Add", "Sum")
        ):
            value, readers = r.output[0], _readers(graph, r.output[0])
        last = readers[0] if len(readers) == 1 else None
        if value != node.output[0] and last is not None and _keeps_zero(last, ends, graph):
            found[node.output[0]] = ends[last.name]
    return found


def _narrowed(
    model: onnx.ModelProto, cut: Mapping[str, tuple[float, float]], feeds: Sequence[dict[str, np.ndarray]]
) -> dict[str, list[dict[str, np.float32]]]:
    """Return ranges for answers that are cut off later: what is left, and as much again on both sides for an adapter to move."""
    if not cut:
        return {}
    session = watching(model, cut)
    seen = dict.fromkeys(cut, (0.0, 0.0))
    for batch in feeds:
        for n, v in zip(cut, session.run(list(cut), batch), strict=True):
            seen[n] = min(seen[n][0], float(v.min())), max(seen[n][1], float(v.max()))
    found = {}
    for n, (low, high) in cut.items():
        low, high = max(low, seen[n][0]), min(high, seen[n][1])
        ends = max(seen[n][0], low - (high - low)), min(seen[n][1], high + (high - low))
        if ends[0] < ends[1]:
            found[n] = [{"rmin": np.float32(ends[0]), "rmax": np.float32(ends[1])}]
    return found


#: The domain of operators that a tool is not to see.
_HELD = "lrcompress.held"


def dynamic_matrices(model: onnx.ModelProto, nodes: Collection[str], scratch: Path) -> onnx.ModelProto:
    """Quantize the constant operand of the products `nodes`, each output column with its own scale."""
    if not nodes:
        return model
    # The tool rewrites every Gemm to MatMul and renames it and its weight: no list of wanted nodes would match, so others are
    # excluded; and what is excluded would lose its weight's name, so Gemms are no Gemms meanwhile.
    unwanted = [n.name for n in model.graph.node if n.op_type in _MATRIX_OPS and n.name not in nodes]
    held = {n.name for n in model.graph.node if n.op_type == "Gemm" and n.name not in nodes}
    _rename(model, held, f"{_HELD}.Gemm")
    onnx.save(model, scratch / "matrices_in.onnx")
    quantize_dynamic(
        str(scratch / "matrices_in.onnx"), str(scratch / "matrices.onnx"), op_types_to_quantize=list(_MATRIX_OPS),
        nodes_to_exclude=unwanted, per_channel=True, weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what operators make that it does not know
    )  # fmt: skip
    model = _sorted(onnx.load(scratch / "matrices.onnx"))
    _rename(model, held, "Gemm")
    return model


def _rename(model: onnx.ModelProto, nodes: Collection[str], operator: str) -> None:
    """Have the nodes called so be operators of another name, which one of a domain of its own needs declared."""
    domain, _, kind = operator.rpartition(".")
    for node in model.graph.node:
        if node.name in nodes:
            node.domain, node.op_type = domain, operator if domain else kind
    for declared in [o for o in model.opset_import if o.domain == _HELD]:
        model.opset_import.remove(declared)
    if domain and nodes:
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))


def quantize_tables(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Replace the float tables `names`, which only Gather reads, by s8 rows and their scales: gather both, then multiply."""
    tables = {t.name: t for t in graph.initializer if t.name in names}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for name, table in tables.items():
        nodes = readers.get(name, [])
        rows_only = all(
            n.op_type == "Gather" and n.input[0] == name and name not in n.input[1:] and _axis(n) == 0 for n in nodes
        )
        if not nodes or not rows_only:
            continue
        values = numpy_helper.to_array(table)
        scale = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / np.float32(127)
        codes = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
        graph.initializer.remove(table)
        graph.initializer.append(numpy_helper.from_array(codes, f"{name}_quantized"))
        graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"))
        for node in nodes:
            _gather_and_scale(graph, node, name)


def _axis(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)


def _gather_and_scale(graph: onnx.GraphProto, node: onnx.NodeProto, name: str) -> None:
    """y = table[i] becomes y = float(codes[i]) * scale[i]."""
    at, out, base = list(graph.node).index(node), node.output[0], node.name
    parts = [
        helper.make_node(
            "Gather", [f"{name}_quantized", node.input[1]], [f"{base}_codes"], name=f"{base}_codes", axis=0
        ),
        helper.make_node("Gather", [f"{name}_scale", node.input[1]], [f"{base}_scale"], name=f"{base}_scale", axis=0),
        helper.make_node("Cast", [f"{base}_codes"], [f"{base}_float"], name=f"{base}_float", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [f"{base}_float", f"{base}_scale"], [out], name=f"{base}_rows"),
    ]
    graph.node.remove(node)
    for i, part in enumerate(parts):
        graph.node.insert(at + i, part)

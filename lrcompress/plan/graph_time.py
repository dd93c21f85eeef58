"""What a whole ONNX graph takes: its operators, as ONNX Runtime leaves them, priced one by one.

    found = graph_time(Path("exported/model.onnx"), feeds, prices)
    found.ms, found.parts                       # the sum, and {operator: ms} by what it is spent on

The runtime's own optimizer rewrites the graph first, because it is what runs that must be priced, and one run with every
intermediate result as an output tells all shapes, those that depend on the data too. Blocked convolution layouts are
followed where the priced machine has them; a machine of another kind is priced from the graph before that step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from ..errors import ModelError
from ..graphs.running import watching
from ..latency import Dims
from ..runtime import session_options
from .prices import Prices

#: What an operator that only changes how a tensor is looked at is priced as.
_NOTHING: tuple[str, Dims] = ("Relu", (4,))
_VIEWS = {
    "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Range", "Dropout", "Constant",
    "ConstantOfShape",
}  # fmt: skip
#: Operators by number of elements: the kind that is timed for them.
_BY_ELEMENTS = {
    **dict.fromkeys(("Relu", "Clip", "LeakyRelu", "PRelu", "Not", "IsNaN", "Abs", "Ceil", "Floor", "Round"), "Relu"),
    **dict.fromkeys(("Neg",), "Neg"),
    **dict.fromkeys(("Add", "Sub", "Sum", "Max", "Min", "And", "Or", "QLinearAdd"), "Add"),
    **dict.fromkeys(("Mul", "QLinearMul"), "Mul"),
    **dict.fromkeys(("Div", "Reciprocal", "Mod", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"), "Div"),
    **dict.fromkeys(("Pow",), "Pow"),
    **dict.fromkeys(("Sqrt",), "Sqrt"),
    **dict.fromkeys(("Sigmoid", "HardSigmoid", "HardSwish"), "Sigmoid"),
    **dict.fromkeys(("Tanh",), "Tanh"),
    **dict.fromkeys(("Erf", "Exp", "Log", "Sin", "Cos", "Softplus"), "Erf"),
    **dict.fromkeys(("Gelu", "BiasGelu", "FastGelu", "QuickGelu"), "Gelu"),
    **dict.fromkeys(("Slice", "Split"), "Slice"),
    **dict.fromkeys(("Concat",), "Concat"),
    **dict.fromkeys(("Expand", "Tile"), "Expand"),
    **dict.fromkeys(("Pad",), "Pad"),
    **dict.fromkeys(("Where",), "Where"),
    **dict.fromkeys(("Cast",), "Cast"),
    **dict.fromkeys(("Transpose",), "Transpose"),
    **dict.fromkeys(("ReorderInput", "ReorderOutput"), "reorder"),
    **dict.fromkeys(("QuantizeLinear",), "QuantizeLinear"),
    **dict.fromkeys(("DequantizeLinear",), "DequantizeLinear"),
}
_NORMS = {"LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}  # fmt: skip
_REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceL2", "ReduceMax", "GlobalAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean"}  # fmt: skip
_POOLS = {"MaxPool", "AveragePool", "QLinearAveragePool"}


@dataclass(frozen=True)
class Operator:
    """One operator of a graph: what it is priced as, and how often. `name`: what the graph calls it."""

    op: str
    kind: str
    bits: int
    dims: Dims
    times: int = 1
    name: str = ""


@dataclass(frozen=True)
class GraphTime:
    """`ms`: of one request; `parts`: {operator type: ms}; `operators`: each with its ms."""

    ms: float
    parts: Mapping[str, float]
    operators: Sequence[tuple[Operator, float]]


def graph_time(path: Path, feeds: Mapping[str, np.ndarray], prices: Prices) -> GraphTime:
    """Return what one request with these inputs takes. Raises `ModelError` where the runtime cannot run the graph."""
    return priced(request_operators(path, feeds, blocked=prices.table.blocked), prices)


def priced(found: Sequence[Operator], prices: Prices) -> GraphTime:
    """Return what these operators take together in one request."""
    timed = [(o, o.times * prices.ms(o.kind, o.bits, o.dims)) for o in found]
    parts: dict[str, float] = {}
    for o, ms in timed:
        parts[o.op] = parts.get(o.op, 0.0) + ms
    count = sum(o.times > 0 for o, _ in timed)
    parts["(among others)"] = prices.among_ms(sum(weight_bytes(o) for o, _ in timed), count)
    return GraphTime(prices.run_ms + sum(parts.values()), parts, timed)


def total_ms(found: Sequence[Operator], prices: Prices) -> float:
    return priced(found, prices).ms


def weight_bytes(o: Operator) -> float:
    """Return the bytes of constants that a product reads."""
    if o.kind == "matmul":
        return o.dims[1] * o.dims[2] * o.bits / 8
    return float(np.prod(o.dims[:4])) * o.bits / 8 if o.kind in ("conv", "conv_odd") else 0.0


def request_operators(path: Path | bytes, feeds: Mapping[str, np.ndarray], *, blocked: bool) -> list[Operator]:
    """Return what runs for one request with these inputs, as priced operators."""
    where = path if isinstance(path, Path) else "the graph"
    try:
        data = onnx.load(path).SerializeToString() if isinstance(path, Path) else path
        model, shapes = _as_it_runs(data, feeds, blocked)
    except Exception as e:  # the runtime's family of errors is private; so is what the readers raise
        raise ModelError(where, "a graph that ONNX Runtime runs with these inputs", e) from e
    constants = {t.name for t in model.graph.initializer}
    found: list[Operator] = []
    for node in model.graph.node:
        found += _priced(node, shapes, constants)
    return found


def _as_it_runs(
    data: bytes, feeds: Mapping[str, np.ndarray], blocked: bool
) -> tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]:
    """Return the graph after the runtime's optimizer, and the shape of every value of a run."""
    levels = ort.GraphOptimizationLevel
    options = session_options(1)
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if blocked else levels.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath)
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer} | {k: v.shape for k, v in feeds.items()}
    made = [n for node in model.graph.node for n in node.output if n]
    session = watching(model, made)
    wanted = {i.name for i in session.get_inputs()}
    for name, value in zip(made, session.run(made, {k: v for k, v in feeds.items() if k in wanted}), strict=True):
        shapes[name] = tuple(np.shape(value))
    return model, shapes


def _priced(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]], constants: set[str]) -> list[Operator]:
    """Return what a node is priced as; nothing for what runs before the first request."""
    op = node.op_type
    out = shapes.get(node.output[0], ())
    special = _SPECIAL.get(op)
    if special is not None:
        return [
            Operator(op, kind, bits, dims, times, node.name)
            for kind, bits, dims, times in special(node, shapes, constants)
        ]
    if op in _VIEWS:
        return [Operator(op, _NOTHING[0], 32, _NOTHING[1], 1, node.name)]
    if op in _NORMS or op == "Softmax":
        kind = "Softmax" if op == "Softmax" else "LayerNormalization"
        return [Operator(op, kind, 32, _rows(out), 1, node.name)]
    if op in _REDUCTIONS:
        size, kept = _size(shapes.get(node.input[0], ())), max(_size(out), 1)
        return [Operator(op, "ReduceMean", 32, (kept, max(size // kept, 1)), 1, node.name)]
    if op == "BatchNormalization":
        channels = max(out[1] if len(out) > 1 else 1, 1)
        return [Operator(op, op, 32, (channels, max(_size(out) // channels, 1)), 1, node.name)]
    if op in _POOLS:
        window = int(np.prod(_attribute(node, "kernel_shape", [1])))
        return [Operator(op, "ReduceMean", 32, (max(_size(out), 1), window), 1, node.name)]
    elements = max(sum(_size(shapes.get(o, ())) for o in node.output if o) if op == "Split" else _size(out), 1)
    return [Operator(op, _BY_ELEMENTS.get(op, op), 32, (elements,), 1, node.name)]


_Priced = list[tuple[str, int, Dims, int]]
_Shapes = Mapping[str, tuple[int, ...]]


def _convolution(node: onnx.NodeProto, shapes: _Shapes, constants: set[str]) -> _Priced:
    """Return a convolution by its kind; groups that are not one channel each count one by one."""
    eight = node.op_type == "QLinearConv"
    bits = 8 if eight or node.op_type == "ConvInteger" else 32
    weight = shapes[node.input[3 if eight else 1]]
    out = shapes[node.output[0]]
    last = bool(_attribute(node, "channels_last", 0))
    space = out[1:-1] if last else out[2:]
    kernel, space = (1, *weight[2:])[-2:], (1, *space)[-2:]
    groups, stride = int(_attribute(node, "group", 1)), int(max(_attribute(node, "strides", [1])))
    channels = weight[0] if not last else out[-1]
    place = (kernel[0], kernel[1], space[0] * out[0], space[1], stride)
    return conv_kind(bits, channels, weight[1] * groups, groups, place)


def conv_kind(bits: int, c_out: int, c_in: int, groups: int, place: tuple[int, int, int, int, int]) -> _Priced:
    """Return how a convolution is priced. `place`: kernel height and width, output height and width, stride."""
    if groups > 1 and groups == c_in == c_out:
        return [("depthwise", bits, (c_in, c_out, *place), 1)]
    kind = "conv_odd" if bits == 32 and c_out % 8 and groups == 1 else "conv"
    return [(kind, bits, (c_in // groups, max(c_out // groups, 1), *place), groups)]


def _product(node: onnx.NodeProto, shapes: _Shapes, constants: set[str]) -> _Priced:
    a, b = shapes[node.input[0]], shapes[node.input[1]]
    out = shapes[node.output[0]]
    inner = a[-2] if _attribute(node, "transA", 0) and len(a) > 1 else a[-1]
    if len(b) <= 2 and node.input[1] in constants:
        columns = out[-1] if len(b) == 2 else 1
        return [("matmul", 32, (max(_size(out) // max(columns, 1), 1), inner, columns), 1)]
    rows = out[-2] if len(out) > 1 else 1
    return [("bmm", 32, (max(_size(out) // max(rows * out[-1], 1), 1), rows, inner, out[-1]), 1)]


def _int8_product(node: onnx.NodeProto, shapes: _Shapes, constants: set[str]) -> _Priced:
    """Return a product of codes; where another operator quantizes its input, that is not paid twice."""
    a, out = shapes[node.input[0]], shapes[node.output[0]]
    rows = max(_size(a) // a[-1], 1)
    found: _Priced = [("matmul", 8, (rows, a[-1], out[-1]), 1)]
    return found if node.op_type == "DynamicQuantizeMatMul" else [*found, ("quantize", 32, (rows, a[-1]), -1)]


def _packed_product(node: onnx.NodeProto, shapes: _Shapes, constants: set[str]) -> _Priced:
    a, out = shapes[node.input[0]], shapes[node.output[0]]
    return [("matmul", int(_attribute(node, "bits", 4)), (max(_size(a) // a[-1], 1), a[-1], out[-1]), 1)]


def _quantizer(node: onnx.NodeProto, shapes: _Shapes, constants: set[str]) -> _Priced:
    return [("quantize", 32, _rows(shapes[node.input[0]]), 1)]


def _lookup(node: onnx.NodeProto, shapes: _Shapes, constants: set[str]) -> _Priced:
    out, index = shapes[node.output[0]], shapes[node.input[1]]
    rows = max(_size(index), 1)
    found: _Priced = [("gather", 32, (rows, max(_size(out) // rows, 1)), 1)]
    if node.op_type == "Gather":
        data = shapes[node.input[0]]
        axis = int(_attribute(node, "axis", 0)) % max(len(data), 1)
        found = [taken(_size(out), _size(data[axis + 1 :]), rows)]
    return found if node.op_type == "Gather" else [*found, ("Mul", 32, (max(_size(out), 1),), 1)]


def taken(numbers: int, block: int, picked: int) -> tuple[str, int, Dims, int]:
    """Return how it is priced to pick so many `numbers`, in blocks that lie together: rows, or number by number."""
    if block == 1 and picked > 1:
        return "take", 32, (max(numbers, 1),), 1
    return "gather", 32, (max(numbers // max(block, 1), 1), max(block, 1)), 1


_SPECIAL: Mapping[str, Callable[[onnx.NodeProto, _Shapes, set[str]], _Priced]] = {
    **dict.fromkeys(("Conv", "FusedConv", "QLinearConv", "ConvInteger", "NhwcFusedConv"), _convolution),
    **dict.fromkeys(("MatMul", "Gemm", "FusedGemm", "FusedMatMul"), _product),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm"), _int8_product),
    "MatMulNBits": _packed_product, "DynamicQuantizeLinear": _quantizer,
    **dict.fromkeys(("Gather", "GatherBlockQuantized", "GatherND", "GatherElements"), _lookup),
}  # fmt: skip


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _rows(shape: tuple[int, ...]) -> Dims:
    columns = max(shape[-1] if shape else 1, 1)
    return max(_size(shape) // columns, 1), columns


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape))

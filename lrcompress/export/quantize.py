"""int8 constants: ONNX Runtime's quantizers, held away from the adapter branches.

    Conv            static: u8 activations with ranges seen in calibration, s8 weights with one scale per output channel
    MatMul, Gemm    dynamic: ranges of the activation measured at run time, s8 weights,
                    one scale per output column: the columns of a factor differ as much as the singular values do
    Gather          the embedding table in s8 with one scale per row; the rows that are read are dequantized

The quantizers would turn a slot's empty default into a constant and so delete the slot, silently. So the defaults are
held back while they work (a slot is then a plain input), the nodes of the branches are excluded by name, and at the
end every slot must be what it was. Without calibration data convolutions keep their precision, with a warning.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from ..errors import LrcompressWarning, ModelError

WHERE = "export --quantize int8"
#: Tables below this many bytes are not worth the extra nodes.
_MIN_TABLE_BYTES = 16_384
_MATRIX_OPS = ("MatMul", "Gemm")


class _Feeds(CalibrationDataReader):  # type: ignore[misc]
    """The calibration inputs, one batch after the other."""

    def __init__(self, batches: Sequence[dict[str, np.ndarray]]) -> None:
        self._left: Iterator[dict[str, np.ndarray]] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def quantize_int8(
    src_model: onnx.ModelProto, *, slots: Sequence[str], calibration: Iterable[dict[str, np.ndarray]] | None
) -> onnx.ModelProto:
    """Return `src_model` with int8 weights; `slots` name the inputs whose defaults and branches stay as they are.

    `calibration`: feeds of the model's own inputs; needed for convolutions only. The source is not changed. Factor
    `name` becomes `name_quantized` (see `renamed`). Raises `ModelError` if a slot did not survive.
    """
    model = onnx.ModelProto()
    model.CopyFrom(src_model)
    before = {i.name: i.SerializeToString(deterministic=True) for i in model.graph.input}
    held = [t for t in model.graph.initializer if t.name in set(slots)]
    lost = sorted(set(slots) - {t.name for t in held})
    if lost:
        raise ModelError(f"{WHERE}: slot {lost[0]}", "a graph input with a default", "none")
    for tensor in held:
        model.graph.initializer.remove(tensor)
    _name_nodes(model.graph)
    _fold_transposes(model.graph)
    branches = branch_nodes(model.graph, slots)
    batches = None if calibration is None else list(calibration)
    if not batches and any(n.op_type == "Conv" and n.name not in branches for n in model.graph.node):
        warnings.warn(
            "convolutions stay fp32: int8 needs calibration data for them (--calib)", LrcompressWarning, stacklevel=2
        )
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        model = _static_convs(model, branches, batches, held, Path(scratch))
        model = _dynamic_matrices(model, branches, Path(scratch))
    _quantize_tables(model.graph)
    model.graph.initializer.extend(held)
    _drop_unused(model.graph, keep=set(slots))
    _restore_header(model, src_model)
    after = {i.name: i.SerializeToString(deterministic=True) for i in model.graph.input}
    if after != before or not set(slots) <= {t.name for t in model.graph.initializer}:
        gone = sorted(set(before) ^ set(after)) or sorted(n for n in before if before[n] != after[n])
        raise ModelError(
            f"{WHERE}: {gone[0] if gone else 'slots'}", "inputs that survive quantization", "a changed graph"
        )
    onnx.checker.check_model(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


def renamed(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, str]:
    """Return where each constant of `names` is now: under its own name, or with the suffixes of the quantizers."""
    have = {t.name for t in model.graph.initializer}
    found = {}
    for name in names:
        for candidate in (name, f"{name}_quantized", f"{name}_Transposed", f"{name}_Transposed_quantized"):
            if candidate in have:
                found[name] = candidate
                break
    return found


def branch_nodes(graph: onnx.GraphProto, slots: Sequence[str]) -> set[str]:
    """Return the names of the nodes that only exist for the adapters: from a slot to the sum with its layer.

    A product or convolution whose other operand comes out of a branch belongs to it; the addition ends it.
    """
    inside, names = set(slots), set()
    for node in graph.node:
        if inside & set(node.input):
            names.add(node.name)
            if node.op_type not in ("Add", "Sum"):
                inside.update(node.output)
    return names


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name: exclusion works by name."""
    taken = {n.name for n in graph.node if n.name}
    for i, node in enumerate(graph.node):
        if not node.name:
            name = f"{node.op_type}_{i}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)


def _fold_transposes(graph: onnx.GraphProto) -> None:
    """Turn `Transpose(constant)`, which is how a traced linear layer holds its weight, into a constant of its own.

    The quantizers look for constant operands and would leave these products alone. A table that is also read as it
    stands (tied embeddings) then exists twice, in int8 still half of what it was.
    """
    constants = {t.name: t for t in graph.initializer}
    outputs = {o.name for o in graph.output}
    for node in [
        n for n in graph.node if n.op_type == "Transpose" and n.input[0] in constants and n.output[0] not in outputs
    ]:
        source = constants[node.input[0]]
        if len(source.dims) != 2 or source.data_type != onnx.TensorProto.FLOAT or _axes(node) != [1, 0]:
            continue
        name = f"{source.name}_Transposed"
        if name not in constants:
            constants[name] = numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(source).T), name)
            graph.initializer.append(constants[name])
        for reader in graph.node:
            for i, value in enumerate(reader.input):
                if value == node.output[0]:
                    reader.input[i] = name
        graph.node.remove(node)
    _drop_unused(graph, keep=set())


def _axes(node: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [1, 0])


def _static_convs(
    model: onnx.ModelProto,
    branches: set[str],
    batches: Sequence[dict[str, np.ndarray]] | None,
    held: Sequence[onnx.TensorProto],
    scratch: Path,
) -> onnx.ModelProto:
    """Wrap convolutions in QuantizeLinear/DequantizeLinear pairs with the ranges seen in `batches`."""
    constants = {t.name for t in model.graph.initializer}
    convs = [
        n.name for n in model.graph.node if n.op_type == "Conv" and n.name not in branches and n.input[1] in constants
    ]
    if not convs or not batches:
        return model
    # While calibrating, slots are inputs without a default: feed what the default would have been.
    empty = {t.name: numpy_helper.to_array(t) for t in held}
    onnx.save(model, scratch / "float.onnx")
    quantize_static(
        str(scratch / "float.onnx"), str(scratch / "convs.onnx"), _Feeds([{**b, **empty} for b in batches]),
        quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv"], nodes_to_quantize=convs, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
    )  # fmt: skip
    return onnx.load(scratch / "convs.onnx")


def _dynamic_matrices(model: onnx.ModelProto, branches: set[str], scratch: Path) -> onnx.ModelProto:
    """Quantize the constant operand of products, each output column with its own scale."""
    constants = {t.name for t in model.graph.initializer}
    nodes = [
        n.name
        for n in model.graph.node
        if n.op_type in _MATRIX_OPS and n.name not in branches and constants & set(n.input[:2])
    ]
    if not nodes:
        return model
    # The tool rewrites Gemm to MatMul and renames it, so that no list of wanted nodes would match: exclude instead.
    unwanted = [n.name for n in model.graph.node if n.op_type in _MATRIX_OPS and n.name not in nodes]
    onnx.save(model, scratch / "matrices_in.onnx")
    quantize_dynamic(
        str(scratch / "matrices_in.onnx"), str(scratch / "matrices.onnx"), op_types_to_quantize=list(_MATRIX_OPS),
        nodes_to_exclude=unwanted, per_channel=True, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return onnx.load(scratch / "matrices.onnx")


def _quantize_tables(graph: onnx.GraphProto) -> None:
    """Replace float tables that only Gather reads by s8 rows and their scales: gather both, then multiply."""
    tables = {t.name: t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for name, table in tables.items():
        nodes = readers.get(name, [])
        rows_only = all(
            n.op_type == "Gather" and n.input[0] == name and name not in n.input[1:] and _axis(n) == 0 for n in nodes
        )
        if not nodes or not rows_only or 4 * int(np.prod(table.dims)) < _MIN_TABLE_BYTES:
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


def _drop_unused(graph: onnx.GraphProto, *, keep: set[str]) -> None:
    """Remove constants that nothing reads any more."""
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output} | keep
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)


def _restore_header(model: onnx.ModelProto, source: onnx.ModelProto) -> None:
    """Keep the source's header and input order; remove what the tools noted about themselves."""
    model.ir_version = source.ir_version
    model.producer_name, model.producer_version = source.producer_name, source.producer_version
    model.doc_string = model.graph.doc_string = ""
    model.graph.name = source.graph.name
    del model.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""

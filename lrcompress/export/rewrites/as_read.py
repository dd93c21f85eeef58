"""A tensor of the network that is only ever read turned or reshaped is stored that way, under its own name.

    Transpose(W, perm), Reshape(W, shape), Unsqueeze(W, axes), Squeeze(W, axes)  =  W′, as many bytes
    Gather(x, Cast(order))                                                       =  Gather(x, order)

Refused where readers disagree: two copies are more bytes, and the runtime turns one of them when it loads the graph.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from . import Applied, Refusal

_TURNS = ("Transpose", "Reshape", "Unsqueeze", "Squeeze")
_INDICES = (ir.DataType.INT32, ir.DataType.INT64)


def apply(model: ir.Model, keep: Collection[str]) -> Applied:
    graph, fired, refused = model.graph, 0, []
    inputs = {v.name for v in graph.inputs} | set(keep)
    for name, value in list(graph.initializers.items()):
        if name in inputs or value.const_value is None or value.is_graph_output():
            continue
        while (turned := _turned(value)) is not None:
            if isinstance(turned, Refusal):
                refused.append(turned)
                break
            array, nodes = turned
            fired += len(nodes)
            value.const_value = ir.tensor(np.ascontiguousarray(array), dtype=value.const_value.dtype, name=name)
            value.shape = ir.Shape(array.shape)
            _bypass(graph, nodes, value)
    for node in list(graph):
        if node.op_type == "Cast" and _only_indices(node):
            source = node.inputs[0]
            assert source is not None
            _bypass(graph, [node], source)
            fired += 1
    return Applied(fired, tuple(refused))


def _turned(value: ir.Value) -> tuple[np.ndarray, list[ir.Node]] | Refusal | None:
    """Return the tensor as all its readers want it, and those readers; None where none of them turns it."""
    readers = [u.node for u in value.uses()]
    turning = [n for n in readers if n.op_type in _TURNS and n.inputs[0] is value]
    if not turning:
        return None
    where = f"{turning[0].op_type}({value.name})"
    if len(turning) < len(readers):
        return Refusal(where, "read as it stands, too")
    assert value.const_value is not None
    arrays = [_result(n, value.const_value.numpy()) for n in turning]
    first = arrays[0]
    if first is None or any(n.outputs[0].is_graph_output() for n in turning):
        return Refusal(where, "turned in a way that is only known at run time")
    if any(a is None or a.shape != first.shape or not np.array_equal(a, first) for a in arrays[1:]):
        return Refusal(where, "read in two ways")
    return first, turning


def _result(node: ir.Node, array: np.ndarray) -> np.ndarray | None:
    if node.op_type == "Transpose":
        perm = node.attributes.get("perm")
        return array.transpose(None if perm is None else perm.as_ints())
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None or axes.const_value is None:
        return None
    numbers = [int(n) for n in axes.const_value.numpy().reshape(-1)]
    if node.op_type == "Reshape":
        zero = node.attributes.get("allowzero")
        if zero is None or not zero.as_int():
            numbers = [array.shape[i] if n == 0 else n for i, n in enumerate(numbers)]
        return array.reshape(numbers)
    if node.op_type == "Unsqueeze":
        return np.expand_dims(array, tuple(numbers))
    return np.squeeze(array, tuple(numbers))


def _only_indices(node: ir.Node) -> bool:
    """Return whether a cast only widens indices, which Gather takes at either width."""
    source, out = node.inputs[0], node.outputs[0]
    to = node.attributes["to"].as_int()
    fits = source is not None and source.dtype in _INDICES and ir.DataType(to) in _INDICES
    return fits and not out.is_graph_output() and all(u.node.op_type == "Gather" and u.idx == 1 for u in out.uses())


def _bypass(graph: ir.Graph, nodes: list[ir.Node], value: ir.Value) -> None:
    for node in nodes:
        node.outputs[0].replace_all_uses_with(value)
    graph.remove(nodes, safe=True)

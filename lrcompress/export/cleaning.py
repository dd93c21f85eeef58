"""Remove what the exporter leaves around convolutions without a bias: a computed vector of zeros.

    Conv(x, W, Expand(CastLike(0, x), shape)) = Conv(x, W)

With a slot as W the vector would be computed on every run, from a rank that is only known then.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

_TRANSPARENT = {"Expand", "CastLike", "Cast", "Identity", "Reshape"}


def drop_zero_biases(graph: onnx.GraphProto) -> int:
    """Drop the zero bias of every convolution that has one; return how many, dead nodes removed."""
    made = {o: n for n in graph.node for o in n.output}
    known = {t.name: t for t in graph.initializer}
    dropped = 0
    for node in graph.node:
        if node.op_type == "Conv" and len(node.input) == 3 and _is_zero(node.input[2], made, known):
            del node.input[2]
            dropped += 1
    if dropped:
        remove_dead(graph)
    return dropped


def _is_zero(name: str, made: dict[str, onnx.NodeProto], known: dict[str, onnx.TensorProto]) -> bool:
    """Follow nodes that keep the values of their first input down to a constant; an initializer is never one."""
    node = made.get(name)
    while node is not None and node.op_type in _TRANSPARENT:
        name = node.input[0]
        node = made.get(name)
    if node is None or node.op_type != "Constant":
        return False
    for attribute in node.attribute:
        if attribute.name == "value":
            return not np.any(numpy_helper.to_array(attribute.t))
        if attribute.name in ("value_float", "value_int"):
            return not (attribute.f or attribute.i)
    return False


def remove_dead(graph: onnx.GraphProto) -> None:
    """Remove nodes nobody reads, until none is left; subgraphs read outer names, so those count as read."""
    while True:
        read = {o.name for o in graph.output} | _read(graph)
        keep = [n for n in graph.node if any(o in read for o in n.output)]
        if len(keep) == len(graph.node):
            return
        del graph.node[:]
        graph.node.extend(keep)


def _read(graph: onnx.GraphProto) -> set[str]:
    names = {i for n in graph.node for i in n.input}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names |= _read(attribute.g) | {o.name for o in attribute.g.output}
    return names

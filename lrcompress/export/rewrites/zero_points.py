"""A zero point that is zero is what holds without it, and the weight of a convolution is as long as its outputs.

    DequantizeLinear(codes, scale, 0)  =  DequantizeLinear(codes, scale)

Only for codes with a sign: of codes without one the runtime's own fusions want to see the zero.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from . import Applied

_SIGNED = (ir.DataType.INT8, ir.DataType.INT32)


def apply(model: ir.Model, keep: Collection[str]) -> Applied:
    graph, fired = model.graph, 0
    for node in graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        zero = node.inputs[2]
        if zero.const_value is None or zero.is_graph_input() or zero.const_value.dtype not in _SIGNED:
            continue
        if not zero.const_value.numpy().any():
            node.resize_inputs(2)
            fired += 1
            if not zero.uses() and zero.name in graph.initializers:
                del graph.initializers[zero.name]
    return Applied(fired)

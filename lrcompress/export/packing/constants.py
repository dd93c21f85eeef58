"""Weights of 4 or 8 bits that are multiplied out when the graph is loaded: small on disk, dense in memory.

    Conv(x, W)    =  Conv(x, Reshape(Cast(codes) · scales, W.shape))      codes (blocks, block), scales (blocks, 1)
    MatMul(x, W)  =  MatMul(x, Transpose(Reshape(…)))                     of outputs' rows, too

The runtime has no 4-bit convolution, and none of 8 bits whose input is not rounded; all these nodes read constants only
and are gone when the model runs. Four bits are a type of opset 21.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from . import Applied, Packed, Refusal, constant, retire, scales

OPSET, IR = 21, 10


def raise_opset(model: onnx.ModelProto) -> None:
    """Call a graph one of the opset that has 4 bits; whether it is one, too, is for the caller to see."""
    default = next(o for o in model.opset_import if o.domain in ("", "ai.onnx"))
    default.version = max(default.version, OPSET)
    model.ir_version = max(model.ir_version, IR)


def pack(model: ir.Model, weights: Sequence[Packed]) -> Applied:
    graph, fired, refused, four = model.graph, 0, [], False
    for w in weights:
        assert w.coded is not None
        name = w.product.weight
        value = graph.initializers[name]
        if w.product.kind == "conv_transpose":
            refused.append(Refusal(name, "a transposed convolution holds its outputs second"))
            continue
        codes = w.coded.codes.numpy()
        block = w.coded.grid.width(codes.shape[1])
        order = {n: i for i, n in enumerate(graph)}
        first = min((u.node for u in value.uses()), key=lambda n: order[n])
        kind, dtype = (ml_dtypes.int4, ir.DataType.INT4) if w.coded.grid.bits == 4 else (np.int8, ir.DataType.INT8)
        four = four or dtype == ir.DataType.INT4
        stored = constant(graph, f"{name}_quantized", codes.reshape(-1, block).astype(kind), dtype)
        wide = scales(graph, name, w.coded.scales.numpy().reshape(-1, 1), first)
        turned = w.product.kind in ("matmul", "gemm") and not w.product.turned
        shape = constant(graph, f"{name}_shape", np.array(w.product.shape[:: -1 if turned else 1], np.int64))
        last: ir.Value = stored
        for node in (
            ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)}), ir.node("Mul", [None, wide]), ir.node("Reshape", [None, shape]),
            *([ir.node("Transpose", [None], {"perm": [1, 0]})] if turned else []),
        ):  # fmt: skip
            if node.inputs[0] is None:
                node.replace_input_with(0, last)
            graph.insert_before(first, node)
            last = node.outputs[0]
            last.name = f"{name}_{node.op_type.lower()}"
        last.dtype, last.shape = ir.DataType.FLOAT, ir.Shape(w.product.shape)
        value.replace_all_uses_with(last)
        retire(graph, name)
        fired += 1
    if four:
        model.opset_imports[""] = max(model.opset_imports.get("", 0), OPSET)
    return Applied(fired, tuple(refused))

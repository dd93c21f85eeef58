"""Constants that are stored in 16 bits and computed with in 32.

    f(x, W)       =  f(x, Cast(W₁₆))             the runtime casts once, when it loads the graph
    Gather(W, i)  =  Cast(Gather(W₁₆, i))        only the rows that are read are cast

Refused: weights beyond the range of 16 bits, and those that would lose more than 16 bits of precision lose because they
are too small for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from . import Applied, Packed, Refusal, constant, retire, take_over

_MOST = float(np.finfo(np.float16).max)
#: Largest share of a weight, in the Frobenius norm, that rounding to 16 bits may lose.
_LOSS = 2e-3


def pack(model: ir.Model, weights: Sequence[Packed]) -> Applied:
    graph, fired, refused = model.graph, 0, []
    for w in weights:
        name = w.product.weight
        value = graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy()
        reason = _reason(array)
        if reason is not None:
            refused.append(Refusal(name, reason))
            continue
        half = constant(graph, f"{name}_quantized", array.astype(np.float16))
        if w.product.kind == "table" and all(u.node.op_type == "Gather" for u in value.uses()):
            for node in [u.node for u in value.uses()]:
                _cast_rows(graph, node, half)
        else:
            order = {n: i for i, n in enumerate(graph)}
            # What a branch or a loop reads is cast before anything else is done.
            first = min((u.node for u in value.uses()), key=lambda n: order.get(n, -1))
            first = first if first in order else graph[0]
            cast = ir.node("Cast", [half], {"to": int(ir.DataType.FLOAT)})
            graph.insert_before(first, cast)
            cast.outputs[0].name = f"{name}_wide"
            cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(array.shape)
            value.replace_all_uses_with(cast.outputs[0])
        retire(graph, name)
        fired += 1
    return Applied(fired, tuple(refused))


def _reason(array: np.ndarray) -> str | None:
    largest = float(np.abs(array).max(initial=0.0))
    if not largest <= _MOST:
        return f"an entry of {largest:.3g}, beyond the range of 16 bits"
    lost = float(np.linalg.norm(array.astype(np.float16).astype(np.float64) - array))
    if lost > _LOSS * float(np.linalg.norm(array.astype(np.float64))):
        return "entries too small for 16 bits"
    return None


def _cast_rows(graph: ir.Graph, node: ir.Node, half: ir.Value) -> None:
    out = node.outputs[0]
    rows = ir.node("Gather", [half, node.inputs[1]], dict(node.attributes))
    cast = ir.node("Cast", [rows.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    for new in (rows, cast):
        graph.insert_before(node, new)
    rows.outputs[0].name = f"{out.name}_half"
    take_over(graph, node, out, cast.outputs[0])

"""Codes into graphs, one kind of operator per file, on onnx-ir.

Each file has `pack(model, weights) -> Applied`, which puts the codes of `weights` into an onnx-ir model in place of the
float constants. What it cannot hold it refuses with the reason, and leaves as it is.

    nbits       MatMul, Gemm   x · W      =  MatMulNBits(x, codes, scales)
    tables      Gather         W[i]       =  GatherBlockQuantized(codes, i, scales)
    constants   Conv, products W          =  Cast(codes) · scales, multiplied out when the graph is loaded
    halves      any            W          =  Cast(W in 16 bits); of a table, only the rows that are read are cast
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..products import Product
from ..refit.grids import Coded
from ..rewrites import Applied, Refusal

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Packed:
    """A weight of the graph and its codes; None where the format follows from the values (16 bits)."""

    product: Product
    coded: Coded | None = None


def constant(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """Add an initializer and return it."""
    value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), dtype=dtype, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), dtype or ir.DataType.from_numpy(array.dtype)
    graph.initializers[name] = value
    return value


def scales(graph: ir.Graph, name: str, array: np.ndarray, before: ir.Node) -> ir.Value:
    """Add scales that are stored in 16 bits, and the cast that the runtime does when it loads the graph."""
    stored = constant(graph, f"{name}_scale", array.astype(np.float16))
    cast = ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)})
    graph.insert_before(before, cast)
    cast.outputs[0].name = f"{name}_scale_wide"
    cast.outputs[0].dtype = ir.DataType.FLOAT
    return cast.outputs[0]


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Pack codes 0…15 along the last axis (even), the first of two in the low half."""
    low, high = codes[..., 0::2].astype(np.uint8), codes[..., 1::2].astype(np.uint8)
    return (low | (high << 4)).astype(np.uint8)


def use(model: ir.Model) -> None:
    """Declare the runtime's own operators."""
    model.opset_imports.setdefault(MICROSOFT, 1)


def retire(graph: ir.Graph, name: str) -> None:
    """Remove an initializer that nothing reads any more."""
    value = graph.initializers.get(name)
    if value is not None and not value.uses() and not value.is_graph_output():
        del graph.initializers[name]


def take_over(graph: ir.Graph, node: ir.Node, out: ir.Value, new: ir.Value) -> None:
    """Let `new` be what `out` was, name and place among the graph's outputs included."""
    name = out.name
    new.dtype, new.shape = ir.DataType.FLOAT, out.shape
    for i, o in enumerate(graph.outputs):
        if o is out:
            graph.outputs[i] = new
    out.replace_all_uses_with(new)
    graph.remove(node, safe=True)
    new.name = name


__all__ = ["MICROSOFT", "Applied", "Packed", "Refusal"]

"""What is computed from numbers alone becomes one number: shapes, axes, scales. Equal computations are done once.

    f(c₁, c₂, …) = c        cᵢ constants of the graph, none of them a tensor of the network

A tensor of the network is never folded into anything, whatever its size: factors stay apart.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from . import Applied, Refusal

#: Larger constants are tensors of the network that no name protects.
_MOST = 1024


def apply(model: ir.Model, keep: Collection[str]) -> Applied:
    graph = model.graph
    before = graph.num_nodes()
    named = {n for n, v in graph.initializers.items() if not _is_small_integer(v)} | set(keep)
    refused: dict[str, Refusal] = {}

    def should_fold(node: ir.Node) -> bool | None:
        tensors = [v.name for v in node.inputs if v is not None and v.name in named]
        if tensors and all(v is None or v.const_value is not None for v in node.inputs):
            where = f"{node.op_type}({tensors[0]})"
            refused[where] = Refusal(where, "a tensor of the network stays apart")
        # A random or sized-by-input constant is left to the runtime; so is an identity, r² numbers made of two ranges.
        return False if tensors or _is_identity(node) else None

    fold_constants(model, should_fold=should_fold, input_size_limit=_MOST, output_size_limit=_MOST)
    common.IdentityEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _share(graph, named)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    return Applied(before - graph.num_nodes(), tuple(refused.values()))


def _is_identity(node: ir.Node) -> bool:
    """Return whether a node compares a column with a row, as what makes an identity does."""
    if node.op_type != "Equal" or any(v is None or v.const_value is None for v in node.inputs):
        return False
    first, second = (v.const_value.shape for v in node.inputs if v is not None and v.const_value is not None)
    return len(first) == 2 and len(second) == 1 and first[1] == 1


def _is_small_integer(value: ir.Value) -> bool:
    """Return whether an initializer is one of those that stand for a shape: lifted from a constant node by us."""
    return bool(value.metadata_props.get(_LIFTED) == "1")


_LIFTED = "lrcompress.lifted"


def _share(graph: ir.Graph, named: Collection[str]) -> None:
    """Let equal lifted constants be one, of a short name."""
    first: dict[tuple[object, ...], ir.Value] = {}
    inputs = {v.name for v in graph.inputs}
    taken = {*graph.initializers, *(o.name for n in graph for o in n.outputs)} | inputs
    number = 0
    for name, value in list(graph.initializers.items()):
        if name in named or name in inputs or value.const_value is None:
            continue
        array = value.const_value.numpy()
        key = (str(value.const_value.dtype), array.shape, np.ascontiguousarray(array).tobytes())
        if key not in first:
            first[key] = value
            if value.metadata_props.get(_LIFTED) != "1":
                while f"c{number}" in taken:
                    number += 1
                del graph.initializers[name]
                value.name = f"c{number}"
                taken.add(value.name)
                graph.initializers[value.name] = value
                value.metadata_props[_LIFTED] = "1"
        elif first[key] is not value:
            value.replace_all_uses_with(first[key])
            if not value.is_graph_output():
                del graph.initializers[name]

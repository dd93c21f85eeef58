"""Nodes that return what they are given: Slice(x, 0, ∞), Cast and CastLike to the type it has, Expand to its shape.

The rules are onnxscript's own; CastLike is ours.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import RewriteRule, rewrite
from onnxscript.rewriter.rules import common as rules

from . import Applied

_RULES: list[RewriteRule] = [
    rules.collapse_slice_rule, rules.collapse_slice2_rule, rules.no_op_cast_rule, rules.no_op_expand_rule,
    rules.no_op_transpose_rule, rules.cast_cast_rule, rules.reshape_reshape_rule, rules.transpose_transpose_rule,
]  # fmt: skip


def apply(model: ir.Model, keep: Collection[str]) -> Applied:
    before = model.graph.num_nodes()
    for node in list(model.graph):
        if node.op_type == "CastLike" and _same_type(node.inputs[0], node.inputs[1]):
            out, source = node.outputs[0], node.inputs[0]
            assert source is not None
            if not out.is_graph_output():
                out.replace_all_uses_with(source)
    # `rewrite` copies nothing, but returns a model of its own when it is given a proto.
    rewrite(model, pattern_rewrite_rules=_RULES)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    return Applied(before - model.graph.num_nodes())


def _same_type(a: ir.Value | None, b: ir.Value | None) -> bool:
    return a is not None and b is not None and a.dtype is not None and a.dtype == b.dtype

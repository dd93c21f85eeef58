"""A normalisation with fixed statistics becomes part of the convolution before it.

    BatchNorm(Conv(x, W, b))  =  Conv(x, a·W, a·(b − mean) + β)        a = γ/√(var + ε), per output channel

The rule is onnxscript's. It never matches across an adapter's branch, whose sum stands between the two, and refuses
where a weight is a slot or has another reader.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules import common as rules

from . import Applied, Refusal


def apply(model: ir.Model, keep: Collection[str]) -> Applied:
    fired = RewriteRuleSet([rules.fuse_batchnorm_into_conv_rule]).apply_to_model(model)
    left = [n for n in model.graph if n.op_type == "BatchNormalization" and not n.domain]
    return Applied(
        fired, tuple(Refusal(f"BatchNormalization({n.inputs[0].name})", _reason(n)) for n in left if n.inputs[0])
    )


def _reason(node: ir.Node) -> str:
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    if before is None or before.op_type != "Conv":
        return f"{before.op_type if before else 'the input'} stands before it, no convolution"
    if len(before.outputs[0].uses()) > 1:
        return "the convolution has another reader"
    return "a weight has another reader, or is no constant"

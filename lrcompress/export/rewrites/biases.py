"""A bias that is added to a convolution becomes the convolution's own.

    Add(Conv(x, W), b)          =  Conv(x, W, b.reshape(out))          b a constant of shape (out, 1, …) or (1, out, 1, …)
    Add(Add(a, Conv(x, W)), b)  =  Add(a, Conv(x, W, b.reshape(out)))

One node less, and the sum is there before anything is rounded to int8. Refused where the sum without the bias has
another reader, where b is no constant, or where it is not one number per output channel.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet

from . import Applied, Refusal


def _made_of_constants(value: ir.Value, keep: Collection[str]) -> bool:
    """Return whether a value is a constant, or is made of constants alone before the first request."""
    if value.const_value is not None:
        return not value.is_graph_input() and value.name not in keep
    node = value.producer()
    return node is not None and bool(node.inputs) and all(v is None or _made_of_constants(v, keep) for v in node.inputs)


class _BiasOfConv(RewriteRuleClassBase):  # type: ignore[misc]
    """See above; remembers why it refused."""

    def __init__(self, keep: Collection[str], refused: dict[str, Refusal]) -> None:
        super().__init__("conv_bias", remove_nodes=True)
        self.keep, self.refused = keep, refused

    def pattern(self, op: Any, x: Any, w: Any, b: Any) -> Any:
        return op.Add(op.Conv(x, w, _allow_other_attributes=True, _outputs=["y"]), b)

    def check(self, context: Any, x: ir.Value, w: ir.Value, b: ir.Value, y: ir.Value, **_: Any) -> MatchResult:
        found = MatchResult()
        node = y.producer()
        if node is not None and len(node.inputs) > 2:
            return found.fail("it has a bias")
        reason = self._reason(w, b)
        if reason is not None:
            where = f"Add({y.name}, {b.name})"
            self.refused[where] = Refusal(where, reason)
            return found.fail(reason)
        return found

    def _reason(self, w: ir.Value, b: ir.Value) -> str | None:
        if not _made_of_constants(w, self.keep):
            return "its weight is no constant"
        if b.const_value is None or b.is_graph_input() or b.name in self.keep:
            return "what is added is no constant"
        shape = tuple(b.const_value.shape)
        if (
            w.const_value is None
        ):  # made when the graph is loaded, of one row per channel: a bias of one number is no proof
            channels = max((int(d) for d in shape), default=1)
            axes = len(shape) + int(shape[:1] == (channels,))
            if channels == 1:
                return "not one number per output channel"
        else:
            axes, channels = len(w.const_value.shape), int(w.const_value.shape[0])
        wide = (1,) * (axes - len(shape)) + tuple(int(d) for d in shape)
        if len(shape) > axes or wide[1] != channels or any(d != 1 for i, d in enumerate(wide) if i != 1):
            return "not one number per output channel"
        if len(b.uses()) > 1:
            return "the bias has another reader"
        return None

    def rewrite(self, op: Any, x: ir.Value, w: ir.Value, b: ir.Value, y: ir.Value, **_: Any) -> Any:
        assert b.const_value is not None
        b.const_value = ir.tensor(np.ascontiguousarray(b.const_value.numpy().reshape(-1)), name=b.name)
        b.shape = ir.Shape(b.const_value.shape)
        node = y.producer()
        assert node is not None
        return op.Conv(x, w, b, **dict(node.attributes.items()))


class _BiasOfSum(_BiasOfConv):
    """The bias of a sum goes to the convolution in it."""

    def pattern(self, op: Any, x: Any, w: Any, b: Any, a: Any) -> Any:  # type: ignore[override]
        return op.Add(op.Add(a, op.Conv(x, w, _allow_other_attributes=True, _outputs=["y"])), b)

    def rewrite(self, op: Any, x: ir.Value, w: ir.Value, b: ir.Value, y: ir.Value, **values: Any) -> Any:
        return op.Add(values["a"], super().rewrite(op, x, w, b, y))


def apply(model: ir.Model, keep: Collection[str]) -> Applied:
    refused: dict[str, Refusal] = {}
    rules = [kind.rule(keep, refused) for kind in (_BiasOfConv, _BiasOfSum)]
    fired = RewriteRuleSet(rules, commute=True).apply_to_model(model)
    return Applied(fired, tuple(refused.values()))

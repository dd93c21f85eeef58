"""Attributes that say what holds without them are dropped.

Conv(dilations=[1, 1], group=1, strides=[1, 1], pads=[0, 0, 0, 0], auto_pad="NOTSET", kernel_shape=W.shape) = Conv()
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import onnx
import onnx_ir as ir

from . import Applied

_ONES, _ZEROS = ("dilations", "strides"), ("pads",)


def apply(model: ir.Model, keep: Collection[str]) -> Applied:
    fired = 0
    for node in model.graph:
        schema = _schema(node, model.opset_imports.get(node.domain))
        for name, attribute in list(node.attributes.items()):
            if attribute.is_ref() or attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.TENSOR):
                continue
            if _is_default(node, name, attribute.value, schema):
                del node.attributes[name]
                fired += 1
    return Applied(fired)


def _schema(node: ir.Node, version: int | None) -> Any:
    try:
        return onnx.defs.get_schema(node.op_type, version or 1, node.domain)
    except onnx.defs.SchemaError:
        return None


def _is_default(node: ir.Node, name: str, value: Any, schema: Any) -> bool:
    if node.op_type == "Conv" and name in (*_ONES, *_ZEROS):
        return all(v == (1 if name in _ONES else 0) for v in value)
    if node.op_type == "Conv" and name == "kernel_shape":
        weight = node.inputs[1]
        return weight is not None and weight.const_value is not None and not weight.is_graph_input()
    if node.op_type == "Reshape" and name == "allowzero":
        shape = node.inputs[1]
        known = shape is not None and shape.const_value is not None
        return value == 0 or (known and not (shape.const_value.numpy() == 0).any())  # type: ignore[union-attr]
    declared = schema.attributes.get(name) if schema is not None else None
    if declared is None or not declared.default_value.type:
        return False
    default = onnx.helper.get_attribute_value(declared.default_value)
    default = default.decode() if isinstance(default, bytes) else default
    return bool(default == value)

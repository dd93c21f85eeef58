"""ONNX graphs without the onnx package: the few protobuf messages that a graph of one operator needs, written by hand.

    node = Node("MatMul", ["x", "w"], ["y"])
    data = model([node], inputs={"x": (FLOAT, (1, 8))}, outputs={"y": FLOAT}, constants={"w": weight})
    ort.InferenceSession(data)

A device profile is taken on the base install, which has ONNX Runtime but not onnx. Field numbers are those of onnx.proto
(IR 10); a test reads every message back with the onnx package and its checker.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

FLOAT, UINT8, INT8, INT64, BOOL = 1, 2, 3, 7, 9
IR_VERSION, OPSET = 10, 20
MICROSOFT = "com.microsoft"
_DTYPES = {"float32": FLOAT, "uint8": UINT8, "int8": INT8, "int32": 6, "int64": INT64}
_VARINT, _FIXED32, _BYTES = 0, 5, 2

Attribute = int | float | str | Sequence[int]


@dataclass(frozen=True)
class Node:
    """One operator; `domain` "" is ONNX's own."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    domain: str = ""


def model(
    nodes: Sequence[Node],
    *,
    inputs: Mapping[str, tuple[int, Sequence[int]]],
    outputs: Mapping[str, int],
    constants: Mapping[str, np.ndarray],
) -> bytes:
    """Return a serialized ModelProto. `inputs`: name -> (element type, shape); `outputs`: name -> element type."""
    graph = b"".join(
        [
            *(_message(1, _node(n)) for n in nodes),
            _text(2, "probe"),
            *(_message(5, _tensor(name, value)) for name, value in constants.items()),
            *(_message(11, _value(name, kind, shape)) for name, (kind, shape) in inputs.items()),
            *(_message(12, _value(name, kind, None)) for name, kind in outputs.items()),
        ]
    )
    domains = {"": OPSET} | {n.domain: 1 for n in nodes if n.domain}
    opsets = [_message(8, _text(1, name) + _number(2, version)) for name, version in domains.items()]
    return b"".join([_number(1, IR_VERSION), _text(2, "lrcompress"), _message(7, graph), *opsets])


def _node(node: Node) -> bytes:
    parts = [_text(1, name) for name in node.inputs] + [_text(2, name) for name in node.outputs]
    parts += [_text(3, node.outputs[0] + "/node"), _text(4, node.op)]
    parts += [_message(5, _attribute(k, v)) for k, v in node.attributes.items()]
    return b"".join(parts) + (_text(7, node.domain) if node.domain else b"")


def _attribute(name: str, value: Attribute) -> bytes:
    head = _text(1, name)
    if isinstance(value, float):
        return head + _key(2, _FIXED32) + struct.pack("<f", value) + _number(20, 1)
    if isinstance(value, int):
        return head + _number(3, value) + _number(20, 2)
    if isinstance(value, str):
        return head + _text(4, value) + _number(20, 3)
    return head + b"".join(_number(8, v) for v in value) + _number(20, 7)


def _tensor(name: str, value: np.ndarray) -> bytes:
    dims = b"".join(_number(1, d) for d in value.shape)
    kind = _number(2, _DTYPES[str(value.dtype)])
    return (
        dims
        + kind
        + _text(8, name)
        + _message(9, np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<")).tobytes())
    )


def _value(name: str, kind: int, shape: Sequence[int] | None) -> bytes:
    dims = b"" if shape is None else _message(2, b"".join(_message(1, _number(1, d)) for d in shape))
    return _text(1, name) + _message(2, _message(1, _number(1, kind) + dims))


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _number(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _varint(value & (1 << 64) - 1)


def _text(number: int, value: str) -> bytes:
    return _message(number, value.encode())


def _message(number: int, body: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)

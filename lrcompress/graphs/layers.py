"""The layers of an ONNX graph: who multiplies by a stored weight, how it is stored, and what must stay as it is.

    for layer in find_layers(graph):
        layer.name, layer.kind, layer.shape, layer.reason

A layer is named after its weight without `.weight`, or after its node where the exporter invented the weight's name.
One weight that several nodes use alike is one layer. What cannot be factorized is listed too, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, helper

from ..errors import ModelError
from .opening import FLOATS, LOOPS, OnnxGraph, branches, line

_OWN = ("", "ai.onnx")
#: Stored tensors of fewer numbers are not worth a line in a report.
_WORTH = 256
_RECURRENT = ("LSTM", "GRU", "RNN")
_QUANTIZED = (
    "DequantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat", "MatMulNBits", "QGemm",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Scope:
    """A graph, and where it lies: `node` of `parent` holds it."""

    graph: GraphProto
    parent: Scope | None = None
    node: NodeProto | None = None
    made: dict[str, NodeProto] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: GraphProto, parent: Scope | None = None, node: NodeProto | None = None) -> Scope:
        return cls(graph, parent, node, {o: n for n in graph.node for o in n.output if o})

    def maker(self, name: str) -> NodeProto | None:
        """Return the node that makes a value, here or further out."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.made:
                return scope.made[name]
            scope = scope.parent
        return None

    @property
    def looped(self) -> str:
        """The operator that runs this graph many times, or nothing."""
        if self.node is None or self.parent is None:
            return ""
        return self.node.op_type if self.node.op_type in LOOPS else self.parent.looped


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks, per spatial axis. `auto`: "upper" or "lower" pads to ⌈size / stride⌉ positions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...] = ()
    auto: str = ""
    groups: int = 1


@dataclass(frozen=True)
class Use:
    """One node that multiplies by a stored weight. `value` is what it reads; `turned`: stored as (in, out).

    `bias`: the stored vector (out,) that is added, read by `bias_node` at `bias_at`. `open`: a bias may be added.
    """

    scope: Scope = field(compare=False)
    node: NodeProto = field(compare=False)
    kind: str
    weight: str
    value: str
    turned: bool
    geometry: Geometry | None = None
    bias: str = ""
    bias_node: NodeProto | None = field(default=None, compare=False)
    open: bool = True
    reason: str | None = None

    @property
    def settings(self) -> tuple[Any, ...]:
        return self.kind, self.turned, self.geometry, self.bias


@dataclass(frozen=True)
class GraphLayer:
    """A layer: `shape` is (out, in, *kernel), of an embedding (rows, width). `reason`: why it must stay dense."""

    name: str
    kind: str
    shape: tuple[int, ...]
    uses: tuple[Use, ...]
    reason: str | None = None

    @property
    def weight(self) -> str:
        return self.uses[0].weight

    @property
    def has_bias(self) -> bool:
        return bool(self.uses[0].bias)

    @property
    def params(self) -> int:
        return math.prod(self.shape)


def find_layers(graph: OnnxGraph) -> list[GraphLayer]:
    """Return the layers in the order they run, then what holds weights and is none.

    Raises `ModelError` for nodes whose attributes are not of their operator: bytes that were damaged can say anything.
    """
    try:
        return _Finder(graph).layers()
    except (ValueError, TypeError, IndexError, AttributeError) as e:
        raise ModelError(graph.path, "nodes with the attributes of their operators", line(e), "export it again") from e


def weight_of(graph: OnnxGraph, layer: GraphLayer) -> np.ndarray:
    """Return the weight as (out, in, *kernel), of an embedding (rows, width)."""
    array = graph.array(layer.weight)
    return array.T if layer.uses[0].turned else array


class _Finder:
    def __init__(self, graph: OnnxGraph) -> None:
        self.graph, self.model = graph, graph.model
        self.fed = {i.name for i in self.model.graph.input}
        # Up to IR 3 every stored tensor had to stand among the inputs too.
        self.listed = self.model.ir_version <= 3
        self.nodes = list(_walk(Scope.of(self.model.graph)))
        self.readers: dict[str, list[tuple[Scope, NodeProto]]] = {}
        for scope, node in self.nodes:
            for name in dict.fromkeys(filter(None, node.input)):
                self.readers.setdefault(name, []).append((scope, node))
        self.given = {o.name for s, _ in self.nodes for o in s.graph.output}

    def layers(self) -> list[GraphLayer]:
        uses = [u for scope, n in self.nodes if (u := self._use(scope, n)) is not None]
        named = _named(uses)
        sharing: dict[str, list[str]] = {}
        for name, found in named.items():
            sharing.setdefault(found[0].weight, []).append(name)
        out = [self._layer(name, tuple(found), sharing[found[0].weight]) for name, found in named.items()]
        return [*out, *self._others(set(sharing))]

    def _layer(self, name: str, uses: tuple[Use, ...], sharing: list[str]) -> GraphLayer:
        first = uses[0]
        shape = tuple(int(d) for d in self.graph.stored[first.weight].dims)
        shape = shape[::-1] if first.turned else shape
        reason = next((u.reason for u in uses if u.reason), None) or self._why_dense(first, shape)
        if reason is None and len(sharing) > 1:
            reason = f"tied: one tensor serves {', '.join(sharing)}"
        if reason is None:
            own = {id(u.node) for u in uses}
            others = [n.name or n.output[0] for n in self._through(first.weight) if id(n) not in own]
            reason = f"its weight is also read directly, by {', '.join(others[:3])}" if others else None
        return GraphLayer(name, first.kind, shape, uses, reason)

    def _why_dense(self, use: Use, shape: tuple[int, ...]) -> str | None:
        if not math.prod(shape):
            return "its weight has no elements"
        if use.weight in self.fed and not self.listed:
            return "its weight may be fed: it stands among the inputs of the graph"
        if use.scope.looped:
            return f"it runs inside {use.scope.looped}, many times per sample"
        if use.geometry is not None and use.geometry.groups > 1:
            groups = use.geometry.groups
            return "depthwise: nothing to save" if shape[1] == 1 else f"grouped convolution ({groups} groups)"
        if not np.isfinite(self.graph.array(use.weight)).all():
            return "its weight is not finite"
        return None

    def _through(self, name: str) -> Iterator[NodeProto]:
        """Yield the nodes that read a value, seen through transposition."""
        for _, node in self.readers.get(name, ()):
            if node.op_type in ("Transpose", "Identity"):
                yield from self._through(node.output[0])
            else:
                yield node

    def _use(self, scope: Scope, node: NodeProto) -> Use | None:
        reader = _READERS.get(node.op_type) if node.domain in _OWN else None
        if reader is None or len(node.input) < 2:
            return None
        return reader(self, scope, node, {a.name: helper.get_attribute_value(a) for a in node.attribute})

    def _others(self, taken: set[str]) -> Iterator[GraphLayer]:
        """Yield stored weights of operators that are no layer here, with the reason."""
        for scope, node in self.nodes:
            reason = _why_none(node)
            for name in dict.fromkeys(node.input) if reason else ():
                name = self._behind(scope, name)
                stored = self.graph.stored.get(name)
                if stored is None or len(stored.dims) < 2 or math.prod(stored.dims) < _WORTH:
                    continue
                if name in taken or (stored.data_type not in FLOATS and node.op_type not in _QUANTIZED):
                    continue
                taken.add(name)
                use = Use(scope, node, node.op_type.lower(), name, node.input[0], False)
                yield GraphLayer(_title(name, node), use.kind, tuple(stored.dims), (use,), reason)

    def _behind(self, scope: Scope, name: str) -> str:
        """Return the stored tensor that a value is made of, one operator after the other, as long as each has one."""
        for _ in range(16):
            node = scope.maker(name)
            if name in self.graph.stored or node is None or not node.input:
                return name
            name = node.input[0]
        return name

    # What the readers below ask.

    def matrix(self, scope: Scope, name: str) -> tuple[str, bool, tuple[int, ...]] | None:
        """Return the stored tensor behind a value, whether it is transposed on the way, and its stored shape."""
        turned = False
        while name not in self.graph.stored:
            node = scope.maker(name)
            if node is None or node.op_type not in ("Transpose", "Identity"):
                return None
            if node.op_type == "Transpose":
                perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
                if perm not in (None, [1, 0]):
                    return None
                turned = not turned
            name = node.input[0]
        shape = self.shape(name)
        return None if shape is None else (name, turned, shape)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a stored floating-point tensor."""
        found = self.graph.stored.get(name)
        return tuple(found.dims) if found is not None and found.data_type in FLOATS else None

    def added(self, node: NodeProto, width: int) -> tuple[str, NodeProto | None]:
        """Return the stored vector that alone is added to what a node makes, and the node that adds it."""
        after = self.readers.get(node.output[0], [])
        if len(after) != 1 or after[0][1].op_type != "Add" or node.output[0] in self.given:
            return "", None
        (other,) = [n for n in after[0][1].input if n != node.output[0]] or [""]
        return (other, after[0][1]) if self.shape(other) == (width,) and other not in self.fed else ("", None)


def _walk(scope: Scope) -> Iterator[tuple[Scope, NodeProto]]:
    """Yield every node in the order they run, those inside a node after it."""
    for node in scope.graph.node:
        yield scope, node
        for inner in branches(node):
            yield from _walk(Scope.of(inner, scope, node))


def _named(uses: list[Use]) -> dict[str, list[Use]]:
    """Group uses by layer: one weight used twice alike is one; a different use is named after its node."""
    out: dict[str, list[Use]] = {}
    known: dict[tuple[Any, ...], str] = {}
    for use in uses:
        alike = (use.weight, use.settings)
        if alike not in known:
            name = _title(use.weight, use.node, use.bias)
            if name in out:
                name = use.node.name or use.node.output[0]
            while name in out:
                name += "'"
            known[alike] = name
        out.setdefault(known[alike], []).append(use)
    return out


#: How exporters begin the names that they invent.
_INVENTED = ("onnx::", "/", "val_", "_")


def _title(weight: str, node: NodeProto, bias: str = "") -> str:
    """Name a layer after its weight, or where that was invented after its bias, or after its node."""
    if weight and not weight.startswith(_INVENTED):
        return weight.removesuffix(".weight") or weight
    if bias.endswith(".bias") and not bias.startswith(_INVENTED):
        return bias.removesuffix(".bias")
    parts = [p for p in node.name.split("/") if p]
    return ".".join(parts[:-1] or parts) or weight


def _why_none(node: NodeProto) -> str:
    """Return why an operator that holds weights is no layer, or nothing."""
    if node.op_type in _QUANTIZED:
        return "it is quantized already: factorize the model in floating point, then quantize"
    if node.domain not in _OWN:
        return f"{node.op_type} of {node.domain} takes its weights whole"
    if node.op_type in _RECURRENT:
        return f"recurrent: {node.op_type} takes its weights whole"
    if node.op_type == "ConvTranspose":
        return "transposed convolution"
    if node.op_type in ("MatMul", "Gemm"):
        return "its weight is no matrix on the right of the product"
    if node.op_type == "Einsum":
        return "Einsum: which axes are multiplied is not read here"
    return "a table that is not read by rows" if node.op_type == "Gather" else ""


def _matmul(found: _Finder, scope: Scope, node: NodeProto, _: Mapping[str, Any]) -> Use | None:
    weight = found.matrix(scope, node.input[1])
    if weight is None or len(weight[2]) != 2:
        return None
    name, turned, shape = weight
    bias, adder = found.added(node, shape[0] if turned else shape[1])
    return Use(scope, node, "linear", name, node.input[0], not turned, bias=bias, bias_node=adder)


def _gemm(found: _Finder, scope: Scope, node: NodeProto, a: Mapping[str, Any]) -> Use | None:
    weight = found.matrix(scope, node.input[1])
    if weight is None or len(weight[2]) != 2 or a.get("transA", 0):
        return None
    name, turned, shape = weight
    turned = turned == bool(a.get("transB", 0))
    width = shape[1] if turned else shape[0]
    third = node.input[2] if len(node.input) > 2 else ""
    bias = third if found.shape(third) == (width,) and third not in found.fed else ""
    use = Use(scope, node, "linear", name, node.input[0], turned, bias=bias, bias_node=node if bias else None)
    use = replace(use, open=not third)
    scaled = a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0
    return replace(use, reason="its product is scaled (alpha or beta of Gemm)") if scaled else use


def _conv(found: _Finder, scope: Scope, node: NodeProto, a: Mapping[str, Any]) -> Use | None:
    shape = found.shape(node.input[1])
    if shape is None or not 3 <= len(shape) <= 5:
        return None
    axes = len(shape) - 2
    ones = [1] * axes
    pads = a.get("pads", [0] * 2 * axes)
    auto = {b"SAME_UPPER": "upper", b"SAME_LOWER": "lower"}.get(a.get("auto_pad", b""), "")
    if a.get("auto_pad") == b"VALID":
        pads = [0] * 2 * axes
    around = () if auto else tuple(zip(pads[:axes], pads[axes:], strict=True))
    strides, dilations = tuple(a.get("strides", ones)), tuple(a.get("dilations", ones))
    geometry = Geometry(tuple(shape[2:]), strides, dilations, around, auto, a.get("group", 1))
    third = node.input[2] if len(node.input) > 2 else ""
    bias = third if found.shape(third) == shape[:1] and third not in found.fed else ""
    return Use(
        scope, node, "conv", node.input[1], node.input[0], False, geometry, bias, node if bias else None, not third
    )  # fmt: skip


def _gather(found: _Finder, scope: Scope, node: NodeProto, a: Mapping[str, Any]) -> Use | None:
    shape = found.shape(node.input[0])
    if shape is None or len(shape) != 2 or a.get("axis", 0) != 0 or node.input[1] in found.graph.stored:
        return None
    return Use(scope, node, "embedding", node.input[0], node.input[1], False, open=False)


_READERS: dict[str, Callable[[_Finder, Scope, NodeProto, Mapping[str, Any]], Use | None]] = {
    "MatMul": _matmul, "Gemm": _gemm, "Conv": _conv, "Gather": _gather,
}  # fmt: skip

__all__ = ["Geometry", "GraphLayer", "Scope", "Use", "find_layers", "weight_of"]

"""Put factors into a graph: each node that multiplied by a weight becomes two or three that multiply by its factors.

    MatMul(x, W) + b          MatMul(MatMul(x, V), U) + b                 V (in, r), U (r, out)
    Gemm(x, W, b)             Gemm(MatMul(x, V), U, b)
    Conv(x, W, b)             Conv₁ₓ₁(Conv(x, V), U, b)                   V walks as W did
    Conv(x, W, b)             Conv₁ₓ₁(Conv(Conv₁ₓ₁(x, I), core), O, b)    core walks as W did
    Gather(W, i)              MatMul(Gather(U, i), V)                     U (rows, r), V (r, width)

The last node keeps the old one's name and output, so that everything else of the graph stays as it is. Factors become
initializers `<layer>.U`, `<layer>.V`, … of the main graph, which inner graphs see too; the old weight goes where
nothing reads it any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from .forms import Factors
from .layers import GraphLayer, Use
from .opening import OnnxGraph, branches


@dataclass(frozen=True)
class Change:
    """What becomes of a layer. `factors` None leaves its weight; `bias`: (out,), None leaves it; `weight`: a new dense one."""

    factors: Factors | None = None
    bias: np.ndarray | None = None
    weight: np.ndarray | None = None


@dataclass(frozen=True)
class Rewritten:
    """`model`, and the names that the factors of each layer have in it."""

    model: ModelProto
    factors: dict[str, dict[str, str]]


def rewrite(graph: OnnxGraph, layers: Sequence[GraphLayer], changes: Mapping[str, Change]) -> Rewritten:
    """Return the model with `changes` by layer name; the graph's own is not touched."""
    return _Rewriter(graph, layers).apply(changes)


class _Rewriter:
    def __init__(self, graph: OnnxGraph, layers: Sequence[GraphLayer]) -> None:
        self.graph, self.layers = graph, layers
        self.model = ModelProto()
        self.model.CopyFrom(graph.model)
        # The copy has the same nodes in the same order: that is how a node of the original is found in it.
        self.nodes = {
            id(old): (holder, new) for old, holder, new in _pairs(graph.model.graph, self.model.graph)
        }  # fmt: skip
        self.taken = _all_names(self.model.graph)
        self.names: dict[str, dict[str, str]] = {}

    def apply(self, changes: Mapping[str, Change]) -> Rewritten:
        for layer in self.layers:
            change = changes.get(layer.name)
            if change is None:
                continue
            dtype = self.graph.array(layer.weight).dtype
            if change.weight is not None:
                self._replace_weight(layer, change.weight.astype(dtype))
            bias = self._bias(layer, change, dtype)
            if change.factors is None:
                continue
            arrays = _as_stored(layer, change.factors, dtype)
            self.names[layer.name] = {key: self._store(f"{layer.name}.{key}", a) for key, a in arrays.items()}
            for use in layer.uses:
                self._split(use, change.factors, self.names[layer.name], bias)
        if self.model.ir_version <= 3 and len(self.model.graph.initializer) > len(self.graph.model.graph.initializer):
            # IR 3 wants every initializer among the inputs, where anyone may feed it; IR 4 does not.
            self.model.ir_version = 4
            stored = {t.name for t in self.model.graph.initializer}
            for value in [i for i in self.model.graph.input if i.name in stored]:
                self.model.graph.input.remove(value)
        _drop_unread(self.model.graph, _unread(self.graph.model.graph))
        return Rewritten(self.model, self.names)

    def _store(self, name: str, array: np.ndarray) -> str:
        """Add an initializer to the main graph; return the name it got."""
        name = self._fresh(name)
        self.model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _fresh(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _replace_weight(self, layer: GraphLayer, weight: np.ndarray) -> None:
        stored = weight.T if layer.uses[0].turned else weight
        name = self._store(f"{layer.name}.weight", stored)
        for use in layer.uses:
            _, node = self.nodes[id(use.node)]
            at = 0 if use.kind == "embedding" else 1
            if self._reads_transposed(use):
                # Behind a Transpose the product reads what that makes: the new weight is stored as it is multiplied.
                turned = self._store(f"{layer.name}.weight", stored.T)
                node.input[at] = turned
            else:
                node.input[at] = name

    def _reads_transposed(self, use: Use) -> bool:
        node: NodeProto | None = use.node
        name, turned = use.node.input[0 if use.kind == "embedding" else 1], False
        while name != use.weight:
            node = use.scope.maker(name)
            assert node is not None
            turned ^= node.op_type == "Transpose"
            name = node.input[0]
        return turned

    def _bias(self, layer: GraphLayer, change: Change, dtype: np.dtype) -> str:
        """Store a new bias; return its name. Where the layer had one, its readers read the new one."""
        if change.bias is None:
            return ""
        use = layer.uses[0]
        name = self._store(use.bias + ".shifted" if use.bias else f"{layer.name}.bias", change.bias.astype(dtype))
        for use in layer.uses:
            if use.bias_node is not None:
                _, node = self.nodes[id(use.bias_node)]
                for i, value in enumerate(node.input):
                    if value == use.bias:
                        node.input[i] = name
        return "" if layer.has_bias else name

    def _split(self, use: Use, factors: Factors, names: Mapping[str, str], bias: str) -> None:
        holder, node = self.nodes[id(use.node)]
        new = _SPLIT[use.kind](self, node, factors, names, bias)
        at = next(i for i, n in enumerate(holder.node) if n is node or n == node)
        holder.node.remove(node)
        for i, part in enumerate(new):
            holder.node.insert(at + i, part)

    def linear(self, node: NodeProto, factors: Factors, names: Mapping[str, str], bias: str) -> list[NodeProto]:
        narrow = self._fresh(f"{node.output[0]}/narrow")
        first = self._node("MatMul", [node.input[0], names["V"]], narrow, node, "V")
        if node.op_type == "Gemm":
            third = [bias] if bias else list(node.input[2:3])
            return [first, self._node("Gemm", [narrow, names["U"], *third], node.output[0], node)]
        if not bias:
            return [first, self._node("MatMul", [narrow, names["U"]], node.output[0], node)]
        product = self._fresh(f"{node.output[0]}/product")
        second = self._node("MatMul", [narrow, names["U"]], product, node)
        return [first, second, self._node("Add", [product, bias], node.output[0], node, "bias")]

    def conv(self, node: NodeProto, factors: Factors, names: Mapping[str, str], bias: str) -> list[NodeProto]:
        third = [bias] if bias else list(node.input[2:3])
        chain = ["V", "U"] if factors.form == "svd" else ["I", "core", "O"]
        walks = "V" if factors.form == "svd" else "core"
        value, out = node.input[0], []
        for key in chain:
            last = key == chain[-1]
            made = node.output[0] if last else self._fresh(f"{node.output[0]}/{key}")
            part = self._node("Conv", [value, names[key], *(third if last else [])], made, node, "" if last else key)
            if key == walks:
                part.attribute.extend(a for a in node.attribute if a.name != "group")
            else:
                part.attribute.append(helper.make_attribute("kernel_shape", [1] * (factors.arrays[key].ndim - 2)))
            out.append(part)
            value = made
        return out

    def embedding(self, node: NodeProto, factors: Factors, names: Mapping[str, str], bias: str) -> list[NodeProto]:
        narrow = self._fresh(f"{node.output[0]}/narrow")
        first = self._node("Gather", [names["U"], node.input[1]], narrow, node, "U")
        first.attribute.append(helper.make_attribute("axis", 0))
        return [first, self._node("MatMul", [narrow, names["V"]], node.output[0], node)]

    def _node(self, op: str, inputs: Sequence[str], output: str, like: NodeProto, part: str = "") -> NodeProto:
        """Make a node; without `part` it has the name of the one it stands for."""
        name = like.name and (f"{like.name}/{part}" if part else like.name)
        return helper.make_node(op, list(inputs), [output], name=name or None)


_SPLIT = {"linear": _Rewriter.linear, "conv": _Rewriter.conv, "embedding": _Rewriter.embedding}


def _as_stored(layer: GraphLayer, factors: Factors, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Return the factors as the new nodes multiply by them: a matrix as (in, r) and (r, out)."""
    arrays = {k: a.astype(dtype) for k, a in factors.arrays.items()}
    return {k: a.T for k, a in arrays.items()} if layer.kind == "linear" else arrays


def _pairs(old: GraphProto, new: GraphProto) -> list[tuple[NodeProto, GraphProto, NodeProto]]:
    found = []
    for a, b in zip(old.node, new.node, strict=True):
        found.append((a, new, b))
        for inner_a, inner_b in zip(branches(a), branches(b), strict=True):
            found += _pairs(inner_a, inner_b)
    return found


def _all_names(graph: GraphProto) -> set[str]:
    """Return every name that a value has, here and inside."""
    names = {t.name for t in graph.initializer} | {i.name for i in graph.input}
    for node in graph.node:
        names |= {*node.output, *node.input}
        for inner in branches(node):
            names |= _all_names(inner)
    return names


def _unread(graph: GraphProto) -> set[str]:
    return _all_names(graph) - _read(graph)


def _drop_unread(graph: GraphProto, keep: set[str]) -> None:
    """Remove stored tensors, constants and transpositions that nothing reads, but those that nothing ever read."""
    while True:
        read = _read(graph) | keep
        gone = 0
        for g, fed in _everywhere(graph):
            for tensor in [t for t in g.initializer if t.name not in read and t.name not in fed]:
                g.initializer.remove(tensor)
                gone += 1
            for node in [n for n in g.node if _is_fixed(n) and not any(o in read for o in n.output)]:
                g.node.remove(node)
                gone += 1
        if not gone:
            return


def _is_fixed(node: NodeProto) -> bool:
    return node.op_type in ("Constant", "Transpose", "Identity") and not node.domain


def _everywhere(graph: GraphProto) -> list[tuple[GraphProto, set[str]]]:
    found = [(graph, {i.name for i in graph.input})]
    for node in graph.node:
        for inner in branches(node):
            found += _everywhere(inner)
    return found


def _read(graph: GraphProto) -> set[str]:
    names = {o.name for o in graph.output}
    for node in graph.node:
        names |= set(node.input)
        for inner in branches(node):
            names |= _read(inner)
    return names


__all__ = ["Change", "Rewritten", "rewrite"]

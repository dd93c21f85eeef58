"""The weights of a graph: which constants multiply an activation or are looked up, by which node, in which orientation.

    for p in products(graph, leave=branch_nodes(graph, slots)):
        rows = p.rows(array)                     # (out, in·k): what one output reads is one row
        array = p.array(rows)                    # and back, as the node wants it

Left out, with the reason: weights that a slot or a second reader uses in another way, products of two activations.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

_KINDS = {"MatMul": "matmul", "Gemm": "gemm", "Conv": "conv", "ConvTranspose": "conv_transpose", "Gather": "table"}


@dataclass(frozen=True)
class Product:
    """One constant `weight` of shape `shape`, read by the node that makes `output` from `source`.

    `kind`: matmul, gemm, conv, conv_transpose or table. `turned`: a Gemm that holds (out, in). `groups` of a convolution.
    """

    kind: str
    weight: str
    source: str
    output: str
    shape: tuple[int, ...]
    turned: bool = False
    groups: int = 1

    @property
    def n_rows(self) -> int:
        """How many rows have scales of their own: outputs; for a table, its entries."""
        return self.shape[0] if self.kind in ("conv", "table") or self.turned else self.shape[1]

    def rows(self, array: np.ndarray) -> np.ndarray:
        """Return the weight as (rows, columns)."""
        if self.kind == "conv":
            return array.reshape(len(array), -1)
        if self.kind == "conv_transpose":
            return array.swapaxes(0, 1).reshape(array.shape[1], -1)
        return array if self.kind == "table" or self.turned else array.T

    def array(self, rows: np.ndarray) -> np.ndarray:
        """Return (rows, columns) as the node wants it."""
        if self.kind == "conv":
            return np.ascontiguousarray(rows.reshape(self.shape))
        if self.kind == "conv_transpose":
            return np.ascontiguousarray(rows.reshape(self.shape[1], self.shape[0], *self.shape[2:]).swapaxes(0, 1))
        return np.ascontiguousarray(rows if self.kind == "table" or self.turned else rows.T)


def products(graph: onnx.GraphProto, leave: Collection[str] = ()) -> list[Product]:
    """Return the products of `graph` in its order; `leave` names nodes of adapter branches.

    A weight that several nodes read in one and the same way is one product, of the first of them; one that is read inside
    a branch or a loop is none.
    """
    inputs = {i.name for i in graph.input} | inner_reads(graph)
    constants = {t.name: t for t in graph.initializer if t.name not in inputs and _floating(t) and len(t.dims) >= 2}
    found: dict[str, Product | None] = {}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name not in constants or math.prod(constants[name].dims) == 0:
                continue
            product = None if node.name in leave else _product(node, i, tuple(constants[name].dims))
            if name not in found:
                found[name] = product
            elif product is None or (before := found[name]) is None or not _alike(before, product):
                found[name] = None
    return [p for p in found.values() if p is not None]


def _floating(t: onnx.TensorProto) -> bool:
    return bool(t.data_type == onnx.TensorProto.FLOAT)


def _alike(a: Product, b: Product) -> bool:
    return (a.kind, a.turned, a.groups) == (b.kind, b.turned, b.groups)


def _product(node: onnx.NodeProto, at: int, shape: tuple[int, ...]) -> Product | None:
    kind = _KINDS.get(node.op_type)
    if kind is None or node.domain not in ("", "ai.onnx"):
        return None
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if kind == "table":
        plain = at == 0 and len(shape) == 2 and attributes.get("axis", 0) == 0
        return Product(kind, node.input[0], node.input[1], node.output[0], shape) if plain else None
    if at != 1 or (kind in ("matmul", "gemm") and len(shape) != 2):
        return None
    if kind == "gemm" and (attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0):
        return None
    groups = int(attributes.get("group", 1))
    if kind == "conv_transpose" and groups > 1:
        return None
    turned = kind == "gemm" and bool(attributes.get("transB", 0))
    return Product(kind, node.input[1], node.input[0], node.output[0], shape, turned, groups)


def inner_reads(graph: onnx.GraphProto) -> set[str]:
    """Return the names that the graphs inside `graph` (branches, bodies of loops) read, at any depth."""
    found: set[str] = set()
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                found.update(name for n in inner.node for name in n.input)
                found.update(o.name for o in inner.output)
                found |= inner_reads(inner)
    return found


def readers(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    """Return the nodes that read the value `name`."""
    return [n for n in graph.node if name in n.input]


def array_of(graph: onnx.GraphProto, name: str) -> np.ndarray:
    """Return the initializer called `name`."""
    found: np.ndarray = numpy_helper.to_array(next(t for t in graph.initializer if t.name == name))
    return found


def put(graph: onnx.GraphProto, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Replace the values of initializers; names and places stay."""
    at = {t.name: i for i, t in enumerate(graph.initializer)}
    for name, array in arrays:
        graph.initializer[at[name]].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

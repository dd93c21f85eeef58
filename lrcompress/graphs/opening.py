"""Open an ONNX file: everything that makes it unusable is said here, in one line, before anything else looks at it.

    graph = open_graph("model.onnx")            # ModelError names the file, the node or the tensor, and what to do
    graph.inputs, graph.array("fc.weight"), graph.model.graph.node

Weights in external data stay in their file until one is asked for; where they lie is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper

from ..errors import ModelError
from ..files import contained, sha256_file, sha256_json

#: Domains whose operators ONNX Runtime's CPU build brings.
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
#: Operators that run their body many times: what is read inside has no one value per sample.
LOOPS = frozenset({"Loop", "Scan", "SequenceMap"})
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})


@dataclass(frozen=True)
class Port:
    """An input or output of the graph; a word in `shape` is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass
class OnnxGraph:
    """A parsed model, checked. `folder` is where its external data lie; `digest` names graph and weights."""

    path: Path
    model: ModelProto
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    digest: str
    stored: dict[str, TensorProto] = field(repr=False)

    @property
    def folder(self) -> Path:
        return self.path.parent.resolve()

    @property
    def opset(self) -> int:
        return opset_of(self.model)

    def array(self, tensor: str | TensorProto) -> np.ndarray:
        """Return a stored tensor, by name or as it stands in the graph; bfloat16 comes as float32."""
        proto = self.stored[tensor] if isinstance(tensor, str) else tensor
        try:
            return np.asarray(numpy_helper.to_array(proto, base_dir=str(self.folder)))
        except Exception as e:  # onnx has an exception for each way of being damaged
            raise ModelError(
                f"{self.path}: {proto.name}", "a tensor that can be read", line(e), "export it again"
            ) from e

    @property
    def n_params(self) -> int:
        """Floating-point numbers that the file stores, scalars left out."""
        return sum(math.prod(t.dims) for t in self.stored.values() if t.data_type in FLOATS and t.dims)


def open_graph(path: str | Path) -> OnnxGraph:
    """Read and check an ONNX file. Raises `ModelError` for what cannot be used, with where and why."""
    path = Path(path)
    model = _parse(path)
    if model.functions:
        try:
            model = inliner.inline_local_functions(model)
        except Exception as e:
            raise ModelError(path, "functions that can be inlined", line(e), "export it without functions") from e
    if not model.graph.node:
        raise ModelError(path, "a valid ONNX graph", "one without nodes", "export it again")
    _check_versions(path, model)
    stored = _stored(path, model.graph)
    _check_operators(path, model.graph)
    _check_names(path, model.graph)
    for tensor in stored.values():
        _check_external(path, tensor)
    given = {t.name for t in model.graph.initializer}
    inputs = tuple(_port(path, i, "input") for i in model.graph.input if i.name not in given)
    outputs = tuple(_port(path, o, "output") for o in model.graph.output)
    return OnnxGraph(path, model, inputs, outputs, _digest(path, stored), stored)


def opset_of(model: ModelProto) -> int:
    """Return the version of ONNX's own operators that a model is written in."""
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


#: What releases of ONNX Runtime take: the newest opset and IR version. Measured by loading files of each.
_TAKEN = (("1.22.0", 22, 10), ("1.23.0", 23, 11), ("1.24.0", 25, 13))


def needed_runtime(model: ModelProto) -> str:
    """Return the oldest ONNX Runtime that takes a model's opset and IR version; what none of the list does, this one does."""
    for version, opset, ir in _TAKEN:
        if opset_of(model) <= opset and model.ir_version <= ir:
            return version
    return str(ort.__version__)


def nodes_of(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield every node of a graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for inner in branches(node):
            yield from nodes_of(inner)


def branches(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the graphs that a node holds."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def line(e: BaseException) -> str:
    """Return the first line of what an exception says."""
    return next((text.strip() for text in str(e).splitlines() if text.strip()), type(e).__name__)


def _parse(path: Path) -> ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as e:
        raise ModelError(path, "a readable ONNX file", e.strerror or str(e)) from e
    except Exception as e:  # the parser raises a family of its own
        raise ModelError(path, "a valid ONNX graph", line(e), "fetch or export it again") from e


def _check_versions(path: Path, model: ModelProto) -> None:
    newest, version = onnx.defs.onnx_opset_version(), opset_of(model)
    if version < 7:
        got = f"opset {version}" if version else "none"
        raise ModelError(path, "operators of opset 7 or newer", got, "export it with a newer opset")
    if version > newest:
        raise ModelError(
            path, f"operators of opset {newest} or older", f"opset {version}",
            "export it with an older opset, or update onnx and onnxruntime",
        )  # fmt: skip


def _stored(path: Path, graph: GraphProto) -> dict[str, TensorProto]:
    """Return every stored tensor of a graph and the graphs inside it: initializers and constants.

    Two graphs that know nothing of each other (the branches of an If) may use one name for different things; such
    tensors are left out, so that nobody takes one for the other.
    """
    found: dict[str, TensorProto] = {}
    twice: set[str] = set()
    for g in _graphs(graph):
        own: set[str] = set()
        for sparse in g.sparse_initializer:
            raise ModelError(f"{path}: {sparse.values.name}", "dense tensors", "a sparse one", "export it dense")
        named = [(t.name, t) for t in g.initializer]
        named += [
            (n.output[0], a.t) for n in g.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"
        ]
        for name, tensor in named:
            if name in own:
                raise ModelError(
                    f"{path}: {name}", "names that stand once", "two tensors of that name", "export it again"
                )
            own.add(name)
            twice |= {name} & found.keys()
            found[name] = tensor
    return {name: tensor for name, tensor in found.items() if name not in twice}


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for inner in branches(node):
            yield from _graphs(inner)


def _check_operators(path: Path, graph: GraphProto) -> None:
    for node in nodes_of(graph):
        if node.domain not in DOMAINS:
            raise ModelError(
                f"{path}: node {node.name or node.output[0]}", "operators that ONNX Runtime brings",
                f"the custom operator {node.domain}.{node.op_type}", "export the model with standard operators",
            )  # fmt: skip


def _check_names(path: Path, graph: GraphProto) -> None:
    """Every value has one source: an input, a stored tensor or a node."""

    def visit(g: GraphProto, outer: frozenset[str]) -> None:
        own = {i.name for i in g.input} | {t.name for t in g.initializer}
        if len({i.name for i in g.input}) != len(g.input):
            raise ModelError(path, "inputs with different names", "two of one name", "export it again")
        for node in g.node:
            for name in filter(None, node.output):
                if name in own or name in outer:
                    where = f"{path}: {name}"
                    raise ModelError(where, "names that stand once", "two sources of that value", "export it again")
                own.add(name)
        for node in g.node:
            for inner in branches(node):
                visit(inner, outer | own)

    visit(graph, frozenset())


def _check_external(path: Path, tensor: TensorProto) -> None:
    """The data of a tensor lie beside the graph, whole."""
    where = f"{path}: {tensor.name}"
    if any(d < 0 for d in tensor.dims):
        raise ModelError(where, "sizes of at least 0", list(tensor.dims), "export it again")
    if tensor.data_location != TensorProto.EXTERNAL:
        return
    entries = {e.key: e.value for e in tensor.external_data}
    place = entries.get("location", "")
    try:
        file = contained(path.parent, place)
    except ValueError:
        raise ModelError(where, "external data inside the graph's folder", place, "do not use this file") from None
    if not file.is_file():
        raise ModelError(where, "its external data beside the graph", f"no file {place}", "fetch both files")
    try:
        offset = int(entries.get("offset", "0"))
        wanted = _nbytes(tensor)
        length = int(entries.get("length", str(wanted)))
    except ValueError:
        raise ModelError(where, "offset and length as numbers", entries, "export it again") from None
    size = file.stat().st_size
    if offset < 0 or length != wanted or offset + length > size:
        got = f"{length} at {offset} of a file of {size}"
        raise ModelError(where, f"{wanted} bytes in {place}", got, "the file is cut or of another model: fetch both")


def _nbytes(tensor: TensorProto) -> int:
    bits = {
        TensorProto.INT4: 4,
        TensorProto.UINT4: 4,
        TensorProto.FLOAT4E2M1: 4,
        TensorProto.INT2: 2,
        TensorProto.UINT2: 2,
    }
    count: int = math.prod(tensor.dims)
    if tensor.data_type in bits:
        return -(-count * bits[tensor.data_type] // 8)
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _port(path: Path, value: onnx.ValueInfoProto, what: str) -> Port:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type == TensorProto.STRING:
        raise ModelError(f"{path}: {what} {value.name}", "tensors of numbers", "another type", "export it otherwise")
    dtype = "float32" if not kind.elem_type else str(np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)))
    shape: list[int | str] = []
    for i, dim in enumerate(kind.shape.dim):
        if dim.HasField("dim_value"):
            if dim.dim_value < 1 and what == "input":
                raise ModelError(
                    f"{path}: input {value.name}", "sizes of at least 1", f"axis {i} of size {dim.dim_value}", "export it again"
                )  # fmt: skip
            shape.append(int(dim.dim_value))
        else:
            # An axis without a name of its own: the first of an input is taken for the batch.
            first = what == "input" and not any(isinstance(d, str) for d in shape)
            unnamed = "batch" if first else f"{value.name}_{i}"
            shape.append(dim.dim_param or unnamed)
    return Port(value.name, dtype, tuple(shape))


def _digest(path: Path, stored: dict[str, TensorProto]) -> str:
    """Return one hash of the file and of every file of external data that it names."""
    places = {
        e.value for t in stored.values() if t.data_location == TensorProto.EXTERNAL for e in t.external_data if e.key == "location"
    }  # fmt: skip
    files = {place: sha256_file(contained(path.parent, place)) for place in sorted(places)}
    return sha256_json({"graph": sha256_file(path), "data": files})


__all__ = [
    "OnnxGraph",
    "Port",
    "branches",
    "nodes_of",
    "open_graph",
    "opset_of",
]

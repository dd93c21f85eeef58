"""The compressed folder of a graph: an ONNX file that runs as it stands, and its weights beside it.

    compressed/  lrcompress.json    source, layers, report: as of every compressed model
                 model.onnx         the graph with its factors; anything that reads ONNX runs it
                 model.safetensors  the weights, by name; the graph points into it as external data

One file of weights serves both readers: safetensors by name, ONNX by offset.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper
from safetensors.numpy import save_file

from ..errors import ModelError
from ..files import made_by, sha256_file, sha256_json, write_json
from .opening import OnnxGraph, branches, open_graph

#: As of every compressed model (`model.checkpoint`, which needs torch).
MAKER, MARKER, SCHEMA = "lrcompress factorize", "lrcompress.json", 1
KIND = "onnx"
GRAPH, TENSORS = "model.onnx", "model.safetensors"
#: Smaller tensors of whole numbers stay in the graph: the runtime reads shapes while it builds it.
_SMALL_BYTES = 256
_DTYPES = {
    TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16,
    TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL,
}  # fmt: skip


@dataclass(frozen=True)
class GraphCheckpoint:
    """A compressed graph. `digest` names its graph, its weights and its layers."""

    path: Path
    digest: str
    spec: dict[str, Any]
    graph: OnnxGraph

    def open_original(self, override: Path | None = None) -> OnnxGraph:
        """Open the graph this was made from, where it was or at `override`; its digest must agree."""
        source = self.spec["source"]
        path = override or (self.path / source["path"]).resolve()
        if not path.exists():
            raise ModelError(path, "the graph this was made from", "nothing there", "name it with --original")
        opened = open_graph(path)
        if opened.digest != source["digest"]:
            expected = f"the original with digest {source['digest'][:12]}"
            raise ModelError(path, expected, opened.digest[:12], "it changed since: factorize it again")
        return opened


def write_graph_checkpoint(
    stage: Path,
    dest: Path,
    graph: OnnxGraph,
    model: ModelProto,
    *,
    layers: Mapping[str, Any],
    report: Mapping[str, Any],
) -> str:
    """Write `model`, made from `graph`, into the folder `stage` that will become `dest`; return its digest."""
    copy = ModelProto()
    copy.CopyFrom(model)
    inline(copy.graph, graph)
    _move_out(copy.graph, stage / TENSORS)
    (stage / GRAPH).write_bytes(copy.SerializeToString(deterministic=True))
    digest = _digest(stage, layers)
    write_json(stage / MARKER, {
        "schema": SCHEMA, "made_by": MAKER, "digest": digest,
        "source": {"path": os.path.relpath(graph.path.resolve(), dest.resolve()), "digest": graph.digest, "kind": KIND},
        "model": {"kind": KIND, "graph": GRAPH, "inputs": [p.as_dict() for p in graph.inputs]},
        "layers": dict(layers), **report,
    })  # fmt: skip
    return digest


def is_graph_checkpoint(folder: Path) -> bool:
    """Tell whether a folder is a compressed graph."""
    if made_by(folder, MARKER) != MAKER:
        return False
    try:
        return json.loads((folder / MARKER).read_text())["model"]["kind"] == KIND  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_graph_checkpoint(folder: Path) -> GraphCheckpoint:
    """Open a compressed graph; `ModelError` where it is not what it was."""
    try:
        spec = json.loads((folder / MARKER).read_text())
        layers, recorded = spec["layers"], spec["digest"]
        found = _digest(folder, layers)
    except (OSError, ValueError, KeyError) as e:
        raise ModelError(folder, "an intact compressed graph", str(e), "factorize again") from e
    if found != recorded:
        raise ModelError(
            folder, f"a graph and weights with digest {recorded[:12]}", found[:12], "a file changed: factorize again"
        )
    return GraphCheckpoint(folder, found, spec, open_graph(folder / GRAPH))


def _digest(folder: Path, layers: Mapping[str, Any]) -> str:
    return sha256_json({
        "graph": sha256_file(folder / GRAPH), "tensors": sha256_file(folder / TENSORS), "layers": dict(layers)
    })  # fmt: skip


def inline(proto: GraphProto, graph: OnnxGraph) -> None:
    """Bring external data into the graph, here and inside."""
    for tensor in proto.initializer:
        _inlined(tensor, graph)
    for node in proto.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _inlined(attribute.t, graph)
        for inner in branches(node):
            inline(inner, graph)


def _inlined(tensor: TensorProto, graph: OnnxGraph) -> None:
    """Bring the external data of one tensor into it."""
    if tensor.data_location == TensorProto.EXTERNAL:
        array, name = graph.array(tensor), tensor.name
        tensor.CopyFrom(numpy_helper.from_array(array, name))


def _move_out(graph: GraphProto, path: Path) -> None:
    """Write the initializers to `path` and point at them; what safetensors does not know stays in the graph."""
    fed = {i.name for i in graph.input}
    chosen: dict[str, TensorProto] = {}
    data: dict[str, np.ndarray] = {}
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor) if tensor.data_type in _DTYPES else None
        if array is None or not array.size or tensor.name in fed or not tensor.name:
            continue
        if array.dtype.kind in "iub" and array.nbytes < _SMALL_BYTES:
            continue
        chosen[tensor.name] = tensor
        data[tensor.name] = np.ascontiguousarray(array)
    save_file(data, path, {"format": "onnx"})
    path.chmod(0o644)
    with path.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    for name, tensor in chosen.items():
        start, end = header[name]["data_offsets"]
        dtype_code, dims = tensor.data_type, list(tensor.dims)
        tensor.Clear()
        tensor.name, tensor.data_type, tensor.data_location = name, dtype_code, TensorProto.EXTERNAL
        tensor.dims.extend(dims)
        for key, value in (("location", path.name), ("offset", str(8 + size + start)), ("length", str(end - start))):
            tensor.external_data.add(key=key, value=value)


__all__ = ["GraphCheckpoint", "inline", "is_graph_checkpoint", "load_graph_checkpoint", "write_graph_checkpoint"]

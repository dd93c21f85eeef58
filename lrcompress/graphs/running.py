"""Run a graph in ONNX Runtime, and see values inside it: intermediate results become outputs.

    run = Run(graph, model, watched=[use.value for use in uses])
    outputs, seen = run(feeds)

A value inside a branch of If is carried out through the If as a further output of it; the branch that was not taken
gives an empty tensor in its place.

In data the first axis is the sample. A graph may have its batch on another axis, or none: `Feeds` puts it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ..errors import DataError, ModelError
from ..runtime import session_options
from .layers import Scope, find_layers
from .opening import OnnxGraph, Port, line

#: Sessions take the graph as bytes; protobuf ends here.
_MOST_BYTES = (1 << 31) - (1 << 20)


class Run:
    """A session over `model` (the graph's own, or one made from it) that also gives values inside it.

    `watched`: (name, dtype) of values as `graph.model` names them, wherever they are made.
    """

    def __init__(
        self, graph: OnnxGraph, model: ModelProto | None = None, watched: Sequence[str] = (), *, threads: int = 1
    ) -> None:
        self.graph = graph
        copy = ModelProto()
        copy.CopyFrom(graph.model if model is None else model)
        own = [o.name for o in copy.graph.output]
        self._fed = {i.name for i in copy.graph.input}
        self._watched = {name: name for name in watched if name in own or name in self._fed}
        for name in dict.fromkeys(w for w in watched if w not in self._watched):
            self._watched[name] = _carry_out(Scope.of(copy.graph), name)
        self._outputs = own
        self._session = session(graph.path, copy, threads=threads)

    def __call__(
        self, feeds: Mapping[str, np.ndarray], *, only_watched: bool = False
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the outputs (none with `only_watched`: what they alone need is not computed) and the watched values."""
        inside = [n for n in dict.fromkeys(self._watched.values()) if n not in self._fed and n not in self._outputs]
        outside = [n for n in self._outputs if not only_watched or n in self._watched.values()]
        options = ort.RunOptions()
        options.only_execute_path_to_fetches = only_watched
        options.log_severity_level = 4  # what fails is raised, and said once
        if not (wanted := [*outside, *inside]):
            return {}, {name: np.asarray(feeds[self._watched[name]]) for name in self._watched}
        try:
            values = dict(zip(wanted, self._session.run(wanted, dict(feeds), options), strict=True))
        except Exception as e:  # ONNX Runtime has no family of its own for what data it cannot take
            raise DataError(self.graph.path, "inputs that the graph runs on", line(e), "check shapes and dtypes") from e
        seen = {name: values.get(at, feeds.get(at)) for name, at in self._watched.items()}
        outputs = {} if only_watched else {n: np.asarray(values[n]) for n in self._outputs}
        return outputs, {name: np.asarray(value) for name, value in seen.items() if value is not None}


def watching(
    model: ModelProto, values: Iterable[str], *, threads: int = 1, as_written: bool = True
) -> ort.InferenceSession:
    """Return a session whose outputs are a graph's own and these values of it.

    `as_written`: no node is fused. The runtime's optimizer takes sums into convolutions with what lies between them,
    outputs or not, and then refuses the session.
    """
    watched = ModelProto()
    watched.CopyFrom(model)
    own = {o.name for o in model.graph.output}
    watched.graph.output.extend(ValueInfoProto(name=n) for n in dict.fromkeys(values) if n not in own)
    options = session_options(threads)
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])


def session(path: Path, model: ModelProto, *, threads: int = 1) -> ort.InferenceSession:
    """Return a session over a model whose external data lie beside `path`; `ModelError` where ONNX Runtime refuses."""
    options = session_options(threads)
    folder = str(path.parent.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    if model.ByteSize() > _MOST_BYTES:
        raise ModelError(
            path, "a graph of less than 2 GB beside its weights", "more", "keep its weights in external data"
        )
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # the runtime raises its own private family
        raise ModelError(path, f"a graph that ONNX Runtime {ort.__version__} runs", line(e), "export it again") from e


def _carry_out(scope: Scope, name: str) -> str:
    """Make a value an output of the whole graph; return the name it has there."""
    if name in scope.made:
        scope.graph.output.append(ValueInfoProto(name=name))
        return name
    found = _inside(scope, name)
    if found is None:
        raise ModelError(f"value {name}", "a value of this graph", "none of that name")
    carried = f"{name}/carried"
    scope.graph.output.append(ValueInfoProto(name=carried))
    return carried


def _inside(scope: Scope, name: str) -> str | None:
    """Carry a value out of a branch of this graph, into this graph; return its name here, or None if it is not there."""
    for node in scope.graph.node:
        if node.op_type != "If":
            continue
        for attribute in [a for a in node.attribute if a.type == AttributeProto.GRAPH]:
            inner = Scope.of(attribute.g, scope, node)
            here = name if name in inner.made else _inside(inner, name)
            if here is not None:
                return _through_if(node, attribute.g, here, f"{name}/carried")
    return None


def _through_if(node: NodeProto, branch: GraphProto, value: str, name: str) -> str:
    """Add an output to an If: `value` of one branch, nothing of the other."""
    for attribute in [a for a in node.attribute if a.type == AttributeProto.GRAPH]:
        own = f"{name}/{attribute.name}"
        if attribute.g is branch:
            attribute.g.node.append(helper.make_node("Identity", [value], [own]))
        else:
            empty = helper.make_tensor("empty", TensorProto.FLOAT, [0], [])
            attribute.g.node.append(helper.make_node("Constant", [], [own], value=empty))
        attribute.g.output.append(ValueInfoProto(name=own))
    node.output.append(name)
    return name


class Feeds:
    """Batches of data as the graph takes them.

    The batch axis of an input is its first dynamic axis; in data it stands first. A scalar input, and one without a
    dynamic axis, has one value per sample in data, which must be the same for all samples of a batch.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self._axis = {
            p.name: next((i for i, d in enumerate(p.shape) if isinstance(d, str)), None) for p in graph.inputs
        }

    @property
    def ports(self) -> tuple[Port, ...]:
        """The inputs as data hold them: the sample first."""
        found = []
        for port in self.graph.inputs:
            axis = self._axis[port.name]
            if axis is None and port.shape and self.fixed == port.shape[0]:
                axis = 0
            rest = port.shape if axis is None else (*port.shape[:axis], *port.shape[axis + 1 :])
            found.append(Port(port.name, port.dtype, ("batch", *rest)))
        return tuple(found)

    @property
    def fixed(self) -> int | None:
        """The one batch size that the graph takes, where it has no dynamic axis at all."""
        if any(axis is not None for axis in self._axis.values()):
            return None
        first = {p.shape[0] for p in self.graph.inputs if p.shape}
        return int(first.pop()) if len(first) == 1 else None

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return a batch of data, sample first, as the graph takes it."""
        given, wanted = dict(inputs), [p.name for p in self.graph.inputs]
        if len(wanted) == len(given) == 1:
            given = {wanted[0]: next(iter(given.values()))}
        if missing := [n for n in wanted if n not in given]:
            got = ", ".join(given) or "none"
            raise DataError(
                self.graph.path, f"inputs named {', '.join(wanted)}", got, f"name an array after the input {missing[0]}"
            )
        return {p.name: self._placed(p, np.asarray(given[p.name])) for p in self.graph.inputs}

    def _placed(self, port: Port, value: np.ndarray) -> np.ndarray:
        axis = self._axis[port.name]
        if axis is not None:
            return np.ascontiguousarray(np.moveaxis(value, 0, axis)) if axis else value
        if value.ndim == len(port.shape):
            return value
        if not len(value) or not np.array_equal(value, np.broadcast_to(value[:1], value.shape)):
            where = f"{self.graph.path}: input {port.name}"
            raise DataError(where, "one value for all samples of a batch", "different ones", "split the data by it")
        return np.array(value[0])

    def groups(self, size: int) -> int:
        """Return the batch size to read data in."""
        return self.fixed or size


def example_feeds(graph: OnnxGraph, *, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return seeded inputs: a word is a dynamic axis, of one size wherever it stands; the first is the batch.

    Whole numbers are drawn below the shortest table that rows are looked up in; masks are ones, positions count.
    """
    rng = np.random.default_rng(seed)
    rows = [layer.shape[0] for layer in find_layers(graph) if layer.kind == "embedding"]
    top = max(1, min([*rows, 1000])) if rows else 2
    sizes: dict[str, int] = {}
    found = {}
    for port in graph.inputs:
        first = next((d for d in port.shape if isinstance(d, str)), None)
        shape = [
            d if isinstance(d, int) else sizes.setdefault(d, batch if d == first else 12 + len(sizes)) for d in port.shape
        ]  # fmt: skip
        kind = np.dtype(port.dtype).kind
        value: np.ndarray
        if kind == "f":
            value = rng.standard_normal(shape)
        elif "mask" in port.name or kind == "b":
            value = np.ones(shape)
        elif "position" in port.name and shape:
            value = np.broadcast_to(np.arange(shape[-1]), shape)
        else:
            value = rng.integers(0, 1 if "type" in port.name else top, shape)
        found[port.name] = np.asarray(value).astype(port.dtype)
    return found


def floats(outputs: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the floating-point outputs."""
    yield from (v for v in outputs.values() if np.issubdtype(v.dtype, np.floating))


__all__ = ["Feeds", "Run", "example_feeds", "floats", "session"]

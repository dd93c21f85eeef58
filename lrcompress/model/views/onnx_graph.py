"""An ONNX graph, read through the intermediate outputs of a run in ONNX Runtime.

    view = OnnxView("model.onnx")
    view.layers, view.consumers("fc1.weight")                   # who multiplies by an initializer
    statistics = measure(view, data, view.layers)               # input moments; a graph has no gradients

Only the build plane imports this file: it needs the package `onnx`. Weights may lie in external data beside the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, inliner, numpy_helper
from torch import Tensor

from ...errors import DataError, ModelError
from ...factorize import Factorization
from ...runtime.session import EXACT_INT8
from ..surgery import Layer
from .base import Deliver, LayerView, Outputs, Reading
from .walk import Walk

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
#: Operators that give the numbers they get, in the same order: what they change is at most the shape.
_SAME_NUMBERS = {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class Use:
    """One node that multiplies by an initializer. `value` is what it reads; `turned`: the weight is stored (in, out)."""

    node: onnx.NodeProto
    kind: str
    initializer: str
    value: str
    turned: bool
    walk: Walk | None = None
    bias: str = ""
    reason: str | None = None

    @property
    def settings(self) -> tuple[Any, ...]:
        return self.kind, self.turned, self.walk, self.bias


class OnnxView(LayerView):
    """The layers of a graph, named after their initializers without `.weight`; shared ones are one layer."""

    differentiable = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.model = _load(self.path)
        graph = self.model.graph
        self._initializers = {t.name: t for t in graph.initializer}
        self._producers = {o: n for n in graph.node for o in n.output if o}
        self._constants = dict(_constants(graph))
        uses = [u for u in (self._use(n) for n in graph.node) if u is not None]
        self._uses = _named(uses)
        self.layers = list(self._layers())
        self.walks = {name: u[0].walk for name, u in self._uses.items() if u[0].walk is not None}
        self._sessions: dict[frozenset[str], ort.InferenceSession] = {}

    def consumers(self, initializer: str) -> list[str]:
        """Return the nodes that read an initializer, by name, or by first output where they have none."""
        return [n.name or n.output[0] for n in self.model.graph.node if initializer in n.input]

    def initializers(self, name: str) -> list[str]:
        """Return the initializers that a layer holds: its weight, then its bias if it has one."""
        first = self._uses[self.layer(name).name][0]
        return [first.initializer, *([first.bias] if first.bias else [])]

    def nodes(self, name: str) -> list[onnx.NodeProto]:
        """Return the nodes of a layer, in the order they run."""
        return [u.node for u in self._uses[self.layer(name).name]]

    def read(
        self, inputs: Mapping[str, Tensor], names: Collection[str], deliver: Deliver, outputs: Outputs | None = None
    ) -> dict[str, Tensor]:
        self.check(names)
        if outputs is not None:
            raise ValueError("a graph in ONNX Runtime has no gradients")
        wanted = set(names)
        uses = [(name, u) for name, found in self._uses.items() if name in wanted for u in found]
        feeds = self._feeds(inputs)
        own = [o.name for o in self.model.graph.output]
        computed = sorted({u.value for _, u in uses if u.value in self._producers} - set(own))
        session = self._session(frozenset(computed))
        try:
            values = dict(zip([*own, *computed], session.run([*own, *computed], feeds), strict=True))
        except Exception as e:  # ONNX Runtime has no family of its own for what data it cannot take
            raise DataError(self.path, "inputs that the graph runs on", _line(e), "check shapes and dtypes") from e
        order = {id(n): i for i, n in enumerate(self.model.graph.node)}
        for name, use in sorted(uses, key=lambda u: order[id(u[1].node)]):
            value = values.get(use.value, feeds.get(use.value))
            if value is not None:
                x = torch.from_numpy(np.ascontiguousarray(value))
                rows = self.layer(name).shape[0]
                x = x % rows if use.kind == "embedding" else x  # Gather counts from the end below zero
                deliver(Reading(name, x, (self._origin(use.value), tuple(x.shape))))
        return {name: torch.from_numpy(np.asarray(values[name])) for name in own}

    def replace(self, name: str, factors: Factorization) -> None:
        """Refuse: the weights of a graph are replaced where it is written."""
        self.layer(name)
        raise ModelError(
            f"{self.path}: {name}", "a network whose layers can be replaced", "an ONNX graph",
            "factorize the model that it was exported from",
        )  # fmt: skip

    def _layers(self) -> Iterator[Layer]:
        sharing: dict[str, list[str]] = {}
        for name, uses in self._uses.items():
            sharing.setdefault(uses[0].initializer, []).append(name)
        for name, uses in self._uses.items():
            first = uses[0]
            weight = self._weight(first)
            reason = next((u.reason for u in uses if u.reason), None) or self._why_dense(first, weight)
            others = sharing[first.initializer]
            if reason is None and len(others) > 1:
                reason = f"tied: one tensor serves {', '.join(others)}"
            yield Layer(name, first.kind, weight, reason, bool(first.bias))

    def _why_dense(self, use: Use, weight: Tensor) -> str | None:
        if weight.numel() == 0:
            return "its weight has no elements"
        if not bool(torch.isfinite(weight).all()):
            return "its weight is not finite"
        if use.walk is not None and use.walk.groups > 1:
            groups = use.walk.groups
            return "depthwise: nothing to save" if weight.shape[1] == 1 else f"grouped convolution ({groups} groups)"
        through = self._readers(use.initializer)
        users = {id(u.node) for found in self._uses.values() for u in found}
        others = [n.name or n.output[0] for n in through if id(n) not in users]
        return f"its weight is also read directly, by {', '.join(others[:3])}" if others else None

    def _readers(self, name: str) -> list[onnx.NodeProto]:
        """Return the nodes that read an initializer, seen through transposition."""
        out = []
        for node in self.model.graph.node:
            if name in node.input:
                out += self._readers(node.output[0]) if node.op_type in ("Transpose", "Identity") else [node]
        return out

    def _weight(self, use: Use) -> Tensor:
        """Return the weight as (out, in, *k)."""
        stored = self._initializers.get(use.initializer)
        tensor = _tensor(self._constants[use.initializer] if stored is None else stored, self.path)
        return tensor.T if use.turned else tensor

    def _use(self, node: onnx.NodeProto) -> Use | None:
        reader = _READERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        return (
            None
            if reader is None or len(node.input) < 2
            else reader(self, node, {a.name: helper.get_attribute_value(a) for a in node.attribute})
        )

    def _matrix(self, name: str) -> tuple[str, bool, tuple[int, ...]] | None:
        """Return the stored matrix behind `name`, whether it is turned on the way, and its stored shape."""
        turned = False
        while name in self._producers and name not in self._constants:
            node = self._producers[name]
            if node.op_type == "Transpose":
                perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
                if perm not in (None, [1, 0]):
                    return None
                turned = not turned
            elif node.op_type != "Identity":
                return None
            name = node.input[0]
        shape = self._shape(name)
        return (name, turned, shape) if shape is not None else None

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a stored floating-point tensor that nobody can feed."""
        found = self._initializers.get(name) or self._constants.get(name)
        if found is None or found.data_type not in _FLOATS or name in {i.name for i in self.model.graph.input}:
            return None
        return tuple(found.dims)

    def _added(self, node: onnx.NodeProto, width: int) -> str:
        """Return the stored vector that alone is added to a node's output, or nothing."""
        after = [n for n in self.model.graph.node if node.output[0] in n.input]
        if len(after) != 1 or after[0].op_type != "Add" or node.output[0] in {o.name for o in self.model.graph.output}:
            return ""
        (other,) = [n for n in after[0].input if n != node.output[0]] or [""]
        return str(other) if self._shape(other) == (width,) else ""

    def _origin(self, value: str) -> str:
        """Follow a value back through nodes that keep its numbers: two that differ by name alone are one."""
        while value in self._producers and self._producers[value].op_type in _SAME_NUMBERS:
            value = self._producers[value].input[0]
        return value

    def _feeds(self, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Return the arrays by the graph's names; a single input fits whatever its name."""
        wanted = [i.name for i in self.model.graph.input if i.name not in self._initializers]
        given = dict(inputs)
        if len(wanted) == len(given) == 1:
            given = {wanted[0]: next(iter(given.values()))}
        missing = [n for n in wanted if n not in given]
        if missing:
            raise DataError(
                self.path,
                f"inputs named {', '.join(wanted)}",
                ", ".join(given),
                "name the arrays after the graph's inputs",
            )
        return {n: given[n].detach().cpu().numpy() for n in wanted}

    def _session(self, names: frozenset[str]) -> ort.InferenceSession:
        """Return a session whose graph also gives the named values."""
        if names not in self._sessions:
            graph = onnx.ModelProto()
            graph.CopyFrom(self.model)
            graph.graph.output.extend(onnx.ValueInfoProto(name=n) for n in sorted(names))
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = torch.get_num_threads()
            options.add_session_config_entry(*EXACT_INT8)
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self.path.parent.resolve())
            )
            try:
                session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
            except Exception as e:  # as above
                raise ModelError(self.path, "a graph that ONNX Runtime can run", _line(e), "export it again") from e
            self._sessions = {names: session}  # one at a time: each holds the weights
        return self._sessions[names]


def _load(path: Path) -> onnx.ModelProto:
    """Read a graph; weights in external data stay where they are."""
    try:
        model = onnx.load(path, load_external_data=False)
        if model.functions:
            model = inliner.inline_local_functions(model)
        if not model.graph.node:
            raise ModelError(path, "a valid ONNX graph", "one without nodes", "export it again")
    except ModelError:
        raise
    except OSError as e:
        raise ModelError(path, "a readable ONNX file", e.strerror or str(e)) from e
    except Exception as e:  # the parser raises a family of its own
        raise ModelError(path, "a valid ONNX graph", _line(e), "export it again") from e
    return model


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, TensorProto]]:
    for node in graph.node:
        if node.op_type == "Constant":
            yield from ((node.output[0], a.t) for a in node.attribute if a.name == "value")


def _tensor(stored: TensorProto, path: Path) -> Tensor:
    try:
        array = numpy_helper.to_array(stored, base_dir=str(path.parent))
    except Exception as e:  # missing, cut or hostile external data, each with an exception of its own
        raise ModelError(
            f"{path}: {stored.name}", "its external data beside the graph", _line(e), "fetch both files"
        ) from e
    if stored.data_type == TensorProto.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _line(e: BaseException) -> str:
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)


def _named(uses: list[Use]) -> dict[str, list[Use]]:
    """Group uses by layer: one weight used twice alike is one; a different use is named after its node."""
    out: dict[str, list[Use]] = {}
    for use in uses:
        name = use.initializer.removesuffix(".weight") or use.initializer
        if name in out and out[name][0].settings != use.settings:
            name = use.node.name or use.node.output[0]
        out.setdefault(name, []).append(use)
    return out


def _matmul(view: OnnxView, node: onnx.NodeProto, _: Mapping[str, Any]) -> Use | None:
    found = view._matrix(node.input[1])
    if found is None or len(found[2]) != 2:
        return None
    name, turned, shape = found
    width = shape[0] if turned else shape[1]
    return Use(node, "linear", name, node.input[0], not turned, bias=view._added(node, width))


def _gemm(view: OnnxView, node: onnx.NodeProto, a: Mapping[str, Any]) -> Use | None:
    found = view._matrix(node.input[1])
    if found is None or len(found[2]) != 2 or a.get("transA", 0):
        return None
    name, turned, _ = found
    scaled = a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0
    use = Use(
        node,
        "linear",
        name,
        node.input[0],
        turned == bool(a.get("transB", 0)),
        bias=node.input[2] if len(node.input) > 2 else "",
    )
    return replace(use, reason="its product is scaled (alpha or beta of Gemm)") if scaled else use


def _conv(view: OnnxView, node: onnx.NodeProto, a: Mapping[str, Any]) -> Use | None:
    shape = view._shape(node.input[1])
    if shape is None or not 3 <= len(shape) <= 5:
        return None
    axes = len(shape) - 2
    ones = [1] * axes
    pads = a.get("pads", [0] * 2 * axes)
    auto = {b"SAME_UPPER": "upper", b"SAME_LOWER": "lower"}.get(a.get("auto_pad", b""), "")
    if a.get("auto_pad") == b"VALID":
        pads = [0] * 2 * axes
    around = () if auto else tuple(zip(pads[:axes], pads[axes:], strict=True))
    walk = Walk(
        tuple(shape[2:]),
        tuple(a.get("strides", ones)),
        tuple(a.get("dilations", ones)),
        around,
        auto,
        groups=a.get("group", 1),
    )
    return Use(
        node, "conv", node.input[1], node.input[0], False, walk, bias=node.input[2] if len(node.input) > 2 else ""
    )


def _gather(view: OnnxView, node: onnx.NodeProto, a: Mapping[str, Any]) -> Use | None:
    shape = view._shape(node.input[0])
    if shape is None or len(shape) != 2 or a.get("axis", 0) != 0 or node.input[1] in view._initializers:
        return None
    return Use(node, "embedding", node.input[0], node.input[1], False)


_READERS: dict[str, Callable[[OnnxView, onnx.NodeProto, Mapping[str, Any]], Use | None]] = {
    "MatMul": _matmul, "Gemm": _gemm, "Conv": _conv, "Gather": _gather,
}  # fmt: skip

"""An ONNX graph, read through the intermediate outputs of a run in ONNX Runtime, as tensors of torch.

    view = OnnxView("model.onnx")
    view.layers, view.consumers("fc1.weight")                   # who multiplies by an initializer
    statistics = measure(view, data, view.layers)               # input moments; a graph has no gradients

The graph itself is opened, searched and run by `lrcompress.graphs`, which also factorizes it, without torch. Only the
build plane imports this file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from ...errors import DataError, ModelError
from ...factorize import Factorization
from ...graphs import GraphLayer, Run, find_layers, open_graph
from ...graphs.layers import Use, weight_of
from ...graphs.opening import nodes_of
from ..surgery import Layer
from .base import Deliver, LayerView, Outputs, Reading
from .walk import Walk

#: Operators that give the numbers they get, in the same order: what they change is at most the shape.
_SAME_NUMBERS = {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}
_KINDS = ("linear", "conv", "embedding")


class OnnxView(LayerView):
    """The layers of a graph, named after their initializers without `.weight`; shared ones are one layer."""

    differentiable = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.graph = open_graph(self.path)
        self._found = {n.name: n for n in find_layers(self.graph) if n.kind in _KINDS}
        self.layers = [self._layer(n) for n in self._found.values()]
        self.walks = {n.name: _walk(n.uses[0]) for n in self._found.values() if n.kind == "conv"}
        self._order = {id(n): i for i, n in enumerate(nodes_of(self.graph.model.graph))}
        self._runs: dict[frozenset[str], Run] = {}

    def consumers(self, initializer: str) -> list[str]:
        """Return the nodes that read an initializer, by name, or by first output where they have none."""
        return [n.name or n.output[0] for n in nodes_of(self.graph.model.graph) if initializer in n.input]

    def initializers(self, name: str) -> list[str]:
        """Return the initializers that a layer holds: its weight, then its bias if it has one."""
        first = self._found[self.layer(name).name].uses[0]
        return [first.weight, *([first.bias] if first.bias else [])]

    def nodes(self, name: str) -> list[onnx.NodeProto]:
        """Return the nodes of a layer, in the order they run."""
        return [u.node for u in self._found[self.layer(name).name].uses]

    def read(
        self, inputs: Mapping[str, Tensor], names: Collection[str], deliver: Deliver, outputs: Outputs | None = None
    ) -> dict[str, Tensor]:
        self.check(names)
        if outputs is not None:
            raise ValueError("a graph in ONNX Runtime has no gradients")
        wanted = set(names)
        uses = [(name, u) for name, layer in self._found.items() if name in wanted for u in layer.uses]
        found, seen = self._run(frozenset(u.value for _, u in uses))(self._feeds(inputs))
        for name, use in sorted(uses, key=lambda u: self._order[id(u[1].node)]):
            value = seen.get(use.value)
            if value is None or (not value.size and use.scope.parent is not None):
                continue  # a branch that was not taken
            x = torch.from_numpy(np.ascontiguousarray(value))
            rows = self.layer(name).shape[0]
            x = x % rows if use.kind == "embedding" else x  # Gather counts from the end below zero
            deliver(Reading(name, x, (self._origin(use), tuple(x.shape))))
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def replace(self, name: str, factors: Factorization) -> None:
        """Refuse: the weights of a graph are replaced where it is written."""
        self.layer(name)
        raise ModelError(
            f"{self.path}: {name}", "a network whose layers can be replaced", "an ONNX graph",
            "lrcompress factorize takes the file itself",
        )  # fmt: skip

    def _layer(self, found: GraphLayer) -> Layer:
        weight = torch.from_numpy(np.array(weight_of(self.graph, found)))
        return Layer(found.name, found.kind, weight, found.reason, found.has_bias)

    def _origin(self, use: Use) -> str:
        """Follow a value back through nodes that keep its numbers: two that differ by name alone are one."""
        value = use.value
        while (node := use.scope.maker(value)) is not None and node.op_type in _SAME_NUMBERS:
            value = node.input[0]
        return value

    def _feeds(self, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Return the arrays by the graph's names; a single input fits whatever its name."""
        wanted, given = [p.name for p in self.graph.inputs], dict(inputs)
        if len(wanted) == len(given) == 1:
            given = {wanted[0]: next(iter(given.values()))}
        if any(n not in given for n in wanted):
            expected, got = f"inputs named {', '.join(wanted)}", ", ".join(given)
            raise DataError(self.path, expected, got, "name the arrays after the graph's inputs")
        return {n: given[n].detach().cpu().numpy() for n in wanted}

    def _run(self, names: frozenset[str]) -> Run:
        """Return a session whose graph also gives the named values."""
        if names not in self._runs:
            run = Run(self.graph, watched=sorted(names), threads=torch.get_num_threads())
            self._runs = {names: run}  # one at a time: each holds the weights
        return self._runs[names]


def _walk(use: Use) -> Walk:
    g = use.geometry
    assert g is not None
    return Walk(g.kernel, g.stride, g.dilation, g.pads, g.auto, groups=g.groups)

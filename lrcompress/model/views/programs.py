"""A traced program, read by interpreting its graph node by node.

    view = ProgramView.of(torch.export.export(net, args))     # the graph as it was traced, operators and all
    view = ProgramView(opened, opened.module)                 # a `.pt2` as `open_model` gives it

Layers are calls: of a module, or of an operator on a stored weight (`calls.py` says which).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from ...factorize import Factorization
from ..calls import find_calls, other_readers
from ..opened import OpenedModel
from ..placing import places, put_modules
from ..programs import as_network
from ..surgery import Layer, find_layers, replace_layer
from .base import Deliver, LayerView, Outputs, Reading, frozen, identity, kept
from .walk import walks_of


class ProgramView(LayerView):
    """The layers of a graph. `network` keeps its operators until the first layer is replaced."""

    def __init__(self, opened: OpenedModel, network: GraphModule) -> None:
        self._opened, self.network = opened, network
        self._index()

    @classmethod
    def of(cls, program: torch.export.ExportedProgram) -> ProgramView:
        """View a program in memory."""
        network = as_network(program)
        return cls(OpenedModel(None, "pt2", "", network), network)

    def read(
        self, inputs: Mapping[str, Tensor], names: Collection[str], deliver: Deliver, outputs: Outputs | None = None
    ) -> dict[str, Tensor]:
        self.check(names)
        runner = nn.Module()
        signature = inspect.signature(self.network.forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            reader = _Reader(self.network, self._reads, self._answers, set(names), deliver, outputs)
            return reader.run(*bound.arguments.values(), enable_io_processing=False)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        runner.forward = forward
        with frozen(self.network, gradients=outputs is not None):
            return self._opened.outputs(runner, inputs)

    def replace(self, name: str, factors: Factorization) -> None:
        self.layer(name)
        if any(c for c in find_calls(self.network)):
            put_modules(self.network)
            self.network.recompile()
        replace_layer(self.network, name, factors)
        self._index()

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        self.network.to(device)
        try:
            yield
        finally:
            self.network.cpu()

    def _index(self) -> None:
        """Find the layers, and the nodes that read for them and give their answers."""
        calls = find_calls(self.network)
        #: node -> (layer, what it reads)
        self._reads: dict[Node, tuple[str, Node]] = {}
        #: node -> layer
        self._answers: dict[Node, str] = {}
        for call, name in zip(calls, places(self.network, calls), strict=True):
            self._reads[call.read], self._answers[call.answer] = (name, call.source), name
        shadow = _with_modules(self.network) if calls else self.network
        found = find_layers(shadow)
        named = {layer.name for layer in found}
        for node in self.network.graph.nodes:
            if node.op == "call_module" and node.target in named:
                (source, *_) = node.all_input_nodes
                self._reads[node], self._answers[node] = (str(node.target), source), str(node.target)
        called = set(self._answers.values())
        self.layers = [_judged(shadow, layer) for layer in found if layer.name in called]
        self.walks = walks_of(shadow, (n.name for n in self.layers))


class _Reader(Interpreter):
    """Runs a graph and tells what its layers read."""

    def __init__(
        self, network: GraphModule, reads: Mapping[Node, tuple[str, Node]], answers: Mapping[Node, str],
        names: set[str], deliver: Deliver, outputs: Outputs | None,
    ) -> None:  # fmt: skip
        super().__init__(network)
        self._reads, self._answers, self._names = reads, answers, names
        self._deliver, self._outputs = deliver, outputs

    def run_node(self, n: Node) -> Any:
        if n in self._reads and self._reads[n][0] in self._names:
            layer, source = self._reads[n]
            x = self.env[source].detach()
            self._deliver(Reading(layer, x, identity(x)))
        out = super().run_node(n)
        if n in self._answers and self._answers[n] in self._names:
            return kept(out, self._answers[n], self._outputs)
        return out


def _with_modules(network: GraphModule) -> GraphModule:
    """Return a copy with modules in the place of layer calls that holds the very tensors of `network`."""
    tensors = {
        id(t): t
        for m in network.modules()
        for own in (m._parameters, m._buffers)
        for t in own.values()
        if t is not None
    }
    shadow = copy.deepcopy(network, memo=dict(tensors))  # type: ignore[arg-type]
    put_modules(shadow)
    return shadow


def _judged(network: GraphModule, layer: Layer) -> Layer:
    """Keep a layer dense whose weight other nodes read as it is."""
    readers = other_readers(network, f"{layer.name}.weight", ())
    if layer.reason is None and readers:
        return replace(layer, reason=f"its weight is also read directly, by {', '.join(readers[:3])}")
    return layer

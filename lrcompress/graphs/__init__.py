"""ONNX in, ONNX out: factorize a graph that nobody has the source of, with NumPy and ONNX Runtime alone.

    graph = open_graph("model.onnx")                        # refused in one line, or fit to be worked on
    layers = find_layers(graph)                             # each with its reason where it must stay as it is
    seen = measure(graph, layers, batches)                  # what layers read, through intermediate outputs
    chosen = by_ratio(graph, layers, 0.5, "auto", seen, batches)
    fitted = fit(graph, layers, chosen, seen, batches)      # in the order of depth, biases refitted
    model = rewrite(graph, layers, {n: f.change for n, f in fitted.items()}).model

Nothing here imports torch; a test holds that.
"""

from __future__ import annotations

from .checkpoint import GraphCheckpoint, is_graph_checkpoint, load_graph_checkpoint, write_graph_checkpoint
from .layers import GraphLayer, find_layers
from .opening import OnnxGraph, Port, open_graph
from .running import Feeds, Run
from .sniffing import is_onnx

__all__ = [
    "Feeds", "GraphCheckpoint", "GraphLayer", "OnnxGraph", "Port", "Run", "find_layers", "is_graph_checkpoint",
    "is_onnx", "load_graph_checkpoint", "open_graph", "write_graph_checkpoint",
]  # fmt: skip

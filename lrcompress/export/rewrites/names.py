"""What is handed from node to node gets a short name; inputs, outputs and constants keep theirs.

layer1.0.conv1.weight_DequantizeLinear_Output  =  v7
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from . import Applied


def apply(model: ir.Model, keep: Collection[str]) -> Applied:
    graph, fired = model.graph, 0
    fixed = {v.name for v in (*graph.inputs, *graph.outputs)} | set(graph.initializers) | set(keep)
    number = 0
    for node in graph:
        node.name = None
        for value in node.outputs:
            if not value.name or value.name in fixed:
                continue
            while f"v{number}" in fixed:
                number += 1
            fired += value.name != f"v{number}"
            value.name = f"v{number}"
            number += 1
    return Applied(fired)

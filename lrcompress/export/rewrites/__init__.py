"""Graph transformations, one per file: what the exporter leaves around the products is folded, shared or dropped.

Each file has a function `apply(model, keep) -> Applied`, which changes an onnx-ir model in place. Tensors named in
`keep` (adapter slots, of which only the device knows the rank) are never touched. What a transformation could have
meant but must not touch, it names with the reason.

    folded    Reshape(Concat(1, 8), …) of numbers alone        = one constant
    no_ops    Slice(x, 0, ∞), Cast to what it is, Expand to …  = x
    as_read   Transpose(W), Reshape(W), Cast(order)            = W stored as it is read
    norms     BatchNorm(Conv(x, W))                            = Conv(x, a·W, b)
    biases    Add(Conv(x, W), b)                               = Conv(x, W, b)
    defaults  attributes that say what would hold without them = none

and when nothing comes after it any more:

    zero_points  DequantizeLinear(codes, scale, 0)             = DequantizeLinear(codes, scale)
    names        of values between nodes                       = short ones
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from ... import plugins


@dataclass(frozen=True)
class Refusal:
    """Where a transformation could have applied and did not, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Applied:
    """How often a transformation applied, and where it refused to."""

    fired: int
    refused: tuple[Refusal, ...] = ()


#: In this order: each meets what the one before it leaves.
ORDER = ("folded", "no_ops", "as_read", "norms", "biases", "folded", "defaults")
#: What is done when weights are in the form in which they are stored.
LAST = ("zero_points", "defaults", "names")


def apply(name: str, model: ir.Model, keep: Collection[str] = ()) -> Applied:
    """Apply one transformation to `model`, in place. Raises `KeyError` for a name that is none."""
    found: Applied = plugins.load(__name__, name).apply(model, keep)
    return found


def finish(source: onnx.ModelProto, keep: Collection[str] = ()) -> onnx.ModelProto:
    """Return `source` as it is stored: nothing reads it after this but the runtime."""
    model = ir.from_proto(source)
    for name in LAST:
        apply(name, model, keep)
    return ir.to_proto(model)


def simplify(source: onnx.ModelProto, keep: Collection[str] = ()) -> tuple[onnx.ModelProto, Mapping[str, Applied]]:
    """Return `source` with as few nodes and bytes as these transformations leave, and what each of them did.

    Shapes that were recorded while tracing are forgotten first: those behind a slot hold for one rank only.
    """
    model = ir.from_proto(source)
    for value in _values(model.graph):
        value.shape = None
    done: dict[str, Applied] = {}
    for name in ORDER:
        found = apply(name, model, keep)
        before = done.get(name, Applied(0))
        done[name] = Applied(before.fired + found.fired, (*before.refused, *found.refused))
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.graph.sort()
    return ir.to_proto(model), done


def _values(graph: ir.Graph) -> list[ir.Value]:
    """Return every value that a node makes, but for the graph's outputs, whose shapes are declared."""
    outputs = {id(o) for o in graph.outputs}
    return [o for node in graph for o in node.outputs if id(o) not in outputs]

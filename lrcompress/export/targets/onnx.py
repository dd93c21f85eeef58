"""ONNX: the graph in one file, every factor a named constant in another, adapter slots as optional inputs.

The gates run here, in the order in which they can fail: names and bytes after tracing, slots after quantizing,
factors after the runtime's own optimizer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from ...factorize import form
from ...manifest import slot_inputs
from ...model.checkpoint import module_layers
from ...model.layers import FactorizedLayer
from ...model.surgery import factorized_layers
from ..gates import factors_stay_apart, names_and_bytes
from ..graph import store_external, strip, trace
from ..needs import check_device, needs
from ..plain import Undone, undo_gauges
from ..quantize import quantize
from ..rewrites import finish, simplify
from ..slots import attach_slots, make_inputs
from . import Request, Written

QUANTIZE = ("none", "fp16", "int8", "int4", "plan")
_BITS = {"fp16": 16, "int8": 8, "int4": 4}
GRAPH, DATA = "model.onnx", "base.data"


def write(stage: Path, request: Request) -> Written:
    """Write `model.onnx` and `base.data`. Raises `ModelError` where a gate finds something lost."""
    module = copy.deepcopy(request.module)
    slotted = copy.deepcopy(module)
    layers = attach_slots(slotted, request.slot_include, request.slots) if "none" not in (request.slots or ()) else []
    planned = _layer_bits(module, request)
    cored = [s.layer for s in layers if s.kind == "core"]
    undone = undo_gauges(module, request.opened, request.calibration or (), planned, cored)
    if undone:
        planned |= {n: u.stored for n, u in undone.items() if u.stored}
        slotted = copy.deepcopy(module)
        layers = attach_slots(slotted, request.slot_include, request.slots) if layers else []
    for _, layer in factorized_layers(slotted):
        layer.as_loaded = True
    entries = [s.manifest() for s in layers]
    slot_names = [t["name"] for e in entries for t in slot_inputs(e)]
    factors = [
        f"{layer}.{f}"
        for layer, spec in module_layers(module).items()
        if "tied" not in spec
        for f, shape in spec["factors"].items()
        if f not in spec.get("shares", {}) and math.prod(shape) > 0
    ]
    rebuilt, more = _dense_when_loaded(module, cored), _more_when_loaded(module)
    once = sum(len(spec.get("shares", {})) for spec in module_layers(module).values())
    model = trace(request.opened, slotted, where="export")
    names_and_bytes(model, slotted, slot_names)
    make_inputs(model.graph, entries)
    model, _ = simplify(model, slot_names)
    strip(model)
    request.advance(1, "gates")
    weights: list[dict[str, Any]] = []
    if request.quantize != "none":
        bits = _of_weights(model, request.quantize, planned)
        blocks = {n: request.blocks.get(n.rpartition(".")[0], request.block) for n in bits}
        stored = [n for n in bits if (u := undone.get(n.rpartition(".")[0])) and u.stored]
        quantized = quantize(
            model, bits, slots=slot_names, calibration=request.calibration, block=blocks, stored=stored
        )
        model, weights = quantized.model, quantized.rows
    model = finish(model, slot_names)
    strip(model)
    need = needs(model)
    if request.profile is not None:
        check_device(need, request.profile)
    blob = store_external(model, DATA)
    (stage / GRAPH).write_bytes(model.SerializeToString(deterministic=True))
    (stage / DATA).write_bytes(blob)
    onnx.checker.check_model(str(stage / GRAPH))
    if request.quantize == "none":
        factors_stay_apart(stage / GRAPH, factors, slot_names, sum(rebuilt.values()), more, once)
    request.advance(1, "written")
    weights += [_told(name, u) for name, u in undone.items()]
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    dense = {*rebuilt, *(w["name"].rpartition(".")[0] for w in weights if w["kind"] == "conv" and w.get("bits") == 4)}
    dense |= {n for n, u in undone.items() if u.stored}
    about = {"opset": opset, "ir": model.ir_version, "dense_at_run_time": sorted(dense)}
    return Written(entries, _outputs(model, request.golden), factors, about, weights, need.version)


def _dense_when_loaded(module: nn.Module, cored: Sequence[str]) -> dict[str, int]:
    """Return the layers that a runtime holds densely, whatever is stored of them, and their numbers."""
    found = {
        name: math.prod(spec["shape"])
        for name, spec in module_layers(module).items()
        # Of an embedding, only the rows that are looked up are rebuilt.
        if getattr(form(spec["form"]), "DENSE_AT_RUN_TIME", False) and spec["kind"] != "embedding"
    }
    return found | {
        name: math.prod(layer.shape)
        for name, layer in factorized_layers(module)
        if name not in cored and getattr(form(layer.form), "is_dense_when_loaded", _never)(layer.shape, layer.rank)
    }


def _more_when_loaded(module: nn.Module) -> int:
    """Return how many numbers a runtime may hold beyond those that are stored: tied factors turned, bases made whole."""
    turned = sum(
        math.prod(f) for spec in module_layers(module).values() if "tied" in spec for f in spec["factors"].values()
    )
    return int(turned + sum(_made_whole(layer) for _, layer in factorized_layers(module)))


def _never(shape: tuple[int, ...], rank: Any) -> bool:
    return False


def _made_whole(layer: FactorizedLayer) -> int:
    """Return how many numbers a runtime holds of a pivoted layer beyond those that are stored: it makes the bases whole."""
    own, shape = form(layer.form), layer.shape
    return form(own.PLAIN).n_params(shape, layer.rank) - own.n_params(shape, layer.rank) if hasattr(own, "PLAIN") else 0


def _told(name: str, undone: Undone) -> dict[str, Any]:
    """Return the row of a pivoted layer that is to be rounded."""
    if not undone.stored:
        return {
            "name": name,
            "kind": "layer",
            "gauge": f"{name} became {undone.form}: fewer operators, and rounding costs it less",
        }
    cost = f"pivoted, rounding would cost it {undone.error:.3g} of its answers, not {undone.plain_error:.3g}"
    return {
        "name": name,
        "kind": "layer",
        "gauge": f"{name} is stored in {undone.stored} bits and computed in 32: an adapter lies between its factors; {cost}",
    }


def _layer_bits(module: nn.Module, request: Request) -> dict[str, int]:
    """Return the bits that are asked of single layers."""
    if request.quantize == "plan":
        return dict(request.bits)
    bits = _BITS.get(request.quantize)
    return {} if bits is None else {name: bits for name, _ in factorized_layers(module)}


def _of_weights(model: onnx.ModelProto, precision: str, layers: Mapping[str, int]) -> dict[str, int]:
    """Return the bits of every weight: its layer's, or those of the whole model."""
    names = (t.name for t in model.graph.initializer)
    return {n: b for n in names if (b := layers.get(n.rpartition(".")[0], _BITS.get(precision, 32))) != 32}


def _outputs(model: onnx.ModelProto, golden: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    found = []
    for o in model.graph.output:
        array = golden.get(f"compressed/{o.name}")
        dims = [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim]
        found.append({"name": o.name, "dtype": str(array.dtype) if array is not None else "float32", "shape": dims})
    return found

"""ONNX: the graph in one file, every factor a named constant in another, adapter slots as optional inputs.

The gates run here, in the order in which they can fail: names and bytes after tracing, slots after quantizing,
factors after the runtime's own optimizer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...factorize import form
from ...manifest import slot_inputs
from ...model.checkpoint import module_layers
from ..gates import factors_stay_apart, names_and_bytes
from ..graph import OPSET, store_external, trace
from ..quantize import quantize_int8
from ..slots import attach_slots, make_inputs
from . import Request, Written

QUANTIZE = ("none", "int8")
GRAPH, DATA = "model.onnx", "base.data"


def write(stage: Path, request: Request) -> Written:
    """Write `model.onnx` and `base.data`. Raises `ModelError` where a gate finds something lost."""
    traced = copy.deepcopy(request.module)
    layers = attach_slots(traced, request.slot_include, request.slots) if "none" not in (request.slots or ()) else []
    entries = [s.manifest() for s in layers]
    slot_names = [t["name"] for e in entries for t in slot_inputs(e)]
    factors = [
        f"{layer}.{f}"
        for layer, spec in module_layers(request.module).items()
        if "tied" not in spec
        for f in spec["factors"]
        if f not in spec.get("shares", {})
    ]
    rebuilt = {
        name: math.prod(spec["shape"])
        for name, spec in module_layers(request.module).items()
        if getattr(form(spec["form"]), "DENSE_AT_RUN_TIME", False)
    }
    turned = sum(
        math.prod(f)
        for spec in module_layers(request.module).values()
        if "tied" in spec
        for f in spec["factors"].values()
    )
    once = sum(len(spec.get("shares", {})) for spec in module_layers(request.module).values())
    model = trace(request.opened, traced, where="export")
    names_and_bytes(model, traced, slot_names)
    make_inputs(model.graph, entries)
    request.advance(1, "gates")
    if request.quantize == "int8":
        model = quantize_int8(model, slots=slot_names, calibration=request.calibration)
    blob = store_external(model, DATA)
    (stage / GRAPH).write_bytes(model.SerializeToString(deterministic=True))
    (stage / DATA).write_bytes(blob)
    onnx.checker.check_model(str(stage / GRAPH))
    if request.quantize == "none":
        factors_stay_apart(stage / GRAPH, factors, slot_names, sum(rebuilt.values()), turned, once)
    request.advance(1, "written")
    about = {"opset": OPSET, "ir": model.ir_version, "dense_at_run_time": sorted(rebuilt)}
    return Written(entries, _outputs(model, request.golden), factors, about)


def _outputs(model: onnx.ModelProto, golden: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    found = []
    for o in model.graph.output:
        array = golden.get(f"compressed/{o.name}")
        dims = [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim]
        found.append({"name": o.name, "dtype": str(array.dtype) if array is not None else "float32", "shape": dims})
    return found

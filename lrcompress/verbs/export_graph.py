"""The verb `export` for a compressed ONNX graph: the same folder as of every export, from the graph itself.

There is nothing to trace: the graph is what it is, with its names and its opset. Constants go to `base.data`, goldens
are the answers of the compressed and of the original graph in ONNX Runtime. A graph has no adapter slots.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..data import Data, open_data
from ..errors import CommandError, LrcompressError, LrcompressWarning, ModelError
from ..export.gates import factors_stay_apart
from ..export.graph import store_external
from ..export.needs import FLOOR
from ..export.packing.constants import raise_opset
from ..export.quantize import quantize as in_bits
from ..files import check_output, sha256_file, staged_folder, write_json
from ..graphs import Feeds, GraphCheckpoint, OnnxGraph, Run, load_graph_checkpoint
from ..graphs.checkpoint import inline
from ..graphs.opening import line, needed_runtime, opset_of
from ..graphs.running import example_feeds
from ..manifest import DATA, GRAPH, REQUIRED, base_id, slots_id, version_key
from ..plan.bits import BLOCK
from ..plan.profile import DeviceProfile, load_profile
from ..progress import Progress, Silent
from ..validate.tolerances import tolerances

WHERE = "lrcompress export"
MAKER, MARKER = "lrcompress export", "manifest.json"
GOLDEN_SAMPLES, _CALIBRATION_SAMPLES = 8, 256
BITS = {"fp16": 16, "int8": 8, "int4": 4}
QUANTIZE = ("none", *BITS)


def export_graph(
    compressed: str | Path,
    *,
    slots: Sequence[str] | None = None,
    quantize: str = "none",
    calib: str | Path | Data | None = None,
    original: str | Path | None = None,
    name: str | None = None,
    device: str | Path | None = None,
    block: int = BLOCK,
    output: str | Path = "exported",
    progress: Progress | None = None,
    **others: Any,
) -> tuple[dict[str, Any], Path]:
    """Write a compressed graph as a folder that a device can be given; return the report and the folder.

    Raises `CommandError` for what a graph cannot have, `ModelError` for a device whose runtime is too old for it.
    """
    progress, dest = progress or Silent(), Path(output)
    _check(slots, quantize, others)
    profile = None if device is None else load_profile(device)
    check_output(dest, maker=MAKER, marker=MARKER)
    found = load_graph_checkpoint(Path(compressed))
    _check_device(found, profile)
    with progress.task("export", total=3) as advance:
        batches = None if calib is None else _batches(found.graph, calib)
        golden = _golden(found, batches, original)
        advance(1, "goldens")
        model = onnx.ModelProto()
        model.CopyFrom(found.graph.model)
        inline(model.graph, found.graph)
        weights: list[dict[str, Any]] = []
        if quantize != "none":
            model, weights = _quantized(found, model, batches, golden, BITS[quantize], block)
        with staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
            report = _write(stage, dest, found, model, golden, quantize, name, profile)
            advance(2, "written")
    return {**report, "weights": weights, "output": str(dest)}, dest


def _check(slots: Sequence[str] | None, quantize: str, others: Mapping[str, Any]) -> None:
    if others.get("target", "onnx") != "onnx":
        raise CommandError(f"{WHERE} --target", "onnx for a graph", others["target"])
    if slots is not None and tuple(slots) != ("none",):
        expected = "no adapter slots for an ONNX graph"
        raise CommandError(f"{WHERE} --slots", expected, ",".join(slots), "factorize the network in torch for slots")
    for option in ("merge", "adapters", "slot_include", "emit"):
        if others.get(option):
            expected = "no adapters for an ONNX graph"
            raise CommandError(f"{WHERE} --{option.replace('_', '-')}", expected, others[option])
    if others.get("kv_cache"):
        raise CommandError(f"{WHERE} --kv-cache", "a Hugging Face decoder", "an ONNX graph, which is what it is")
    if quantize not in QUANTIZE:
        raise CommandError(f"{WHERE} --quantize", f"{' or '.join(QUANTIZE)} for an ONNX graph", quantize)


def _check_device(found: GraphCheckpoint, profile: DeviceProfile | None) -> None:
    needed = _least_runtime(found.graph.model)
    if profile is not None and profile.ort.max is not None and version_key(profile.ort.max) < version_key(needed):
        got = f"{profile.ort.max} on {profile.name}"
        raise ModelError(
            found.path / GRAPH, f"ONNX Runtime {needed} or newer for opset {found.graph.opset}, IR {found.graph.model.ir_version}",
            got, "export the original with an older opset",
        )  # fmt: skip


def _least_runtime(model: onnx.ModelProto) -> str:
    """Return the oldest runtime for a graph: opsets that fewer bits raise it to need none newer than a device has anyway."""
    return max(needed_runtime(model), FLOOR, key=version_key)


def _batches(graph: OnnxGraph, calib: str | Path | Data) -> list[dict[str, np.ndarray]]:
    """Return some of the data, batch by batch, as the graph takes them."""
    feeds = Feeds(graph)
    data = calib if isinstance(calib, Data) else open_data(calib, inputs=feeds.ports)
    small = data.take(slice(0, min(_CALIBRATION_SAMPLES, len(data))))
    size = feeds.groups(GOLDEN_SAMPLES)
    batches = [feeds({k: np.asarray(v) for k, v in b.inputs.items()}) for b in small.batches(size)]
    return batches if feeds.fixed is None else [b for b in batches if all(len(v) == size for v in b.values() if v.ndim)]


def _quantized(
    found: GraphCheckpoint,
    model: onnx.ModelProto,
    batches: Sequence[dict[str, np.ndarray]] | None,
    golden: Mapping[str, np.ndarray],
    bits: int,
    block: int,
) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """Return the model in fewer bits, and what became of each weight; ONNX Runtime's tools do not take every graph."""
    try:
        raised = bits == 4 and _may_be_raised(found.graph, model, golden)
        made = in_bits(model, bits, slots=[], calibration=batches, block=block, may_raise=raised)
        return made.model, made.rows
    except LrcompressError:
        raise
    except Exception as e:  # whatever those tools raise
        expected = "a graph that the quantizer of ONNX Runtime takes"
        raise ModelError(found.path / GRAPH, expected, line(e), "export it with --quantize none") from e


def _may_be_raised(graph: OnnxGraph, model: onnx.ModelProto, golden: Mapping[str, np.ndarray]) -> bool:
    """Return whether the graph is, word by word, one of the opset that has 4 bits, too, and answers the same bits."""
    raised = onnx.ModelProto()
    raised.CopyFrom(model)
    raise_opset(raised)
    inputs = {k.removeprefix("input/"): v for k, v in golden.items() if k.startswith("input/")}
    try:
        answers = Run(graph, raised)(inputs)[0]
    except LrcompressError:  # an operator has changed since
        return False
    return all(np.array_equal(a, golden[f"compressed/{n}"], equal_nan=True) for n, a in answers.items())


def _golden(
    found: GraphCheckpoint, batches: Sequence[dict[str, np.ndarray]] | None, original: str | Path | None
) -> dict[str, np.ndarray]:
    """Return golden inputs, the answers of the compressed graph and, where it can be opened, of the original."""
    if batches:
        inputs = batches[0]
        compressed = Run(found.graph)(inputs)[0]
    else:
        inputs, run = example_feeds(found.graph, batch=GOLDEN_SAMPLES), Run(found.graph)
        try:
            compressed = run(inputs)[0]
        except LrcompressError as e:
            expected = "inputs that the graph runs on: random ones do not do"
            raise ModelError(found.path / GRAPH, expected, e.got, "give some with --calib") from e
    bad = next((n for n, v in compressed.items() if v.dtype.kind == "f" and not np.isfinite(v).all()), None)
    if bad is not None:
        raise ModelError(
            f"{found.path / GRAPH}: output {bad}", "finite answers to golden inputs", "NaN", "give --calib"
        )
    arrays = {f"input/{k}": v for k, v in inputs.items()} | {f"compressed/{k}": v for k, v in compressed.items()}
    try:
        reference = found.open_original(None if original is None else Path(original))
    except LrcompressError as e:
        if original is not None:
            raise
        warnings.warn(f"golden.npz has no answers of the original: {e}", LrcompressWarning, stacklevel=2)
        return arrays
    return arrays | {f"original/{k}": v for k, v in Run(reference)(inputs)[0].items()}


def _write(
    stage: Path, dest: Path, found: GraphCheckpoint, model: onnx.ModelProto, golden: Mapping[str, np.ndarray],
    quantize: str, name: str | None, profile: DeviceProfile | None,
) -> dict[str, Any]:  # fmt: skip
    """Write graph, constants, goldens, limits, and the manifest over them."""
    from .export import fit_tolerance  # that module dispatches to this one

    blob = store_external(model, DATA)
    (stage / GRAPH).write_bytes(model.SerializeToString(deterministic=True))
    (stage / DATA).write_bytes(blob)
    factors = [n for layer in found.spec["layers"].values() for n in layer["names"].values()]
    if quantize == "none":
        factors_stay_apart(stage / GRAPH, factors, [])
    np.savez(stage / "golden.npz", **golden)  # type: ignore[arg-type]
    write_json(stage / "device.json", _limits(found.graph.n_params, profile))
    precision = "fp32" if quantize == "none" else quantize
    files: dict[str, dict[str, Any]] = {
        n: {"sha256": sha256_file(stage / n), "bytes": (stage / n).stat().st_size} for n in REQUIRED
    }
    value: dict[str, Any] = {
        "schema": 1, "made_by": MAKER, "model": name or _model_name(found),
        "base_id": base_id(graph=files[GRAPH]["sha256"], data=files[DATA]["sha256"], slots=[]),
        "slots_id": slots_id(slots=[], factors=found.digest), "factors_digest": found.digest, "files": files,
        "inputs": [p.as_dict() for p in found.graph.inputs], "outputs": [p.as_dict() for p in found.graph.outputs],
        "opset": opset_of(model), "ir": model.ir_version,
        "ort": {"min": _least_runtime(model), "max": None},
        "precision": precision, "slots": [], "tolerances": tolerances(precision), "factors": factors,
        "params": found.graph.n_params,
        "compressed": {"path": os.path.relpath(found.path.resolve(), dest.resolve()), "digest": found.digest},
        "versions": {p: importlib.metadata.version(p) for p in ("onnx", "onnxruntime")},
    }  # fmt: skip
    fit_tolerance(stage, value, golden, precision)
    write_json(stage / MARKER, value)
    sizes = {
        "graph": files[GRAPH]["bytes"], "base": files[DATA]["bytes"], "total": sum(f["bytes"] for f in files.values()),
    }  # fmt: skip
    return {
        "base_id": value["base_id"], "slots_id": value["slots_id"], "bytes": sizes, "slots": [], "payloads": [],
        "opset": value["opset"], "precision": precision, "model": value["model"],
    }  # fmt: skip


def _model_name(found: GraphCheckpoint) -> str:
    """Return a name that is safe in a path and a URL: that of the file the graph came from."""
    place = Path(str(found.spec["source"].get("path") or "model"))
    stem = place.parent.name if place.stem == "model" and place.parent.name not in ("", "..") else place.stem
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-.") or "model"


def _limits(params: int, profile: DeviceProfile | None) -> dict[str, Any]:
    most = max(4 * params, 1 << 20)
    limits: dict[str, Any] = {"schema": 1, "max_payload_bytes": most, "latency_factor": 20.0, "threads": 1}
    if profile is not None:
        limits |= {
            "device": profile.name, "threads": profile.threads, "max_payload_bytes": min(most, profile.max_update_bytes),
        }  # fmt: skip
    return limits


__all__ = ["export_graph"]

"""The verb `export`: a compressed (or plain) model becomes a folder that a device can be given.

    exported/ model.onnx  the graph; base.data its constants; manifest.json names, hashes, slots, tolerances
              golden.npz  inputs and the answers of the compressed and of the original model
              device.json limits; payloads/NAME.safetensors the adapters that belong to this base
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from .. import payload as payloads
from ..adapt._files import read_adapter
from ..data import Data
from ..errors import CommandError, LrcompressError, LrcompressWarning, ModelError
from ..export.gates import factors_stay_apart, names_and_bytes, outputs_agree
from ..export.graph import OPSET, example_inputs, store_external, trace
from ..export.merging import merge_adapter
from ..export.payloads import payload_tensors
from ..export.quantize import quantize_int8
from ..export.slots import attach_slots, make_inputs
from ..files import check_output, sha256_bytes, staged_folder, write_json
from ..golden import project
from ..manifest import Manifest, base_id, slots_id
from ..model import OpenedModel
from ..model.checkpoint import Compressed, load_compressed, module_layers, state_of, tensors_digest
from ..model.surgery import count_parameters
from ..progress import Progress, Silent
from ..runtime import Session
from ..validate.tolerances import tolerances
from .predict import predictor
from .sources import for_model

MAKER = "lrcompress export"
MARKER = "manifest.json"
GOLDEN_SAMPLES = 8
_CALIBRATION_SAMPLES = 256


@dataclass(frozen=True)
class ExportResult:
    """`data`: the report; `output`: the folder written."""

    data: dict[str, Any]
    output: Path


def export(
    compressed: str | Path | Compressed | OpenedModel = "compressed",
    *,
    target: str = "onnx",
    slots: Sequence[str] = ("lora",),
    slot_include: Sequence[str] = (),
    quantize: str = "none",
    calib: str | Data | None = None,
    merge: str | Path | None = None,
    adapters: Sequence[str | Path] | None = None,
    original: str | Path | None = None,
    name: str | None = None,
    output: str | Path = "exported",
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write `compressed` as ONNX with adapter slots, its goldens and its manifest.

    `adapters`: folders to ship as payloads (default: every folder of `adapters/` beside the checkpoint that belongs
    to it). `merge`: one to bake in instead. `calib`: data for static int8 and for the goldens. An `OpenedModel` gives
    the plain baseline. Raises `CommandError`, `ModelError`, `ParityError`.
    """
    progress = progress or Silent()
    dest = Path(output)
    _check(target, slots, quantize)
    check_output(dest, maker=MAKER, marker=MARKER)
    source = _source(compressed)
    module = copy.deepcopy(source.module)
    with progress.task("export", total=5) as advance:
        if merge is not None:
            merge_adapter(module, read_adapter(_adapter_folder(merge, source.folder)))
        digest = source.digest if merge is None else tensors_digest(state_of(module), module_layers(module))
        data = None if calib is None else for_model(calib, source.opened)
        golden = _golden(source, module, data, original, {"trust_pickle": trust_pickle, "trust_remote_code": trust_remote_code})
        advance(1, "traced")
        with staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
            report = _write(stage, dest, source, module, digest, slots, slot_include, quantize, data, golden, name, advance)
            shipped = [] if merge is not None or not report["slots"] else _payloads(stage, _adapters(adapters, source.folder), digest)
            report["payloads"] = [{"path": str(dest / "payloads" / p.name), "bytes": p.stat().st_size} for p in shipped]
            advance(1, "payloads")
    report["output"] = str(dest)
    return ExportResult(report, dest)


@dataclass(frozen=True)
class _Source:
    opened: OpenedModel
    module: nn.Module
    digest: str
    folder: Path | None
    compressed: Compressed | None
    name: str


def _check(target: str, slots: Sequence[str], quantize: str) -> None:
    where = "lrcompress export"
    if target != "onnx":
        raise CommandError(f"{where} --target", "onnx", target)
    if quantize not in ("none", "int8"):
        raise CommandError(f"{where} --quantize", "none or int8", quantize)
    unknown = sorted(set(slots) - {"lora", "none"})
    if unknown or ("none" in slots and len(slots) > 1):
        raise CommandError(f"{where} --slots", "lora (which also serves LoHa) or none", ",".join(slots))


def _source(compressed: str | Path | Compressed | OpenedModel) -> _Source:
    if isinstance(compressed, OpenedModel):
        if compressed.module is None:
            raise ModelError("export", "a network", "a state dict has no graph", "give --arch and --input")
        digest = tensors_digest(state_of(compressed.module), {})
        return _Source(compressed, compressed.module, digest, None, None, _model_name(compressed.path))
    found = compressed if isinstance(compressed, Compressed) else load_compressed(Path(compressed))
    source = (found.spec["source"].get("path") or "model") if found.spec else "model"
    return _Source(found.opened, found.need_module("export"), found.digest, found.path, found, _model_name(Path(source)))


def _model_name(path: Path | None) -> str:
    """Return a name that is safe in a path and a URL: the file's, or its folder's where the file is called model.*."""
    if path is None:
        return "model"
    stem = path.stem if path.stem not in ("model", "pytorch_model") or len(path.parts) < 2 else path.parent.name or path.stem
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-.") or "model"


def _golden(
    source: _Source, module: nn.Module, data: Data | None, original: str | Path | None, trust: dict[str, bool]
) -> dict[str, np.ndarray]:
    """Return golden inputs and the answers of the module and, where it can be opened, of the original."""
    if data is not None and len(data) >= 1:
        batch = next(iter(data.take(slice(0, min(GOLDEN_SAMPLES, len(data)))).batches(GOLDEN_SAMPLES)))
        inputs = {k: np.asarray(v) for k, v in batch.inputs.items()}
    else:
        inputs = example_inputs(source.opened.inputs, module, batch=GOLDEN_SAMPLES)
    if not inputs:
        raise ModelError(source.folder or "export", "the model's inputs", "none are known", "a state dict has no graph; give --arch and --input")
    arrays = {f"input/{k}": v for k, v in inputs.items()}
    arrays |= {f"compressed/{k}": v for k, v in predictor(source.opened, module)(inputs).items()}
    reference: OpenedModel | None = None
    if source.compressed is None:
        reference = source.opened
    else:
        try:
            reference = source.compressed.open_original(None if original is None else Path(original), **trust)
        except LrcompressError as e:
            if original is not None:
                raise
            warnings.warn(f"golden.npz has no answers of the original: {e}", LrcompressWarning, stacklevel=2)
    if reference is not None and reference.module is not None:
        arrays |= {f"original/{k}": v for k, v in predictor(reference, reference.module)(inputs).items()}
    return arrays


def _write(
    stage: Path, dest: Path, source: _Source, module: nn.Module, digest: str, slots: Sequence[str], slot_include: Sequence[str],
    quantize: str, data: Data | None, golden: Mapping[str, np.ndarray], name: str | None, advance: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write everything but payloads; one pass in the order of the gates, which is why it is long."""
    traced = copy.deepcopy(module)
    slot_layers = attach_slots(traced, slot_include) if "none" not in slots else []
    entries = [s.manifest() for s in slot_layers]
    slot_names = [t["name"] for e in entries for t in e["tensors"]]
    factors = [f"{layer}.{f}" for layer, spec in module_layers(module).items() for f in spec["factors"]]
    model = trace(source.opened, traced, where="export")
    names_and_bytes(model, traced, slot_names)
    make_inputs(model.graph, entries)
    advance(1, "gates")
    if quantize == "int8":
        feeds = None if data is None else _feeds(data)
        model = quantize_int8(model, slots=slot_names, calibration=feeds)
    blob = store_external(model, "base.data")
    graph = model.SerializeToString(deterministic=True)
    (stage / "model.onnx").write_bytes(graph)
    (stage / "base.data").write_bytes(blob)
    onnx.checker.check_model(str(stage / "model.onnx"))
    if quantize == "none":
        factors_stay_apart(stage / "model.onnx", factors, slot_names)
    advance(1, "written")
    np.savez(stage / "golden.npz", **golden)  # type: ignore[arg-type]
    limits = {"schema": 1, "max_payload_bytes": max(4 * sum(p.numel() for p in module.parameters()), 1 << 20), "latency_factor": 20.0, "threads": 1}
    write_json(stage / "device.json", limits)
    precision = "fp32" if quantize == "none" else quantize
    files = {n: (stage / n).read_bytes() for n in ("model.onnx", "base.data", "golden.npz", "device.json")}
    inputs = [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in source.opened.inputs]
    value: dict[str, Any] = {
        "schema": 1, "made_by": MAKER, "model": name or source.name,
        "base_id": base_id(graph=sha256_bytes(graph), data=sha256_bytes(blob), slots=entries),
        "slots_id": slots_id(slots=entries, factors=digest), "factors_digest": digest,
        "files": {n: {"sha256": sha256_bytes(b), "bytes": len(b)} for n, b in files.items()},
        "inputs": inputs, "outputs": _outputs(model, golden),
        "opset": OPSET, "ir": model.ir_version, "ort": {"min": "1.22.0", "max": None}, "precision": precision,
        "slots": entries, "tolerances": tolerances(precision), "factors": factors, "params": count_parameters(module),
        "compressed": None if source.folder is None else {"path": os.path.relpath(source.folder.resolve(), dest.resolve()), "digest": source.digest},
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "onnx", "onnxruntime", "onnxscript")},
    }  # fmt: skip
    _fit_tolerance(stage, value, golden, precision)
    write_json(stage / MARKER, value)
    total = sum(f["bytes"] for f in value["files"].values())
    return {
        "base_id": value["base_id"], "slots_id": value["slots_id"],
        "bytes": {"graph": len(graph), "base": len(blob), "total": total}, "slots": entries, "payloads": [], "opset": OPSET,
        "precision": precision, "model": value["model"],
    }  # fmt: skip


def _fit_tolerance(stage: Path, value: dict[str, Any], golden: Mapping[str, np.ndarray], precision: str) -> None:
    """Gate 4. At fp32 the runtime must match the module; at int8 its own distance is measured and becomes the tolerance.

    An int8 answer that is further from the fp32 one than half of the answer's range is refused.
    """
    write_json(stage / MARKER, value)
    session = Session(stage, threads=1)
    inputs = {k.removeprefix("input/"): v for k, v in golden.items() if k.startswith("input/")}
    expected = {k.removeprefix("compressed/"): v for k, v in golden.items() if k.startswith("compressed/")}
    got = session.run(inputs)
    if precision == "fp32":
        outputs_agree(expected, got, value["tolerances"]["cpu"], where="export")
        return
    distance = max(
        float(np.max(np.abs(v - got[k]), initial=0.0)) / max(1.0, float(np.max(np.abs(v), initial=0.0))) for k, v in expected.items()
    )
    outputs_agree(expected, got, 0.5, where="export --quantize int8")
    value["tolerances"] = tolerances(precision, distance)


def _outputs(model: onnx.ModelProto, golden: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    found = []
    for o in model.graph.output:
        array = golden.get(f"compressed/{o.name}")
        dims = [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim]
        found.append({"name": o.name, "dtype": str(array.dtype) if array is not None else "float32", "shape": dims})
    return found


def _feeds(data: Data) -> list[dict[str, np.ndarray]]:
    small = data.take(slice(0, min(_CALIBRATION_SAMPLES, len(data))))
    return [{k: np.asarray(v) for k, v in b.inputs.items()} for b in small.batches(8)]


def _adapter_folder(name: str | Path, folder: Path | None) -> Path:
    """Return the folder that an adapter's name or path means: beside the checkpoint, here, or as given."""
    places = [Path(name)] if os.sep in str(name) else [*([folder.parent / "adapters" / name] if folder else []), Path("adapters") / name, Path(name)]
    for place in places:
        if place.is_dir():
            return place
    raise CommandError("lrcompress export", "an adapter folder", f"{name}: not in {', '.join(str(p.parent) for p in places)}", "train one with 'lrcompress recover'")


def _adapters(given: Sequence[str | Path] | None, folder: Path | None) -> list[Path]:
    if given is not None:
        return [_adapter_folder(a, folder) for a in given]
    if folder is None or not (folder.parent / "adapters").is_dir():
        return []
    return sorted(p for p in (folder.parent / "adapters").iterdir() if (p / "adapter_config.json").is_file())


def _payloads(stage: Path, adapters: Sequence[Path], digest: str) -> list[Path]:
    """Write the payload of every adapter that belongs to this base; say which do not."""
    manifest = Manifest.load(stage)
    out = []
    for folder in adapters:
        if read_adapter(folder).base != digest:
            warnings.warn(f"{folder} was trained on another base: not shipped", LrcompressWarning, stacklevel=3)
            continue
        kind, tensors = payload_tensors(folder, manifest)
        bare = payloads.build(tensors, manifest=manifest, kind=kind, encoding="f32")
        session = Session(stage, threads=1, manifest=manifest, verify=False)
        session.swap(payloads.parse(bare))
        with np.load(stage / "golden.npz") as golden:
            answers = session.run({k.removeprefix("input/"): golden[k] for k in golden if k.startswith("input/")})
        data = payloads.build(tensors, manifest=manifest, kind=kind, encoding="f32", golden=project(answers))
        (stage / "payloads").mkdir(exist_ok=True)
        path = stage / "payloads" / f"{folder.name}.safetensors"
        path.write_bytes(data)
        out.append(path)
    return out


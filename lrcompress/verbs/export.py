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
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from .. import payload as payloads
from ..adapt._files import AdapterFolder, read_adapter
from ..data import Data
from ..errors import CommandError, LrcompressError, LrcompressWarning, ModelError
from ..export import onnx_adapter
from ..export.gates import outputs_agree
from ..export.graph import example_inputs
from ..export.merging import merge_adapter
from ..export.payloads import check_base, payload_tensors
from ..export.slots import ALL_KINDS as SLOT_KINDS
from ..export.targets import Request, Written
from ..export.targets import target as find_target
from ..files import check_output, sha256_file, staged_folder, write_json
from ..graphs import is_graph_checkpoint
from ..manifest import DATA, GRAPH, REQUIRED, Manifest, base_id, slots_id
from ..model import OpenedModel
from ..model.adapting import every_target
from ..model.cache import CachedModel, with_cache
from ..model.checkpoint import Compressed, load_compressed, module_layers, state_of, tensors_digest
from ..model.describing import copy_notices
from ..model.surgery import count_parameters, wrap_dense
from ..plan.bits import BITS, BLOCK, BLOCKS
from ..plan.profile import DeviceProfile, load_profile
from ..progress import Progress, Silent
from ..runtime import Session
from ..validate.tolerances import tolerances
from .adapter_out import with_goldens
from .export_graph import export_graph
from .predict import predictor
from .sources import for_model

MAKER = "lrcompress export"
MARKER = "manifest.json"
GOLDEN_SAMPLES = 8
_CALIBRATION_SAMPLES = 256
#: What may be written beside a payload.
EMITS = ("onnx_adapter",)


@dataclass(frozen=True)
class ExportResult:
    """`data`: the report; `output`: the folder written."""

    data: dict[str, Any]
    output: Path


def export(
    compressed: str | Path | Compressed | OpenedModel = "compressed",
    *,
    target: str = "onnx",
    slots: Sequence[str] | None = None,
    slot_include: Sequence[str] = (),
    quantize: str = "none",
    calib: str | Data | None = None,
    merge: str | Path | None = None,
    adapters: Sequence[str | Path] | None = None,
    original: str | Path | None = None,
    name: str | None = None,
    device: str | Path | None = None,
    emit: Sequence[str] = (),
    kv_cache: bool = False,
    block: int | None = None,
    output: str | Path = "exported",
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write `compressed` as ONNX with adapter slots, its goldens and its manifest.

    `slots`: kinds to wire (default: lora, and core where layers are factorized; dora only where asked for). `adapters`: folders to ship as payloads (default: every folder of `adapters/` beside the checkpoint that belongs
    to it). `merge`: one to bake in instead. `calib`: data for static int8 and for the goldens. `device`: a profile, by
    name or file, whose limits go into `device.json`; a runtime of its that is too old is refused. `emit`: files to write
    beside each payload: onnx_adapter. `kv_cache`: a decoder takes its keys and values as inputs and gives them back. `block`:
    inputs that share a scale at 4 bits, 32 or what the plan says: more are fewer bytes, coarser. An `OpenedModel` gives the plain baseline. Raises
    `CommandError`, `ModelError`, `ParityError`.
    """
    progress = progress or Silent()
    dest = Path(output)
    if block not in (None, *BLOCKS):
        raise CommandError("lrcompress export --block", f"one of {', '.join(map(str, BLOCKS))}", block)
    if isinstance(compressed, str | Path) and is_graph_checkpoint(Path(compressed)):
        report, dest = export_graph(
            compressed, target=target, slots=slots, slot_include=slot_include, quantize=quantize, calib=calib, merge=merge,
            adapters=adapters, original=original, name=name, device=device, emit=tuple(emit), kv_cache=kv_cache, output=output,
            block=block or BLOCK, progress=progress,
        )  # fmt: skip
        return ExportResult(report, dest)
    exporter = _check(target, slots or ("none",), quantize, emit)
    profile = None if device is None else load_profile(device)
    check_output(dest, maker=MAKER, marker=MARKER)
    source = _source(compressed)
    bits, blocks = _planned_bits(source) if quantize == "plan" else ({}, {})
    if kv_cache:
        source = replace(source, opened=with_cache(source.opened))
    module = copy.deepcopy(source.module)
    chosen = [] if merge is not None else _adapters(adapters, source.folder, source.digest)
    for folder in chosen:  # what cannot be shipped is said before a graph is traced
        check_base(folder, read_adapter(folder, every_target(module)).base, source.digest)
    with progress.task("export", total=5) as advance:
        if merge is not None:
            merge_adapter(module, _of_base(read_adapter(_adapter_folder(merge, source.folder)), source.digest))
        digest = source.digest if merge is None else tensors_digest(state_of(module), module_layers(module))
        data = None if calib is None else _with_past(for_model(calib, source.opened), source.opened, module)
        trust = {"trust_pickle": trust_pickle, "trust_remote_code": trust_remote_code}
        golden = _golden(source, module, data, original, trust, quantize)
        advance(1, "traced")
        feeds = None if data is None else calibration_feeds(data)
        request = Request(
            source.opened, module, slots, slot_include, quantize, feeds, golden, advance, bits, profile,
            block or BLOCK, {} if block else blocks,
        )  # fmt: skip
        with staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
            report = _write(stage, dest, source, module, digest, exporter, request, name, profile)
            shipped = _payloads(stage, chosen, module, emit) if report["slots"] else []
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


def _check(target: str, slots: Sequence[str], quantize: str, emit: Sequence[str]) -> ModuleType:
    where, exporter = "lrcompress export", find_target(target)
    if quantize not in exporter.QUANTIZE:
        raise CommandError(f"{where} --quantize", " or ".join(exporter.QUANTIZE), quantize)
    other = sorted(set(emit) - set(EMITS))
    if other:
        raise CommandError(f"{where} --emit", " or ".join(EMITS), other[0])
    unknown = sorted(set(slots) - {*SLOT_KINDS, "none"})
    if unknown or ("none" in slots and len(slots) > 1):
        expected = "some of lora (which also serves LoHa, LoKr and LoKH), core and dora, or none"
        raise CommandError(f"{where} --slots", expected, ",".join(slots))
    return exporter


def _source(compressed: str | Path | Compressed | OpenedModel) -> _Source:
    if isinstance(compressed, OpenedModel):
        if compressed.module is None:
            raise ModelError("export", "a network", "a state dict has no graph", "give --arch and --input")
        digest = tensors_digest(state_of(compressed.module), {})
        return _Source(compressed, compressed.module, digest, None, None, _model_name(compressed.path))
    found = compressed if isinstance(compressed, Compressed) else load_compressed(Path(compressed))
    source = (found.spec["source"].get("path") or "model") if found.spec else "model"
    return _Source(
        found.opened, found.need_module("export"), found.digest, found.path, found, _model_name(Path(source))
    )


def _planned_bits(source: _Source) -> tuple[dict[str, int], dict[str, int]]:
    """Return bits, and inputs that share a scale, of the plan that the model was factorized by.

    Raises `CommandError` where it knows of no plan, `ModelError` for what no export writes.
    """
    spec = {} if source.compressed is None else source.compressed.spec
    bits = spec.get("bits")
    if bits is None:
        raise CommandError(
            "lrcompress export --quantize plan", "a model that was factorized by a plan with bits", "none",
            "factorize with --plan, or choose fp16, int8 or int4",
        )  # fmt: skip
    unknown = sorted(n for n, b in bits.items() if type(b) is not int or b not in BITS)
    if unknown:
        raise ModelError(f"{source.folder}: bits of {unknown[0]}", ", ".join(map(str, BITS)), bits[unknown[0]])
    blocks = spec.get("blocks") or {}
    odd = sorted(n for n, b in blocks.items() if type(b) is not int or b not in BLOCKS)
    if odd:
        raise ModelError(f"{source.folder}: blocks of {odd[0]}", ", ".join(map(str, BLOCKS)), blocks[odd[0]])
    return dict(bits), dict(blocks)


def _model_name(path: Path | None) -> str:
    """Return a name that is safe in a path and a URL: the file's, or its folder's where the file is called model.*."""
    if path is None:
        return "model"
    stem = (
        path.stem
        if path.stem not in ("model", "pytorch_model") or len(path.parts) < 2
        else path.parent.name or path.stem
    )
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-.") or "model"


def _golden(
    source: _Source, module: nn.Module, data: Data | None, original: str | Path | None, trust: dict[str, bool],
    quantize: str,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return golden inputs and the answers of the module and, where it can be opened, of the original."""
    if data is not None and len(data) >= 1:
        batch = next(iter(data.take(slice(0, min(GOLDEN_SAMPLES, len(data)))).batches(GOLDEN_SAMPLES)))
        inputs = {k: np.asarray(v) for k, v in batch.inputs.items()}
        if quantize != "none":
            inputs = _unpadded(inputs)
    else:
        inputs = example_inputs(source.opened.inputs, module, batch=GOLDEN_SAMPLES)
    if not inputs:
        raise ModelError(
            source.folder or "export",
            "the model's inputs",
            "none are known",
            "a state dict has no graph; give --arch and --input",
        )
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
        reference = with_cache(reference) if isinstance(source.opened, CachedModel) else reference
        assert reference.module is not None
        arrays |= {f"original/{k}": v for k, v in predictor(reference, reference.module)(inputs).items()}
    return arrays


def _with_past(data: Data, opened: OpenedModel, module: nn.Module) -> Data:
    """Return data of a decoder with a cache: half of the tokens of each batch are read into it already."""
    return data.mapped(lambda batch: opened.filled(module, batch)) if isinstance(opened, CachedModel) else data


def _unpadded(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cut token sequences to the shortest one: what a model says at padding is noise, which int8 makes another noise."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or not np.all(mask.astype(bool).sum(1)):
        return inputs
    width = int(mask.astype(bool).sum(1).min())
    return {k: v[:, :width] if v.shape[:2] == mask.shape else v for k, v in inputs.items()}


def _write(
    stage: Path, dest: Path, source: _Source, module: nn.Module, digest: str, exporter: ModuleType, request: Request, name: str | None,
    profile: DeviceProfile | None,
) -> dict[str, Any]:  # fmt: skip
    """Write everything but payloads: the target's files, goldens, limits, and the manifest over them."""
    written: Written = exporter.write(stage, request)
    np.savez(stage / "golden.npz", **request.golden)  # type: ignore[arg-type]
    write_json(stage / "device.json", _limits(module, profile))
    precision = "fp32" if request.quantize == "none" else request.quantize
    files: dict[str, dict[str, Any]] = {
        n: {"sha256": sha256_file(stage / n), "bytes": (stage / n).stat().st_size} for n in REQUIRED
    }
    notices = copy_notices(source.folder, stage, card=source.opened.kind == "huggingface")
    told = {n: {"sha256": sha256_file(stage / n), "bytes": (stage / n).stat().st_size} for n in notices}
    value: dict[str, Any] = {
        "schema": 1, "made_by": MAKER, "model": name or source.name,
        "base_id": base_id(graph=files[GRAPH]["sha256"], data=files[DATA]["sha256"], slots=written.slots),
        "slots_id": slots_id(slots=written.slots, factors=digest), "factors_digest": digest, "files": {**files, **told},
        "inputs": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in source.opened.inputs],
        "outputs": written.outputs, **written.about, "ort": {"min": written.ort_min, "max": None}, "precision": precision,
        "slots": written.slots, "tolerances": tolerances(precision), "factors": written.factors, "params": count_parameters(module),
        "compressed": None if source.folder is None else {"path": os.path.relpath(source.folder.resolve(), dest.resolve()), "digest": source.digest},
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "onnx", "onnxruntime", "onnxscript")},
    }  # fmt: skip
    fit_tolerance(stage, value, request.golden, precision)
    write_json(stage / MARKER, value)
    sizes = {
        "graph": files[GRAPH]["bytes"],
        "base": files[DATA]["bytes"],
        "total": sum(f["bytes"] for f in files.values()),
    }
    return {
        "base_id": value["base_id"], "slots_id": value["slots_id"], "bytes": sizes, "slots": written.slots, "payloads": [],
        "opset": written.about.get("opset"), "precision": precision, "model": value["model"], "weights": written.weights,
    }  # fmt: skip


def _limits(module: nn.Module, profile: DeviceProfile | None) -> dict[str, Any]:
    """Return what a device allows itself: no update larger than the model, a trial no slower than 20 times the base."""
    most = max(4 * sum(p.numel() for p in module.parameters()), 1 << 20)
    limits: dict[str, Any] = {"schema": 1, "max_payload_bytes": most, "latency_factor": 20.0, "threads": 1}
    if profile is not None:
        limits |= {
            "device": profile.name,
            "threads": profile.threads,
            "max_payload_bytes": min(most, profile.max_update_bytes),
        }
    return limits


def fit_tolerance(stage: Path, value: dict[str, Any], golden: Mapping[str, np.ndarray], precision: str) -> None:
    """Gate 4. At fp32 the runtime must match the module; below, its own distance is measured and becomes the tolerance.

    An answer that is further from the fp32 one than half of the answer's range is refused.
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
        float(np.max(np.abs(v - got[k]), initial=0.0)) / max(1.0, float(np.max(np.abs(v), initial=0.0)))
        for k, v in expected.items()
    )
    outputs_agree(expected, got, 0.5, where=f"export --quantize {precision}")
    value["tolerances"] = tolerances(precision, distance)


def calibration_feeds(data: Data) -> list[dict[str, np.ndarray]]:
    """Return what quantization calibrates with."""
    small = data.take(slice(0, min(_CALIBRATION_SAMPLES, len(data))))
    return [{k: np.asarray(v) for k, v in b.inputs.items()} for b in small.batches(8)]


def _adapter_folder(name: str | Path, folder: Path | None) -> Path:
    """Return the folder that an adapter's name or path means: beside the checkpoint, here, or as given."""
    places = (
        [Path(name)]
        if os.sep in str(name)
        else [*([folder.parent / "adapters" / name] if folder else []), Path("adapters") / name, Path(name)]
    )
    for place in places:
        if place.is_dir():
            return place
    raise CommandError(
        "lrcompress export",
        "an adapter folder",
        f"{name}: not in {', '.join(str(p.parent) for p in places)}",
        "train one with 'lrcompress recover'",
    )


def _of_base(found: AdapterFolder, digest: str) -> AdapterFolder:
    """Return an adapter, unless it records that it was trained on another base."""
    if found.base is not None and found.base != digest:
        expected, got = f"an adapter for the base {digest[:12]}", f"one for {found.base[:12]}"
        raise ModelError(found.path, expected, got, "use the base it was made for")
    return found


def _adapters(given: Sequence[str | Path] | None, folder: Path | None, digest: str) -> list[Path]:
    """Return the adapters that were asked for, or those beside the checkpoint that belong to it; say which do not."""
    if given is not None:
        return [_adapter_folder(a, folder) for a in given]
    if folder is None or not (folder.parent / "adapters").is_dir():
        return []
    found = []
    for path in sorted(p for p in (folder.parent / "adapters").iterdir() if (p / "adapter_config.json").is_file()):
        if read_adapter(path).base == digest:
            found.append(path)
        else:
            warnings.warn(f"{path} was trained on another base: not shipped", LrcompressWarning, stacklevel=3)
    return found


def _payloads(stage: Path, adapters: Sequence[Path], module: nn.Module, emit: Sequence[str]) -> list[Path]:
    """Write the payload of every adapter, and the other files asked for. Raises `PayloadError` for one of another base."""
    manifest = Manifest.load(stage)
    out = []
    for folder in adapters:
        kind, tensors = payload_tensors(folder, manifest, lambda name: wrap_dense(module, name))
        data = with_goldens(stage, manifest, kind, tensors)
        (stage / "payloads").mkdir(exist_ok=True)
        out.append(stage / "payloads" / f"{folder.name}.safetensors")
        out[-1].write_bytes(data)
        if "onnx_adapter" in emit:
            out.append(out[-1].with_suffix(onnx_adapter.SUFFIX))
            out[-1].write_bytes(onnx_adapter.pack(payloads.parse(data), manifest))
    return out

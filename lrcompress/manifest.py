"""The exported artifact: its files, slots and hashes, parsed strictly and verified before anything is used.

`base_id` names one base model down to the byte; `slots_id` names what a payload must fit: the slot contract and the
factors before quantization. Both are recomputed here and never believed. The caller's loop:

    manifest = Manifest.load(folder)          # every file hashed; ManifestError says which one is wrong
    manifest.check_runtime(ort.__version__)
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import ManifestError
from .files import canonical_json, sha256_file, sha256_json

MANIFEST = "manifest.json"
GRAPH, DATA, GOLDEN, LIMITS = "model.onnx", "base.data", "golden.npz", "device.json"
#: Files that every artifact has.
REQUIRED = (GRAPH, DATA, GOLDEN, LIMITS)
MAX_MANIFEST_BYTES = 8 << 20

_SHA = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_CONTRACT = ("layer", "kind", "op", "tensors", "r_min", "r_max")
_TENSOR_KEYS = {"name", "dtype", "shape", "rank_symbol", "rank_axis"}


def slot_inputs(slot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a slot offers as inputs: its two tensors, and its scale where it has one."""
    return [*slot["tensors"], *([slot["scale"]] if "scale" in slot else [])]


def is_sha256(value: object) -> bool:
    """Tell whether `value` is a lower-case hex SHA-256."""
    return isinstance(value, str) and _SHA.fullmatch(value) is not None


def is_safe_name(value: object) -> bool:
    """Tell whether `value` may stand in a path and a URL as it is: no separators, no leading dot, no `..`."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None and ".." not in value


def is_file_name(value: object) -> bool:
    """Tell whether `value` may be the name of a file of an artifact: no separators, no leading dot, no `..`."""
    return isinstance(value, str) and _FILE.fullmatch(value) is not None and ".." not in value


def strict_json(data: bytes | str) -> Any:
    """Parse JSON; raise `ValueError` for duplicate keys, what `canonical_json` could not write again, or nesting beyond reason."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    def number(text: str) -> float:
        found = float(text)
        if not math.isfinite(found):
            raise ValueError(f"{text} has no canonical form")
        return found

    try:
        text = data if isinstance(data, str) else data.decode()
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=number)
        if "\\" in text or isinstance(data, str):  # half of a surrogate pair, which UTF-8 has no bytes for
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeError:
        raise ValueError("text that is no Unicode has no canonical form") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def base_id(*, graph: str, data: str, slots: Sequence[Mapping[str, Any]]) -> str:
    """Return the identity of one base: SHA-256 over the hashes of graph and constants, and the slots."""
    return sha256_json({"graph": graph, "data": data, "slots": list(slots)})


def slots_id(*, slots: Sequence[Mapping[str, Any]], factors: str) -> str:
    """Return the identity of what payloads must fit.

    The default's rank is left out: it is how one graph spells "unchanged", so fp32 and int8 exports may differ in it.
    """
    return sha256_json({"slots": [{k: s[k] for k in _CONTRACT} for s in slots], "factors": factors})


@dataclass(frozen=True)
class Manifest:
    """A parsed and self-consistent `manifest.json`. `raw` is what was written; treat it as read-only."""

    raw: dict[str, Any]

    @classmethod
    def parse(cls, data: bytes, *, where: object = MANIFEST) -> Manifest:
        """Parse bytes. Raises `ManifestError` for every shape, name or identity that does not hold."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise ManifestError(where, f"at most {MAX_MANIFEST_BYTES} bytes", f"{len(data)}")
        try:
            raw = strict_json(data)
        except ValueError as e:
            raise ManifestError(where, "JSON", str(e), "export the model again") from None
        _check(raw, where)
        manifest = cls(raw)
        found = base_id(
            graph=manifest.files[GRAPH]["sha256"], data=manifest.files[DATA]["sha256"], slots=manifest.slots
        )
        own_slots_id = slots_id(slots=manifest.slots, factors=manifest.factors_digest)
        if found != raw["base_id"]:
            raise ManifestError(f"{where}: base_id", found, raw["base_id"], "export the model again")
        if own_slots_id != raw["slots_id"]:
            raise ManifestError(f"{where}: slots_id", own_slots_id, raw["slots_id"], "export the model again")
        return manifest

    @classmethod
    def load(cls, folder: Path, verify: bool = True) -> Manifest:
        """Read `folder/manifest.json`; with `verify` also hash every file it names."""
        folder = Path(folder)
        try:
            with open(folder / MANIFEST, "rb") as f:
                data = f.read(MAX_MANIFEST_BYTES + 1)
        except OSError as e:
            remedy = "make one with 'lrcompress export'"
            raise ManifestError(folder, f"an exported model ({MANIFEST})", e.strerror or str(e), remedy) from None
        manifest = cls.parse(data, where=folder / MANIFEST)
        if verify:
            manifest.verify_files(folder)
        return manifest

    def verify_files(self, folder: Path) -> None:
        """Compare size and hash of every file with the manifest. Raises `ManifestError`."""
        for name, entry in sorted(self.files.items()):
            path = Path(folder) / name
            try:
                size = path.stat().st_size
                if size != entry["bytes"]:
                    raise ManifestError(path, f"{entry['bytes']} bytes", str(size), "copy the folder again")
                digest = sha256_file(path)
            except OSError as e:
                raise ManifestError(
                    path, "a file of the exported model", e.strerror or str(e), "copy the folder again"
                ) from None
            if digest != entry["sha256"]:
                raise ManifestError(path, f"sha256 {entry['sha256']}", digest, "copy the folder again")

    def check_runtime(self, version: str) -> None:
        """Raise `ManifestError` unless ONNX Runtime `version` lies in the artifact's range."""
        low, high = self.raw["ort"]["min"], self.raw["ort"].get("max")
        if version_key(version) < version_key(low) or (high and version_key(version) > version_key(high)):
            wanted = f"ONNX Runtime {low} or newer" + (f", at most {high}" if high else "")
            raise ManifestError("onnxruntime", wanted, version, "install another onnxruntime, or export for this one")

    @property
    def model(self) -> str:
        return str(self.raw["model"])

    @property
    def base_id(self) -> str:
        return str(self.raw["base_id"])

    @property
    def slots_id(self) -> str:
        return str(self.raw["slots_id"])

    @property
    def factors_digest(self) -> str:
        return str(self.raw["factors_digest"])

    @property
    def precision(self) -> str:
        return str(self.raw["precision"])

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        return dict(self.raw["files"])

    @property
    def inputs(self) -> list[dict[str, Any]]:
        return list(self.raw["inputs"])

    @property
    def outputs(self) -> list[dict[str, Any]]:
        return list(self.raw["outputs"])

    @property
    def ports(self) -> dict[str, list[tuple[Any, ...]]]:
        """Names, dtypes and shapes of inputs and outputs: what an application knows. A free axis is '?', whatever it is called."""
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        return {
            side: [(p["name"], p["dtype"], *("?" if isinstance(d, str) else d for d in p["shape"])) for p in ports]
            for side, ports in sides.items()
        }

    @property
    def slots(self) -> list[dict[str, Any]]:
        return list(self.raw["slots"])

    @property
    def tolerances(self) -> dict[str, float]:
        return dict(self.raw["tolerances"])

    @property
    def tolerance(self) -> float:
        """The parity tolerance of this precision on this CPU class, relative to max(1, max|output|)."""
        kind = "arm64" if platform.machine().lower() in ("aarch64", "arm64") else "cpu"
        return float(self.raw["tolerances"][kind])

    @cached_property
    def slot_tensors(self) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        """Tensor name -> (its entry, its slot)."""
        return {t["name"]: (t, s) for s in self.slots for t in slot_inputs(s)}

    def to_bytes(self) -> bytes:
        return canonical_json(self.raw)


def version_key(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version for comparison: '1.22.0rc1' -> (1, 22, 0)."""
    parts = []
    for part in text.split("."):
        digits = re.match(r"\d{1,9}", part)
        if digits is None:
            break
        parts.append(int(digits[0]))
        if digits[0] != part:
            break
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def load_limits(folder: Path) -> dict[str, float]:
    """Return the limits of `device.json`: max_payload_bytes, latency_factor, threads, and max_distance if given.

    `max_distance` bounds how far a payload may move the golden outputs, relative to max(1, max|output|).
    """
    path = Path(folder) / LIMITS
    try:
        value = strict_json(path.read_bytes())
    except (OSError, ValueError) as e:
        raise ManifestError(path, "the device's limits as JSON", str(e), "export the model again") from None
    found = {"max_payload_bytes": float(64 << 20), "latency_factor": 20.0, "threads": 1.0}
    if not isinstance(value, dict) or value.get("schema") != 1:
        raise ManifestError(path, "an object with schema 1", value, "update lrcompress on this device")
    for key in (*found, "max_distance"):
        if key in value:
            if not _number(value[key]) or not 0 < value[key] < 1e15:
                raise ManifestError(f"{path}: {key}", "a positive number", value[key])
            found[key] = float(value[key])
    return found


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check(raw: Any, where: object) -> None:
    """Check the shape of every field that this package reads."""

    def need(good: object, key: str, expected: str) -> None:
        if not good:
            got = raw.get(key.partition(".")[0], "nothing") if isinstance(raw, dict) else raw
            raise ManifestError(f"{where}: {key}", expected, got, "export the model again")

    need(isinstance(raw, dict), "manifest", "an object")
    need(raw.get("schema") == 1 and not isinstance(raw["schema"], bool), "schema", "1")
    need(is_safe_name(raw.get("model")), "model", "a name of a-z, 0-9, '.', '_', '-'")
    for key in ("base_id", "slots_id"):
        need(is_sha256(raw.get(key)), key, "a hex sha256")
    need(isinstance(raw.get("factors_digest"), str), "factors_digest", "text")
    need(isinstance(raw.get("precision"), str), "precision", "text")
    _check_files(raw, need)
    ort = raw.get("ort")
    need(
        isinstance(ort, dict) and isinstance(ort.get("min"), str) and isinstance(ort.get("max"), str | None),
        "ort",
        "{min, max}",
    )
    tolerances = raw.get("tolerances")
    need(isinstance(tolerances, dict), "tolerances", "an object")
    for kind in ("cpu", "arm64"):
        need(_number(tolerances.get(kind)) and 0 < tolerances[kind] < 1e6, f"tolerances.{kind}", "a positive number")
    for key in ("inputs", "outputs"):
        values = raw.get(key)
        need(isinstance(values, list) and values and all(map(_is_port, values)), key, "a list of {name, dtype, shape}")
        need(len({v["name"] for v in values}) == len(values), key, "different names")
    need(isinstance(raw.get("slots"), list), "slots", "a list")
    for i, slot in enumerate(raw["slots"]):
        _check_slot(slot, f"{where}: slots[{i}]")
    names = [t["name"] for s in raw["slots"] for t in slot_inputs(s)]
    need(len(set(names)) == len(names), "slots", "different tensor names")
    need(len({(s["layer"], s["kind"]) for s in raw["slots"]}) == len(raw["slots"]), "slots", "different layers")


def _check_files(raw: dict[str, Any], need: Any) -> None:
    files: Any = raw.get("files")
    need(isinstance(files, dict) and set(REQUIRED) <= files.keys(), "files", f"entries for {', '.join(REQUIRED)}")
    for name, entry in files.items():
        need(is_file_name(name) and name != MANIFEST, "files", f"plain file names, not {name[:80]!r}")
        good = isinstance(entry, dict) and is_sha256(entry.get("sha256")) and _count(entry.get("bytes"))
        need(good, f"files.{name}", "{sha256, bytes}")


def _is_port(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not isinstance(value.get("dtype"), str):
        return False
    shape = value.get("shape")
    return isinstance(shape, list) and all(isinstance(d, str) or _count(d) for d in shape)


def _check_slot(slot: Any, where: str) -> None:
    def need(good: object, expected: str) -> None:
        if not good:
            raise ManifestError(where, expected, slot, "export the model again")

    need(isinstance(slot, dict) and set(_CONTRACT) <= slot.keys(), f"an object with {', '.join(_CONTRACT)}")
    need(isinstance(slot["layer"], str) and slot["layer"], "a layer name")
    kinds = ("lora", "core", "dora")
    need(slot["kind"] in kinds and slot["op"] in ("linear", "conv"), "kind lora, core or dora, op linear or conv")
    need(_count(slot["r_min"]) and _count(slot["r_max"]) and slot["r_min"] <= slot["r_max"], "0 <= r_min <= r_max")
    need(_count(slot.get("default_rank", 0)) and slot.get("default_rank", 0) <= 1, "default_rank 0 or 1")
    tensors = slot["tensors"]
    need(isinstance(tensors, list) and len(tensors) == 2, "two tensors")
    for t in tensors:
        need(
            isinstance(t, dict) and t.keys() >= _TENSOR_KEYS and isinstance(t["name"], str) and t["name"],
            "tensors with " + ", ".join(sorted(_TENSOR_KEYS)),
        )
        need(t["dtype"] in ("float32", "float64"), "dtype float32 or float64")
        shape, axis = t["shape"], t["rank_axis"]
        need(isinstance(shape, list) and _count(axis) and axis < len(shape), "a rank axis inside the shape")
        need(
            all((isinstance(d, str) and i == axis) or (_count(d) and d > 0) for i, d in enumerate(shape)),
            "one symbolic dimension",
        )
        need(isinstance(shape[axis], str) and shape[axis] == t["rank_symbol"], "rank_symbol at rank_axis")
    a, b = tensors
    need(a["rank_symbol"] == b["rank_symbol"], "one rank symbol for both tensors")
    if slot["op"] == "linear":
        need(
            [a["rank_axis"], b["rank_axis"]] == [1, 0] and len(a["shape"]) == len(b["shape"]) == 2,
            "A (in, r) and B (r, out)",
        )
    else:
        need(
            [a["rank_axis"], b["rank_axis"]] == [0, 1] and len(a["shape"]) == len(b["shape"]) > 2,
            "A (r, in, *k) and B (out, r, 1…)",
        )
        need(set(b["shape"][2:]) == {1}, "a 1x1 kernel for B")
    # It follows from the rest of the contract, so that `slots_id` need not name it.
    outputs = b["shape"][1 if slot["op"] == "linear" else 0]
    scale = {"name": f"{slot['layer']}.dora_s", "dtype": b["dtype"], "shape": [outputs]}
    need(slot.get("scale") == (scale if slot["kind"] == "dora" else None), "a scale of every output for kind dora only")

"""Adapter payloads: bytes to verified tensors and back. No IO, no network, and nothing is believed.

A payload is a safetensors file with sorted names and one canonical header. Its tensors are an adapter's own factors
with the scaling folded in, as numbers or as codes (see `encodings`); other kinds than LoRA travel as their own factors and
are expanded here, exactly (see `expansions`). Golden outputs (see `golden.project`) travel along. What a device fetches
may be shorter: a delta from a payload that it has (see `deltas`), whose result is such a file.

    payload = parse(data)            # PayloadError for anything malformed
    payload.verify(manifest)         # and for anything that does not fit this base
    session.swap(payload)            # which feeds payload.feeds(manifest)
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import expansions
from .encodings import ENCODINGS, decode, encode, holdable
from .errors import PayloadError
from .files import canonical_json, sha256_bytes
from .manifest import Manifest, is_sha256, strict_json

SCHEMA = "1"
KINDS = tuple(expansions.KINDS)
GOLDEN = "golden/"
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 16_384
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
_NAMES = {v: k for k, v in _DTYPES.items()}
_METADATA = {"schema", "slots_id", "base_ids", "kind", "encoding"}


@dataclass(frozen=True)
class Payload:
    """A parsed payload. `tensors` are decoded to float32, by slot tensor (LoRA) or `<layer>.<factor>`."""

    kind: str
    encoding: str
    slots_id: str
    base_ids: tuple[str, ...]
    tensors: Mapping[str, np.ndarray]
    golden: Mapping[str, np.ndarray]
    sha256: str
    size: int
    raw: bytes = field(repr=False, default=b"")

    def verify(self, manifest: Manifest) -> None:
        """Raise `PayloadError` unless this payload fits the base of `manifest` exactly."""
        if self.slots_id != manifest.slots_id:
            raise PayloadError("payload: slots_id", manifest.slots_id, self.slots_id, "it was made for another model")
        if manifest.base_id not in self.base_ids:
            raise PayloadError(
                "payload: base_ids",
                f"one that is {manifest.base_id}",
                ", ".join(self.base_ids),
                "it was made for another base",
            )
        slots = self._slots(manifest)
        if not slots:
            kind = expansions.KINDS[self.kind]
            raise PayloadError("payload: kind", f"a base with {kind} slots", self.kind, f"export with --slots {kind}")
        expected = {n for s in slots for n in expansions.own_names(s, self.kind, self.tensors)}
        missing, extra = sorted(expected - set(self.tensors)), sorted(set(self.tensors) - expected)
        if missing or extra:
            got = f"{missing[0]} missing" if missing else f"{extra[0]} too many"
            raise PayloadError("payload: tensors", "exactly the slots of the base", got)
        for slot in slots:
            try:
                rank = expansions.rank_of(slot, self.kind, self.tensors)
            except ValueError as e:
                raise PayloadError(f"payload: {slot['layer']}", "factors that fit the slot", e) from None
            if not slot["r_min"] <= rank <= slot["r_max"]:
                raise PayloadError(f"payload: {slot['layer']}", f"a rank in {slot['r_min']}…{slot['r_max']}", rank)

    def _slots(self, manifest: Manifest) -> list[dict[str, Any]]:
        return [s for s in manifest.slots if s["kind"] == expansions.KINDS[self.kind]]

    def feeds(self, manifest: Manifest) -> dict[str, np.ndarray]:
        """Return every slot tensor of this kind in `manifest`, as the graph takes it. Call `verify` first."""
        out: dict[str, np.ndarray] = {}
        for slot in self._slots(manifest):
            pair = expansions.expand(slot, self.kind, self.tensors)
            for spec, value in zip(slot["tensors"], pair, strict=True):
                if 0 in value.shape and slot.get("default_rank", 0):
                    value = np.zeros([slot["default_rank"] if isinstance(d, str) else d for d in spec["shape"]])
                out[spec["name"]] = np.ascontiguousarray(value, dtype=spec["dtype"])
            if "scale" in slot:
                name = slot["scale"]["name"]
                out[name] = np.ascontiguousarray(self.tensors[name], dtype=slot["scale"]["dtype"])
        return out


# writing --------------------------------------------------------------------------------------------------------------


def build(
    tensors: Mapping[str, np.ndarray],
    *,
    manifest: Manifest,
    kind: str,
    encoding: str,
    golden: Mapping[str, np.ndarray] | None = None,
    base_ids: Sequence[str] = (),
    scales: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """Return the bytes of a payload: equal input, equal bytes. Raises `PayloadError` if it would not verify.

    `scales`: those of an earlier int8 payload (see `scales_of`), used where they suit, so that codes stay comparable.
    """
    if kind not in KINDS or encoding not in ENCODINGS:
        raise PayloadError(
            "payload", f"kind {'|'.join(KINDS)} and encoding {'|'.join(ENCODINGS)}", f"{kind}, {encoding}"
        )
    stored: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
            single = np.asarray(value, np.float32)
        stored |= encode(name, single, encoding, (scales or {}).get(name))
    for name, value in (golden or {}).items():
        stored[GOLDEN + name] = value
    metadata = {
        "schema": SCHEMA, "slots_id": manifest.slots_id, "kind": kind, "encoding": encoding,
        "base_ids": json.dumps(sorted({manifest.base_id, *base_ids})),
    }  # fmt: skip
    data = _serialize(stored, metadata)
    parse(data).verify(manifest)
    return data


def scales_of(data: bytes) -> dict[str, np.ndarray]:
    """Return the int8 scales of a payload by tensor; none for other encodings."""
    stored, metadata = _deserialize(data)
    if metadata.get("encoding") != "int8":
        return {}
    return {n.removesuffix(".scale"): v for n, v in stored.items() if n.endswith(".scale")}


def _serialize(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    chunks, offset = [], 0
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        raw = array.tobytes()
        header[name] = {
            "dtype": _NAMES[array.dtype.newbyteorder("<")],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        chunks.append(raw)
        offset += len(raw)
    text = canonical_json(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(chunks)


# reading --------------------------------------------------------------------------------------------------------------


def parse(data: bytes) -> Payload:
    """Return the payload in `data`; `PayloadError` for every rule of the format that it breaks."""
    stored, metadata = _deserialize(data)
    if set(metadata) != _METADATA or not all(isinstance(v, str) for v in metadata.values()):
        raise PayloadError(
            "payload: metadata",
            f"exactly {', '.join(sorted(_METADATA))}",
            ", ".join(sorted(map(str, metadata))) or "none",
        )
    if metadata["schema"] != SCHEMA:
        raise PayloadError("payload: schema", SCHEMA, metadata["schema"], "update lrcompress on this device")
    if metadata["kind"] not in KINDS or metadata["encoding"] not in ENCODINGS:
        raise PayloadError(
            "payload",
            f"kind {'|'.join(KINDS)}, encoding {'|'.join(ENCODINGS)}",
            f"{metadata['kind']}, {metadata['encoding']}",
        )
    try:
        base_ids = strict_json(metadata["base_ids"])
    except ValueError as e:
        raise PayloadError("payload: base_ids", "a JSON list", str(e)) from None
    if (
        not isinstance(base_ids, list)
        or not base_ids
        or not all(is_sha256(b) for b in [*base_ids, metadata["slots_id"]])
    ):
        raise PayloadError("payload: base_ids, slots_id", "hex sha256", f"{base_ids}, {metadata['slots_id']}")
    golden = {k.removeprefix(GOLDEN): v for k, v in stored.items() if k.startswith(GOLDEN)}
    for name, value in golden.items():
        if not name or value.dtype.kind != "f" or value.ndim != 2 or not np.isfinite(value).all():
            raise PayloadError(
                f"payload: {GOLDEN}{name}", "finite float rows (samples, k)", f"{value.dtype} {list(value.shape)}"
            )
    tensors = decode({k: v for k, v in stored.items() if not k.startswith(GOLDEN)}, metadata["encoding"])
    return Payload(
        metadata["kind"],
        metadata["encoding"],
        metadata["slots_id"],
        tuple(base_ids),
        tensors,
        golden,
        sha256_bytes(data),
        len(data),
        data,
    )


def _deserialize(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return tensors and metadata of safetensors bytes: every byte is accounted for, in the order of sorted names."""
    found = layout(data)
    return {n: np.frombuffer(p.data, p.dtype).reshape(p.shape) for n, p in found.parts.items()}, found.metadata


@dataclass(frozen=True)
class Part:
    """One stored tensor."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Layout:
    """The pieces of a payload file: the header's text, its metadata, the stored tensors in order."""

    text: bytes
    metadata: dict[str, Any]
    parts: dict[str, Part]


def layout(data: bytes) -> Layout:
    """Take a payload file apart. Raises `PayloadError` for every rule of the container that it breaks."""
    if len(data) < 8:
        raise PayloadError("payload", "a safetensors file", f"{len(data)} bytes")
    (length,) = struct.unpack_from("<Q", data)
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise PayloadError("payload: header", f"at most {MAX_HEADER_BYTES} bytes, and no more than there are", length)
    text = bytes(data[8 : 8 + length])
    try:
        header = strict_json(text.decode())
    except ValueError as e:
        raise PayloadError("payload: header", "JSON", str(e)) from None
    if (
        not isinstance(header, dict)
        or not isinstance(header.get("__metadata__"), dict)
        or len(header) - 1 > MAX_TENSORS
    ):
        raise PayloadError(
            "payload: header", f"an object with __metadata__ and at most {MAX_TENSORS} tensors", type(header).__name__
        )
    metadata = header.pop("__metadata__")
    body = memoryview(data)[8 + length :]
    if list(header) != sorted(header):
        raise PayloadError("payload: header", "sorted names", "another order")
    parts, offset = {}, 0
    for name, entry in header.items():
        parts[name], offset = _part(name, entry, body, offset)
    if offset != len(body):
        raise PayloadError("payload", f"{offset} bytes of tensors", len(body))
    return Layout(text, metadata, parts)


def _part(name: str, entry: Any, body: memoryview, offset: int) -> tuple[Part, int]:
    where = f"payload: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise PayloadError(where, "dtype, shape and data_offsets", entry)
    shape, span = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise PayloadError(where, f"a dtype of {', '.join(_DTYPES)}", entry["dtype"])
    dtype: np.dtype[Any] = _DTYPES[entry["dtype"]]
    if not _whole(shape, 8) or not _whole(span, 2) or len(span) != 2:
        raise PayloadError(where, "a shape and two offsets", entry)
    size = math.prod(shape) * dtype.itemsize
    if span != [offset, offset + size] or span[1] > len(body):
        raise PayloadError(where, f"data at [{offset}, {offset + size}] within {len(body)} bytes", span)
    if not holdable(shape):
        raise PayloadError(where, "a shape that an array may have", shape)
    return Part(dtype, tuple(shape), bytes(body[offset : offset + size])), offset + size


def _whole(values: Any, most: int) -> bool:
    """Tell whether `values` is a list of at most `most` plain counts."""
    return isinstance(values, list) and len(values) <= most and all(type(v) is int and 0 <= v < 1 << 40 for v in values)

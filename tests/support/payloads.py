"""Adapter tensors for any base, and safetensors written by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lrcompress.manifest import Manifest
from lrcompress.payload import build
from tests.support.graphs import cnn, write_exported

X = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
GOLDEN = {"output": np.arange(8, dtype=np.float16).reshape(4, 2)}
#: Metadata of a payload that is good in itself.
META = {"schema": "1", "slots_id": "ab" * 32, "base_ids": json.dumps(["cd" * 32]), "kind": "lora", "encoding": "f32"}


def base(folder: Path) -> Manifest:
    """Return a base with three convolutional slots and a linear one."""
    model, slots = cnn()
    return Manifest.load(write_exported(folder, model, slots, X))


def lora(manifest: Manifest, rank: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {n: [rank if isinstance(d, str) else d for d in t["shape"]] for n, (t, _) in manifest.slot_tensors.items()}
    return {n: (rng.standard_normal(s) * 0.1).astype(np.float32) for n, s in shapes.items()}


def loha(manifest: Manifest, rank: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out: dict[str, np.ndarray] = {}
    for slot in manifest.slots:
        a, b = (t["shape"] for t in slot["tensors"])
        outer, inner = (b[0], int(np.prod(a[1:]))) if slot["op"] == "conv" else (b[1], a[0])
        for part in ("hada_w1", "hada_w2"):
            out[f"{slot['layer']}.{part}_a"] = rng.standard_normal((outer, rank)).astype(np.float32)
            out[f"{slot['layer']}.{part}_b"] = rng.standard_normal((rank, inner)).astype(np.float32)
    return out


def made(manifest: Manifest, kind: str = "lora", encoding: str = "f32", rank: int = 2) -> bytes:
    tensors = lora(manifest, rank) if kind == "lora" else loha(manifest, rank)
    return build(tensors, manifest=manifest, kind=kind, encoding=encoding, golden=GOLDEN)


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def stored(tensors: Mapping[str, tuple[str, list[int], bytes]], metadata: Mapping[str, Any]) -> bytes:
    """Write safetensors by hand, in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    body = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    return put_together(header, body)

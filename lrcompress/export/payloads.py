"""From an adapter folder to the exact tensors that an exported model's slots take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..adapt import BaseAdapter
from ..adapt._files import read_adapter
from ..errors import PayloadError
from ..manifest import Manifest


def payload_tensors(adapter_dir: Path, manifest: Manifest) -> tuple[str, dict[str, np.ndarray]]:
    """Return (kind, tensors by payload name) of the adapter in `adapter_dir`, scaling folded in.

    Every slot gets its pair; a layer that the adapter does not touch gets one of rank 0. Raises `PayloadError` for an
    adapter of another base, of a kind without slots, or of a layer without one.
    """
    slots = {s["layer"]: s for s in manifest.slots if s["kind"] == "lora"}
    shapes = {layer: _weight_shape(slot) for layer, slot in slots.items()}
    folder = read_adapter(adapter_dir, shapes)
    if folder.base is not None and folder.base != manifest.factors_digest:
        raise PayloadError(
            adapter_dir, f"an adapter for the base {manifest.factors_digest[:12]}", f"one for {folder.base[:12]}",
            "train it on this compressed model, or export the one it was trained on",
        )  # fmt: skip
    homeless = sorted(set(folder.adapters) - set(slots))
    if homeless:
        raise PayloadError(
            f"{adapter_dir}: layer {homeless[0]}", "a layer that has a slot", "none", "export with slots for it"
        )
    tensors: dict[str, np.ndarray] = {}
    for layer, slot in slots.items():
        adapter = folder.adapters.get(layer)
        if adapter is not None and adapter.weight_shape != shapes[layer]:
            raise PayloadError(
                f"{adapter_dir}: layer {layer}", f"a weight of shape {shapes[layer]}", adapter.weight_shape
            )
        tensors |= _lora(slot, adapter) if folder.kind == "lora" else _loha(slot, adapter, shapes[layer])
    return folder.kind, tensors


def _weight_shape(slot: Mapping[str, Any]) -> tuple[int, ...]:
    """Return (out, in, *k) of the weight that a slot corrects."""
    a, b = (t["shape"] for t in slot["tensors"])
    if slot["op"] == "conv":
        return (b[0], *a[1:])
    return (b[1], a[0])


def _lora(slot: Mapping[str, Any], adapter: BaseAdapter | None) -> dict[str, np.ndarray]:
    a_spec, b_spec = slot["tensors"]
    if adapter is None:
        return {
            t["name"]: np.zeros([0 if isinstance(d, str) else d for d in t["shape"]], t["dtype"])
            for t in slot["tensors"]
        }
    a, b = (t.detach().double().numpy() for t in adapter.expand())
    if slot["op"] == "linear":
        a, b = a.T, b.T
    else:
        b = b.reshape(*b.shape, *(1,) * (len(b_spec["shape"]) - 2))
    return {spec["name"]: np.ascontiguousarray(v.astype(spec["dtype"])) for spec, v in ((a_spec, a), (b_spec, b))}


def _loha(slot: Mapping[str, Any], adapter: BaseAdapter | None, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    out, inner = shape[0], int(np.prod(shape[1:]))
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    if adapter is None:
        empty = [np.zeros(s, np.float32) for s in ((out, 0), (0, inner), (out, 0), (0, inner))]
        return {f"{slot['layer']}.{n}": v for n, v in zip(names, empty, strict=True)}
    found = {n: t.double().numpy() for n, t in adapter.tensors().items()}
    found["hada_w1_a"] = found["hada_w1_a"] * adapter.scaling
    return {f"{slot['layer']}.{n}": np.ascontiguousarray(found[n].astype(np.float32)) for n in names}

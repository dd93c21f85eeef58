"""From an adapter folder to the exact tensors that an exported model's slots take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapt import Base, BaseAdapter, Target
from ..adapt._files import read_adapter
from ..adapt.core import Adapter as Core
from ..adapt.loha import Adapter as LoHa
from ..adapt.lokh import Adapter as LoKH
from ..adapt.lokr import Adapter as LoKr
from ..errors import PayloadError
from ..expansions import KINDS, as_slot, chained, sides
from ..manifest import Manifest

#: The layers that an adapter is for, by path: what the scale of a weight-decomposed one depends on.
Bases = Callable[[str], Base]


def payload_tensors(
    adapter_dir: Path, manifest: Manifest, base: Bases | None = None
) -> tuple[str, dict[str, np.ndarray]]:
    """Return (kind, tensors by payload name) of the adapter in `adapter_dir`, scaling folded in.

    Every slot of the kind gets its tensors; a layer that the adapter does not touch gets rank 0. Raises `PayloadError`
    for an adapter of another base, of a kind without slots, or of a layer without one.
    """
    slots = {s["layer"]: s for s in manifest.slots if s["kind"] in ("lora", "dora")}
    folder = read_adapter(adapter_dir, {n: _target(s) for n, s in slots.items()} or None)
    check_base(adapter_dir, folder.base, manifest.factors_digest)
    return tensors_for(folder.adapters, manifest, where=adapter_dir, base=base)


def check_base(where: object, base: str | None, digest: str) -> None:
    """Raise `PayloadError` for an adapter that records another base than the one with `digest`."""
    if base is not None and base != digest:
        raise PayloadError(
            where, f"an adapter for the base {digest[:12]}", f"one for {base[:12]}",
            "train it on this compressed model, or export the one it was trained on",
        )  # fmt: skip


def tensors_for(
    adapters: Mapping[str, BaseAdapter], manifest: Manifest, *, where: object, base: Bases | None = None
) -> tuple[str, dict[str, np.ndarray]]:
    """Return the payload's kind and tensors of `adapters`, which are of one kind: dora where any is weight-decomposed."""
    kind = next(iter(adapters.values())).kind
    if any(a.magnitude is not None for a in adapters.values()):
        kind = "dora"
    slots = {s["layer"]: s for s in manifest.slots if s["kind"] == KINDS[kind]}
    homeless = sorted(set(adapters) - set(slots))
    if homeless:
        remedy = "export with slots for it" if slots else f"export with --slots {KINDS[kind]}"
        remedy += ", or bake it in with --merge" if kind == "dora" else ""
        raise PayloadError(f"{where}: layer {homeless[0]}", "a layer that has a slot", "none", remedy)
    tensors: dict[str, np.ndarray] = {}
    for layer, slot in slots.items():
        adapter = adapters.get(layer)
        if adapter is None:
            tensors |= _nothing(slot, kind)
            continue
        expected = _target(slot).shape
        shape = (adapter.core * adapter.groups,) * 2 if adapter.in_core else adapter.weight_shape
        if shape != (expected[:2] if adapter.in_core else expected):
            raise PayloadError(f"{where}: layer {layer}", f"a weight of shape {expected}", shape)
        tensors |= _scaled(slot, adapter, where, base) if kind == "dora" else _native(slot, adapter, where)
    return kind, tensors


def empty_tensors(manifest: Manifest) -> tuple[str, dict[str, np.ndarray]]:
    """Return kind and tensors of the correction that leaves every layer alone. Raises `PayloadError` without slots."""
    if not manifest.slots:
        raise PayloadError(manifest.model, "a base with slots", "none", "export with --slots")
    kind = str(manifest.slots[0]["kind"])
    found: dict[str, np.ndarray] = {}
    for slot in manifest.slots:
        found |= _nothing(slot, kind) if slot["kind"] == kind else {}
    return kind, found


def _target(slot: Mapping[str, Any]) -> Target:
    """Return the layer that a slot corrects, as it stores its weight."""
    a, b = (t["shape"] for t in slot["tensors"])
    kind, groups = slot.get("layer_kind", slot["op"]), int(slot.get("groups", 1))
    if slot["op"] == "conv":
        return Target((b[0], *a[1:]), kind, groups=groups)
    return Target((a[0], b[1]) if kind == "embedding" else (b[1], a[0]), kind)


def _nothing(slot: Mapping[str, Any], kind: str) -> dict[str, np.ndarray]:
    """Return the tensors of a layer that is left alone."""
    out, inner = sides(slot)
    if kind in ("lora", "dora"):
        empty = {t["name"]: [0 if isinstance(d, str) else d for d in t["shape"]] for t in slot["tensors"]}
        pair = {n: np.zeros(s, t["dtype"]) for (n, s), t in zip(empty.items(), slot["tensors"], strict=True)}
        return pair if kind == "lora" else {**pair, slot["scale"]["name"]: np.ones(out, slot["scale"]["dtype"])}
    flat, groups = ((out, 0), (0, inner)), int(slot.get("groups", 1))
    own = flat if groups == 1 else ((groups, out // groups, 0), (groups, 0, inner // groups))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "loha": {f"hada_w{i}_{ab}": s for i in (1, 2) for ab, s in zip("ab", flat, strict=True)},
        "lokr": {"lokr_w1": (1, 1), "lokr_w2_a": flat[0], "lokr_w2_b": flat[1]},
        "lokh": {"lokh_1": (0, *chained(slot))},
        "core": {"core_P": own[0], "core_Q": own[1]},
    }
    return {f"{slot['layer']}.{n}": np.zeros(s, np.float32) for n, s in shapes[kind].items()}


def _scaled(slot: Mapping[str, Any], adapter: BaseAdapter, where: object, base: Bases | None) -> dict[str, np.ndarray]:
    """Return s = m/‖W + ΔW‖ of every output, and ΔW's two factors with s folded into the second; s = 1 without m."""
    here, turned = f"{where}: layer {slot['layer']}", slot.get("layer_kind") == "embedding"
    a, b = (t.detach().double().flatten(1) for t in adapter.expand())
    a, b = (b.T, a.T) if turned else (a, b)
    scale = torch.ones(len(b), dtype=torch.float64)
    if adapter.magnitude is not None:
        if adapter.magnitude_axis != adapter.target.output_axis:
            raise PayloadError(here, "a magnitude per output, which a slot scales", "one per input", "use --merge")
        if base is None:
            raise PayloadError(
                here, "the weights, which the scale of a weight-decomposed adapter depends on", "an adapter alone",
                "publish the payload that 'lrcompress export --slots dora --adapter NAME' writes",
            )  # fmt: skip
        scale = adapter.gain(base(slot["layer"])).detach().double().flatten()
    pair = as_slot(slot, a.numpy(), (scale[:, None] * b).numpy())
    found = dict(zip((t["name"] for t in slot["tensors"]), pair, strict=True)) | {slot["scale"]["name"]: scale.numpy()}
    return {n: np.ascontiguousarray(v.astype(slot["scale"]["dtype"])) for n, v in found.items()}


def _native(slot: Mapping[str, Any], adapter: BaseAdapter, where: object) -> dict[str, np.ndarray]:
    """Return the adapter's own factors, of the transposed weight for an embedding (its slot looks rows up)."""
    turned, s = slot.get("layer_kind") == "embedding", adapter.scaling
    if adapter.kind == "lora":
        a, b = (t.flatten(1) for t in adapter.expand())
        pair = as_slot(slot, *(_array(t) for t in ((b.T, a.T) if turned else (a, b))))
        return {
            t["name"]: np.ascontiguousarray(v.astype(t["dtype"])) for t, v in zip(slot["tensors"], pair, strict=True)
        }
    found: dict[str, Tensor] = {}
    if isinstance(adapter, LoHa):
        for i, (b, a) in enumerate(adapter.pairs(), 1):
            b = s * b if i == 1 else b
            found |= {f"hada_w{i}_a": a.T if turned else b, f"hada_w{i}_b": b.T if turned else a}
    elif isinstance(adapter, LoKr):
        w1, second = s * adapter.first, adapter.second()
        found["lokr_w1"] = w1.T if turned else w1
        if isinstance(second, Tensor):
            found["lokr_w2"] = second.T if turned else second.flatten(1)
        else:
            a, b = second[0], second[1].flatten(1)
            found |= {"lokr_w2_a": b.T if turned else a, "lokr_w2_b": a.T if turned else b}
    elif isinstance(adapter, LoKH):
        found = {f"lokh_{i}": f if i > 1 else s * f for i, f in enumerate(adapter.factors, 1)}
    elif isinstance(adapter, Core):
        own = adapter.tensors()
        if "core_R" in own:
            found["core_R"] = s * (own["core_R"].T if turned else own["core_R"])
        else:
            p, q = s * own["core_P"], own["core_Q"]
            found |= {"core_P": q.T if turned else p, "core_Q": p.T if turned else q}
    else:
        raise PayloadError(f"{where}: {adapter.kind}", f"a kind that payloads know ({', '.join(KINDS)})", adapter.kind)
    return {f"{slot['layer']}.{n}": np.ascontiguousarray(_array(t).astype(np.float32)) for n, t in found.items()}


def _array(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy()

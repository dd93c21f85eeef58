"""Adapter folders in PEFT's layout: adapter_config.json and adapter_model.safetensors, plus what binds them to a base.

Names follow PEFT: `base_model.model.<layer path>.<tensor>`. `lrcompress.json` beside them holds the digest of the
compressed model the adapter was trained on; PEFT ignores it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ModelError
from ..files import write_json
from . import adapter_class, kinds
from ._base import BaseAdapter

MARKER = "lrcompress.json"
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter read from disk: one `BaseAdapter` per layer; `base` is the digest it was trained on, if recorded."""

    path: Path
    kind: str
    adapters: Mapping[str, BaseAdapter]
    base: str | None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_params(self) -> int:
        return sum(p.numel() for a in self.adapters.values() for p in a.parameters())


def write_adapter(
    stage: Path, adapters: Mapping[str, BaseAdapter], *, maker: str, base: str, info: Mapping[str, Any]
) -> None:
    """Write `adapters` (by layer path) into the folder `stage`."""
    some = next(iter(adapters.values()))
    rank = Counter(a.rank for a in adapters.values()).most_common(1)[0][0]
    alpha = Counter(a.alpha for a in adapters.values()).most_common(1)[0][0]
    alpha_key = "lora_alpha" if some.kind == "lora" else "alpha"
    config: dict[str, Any] = {
        "peft_type": some.kind.upper(),
        "r": rank,
        alpha_key: alpha,
        "target_modules": sorted(adapters),
        "rank_pattern": {n: a.rank for n, a in sorted(adapters.items()) if a.rank != rank},
        "alpha_pattern": {n: a.alpha for n, a in sorted(adapters.items()) if a.alpha != alpha},
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    if some.kind == "lora":
        config |= {"bias": "none", "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "fan_in_fan_out": False}
    tensors = {
        f"{_PREFIX}{layer}.{name}": t.contiguous().clone()
        for layer, a in adapters.items()
        for name, t in a.tensors().items()
    }
    save_file({k: tensors[k] for k in sorted(tensors)}, stage / TENSORS, metadata={"format": "pt"})
    (stage / TENSORS).chmod(0o644)  # safetensors makes it private
    write_json(stage / CONFIG, config)
    shapes = {layer: list(a.weight_shape) for layer, a in sorted(adapters.items())}
    write_json(
        stage / MARKER, {"schema": 1, "made_by": maker, "base": base, "kind": some.kind, "shapes": shapes, **info}
    )


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> AdapterFolder:
    """Read an adapter folder; `ModelError` where it is none, is damaged, or is of a kind not known here.

    `shapes`: weight shapes by layer, for kinds whose tensors do not tell a kernel (LoHa on a convolution).
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / TENSORS)
        info = json.loads((folder / MARKER).read_text()) if (folder / MARKER).is_file() else {}
        if not isinstance(config, dict) or not isinstance(info, dict) or not isinstance(info.get("shapes", {}), dict):
            raise ValueError("a file that holds no object")
    except OSError as e:
        raise ModelError(folder, f"an adapter folder with {CONFIG} and {TENSORS}", e.strerror or str(e)) from e
    except (ValueError, SafetensorError) as e:
        raise ModelError(folder, "an intact adapter folder", str(e)) from e
    kind = str(config.get("peft_type", "")).lower()
    if kind not in kinds():
        raise ModelError(
            folder / CONFIG, f"a peft_type of {', '.join(k.upper() for k in kinds())}", config.get("peft_type")
        )
    base = info.get("base")
    known = {k: tuple(v) for k, v in {**info.get("shapes", {}), **(shapes or {})}.items()}
    found = _by_layer(folder, tensors, kind)
    adapters = {layer: _one(folder, kind, config, layer, found[layer], known.get(layer)) for layer in sorted(found)}
    if not adapters:
        raise ModelError(folder / TENSORS, "at least one layer", "none")
    return AdapterFolder(folder, kind, adapters, base, info)


def _by_layer(folder: Path, tensors: Mapping[str, Tensor], kind: str) -> dict[str, dict[str, Tensor]]:
    names = sorted(adapter_class(kind).tensor_names.values(), key=len, reverse=True)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        bare = key.removeprefix(_PREFIX)
        name = next((n for n in names if bare.endswith(f".{n}")), None)
        if name is None:
            raise ModelError(folder / TENSORS, f"tensors named <layer>.{' or '.join(names)}", key)
        if not torch.isfinite(value).all():
            raise ModelError(f"{folder / TENSORS}: {key}", "finite numbers", "NaN or infinity")
        layers.setdefault(bare.removesuffix(f".{name}"), {})[name] = value
    return layers


def _one(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    layer: str,
    tensors: Mapping[str, Tensor],
    known: tuple[int, ...] | None,
) -> BaseAdapter:
    try:
        rank = int(config.get("rank_pattern", {}).get(layer, config["r"]))
        default_alpha = config.get("lora_alpha" if kind == "lora" else "alpha", rank)
        alpha = float(config.get("alpha_pattern", {}).get(layer, default_alpha))
        if config.get("use_rslora"):
            alpha *= rank**0.5
        shape = known or _weight_shape(kind, tensors)
        adapter = adapter_class(kind)(shape, rank, alpha)
        adapter.load(tensors)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{folder / TENSORS}: {layer}", f"the configuration and tensors of a {kind} adapter", e) from e
    return adapter


def _weight_shape(kind: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    if kind == "lora":
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        return (b.shape[0], *a.shape[1:])
    return (tensors["hada_w1_a"].shape[0], tensors["hada_w1_b"].shape[1])

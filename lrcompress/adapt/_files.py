"""Adapter folders in PEFT's layout: adapter_config.json and adapter_model.safetensors, plus what binds them to a base.

Names follow PEFT: `base_model.model.<layer path>.<tensor>`. `lrcompress.json` beside them holds the digest of the
compressed model the adapter was trained on, and the layers it is for; PEFT ignores it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ModelError
from ..files import write_json
from ._base import BaseAdapter
from ._target import Target
from .interop import peft

MARKER = "lrcompress.json"
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


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
    stage: Path,
    adapters: Mapping[str, BaseAdapter],
    *,
    maker: str,
    base: str | None,
    info: Mapping[str, Any],
    strict: bool = False,
) -> None:
    """Write `adapters` (by layer path, of one kind) into the folder `stage`.

    `strict`: only what PEFT itself loads; `ModelError` names what it cannot.
    """
    config, tensors = peft.write(adapters, strict=strict)
    save_file(tensors, stage / TENSORS, metadata={"format": "pt"})
    (stage / TENSORS).chmod(0o644)  # safetensors makes it private
    write_json(stage / CONFIG, config)
    layers = {layer: a.target.as_dict() for layer, a in sorted(adapters.items())}
    kind = next(iter(adapters.values())).kind
    write_json(stage / MARKER, {"schema": 1, "made_by": maker, "base": base, "kind": kind, "layers": layers, **info})


def read_adapter(
    folder: Path,
    targets: Mapping[str, Target] | None = None,
    *,
    weight: Callable[[str], Tensor] | None = None,
) -> AdapterFolder:
    """Read an adapter folder; `ModelError` where it is none, is damaged, or is of a kind not known here.

    `targets`: the layers of the base, for adapters that do not record them; `weight`: see `interop.peft.read`.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / TENSORS)
        info = json.loads((folder / MARKER).read_text()) if (folder / MARKER).is_file() else {}
        if not isinstance(config, dict) or not isinstance(info, dict) or not isinstance(info.get("layers", {}), dict):
            raise ValueError("a file that holds no object")
        recorded = {n: Target.from_dict(t) for n, t in info.get("layers", {}).items()}
    except OSError as e:
        raise ModelError(folder, f"an adapter folder with {CONFIG} and {TENSORS}", e.strerror or str(e)) from e
    except (ValueError, AttributeError, SafetensorError) as e:
        raise ModelError(folder, "an intact adapter folder", str(e)) from e
    if recorded:
        config = {**config, "lrcompress": True}
        for name in sorted(set(recorded) & set(targets or {})):
            mine, theirs = recorded[name], (targets or {})[name]
            if (mine.shape, mine.groups) != (theirs.shape, theirs.groups):
                raise ModelError(
                    f"{folder}: layer {name}", f"shape {theirs.shape}", mine.shape, "it was made for another base"
                )
    found = peft.read(config, tensors, recorded or targets, where=folder, weight=weight)
    return AdapterFolder(folder, next(iter(found.values())).kind, found, info.get("base"), info)

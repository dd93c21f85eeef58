"""State dicts: find the dict of tensors, strip what a wrapper put before its names, read safetensors and shards."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LrcompressWarning, ModelError
from .pickles import load_pickle

NESTED_UNDER = ("state_dict", "model", "model_state_dict", "ema")
_WRAPPERS = ("module.", "_orig_mod.")


def clean_state_dict(obj: Any, where: object = "state dict") -> dict[str, Tensor]:
    """Return the tensors in `obj` by name: `obj` itself, or its entry `state_dict|model|model_state_dict|ema`.

    A prefix that all names share because a wrapper put it there is stripped, with a warning that says so.
    Raises `ModelError` for anything that holds no tensors.
    """
    found = _tensors(obj)
    if found is None and isinstance(obj, Mapping):
        found = next((t for key in NESTED_UNDER if (t := _tensors(obj.get(key))) is not None), None)
    if found is None:
        raise ModelError(
            where, f"a dict of tensors, or one under {'|'.join(NESTED_UNDER)}", _what(obj), "save model.state_dict()"
        )
    return _strip(found, where)


def _tensors(obj: Any) -> dict[str, Tensor] | None:
    if not isinstance(obj, Mapping) or not obj or not all(isinstance(k, str) for k in obj):
        return None
    if not all(isinstance(v, Tensor) for v in obj.values()):
        # Some modules keep extra state beside their tensors; a dict of other things is no state dict.
        obj = {k: v for k, v in obj.items() if not k.endswith("_extra_state")}
        if not obj or not all(isinstance(v, Tensor) for v in obj.values()):
            return None
    return {k: v.detach() for k, v in obj.items()}


def _what(obj: Any) -> str:
    if isinstance(obj, Mapping):
        keys = [str(k) for k in list(obj)[:5]]
        return f"a dict with {', '.join(keys)}{', …' if len(obj) > 5 else ''}" if keys else "an empty dict"
    return f"a {type(obj).__module__}.{type(obj).__qualname__}".replace("builtins.", "")


def _strip(tensors: dict[str, Tensor], where: object) -> dict[str, Tensor]:
    stripped = ""
    while prefix := next((p for p in _WRAPPERS if all(k.startswith(p) and len(k) > len(p) for k in tensors)), ""):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
        stripped += prefix
    if stripped:
        warnings.warn(
            f"{where}: all tensor names began with {stripped!r}; it was stripped", LrcompressWarning, stacklevel=4
        )
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; `ModelError` if it is damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, RuntimeError, ValueError) as e:
        raise ModelError(path, "a whole safetensors file", str(e), "the file is cut or damaged: fetch it again") from e


def read_index(path: Path) -> dict[str, Tensor]:
    """Return the tensors that an index file spreads over shards beside it."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        wanted = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(path, "an index with a weight_map", f"{type(e).__name__}: {e}", "fetch it again") from e
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(wanted.values())):
        if Path(shard).name != shard:
            raise ModelError(path, "shards beside the index", shard, "do not use this file")
        file = path.parent / shard
        if not file.is_file():
            raise ModelError(path, f"the shard {shard} beside it", "no such file", "fetch all shards")
        part = read_tensors(file)
        for name, owner in wanted.items():
            if owner == shard:
                if name not in part:
                    raise ModelError(
                        file,
                        f"the tensor {name} that the index promises",
                        "none of that name",
                        "fetch all shards again",
                    )
                tensors[name] = part[name]
    if not tensors:
        raise ModelError(path, "an index with a weight_map", "an empty one", "fetch it again")
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one weight file of a folder, by what its bytes are."""
    return read_safetensors(path) if is_safetensors(path) else clean_state_dict(load_pickle(path), path)


def is_safetensors(path: Path) -> bool:
    """Say whether a file begins like safetensors: a length, then a JSON object."""
    with path.open("rb") as f:
        head = f.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with half precision widened: the CPU and the exported graph compute in float32."""
    halves = (torch.float16, torch.bfloat16)
    return {k: v.float() if v.dtype in halves else v for k, v in tensors.items()}

"""State dicts: find the dict of tensors, and strip what a wrapper put before its names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LrcompressWarning, ModelError

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


def is_safetensors(path: Path) -> bool:
    """Say whether a file begins like safetensors: a length, then a JSON object."""
    with path.open("rb") as f:
        head = f.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with half precision widened: the CPU and the exported graph compute in float32."""
    halves = (torch.float16, torch.bfloat16)
    return {k: v.float() if v.dtype in halves else v for k, v in tensors.items()}

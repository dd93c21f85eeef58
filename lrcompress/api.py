"""The verbs, as functions: what the command line and recipes call.

    import lrcompress
    print(lrcompress.inspect("model.pt").data["summary"])
    result = lrcompress.factorize("model.pt", rank=16)
    lrcompress.recover("compressed", data="train.npz", name="first")
    lrcompress.export("compressed")
    lrcompress.validate("exported")

Every verb returns a result whose `data` is the JSON object of the command line. A verb that writes takes `output`;
the folder is complete or absent, whatever happens in between.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .model.checkpoint import Compressed
    from .model.surgery import to_dense
    from .verbs.adapt import AdaptResult, adapt
    from .verbs.export import ExportResult, export
    from .verbs.factorize import FactorizeResult, factorize
    from .verbs.inspect import InspectResult, inspect
    from .verbs.plan import PlanResult, plan
    from .verbs.recover import RecoverResult, recover
    from .verbs.validate import ValidateResult, validate

__all__ = [
    "AdaptResult", "Compressed", "ExportResult", "FactorizeResult", "InspectResult", "PlanResult", "RecoverResult",
    "ValidateResult", "adapt", "export", "factorize", "inspect", "load", "plan", "recover", "to_dense", "validate",
]  # fmt: skip

#: Name -> module that defines it: a verb loads what it needs when it is first named.
_HOME = {
    "Compressed": "model.checkpoint", "to_dense": "model.surgery",
    "AdaptResult": "verbs.adapt", "adapt": "verbs.adapt",
    "ExportResult": "verbs.export", "export": "verbs.export",
    "FactorizeResult": "verbs.factorize", "factorize": "verbs.factorize",
    "InspectResult": "verbs.inspect", "inspect": "verbs.inspect",
    "PlanResult": "verbs.plan", "plan": "verbs.plan",
    "RecoverResult": "verbs.recover", "recover": "verbs.recover",
    "ValidateResult": "verbs.validate", "validate": "verbs.validate",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"lrcompress.{_HOME[name]}"), name)


def load(folder: str | Path) -> nn.Module:
    """Open a compressed checkpoint as a network in evaluation mode."""
    from .model.checkpoint import load_compressed

    return load_compressed(Path(folder)).need_module("load")

"""lrcompress: factorize pretrained networks, correct them, export them to ONNX, update them in the field.

The verbs of the command line are callable here under the same names:

    import lrcompress
    small = lrcompress.factorize(model, ratio=0.5, calib="calibration.npz").model
    plain = lrcompress.to_dense(small)

Importing this package loads nothing heavy: the verbs of the build plane need `pip install 'lrcompress[build]'`,
`lrcompress.edge` and `lrcompress.runtime` work on the base install.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .api import adapt, export, factorize, inspect, load, plan, recover, to_dense, validate
    from .pipeline import run

# Equal input must give equal bytes: without this, MKL's results depend on where in memory a matrix lies.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

#: Verbs whose name is also a subpackage or module: `lrcompress.factorize(…)` and `lrcompress.factorize.svd` both work.
_VERBS = ("adapt", "export", "factorize", "inspect", "plan", "recover", "validate")
#: Other functions -> the module that has them.
_FUNCTIONS = {"load": "api", "run": "pipeline", "to_dense": "api"}

__all__ = [
    "__version__",
    "adapt",
    "export",
    "factorize",
    "inspect",
    "load",
    "plan",
    "recover",
    "run",
    "to_dense",
    "validate",
]


class _Verb(ModuleType):
    """A submodule that, when called, runs the verb of its name in `lrcompress.api`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module("lrcompress.api"), self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        if name in _VERBS and type(value) is ModuleType:
            value.__class__ = _Verb
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return importlib.import_module(f"lrcompress.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"lrcompress.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'lrcompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Package

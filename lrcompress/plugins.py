"""The "file name = key" loader: what a folder lists is what exists.

A decomposition, adapter, exporter or target is one module in its package; its key is the file's name. Outside
packages add theirs through the entry-point group `lrcompress.<package>`. Names that start with `_` are private.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType


@cache
def names(package: str) -> tuple[str, ...]:
    """Return the sorted keys that `package` (dotted) offers."""
    parent = importlib.import_module(package)
    own = {m.name for m in pkgutil.iter_modules(parent.__path__) if not m.name.startswith("_") and not m.ispkg}
    return tuple(sorted(own | {e.name for e in entry_points(group=package)}))


@cache
def load(package: str, key: str) -> ModuleType:
    """Import the module that is called `key` in `package`; `KeyError` names the nearest one."""
    if key not in names(package):
        near = difflib.get_close_matches(key, names(package), 1)
        raise KeyError(
            f"{key!r} is none of {', '.join(names(package))}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    for entry in entry_points(group=package):
        if entry.name == key:
            module = entry.load()
            if not isinstance(module, ModuleType):
                raise TypeError(f"entry point {key!r} of {package} is not a module")
            return module
    return importlib.import_module(f"{package}.{key}")

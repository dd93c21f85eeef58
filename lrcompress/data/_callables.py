"""`pkg.mod:callable` and `path/file.py:callable`: code of the user's that returns samples."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError


def is_callable_source(source: str) -> bool:
    """Tell `pkg.mod:name` and `file.py:name` from a path."""
    head, colon, name = source.rpartition(":")
    return (
        bool(colon) and name.isidentifier() and (head.endswith(".py") or all(p.isidentifier() for p in head.split(".")))
    )


def load_callable(spec: str) -> Callable[..., Any]:
    """Import what `spec` names; raises `DataError` for a module or a name that is not there."""
    head, _, name = spec.rpartition(":")
    if head.endswith(".py"):
        path = Path(head).resolve()
        if not path.is_file():
            raise DataError(spec, "a Python file", f"no file {head}")
        # One module per file and content, so that an edited file is not answered by an old import.
        key = "lrcompress_user_" + hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]
        module = sys.modules.get(key) or _load_file(key, path)
    else:
        try:
            module = importlib.import_module(head)
        except ModuleNotFoundError as e:
            raise DataError(spec, "an importable module", f"no module {e.name}") from e
    found = getattr(module, name, None)
    if not callable(found):
        offered = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n)))
        raise DataError(spec, f"a callable {name!r}", "none", f"there are {offered}" if offered else "")
    return found  # type: ignore[no-any-return]


def _load_file(key: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise DataError(path, "a Python file", "something that cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def arrays_of(value: object, source: str, names: list[str]) -> dict[str, np.ndarray]:
    """Return what a callable gave as arrays: a dict, (x, y), one array, a DataLoader, or a dataset of samples."""
    if isinstance(value, Mapping):
        return {str(k): _array(v, source) for k, v in value.items()}
    if isinstance(value, tuple) and value and all(hasattr(v, "shape") or hasattr(v, "__array__") for v in value):
        return _positional([_array(v, source) for v in value], names)
    if hasattr(value, "shape"):
        return _positional([_array(value, source)], names)
    if hasattr(value, "batch_size") and hasattr(value, "dataset"):
        return _joined(value, source, names, stack=False)  # type: ignore[arg-type]
    if hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        return _joined([value[i] for i in range(len(value))], source, names, stack=True)
    raise DataError(source, "arrays by name, (x, y), a DataLoader or a dataset", type(value).__name__)


def _joined(parts: Iterable[object], source: str, names: list[str], *, stack: bool) -> dict[str, np.ndarray]:
    """Stack samples, or concatenate batches, into one array per name."""
    columns: dict[str, list[np.ndarray]] = {}
    for part in parts:
        if isinstance(part, Mapping):
            found = {str(k): _array(v, source) for k, v in part.items()}
        else:
            found = _positional(
                [_array(v, source) for v in (part if isinstance(part, tuple | list) else [part])], names
            )
        for k, v in found.items():
            columns.setdefault(k, []).append(v)
    if not columns:
        raise DataError(source, "at least one sample", "none")
    try:
        return {k: np.stack(v) if stack else np.concatenate(v) for k, v in columns.items()}
    except ValueError as e:
        raise DataError(source, "samples of one shape", str(e)) from e


def _positional(values: list[np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """Name values by place: the model's inputs first, then the label."""
    wanted = names or ["x"]
    keys = (
        [*wanted, "y"]
        if len(values) == len(wanted) + 1
        else wanted
        if len(values) == len(wanted)
        else [f"x{i}" for i in range(len(values))]
    )
    return dict(zip(keys, values, strict=True))


def _array(value: object, source: str) -> np.ndarray:
    detach = getattr(value, "detach", None)
    array = np.asarray(detach().cpu().numpy() if detach is not None else value)
    if array.dtype == object:
        raise DataError(source, "arrays of numbers", "something else")
    return array

"""Read what `torch.save` wrote without running anything in it.

Only tensors, containers and a short list of inert types come back: numbers, argument namespaces, paths, NumPy arrays.
Whatever else a file names is refused, unless the caller trusts it; then anything in it may run.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..errors import ModelError

_NUMPY_DTYPES = [t for t in vars(np.dtypes).values() if isinstance(t, type) and issubclass(t, np.dtype)]


def _inert() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Types whose construction and state have no effect beyond themselves, also under the names of NumPy 1."""
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    assert callable(scalar) and callable(reconstruct)
    named: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (f, f"numpy.{core}.multiarray.{f.__name__}") for f in (scalar, reconstruct) for core in ("core", "_core")
    ]
    paths = [(pathlib.PurePosixPath, f"pathlib.{n}") for n in ("Path", "PosixPath", "PurePosixPath", "PurePath")]
    windows = [(pathlib.PureWindowsPath, f"pathlib.{n}") for n in ("WindowsPath", "PureWindowsPath")]
    return [
        *named,
        *paths,
        *windows,
        np.ndarray,
        np.dtype,
        *_NUMPY_DTYPES,
        argparse.Namespace,
        types.SimpleNamespace,
        collections.defaultdict,
    ]


def load_pickle(path: Path, *, trust: bool = False) -> Any:
    """Return the object in a file of `torch.save`, in the zip or the older format, on the CPU.

    Tensors of a zip are mapped from the file, not copied. Raises `ModelError` for a damaged file and for one that
    would run code.
    """
    try:
        # torch.load takes a file that is called .safetensors for one; given a stream it looks at the content.
        if zipfile.is_zipfile(path) and path.suffix != ".safetensors":
            return _load(path, mmap=True)
        with path.open("rb") as f:
            return _load(f, mmap=False)
    except MemoryError:
        raise
    except Exception as e:  # a hostile pickle chooses what is raised
        if trust:
            return _load_trusted(path)
        raise _refusal(path, e) from e


def check_pickle(data: BinaryIO, where: object) -> None:
    """Raise `ModelError` if a pickle holds more than inert data."""
    try:
        _load(data, mmap=False)
    except MemoryError:
        raise
    except Exception as e:  # as above
        raise _refusal(where, e) from e


def _load(source: Path | BinaryIO, *, mmap: bool) -> Any:
    with torch.serialization.safe_globals(_inert()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)


def _load_trusted(path: Path) -> Any:
    try:
        with path.open("rb") as f:
            return torch.load(f, map_location="cpu", weights_only=False)
    except Exception as e:  # trusted code may raise anything
        remedy = (
            "its classes must be importable where it is opened" if isinstance(e, ImportError | AttributeError) else ""
        )
        raise ModelError(
            path, "a readable torch file", f"{type(e).__name__}: {e}", remedy or "the file is damaged: fetch it again"
        ) from e


def _refusal(where: object, error: Exception) -> ModelError:
    named = re.search(r"(?:GLOBAL|global) ([\w.]+\.[\w]+)|class ([\w.]+) ", str(error))
    if named:
        got = f"a pickle that names {named[1] or named[2]}, which could run code"
        return ModelError(
            where,
            "tensors and inert data",
            got,
            "give its state dict, or --trust-pickle if you trust where it comes from",
        )
    got = f"one that cannot be read without running code or at all ({type(error).__name__}: {_reason(error)})"
    remedy = "if the file is cut or damaged, fetch it again; --trust-pickle if it holds more and you trust its source"
    return ModelError(where, "a whole torch file of tensors", got, remedy)


def _reason(error: Exception) -> str:
    """Return the first line that says why; torch puts its advice to load the file unsafely before it."""
    text = str(error)
    if text.startswith("Weights only load failed"):
        text = text.rpartition("WeightsUnpickler error:")[2].rpartition("from a trusted source.")[2]
    return next((line.strip() for line in text.splitlines() if line.strip()), "")

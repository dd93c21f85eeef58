"""Open a source by what it is: the one entry point of this package."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ._callables import arrays_of, is_callable_source, load_callable
from ._fit import fit, split_labels
from ._images import open_images
from ._preprocess import Preprocess
from ._tables import open_table
from ._types import Data, InputLike

_KINDS = ".npz, .safetensors, .tsv, .csv, .jsonl, a folder of images with labels.tsv, or pkg.mod:callable"


def open_data(
    source: str | Path,
    *,
    inputs: Sequence[InputLike] = (),
    preprocess: Mapping[str, Preprocess | Mapping[str, Any]] | None = None,
    skip: int = 0,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    tokenizer: Path | None = None,
    max_length: int = 128,
    args: Mapping[str, Any] | None = None,
) -> Data:
    """Open `source` for a model with `inputs` (none: names and shapes stay as stored).

    `skip` and `limit` count samples, or pairs where rows are pairs. `args`: keyword arguments of a callable.
    Raises `DataError` for whatever does not fit.
    """
    steps = {k: Preprocess.of(v) for k, v in (preprocess or {}).items()}
    text = str(source)
    if is_callable_source(text):
        data = _of_callable(text, inputs, steps, dict(args or {}))
    else:
        if args:
            raise DataError(text, "args for a callable only", "args for a file")
        data = _of_path(Path(source), inputs, steps, columns, tokenizer, max_length)
    return _cut(data, skip, limit)


def _of_path(
    path: Path,
    inputs: Sequence[InputLike],
    steps: dict[str, Preprocess],
    columns: Mapping[str, str] | None,
    tokenizer: Path | None,
    max_length: int,
) -> Data:
    if path.is_dir():
        if not (path / "labels.tsv").is_file():
            raise DataError(path, "a folder of images with labels.tsv", "a folder without it")
        return open_images(path, list(inputs), steps)
    if not path.is_file():
        raise DataError(path, f"a data source: {_KINDS}", "no such file", "check the path")
    suffix = path.suffix.lower()
    if suffix in (".tsv", ".csv", ".jsonl"):
        return open_table(path, inputs, steps, columns, tokenizer, max_length)
    if suffix == ".npz":
        return _of_arrays(_read_npz(path), inputs, steps, str(path))
    if suffix == ".safetensors":
        return _of_arrays(_read_safetensors(path), inputs, steps, str(path))
    raise DataError(path, f"a data source: {_KINDS}", suffix or "a file without an extension")


def _of_callable(text: str, inputs: Sequence[InputLike], steps: dict[str, Preprocess], args: dict[str, Any]) -> Data:
    function = load_callable(text)
    try:
        value = function(**args)
    except TypeError as e:
        # Only a wrong call is the user's recipe; an error from inside the function keeps its traceback.
        if e.__traceback__ is not None and e.__traceback__.tb_next is None:
            raise DataError(text, "a callable that takes these args", str(e)) from e
        raise
    if isinstance(value, Data):
        return value
    return _of_arrays(arrays_of(value, text, [s.name for s in inputs]), inputs, steps, text)


def _of_arrays(
    arrays: Mapping[str, np.ndarray], inputs: Sequence[InputLike], steps: dict[str, Preprocess], origin: str
) -> Data:
    features, labels = (
        split_labels(arrays) if not any(s.name in ("y", "label", "labels") for s in inputs) else (dict(arrays), None)
    )
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    return Data(fit(features, labels, inputs, steps, origin), labels, origin=origin)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as found:
            return {k: found[k] for k in found.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(path, "an .npz of plain arrays", str(e), "write it with numpy.savez") from e


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, TypeError) as e:
        raise DataError(path, "a whole .safetensors file", str(e)) from e


def _cut(data: Data, skip: int, limit: int | None) -> Data:
    """Return rows skip…skip+limit; `DataError` where that leaves none."""
    if skip < 0 or (limit is not None and limit < 1):
        raise DataError(data.origin, "skip ≥ 0 and limit ≥ 1", f"skip {skip}, limit {limit}")
    width = 2 if data.pairs else 1
    rows = len(data) // width
    if skip >= rows:
        raise DataError(data.origin, f"more than {skip} rows to skip", f"{rows} rows")
    stop = rows if limit is None else min(rows, skip + limit)
    if skip == 0 and stop == rows:
        return data
    return data.take(slice(skip * width, stop * width))

"""Columns of `.tsv`, `.csv` and `.jsonl`: one text column makes sentences, two make pairs, numbers make arrays."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError
from ._fit import fit
from ._preprocess import Preprocess
from ._text import TextStore
from ._types import Data, InputLike

_TEXTS = (("sentence1", "sentence2"), ("text1", "text2"), ("text",), ("sentence",), ("query",))
_LABELS = ("score", "label", "labels", "y")
_PARTS = {"text", "pair", "label"}


def read_table(path: Path) -> dict[str, list[object]]:
    """Return the columns of a table; every row has every column."""
    try:
        with path.open(newline="", encoding="utf-8") as f:
            if path.suffix == ".jsonl":
                rows = [json.loads(line) for line in f if line.strip()]
            else:
                tabs = path.suffix == ".tsv"
                # Quotes mean nothing in tab-separated files: sentences hold single ones.
                rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.DictReader(f))
    except (ValueError, csv.Error) as e:
        raise DataError(path, f"a {path.suffix[1:]} table in UTF-8", str(e)) from e
    if not rows or not all(isinstance(r, dict) for r in rows):
        raise DataError(path, "at least one row of named columns", "none" if not rows else "something else")
    names = list(rows[0])
    for number, row in enumerate(rows, start=1):
        if set(row) != set(names) or (path.suffix != ".jsonl" and None in row.values()):
            raise DataError(f"{path}: row {number}", f"columns {', '.join(map(str, names))}", "others or fewer")
    return {n: [r[n] for r in rows] for n in names}


def open_table(
    path: Path,
    inputs: Sequence[InputLike],
    preprocess: Mapping[str, Preprocess],
    columns: Mapping[str, str] | None,
    tokenizer: Path | None,
    max_length: int,
) -> Data:
    """Open a table; `columns` names its parts: text, pair (the second sentence), label."""
    table = read_table(path)
    columns = dict(columns or {})
    for part, name in columns.items():
        if part not in _PARTS:
            raise DataError(f"{path}: columns", f"one of {', '.join(sorted(_PARTS))}", part)
        if name not in table:
            raise DataError(f"{path}: columns.{part}", f"one of {', '.join(table)}", name)
    texts = [columns[p] for p in ("text", "pair") if p in columns]
    if not texts and all(s.name not in table for s in inputs):
        texts = list(next((t for t in _TEXTS if all(c in table for c in t)), ()))
    label = columns.get("label") or next((c for c in _LABELS if c in table and c not in texts), None)
    labels = None if label is None else _numbers(table[label], f"{path}: column {label}")
    if not texts:
        arrays = {s.name: _numbers(table[s.name], f"{path}: column {s.name}") for s in inputs if s.name in table}
        if not arrays:
            wanted = f"a text column, or columns named {', '.join(s.name for s in inputs)}"
            raise DataError(path, wanted, ", ".join(table), "name them with data.columns")
        return Data(fit(arrays, labels, inputs, preprocess, str(path)), labels, origin=str(path))
    if tokenizer is None:
        raise DataError(
            path, "a tokenizer for text", "none", "use a Hugging Face folder as the model, or name data.tokenizer"
        )
    rows = [str(table[t][i]) for i in range(len(table[texts[0]])) for t in texts]
    return Data(
        TextStore(rows, inputs, tokenizer, max_length, str(path)), labels, pairs=len(texts) == 2, origin=str(path)
    )


def _numbers(values: Sequence[object], where: str) -> np.ndarray:
    """Return whole numbers as int64, others as float64; `DataError` names the first row that is none."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        for row, value in enumerate(values, start=1):
            try:
                float(value)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                raise DataError(f"{where}, row {row}", "a number", repr(value)) from None
        raise DataError(where, "rows of equal length", "others") from None
    if not np.isfinite(array).all():
        raise DataError(where, "finite numbers", "NaN or infinity")
    whole = all(isinstance(v, int) or (isinstance(v, str) and v.strip().lstrip("+-").isdigit()) for v in values[:1000])
    return array.astype(np.int64) if whole and np.array_equal(array, np.round(array)) else array

"""Rows of text as token ids: tokenized once, padded to the longest of each batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..files import sha256_json
from ._types import InputLike


class TextStore:
    """Token ids of unequal length under the model's input names."""

    def __init__(
        self, texts: Sequence[str], inputs: Sequence[InputLike], tokenizer: Path, max_length: int, origin: str
    ) -> None:
        from transformers import AutoTokenizer

        if max_length < 1:
            raise DataError(origin, "a max_length of at least 1", max_length)
        try:
            found: Any = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as e:
            raise DataError(tokenizer, "a tokenizer", str(e), "name the model's folder as the tokenizer") from e
        encoded = found(list(texts), truncation=True, max_length=max_length, padding=False)
        names = [s.name for s in inputs] or list(encoded)
        missing = [n for n in names if n not in encoded]
        if missing:
            raise DataError(origin, f"inputs that a tokenizer makes ({', '.join(encoded)})", ", ".join(missing))
        self._rows: dict[str, list[list[int]]] = {n: encoded[n] for n in names}
        self._pad = {n: int(found.pad_token_id or 0) if n == "input_ids" else 0 for n in names}
        dtypes = {s.name: s.dtype for s in inputs}
        self._dtypes = {n: dtypes.get(n, "int64") for n in names}

    def __len__(self) -> int:
        return len(next(iter(self._rows.values())))

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        out = {}
        for name, rows in self._rows.items():
            chosen = [rows[i] for i in index]
            width = max((len(r) for r in chosen), default=0)
            array = np.full((len(chosen), width), self._pad[name], dtype=self._dtypes[name])
            for i, row in enumerate(chosen):
                array[i, : len(row)] = row
            out[name] = array
        return out

    def sizes(self) -> np.ndarray:
        """Return the length of every sample."""
        return np.array([len(r) for r in next(iter(self._rows.values()))], dtype=np.int64)

    def digest(self) -> str:
        return sha256_json({"rows": self._rows, "pad": self._pad, "dtypes": self._dtypes})

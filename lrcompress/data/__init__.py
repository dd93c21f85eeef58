"""What calibration, training and evaluation read: named arrays with a sample axis, and labels.

    data = open_data("calibration.npz", inputs=(InputSpec("x", "float32", ("batch", 3, 32, 32)),))
    for batch in data.take(slice(0, 256)).batches(32):
        model(**batch.inputs)

A source is a file (`.npz`, `.safetensors`, `.tsv`, `.csv`, `.jsonl`), a folder of images with `labels.tsv`, or
`pkg.mod:callable` / `path/file.py:callable`. Whatever does not fit the model's inputs ends in one `DataError`.
"""

from __future__ import annotations

from ._preprocess import Preprocess
from ._types import Batch, Data, InputLike
from .sources import open_data

__all__ = ["Batch", "Data", "InputLike", "Preprocess", "open_data"]

"""Turn what a user names as data into `Data` that fits a model."""

from __future__ import annotations

from pathlib import Path

from ..data import Data, open_data
from ..errors import DataError
from ..model import OpenedModel
from ..recipe import open_split


def as_data(source: str | Path | Data, opened: OpenedModel) -> Data:
    """Open `source`: a `Data`, a file, a folder, `pkg.mod:callable`, or `RECIPE.yaml:SPLIT`."""
    if isinstance(source, Data):
        return source
    text = str(source)
    head, colon, split = text.rpartition(":")
    if colon and head.endswith((".yaml", ".yml")):
        return open_split(Path(head), split, inputs=opened.inputs)
    if not text:
        raise DataError("data", "a source", "an empty name")
    folder = opened.extra.get("folder")
    return open_data(source, inputs=opened.inputs, tokenizer=Path(folder) if folder else None)

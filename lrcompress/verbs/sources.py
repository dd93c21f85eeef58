"""Turn what a user names as data into `Data` that fits a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data import Data, open_data
from ..model import InputSpec, OpenedModel
from ..recipe import open_split


def as_data(source: str | Path | Data, *, inputs: Sequence[InputSpec], tokenizer: Path | None = None) -> Data:
    """Open `source`: a `Data`, a file, a folder, `pkg.mod:callable`, or `RECIPE.yaml:SPLIT`."""
    if isinstance(source, Data):
        return source
    head, colon, split = str(source).rpartition(":")
    if colon and head.endswith((".yaml", ".yml")):
        return open_split(Path(head), split, inputs=inputs)
    return open_data(source, inputs=inputs, tokenizer=tokenizer)


def for_model(source: str | Path | Data, opened: OpenedModel) -> Data:
    """Open `source` for the inputs (and tokenizer) of a model."""
    folder = opened.extra.get("folder")
    return as_data(source, inputs=opened.inputs, tokenizer=Path(str(folder)) if folder else None)

"""Turn what a user names as data into `Data` that fits a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np

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


def inputs_told_by(data: Data, opened: OpenedModel) -> tuple[InputSpec, ...]:
    """Return the inputs that a sample shows, for a network that does not know its own: the first axis is the batch.

    Ids (whole numbers along one axis) may be of any length. A single array takes the name of forward's one argument.
    """
    arrays = next(iter(data.take(slice(0, 1)).batches(1))).inputs
    names = {n: n for n in arrays}
    if len(arrays) == 1 and opened.module is not None:
        required = [
            p.name
            for p in inspect.signature(opened.module.forward).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        names = dict(zip(arrays, required, strict=True)) if len(required) == 1 else names
    found = []
    for name, value in arrays.items():
        ids = value.ndim == 2 and np.issubdtype(value.dtype, np.integer)
        rest: tuple[int | str, ...] = ("sequence",) if ids else value.shape[1:]
        found.append(InputSpec(names[name], str(value.dtype), ("batch", *rest)))
    return tuple(found)

"""Turn what a user names into what a verb works on: data that fit a model, layers, a device to compute on."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..calibrate import Cache, collect, is_statistics, read_statistics
from ..data import Data, InputLike, open_data
from ..errors import CommandError, LrcompressWarning, ModelError
from ..factorize import Statistics
from ..model import InputSpec, OpenedModel
from ..model.cache import PAST
from ..model.surgery import Layer, tensors_as_layers
from ..model.views import view_of
from ..progress import Progress
from ..recipe import open_split
from .asking import marked


def as_data(source: str | Path | Data, *, inputs: Sequence[InputLike], tokenizer: Path | None = None) -> Data:
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
    inputs = [s for s in opened.inputs if not s.name.startswith(PAST)]  # no file holds a cache
    return as_data(source, inputs=inputs, tokenizer=Path(str(folder)) if folder else None)


def layers_of(opened: OpenedModel, include: Sequence[str], exclude: Sequence[str], *, verb: str) -> list[Layer]:
    """Return the layers of the model; those that the patterns leave out carry that as their reason."""
    layers = view_of(opened).layers if opened.module is not None else tensors_as_layers(opened.tensors or {})
    return marked(layers, include, exclude, verb=verb, where=opened.path or "the model")


def statistics_of(
    opened: OpenedModel,
    layers: Sequence[Layer],
    calib: str | Path | Data,
    *,
    seed: int,
    compute: str,
    progress: Progress,
    cache: bool = True,
) -> dict[str, Statistics]:
    """Return the statistics of the layers that have no reason to stay dense: kept ones, or of a pass over `calib`.

    `cache`: whether a pass may be answered by, and kept in, the cache that the environment names.
    """
    wanted = [layer for layer in layers if layer.reason is None]
    if not isinstance(calib, Data) and is_kept(calib):
        return read_statistics(calib, model=opened.digest, layers=wanted)
    if opened.module is None:
        raise no_network(opened)
    data = for_model(calib, opened)
    statistics = collect(
        opened, opened.module, data, wanted, seed=seed, compute=compute, progress=progress,
        cache=Cache.usual() if cache else None,
    )  # fmt: skip
    few = [n.name for n in wanted if 0 < statistics[n.name].count < n.columns and n.kind != "embedding"]
    if few:
        warnings.warn(
            f"calibration has fewer positions than {few[0]} has inputs ({len(few)} layers): what it did not show is guessed from the rest; give more data",
            LrcompressWarning, stacklevel=3,
        )  # fmt: skip
    return statistics


def is_kept(calib: str | Path | Data) -> bool:
    """Return whether `calib` is a folder of statistics rather than data."""
    return not isinstance(calib, Data) and is_statistics(calib)


def no_network(opened: OpenedModel) -> ModelError:
    """Return the error of calibrating a bare state dict."""
    return ModelError(opened.path, "a network to run the calibration data through", "a state dict", "give --arch")


def device_of(compute: str) -> str:
    """Return the torch device that `--compute` means; `CommandError` for one that is not here."""
    if compute == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    asked = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", compute)
    if asked is None:
        raise CommandError("--compute", "auto, cpu, cuda or cuda:N", compute)
    if compute != "cpu" and int(asked[1] or 0) >= torch.cuda.device_count():
        raise CommandError(
            "--compute", "a device that is here", compute, "no such CUDA device was found; use --compute cpu"
        )
    return compute


def with_inputs(opened: OpenedModel, calib: str | Path | Data) -> OpenedModel:
    """Return the model with the inputs that calibration data show, where it does not know its own: export needs them.

    The first axis is the batch; ids (whole numbers along one axis) may be of any length. A single array takes the name
    of forward's one argument.
    """
    if opened.inputs or opened.module is None or is_kept(calib):
        return opened
    data = for_model(calib, opened)
    return replace(opened, inputs=_shown(data, opened)) if len(data) else opened


def _shown(data: Data, opened: OpenedModel) -> tuple[InputSpec, ...]:
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

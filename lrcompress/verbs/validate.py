"""The verb `validate`: an exported model against its goldens, and on data against the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Data
from ..errors import LrcompressError, ModelError
from ..graphs import Feeds, OnnxGraph, Run, is_graph_checkpoint, is_onnx, load_graph_checkpoint, open_graph
from ..manifest import Manifest
from ..model import InputSpec, OpenedModel, open_model
from ..model.cache import PAST, empty_past
from ..model.checkpoint import is_compressed, load_compressed
from ..plan.profile import named_table
from ..progress import Progress, Silent
from ..validate import validate as check_exported
from .predict import Predict, predictor
from .sources import as_data


@dataclass(frozen=True)
class ValidateResult:
    """`passed`, and `data`: the report of the command line."""

    data: dict[str, Any]
    passed: bool


def validate(
    exported: str | Path = "exported",
    *,
    data: str | Data | None = None,
    metric: str | None = None,
    original: str | Path | OpenedModel | None = None,
    max_drop: float | None = None,
    on: Sequence[str] = ("cpu",),
    threads: int = 1,
    latency: str | Path | None = None,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    inputs: Sequence[InputSpec] = (),
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ValidateResult:
    """Check `exported` on every target of `on`; with `data` and `metric` also its accuracy beside the original's.

    `latency`: a latency table, or the profile of a device that has one: the predicted time is told beside the measured.
    A miss is reported, not raised: `passed` is False. Raises `ManifestError`, `DataError`, `ModelError`, `CommandError`.
    """
    folder = Path(exported)
    manifest = Manifest.load(folder)
    table = None if latency is None else named_table(latency)
    reference: OpenedModel | None = None
    samples: Data | None = None
    predict: Predict | None = None
    if data is not None and (graph := _graph_original(folder, manifest, original)) is not None:
        feeds = Feeds(graph)
        samples = as_data(data, inputs=feeds.ports).mapped(feeds)
        predict = _runs(graph)
    elif data is not None:
        trust = {"trust_pickle": trust_pickle, "trust_remote_code": trust_remote_code}
        reference = _original(folder, manifest, original, arch, arch_args, inputs, trust)
        specs = [InputSpec(i["name"], i["dtype"], tuple(i["shape"])) for i in manifest.inputs]
        plain = [s for s in specs if not s.name.startswith(PAST)]
        samples = as_data(data, inputs=plain, tokenizer=_tokenizer(reference))
        predict = _predict(reference)
        if plain != specs:  # a decoder reads each sample from the start
            past = [(s.name, s.dtype, s.shape) for s in specs]
            samples = samples.mapped(lambda batch: batch | empty_past(past, len(next(iter(batch.values())))))
            predict = _without_past(predict)
    report = check_exported(
        folder, data=samples, metric=metric, predict_original=predict, max_drop=max_drop, on=tuple(on), threads=threads,
        latency=table, progress=progress or Silent(),
    )  # fmt: skip
    return ValidateResult(report.data, report.passed)


def _original(
    folder: Path,
    manifest: Manifest,
    original: str | Path | OpenedModel | None,
    arch: str | None,
    arch_args: Mapping[str, Any] | None,
    inputs: Sequence[InputSpec],
    trust: Mapping[str, bool],
) -> OpenedModel | None:
    """Return the original: as named, or where the compressed model that was exported says it is; None if it is gone."""
    if isinstance(original, OpenedModel):
        return original
    compressed = None
    recorded = manifest.raw.get("compressed")
    if isinstance(recorded, dict) and isinstance(recorded.get("path"), str):
        place = (folder / recorded["path"]).resolve()
        if is_compressed(place):
            compressed = load_compressed(place)
    if original is not None:
        if arch is not None or compressed is None:
            opened = open_model(original, arch=arch, arch_args=arch_args, inputs=inputs, **trust)
            if opened.module is None:
                raise ModelError(original, "a network", "a state dict has no graph", "give --arch")
            return opened
        return compressed.open_original(Path(original), **trust)
    if compressed is None:
        return None
    try:
        return compressed.open_original(None, **trust)
    except LrcompressError:
        return None


def _graph_original(folder: Path, manifest: Manifest, original: str | Path | OpenedModel | None) -> OnnxGraph | None:
    """Return the ONNX file that the export was made from: as named, or where it was; None for anything else."""
    if isinstance(original, str | Path) and is_onnx(Path(original)):
        return open_graph(original)
    recorded = manifest.raw.get("compressed")
    if original is None and isinstance(recorded, dict) and isinstance(recorded.get("path"), str):
        place = (folder / recorded["path"]).resolve()
        if is_graph_checkpoint(place):
            return load_graph_checkpoint(place).open_original()
    return None


def _runs(graph: OnnxGraph) -> Predict:
    """Return a function from named input arrays, as the graph takes them, to named output arrays."""
    run = Run(graph)
    return lambda inputs: run(inputs)[0]


def _without_past(predict: Predict | None) -> Predict | None:
    """Return `predict` of a network that keeps no cache."""
    if predict is None:
        return None
    return lambda inputs: predict({k: v for k, v in inputs.items() if not k.startswith(PAST)})


def _tokenizer(opened: OpenedModel | None) -> Path | None:
    folder = opened.extra.get("folder") if opened else None
    return Path(str(folder)) if folder else None


def _predict(opened: OpenedModel | None) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None:
    return None if opened is None or opened.module is None else predictor(opened, opened.module)

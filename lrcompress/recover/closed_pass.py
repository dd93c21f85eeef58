"""What every layer of a compressed network should answer to what it reads: measured in depth order, in one pass.

The original and the compressed network stand side by side at each layer (`model.lockstep`); what is put into the
compressed one there is what later layers read. Layers that are called more than once, or look up rows, come first and
are judged by what they read in the original.

    for seen in observe(opened, original, module, names, fit=train, held=select):
        seen.fit, seen.held             # moments to solve with, and moments of data that decide
        module.get_submodule(seen.path) # the layer, which may change now
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..calibrate import MAX_OUTPUTS, collect
from ..data import Data
from ..factorize import Drift, Statistics
from ..fit import JointMoments, read_batches
from ..model import OpenedModel
from ..model.lockstep import Pair, at_stop, flow_of, lockstep
from ..model.surgery import Layer, find_layers
from ..model.views import Walk
from ..model.views.walk import walks_of
from ..progress import Progress, Silent
from .closed import Wanted, without_drift

#: Samples to solve with and to decide by, evenly spread, and how many of them run together.
FIT_SAMPLES, HELD_SAMPLES, BATCH = 1024, 512, 128
#: So many positions per input are plenty to solve with: half of the batches are read then.
_PLENTY = 512


@dataclass(frozen=True)
class Tried:
    """What was tried on the layers, a row for each, and what the network loses on held-out inputs without and with it."""

    rows: tuple[dict[str, Any], ...]
    before: float
    after: float

    @property
    def applied(self) -> list[str]:
        return [row["layer"] for row in self.rows if row["applied"]]


@dataclass(frozen=True)
class Seen:
    """One layer: `path`, where it is in the compressed network now; `weight` and `bias` of the original, as stored.

    `fit`, `held`: moments of wanted answers (bias included) and of what is read; row weights for an embedding.
    """

    name: str
    path: str
    kind: str
    weight: Tensor
    bias: Tensor | None
    fit: Drift | Statistics
    held: Drift | Statistics

    def wanted(self, bias: Tensor | None, *, held: bool) -> Wanted:
        """Return what a layer that keeps `bias` should stand for."""
        moments = self.held if held else self.fit
        if isinstance(moments, Drift):
            return Wanted.of_drift(self.weight, moments, bias)
        return Wanted.of_rows(self.weight, bias, moments)

    @property
    def total(self) -> float:
        """What an answer that is always the mean loses on held-out data."""
        if isinstance(self.held, Drift):
            return self.held.total()
        assert self.held.row_weights is not None
        p, w = self.held.row_weights.double(), self.weight.double()
        return float((p[:, None] * (w - p @ w).square()).sum())


def evenly(data: Data, most: int) -> Data:
    """Return at most `most` samples, evenly spread: ordered files are represented."""
    if len(data) <= most:
        return data
    return data.take(np.linspace(0, len(data) - 1, most).round().astype(np.int64))


def observe(
    opened: OpenedModel,
    original: nn.Module,
    module: nn.Module,
    names: Sequence[str],
    *,
    fit: Data,
    held: Data,
    progress: Progress | None = None,
) -> Iterator[Seen | tuple[str, str]]:
    """Yield every layer of `names` in depth order, or (name, why it cannot be seen).

    `original` has plain layers where `module` has compressed ones. Raises `ModelError` where the data decide which
    layers are called.
    """
    progress = progress or Silent()
    layers = {layer.name: layer for layer in find_layers(original)}
    fit, held = evenly(fit, FIT_SAMPLES), evenly(held, HELD_SAMPLES)
    known = [n for n in names if n in layers]
    for name in names:
        if name not in layers:
            yield name, "the original has no linear, convolution or embedding layer of this name"
    batches = read_batches(fit, BATCH)
    few = {k: v[:2] for k, v in batches[0].items()}
    narrow = [n for n in known if layers[n].kind != "embedding" and layers[n].outputs <= MAX_OUTPUTS]
    flow = flow_of(opened, original, few, narrow)
    once = set(flow.once) & set(narrow)
    yield from _by_themselves(opened, original, [layers[n] for n in known if n not in once], fit, held)
    order = [n for n in flow.calls if n in once]
    held_batches = read_batches(held, BATCH)
    masks = [_mask(b) for b in (*batches, *held_batches)]
    walks = walks_of(original, order)
    with progress.task("closed form", total=len(order)) as advance:
        for stop in lockstep(opened, original, module, [*batches, *held_batches], flow, order):
            layer, walk = layers[stop.layer], walks.get(stop.layer)
            pairs = list(zip(stop.pairs(), masks, strict=True))
            solving = _enough(pairs[: len(batches)], walk, layer)
            yield _seen(
                layer, original, at_stop(layer.name), _drift(solving, walk), _drift(pairs[len(batches) :], walk)
            )
            advance(1, stop.layer)


def _by_themselves(
    opened: OpenedModel, original: nn.Module, layers: Sequence[Layer], fit: Data, held: Data
) -> Iterator[Seen | tuple[str, str]]:
    """Yield layers with the statistics of what they read in the original."""
    able = [layer for layer in layers if layer.kind == "embedding" or layer.outputs <= MAX_OUTPUTS]
    if not able:
        found: tuple[dict[str, Statistics], ...] = ({}, {})
    else:
        found = tuple(collect(opened, original, data, able, gradient_samples=0) for data in (fit, held))
    for layer in layers:
        if layer not in able:
            yield layer.name, f"more than {MAX_OUTPUTS} outputs"
        elif not all(s[layer.name].count for s in found):
            yield layer.name, "the data never reach it"
        elif layer.kind == "embedding":
            yield _seen(layer, original, layer.name, found[0][layer.name], found[1][layer.name])
        else:
            weight, bias = _stored(layer), getattr(original.get_submodule(layer.name), "bias", None)
            yield _seen(
                layer, original, layer.name, *(without_drift(weight, bias, s[layer.name]) for s in found)
            )  # fmt: skip


def _seen(
    layer: Layer, original: nn.Module, path: str, fit: Drift | Statistics | None, held: Drift | Statistics | None
) -> Seen | tuple[str, str]:
    if fit is None or held is None:
        return layer.name, "the data give it no position"
    bias = getattr(original.get_submodule(layer.name), "bias", None)
    return Seen(layer.name, path, layer.kind, _stored(layer), None if bias is None else bias.detach(), fit, held)


def _stored(layer: Layer) -> Tensor:
    """Return the weight (out, in/groups, *k), or (rows, width)."""
    return layer.weight.reshape(layer.plain_shape)


def _drift(pairs: Sequence[tuple[Pair, Tensor | None]], walk: Walk | None) -> Drift | None:
    moments = JointMoments()
    for pair, mask in pairs:
        moments.add(pair.wanted(), pair.drifted, walk, mask)
    return moments.drift() if moments.read.count else None


def _enough(
    pairs: Sequence[tuple[Pair, Tensor | None]], walk: Walk | None, layer: Layer
) -> Sequence[tuple[Pair, Tensor | None]]:
    """Return every second batch where there are so many positions that the others tell nothing new."""
    answer = pairs[0][0].answer
    positions = len(pairs) * (answer.numel() // answer.shape[1] if walk is not None else answer[..., 0].numel())
    return pairs[::2] if positions > 2 * _PLENTY * layer.columns and len(pairs) > 3 else pairs


def _mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 else None


__all__ = ["Seen", "evenly", "observe"]

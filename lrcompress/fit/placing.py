"""Where layers stand in one request, and how finely their inputs are rounded in 8 bits: two things a price needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..factorize import ConvGeometry
from ..model.views import LayerView
from ..model.views.base import Reading
from ..model.views.walk import Walk
from ..plan.form_time import Place


def places(view: LayerView, inputs: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Place]:
    """Run one request; return where each layer stood. A layer that is called more than once counts its rows together."""
    found: dict[str, Place] = {}
    kinds = {layer.name: layer.kind for layer in view.layers}

    def note(reading: Reading) -> None:
        place = _place(kinds[reading.layer], reading.value, view.walks.get(reading.layer))
        before = found.get(reading.layer)
        found[reading.layer] = place if before is None else Place(before.rows + place.rows, place.image, place.geometry)

    with torch.no_grad():
        view.read(inputs, names, note)
    return found


def _place(kind: str, value: Tensor, walk: Walk | None) -> Place:
    if kind == "embedding":
        return Place(rows=max(value.numel(), 1))
    if walk is None:
        return Place(rows=max(value.numel() // max(value.shape[-1], 1), 1))
    size = tuple(int(n) for n in value.shape[2:])
    around = walk.around(size)
    even = all(a == b for a, b in around)
    padded = size if even else tuple(n + a + b for n, (a, b) in zip(size, around, strict=True))
    pads = tuple(a for a, _ in around) if even else (0,) * len(size)
    return Place(rows=int(value.shape[0]), image=padded, geometry=ConvGeometry(walk.stride, pads, walk.dilation))


@dataclass
class _Range:
    squares: float = 0.0
    samples: int = 0


def input_steps(view: LayerView, batches: Sequence[Mapping[str, Tensor]], names: Collection[str]) -> dict[str, float]:
    """Return the root mean square of the steps in which 8 bits round each layer's inputs: a sample's range over 255."""
    found: dict[str, _Range] = {}
    kinds = {layer.name: layer.kind for layer in view.layers}

    def note(reading: Reading) -> None:
        if kinds[reading.layer] == "embedding":
            return
        rows = reading.value.detach().double().reshape(len(reading.value), -1)
        width = rows.amax(1).clamp_min(0) - rows.amin(1).clamp_max(0)
        own = found.setdefault(reading.layer, _Range())
        own.squares += float(width.square().sum()) / 255**2
        own.samples += len(rows)

    with torch.no_grad():
        for batch in batches:
            view.read(batch, names, note)
    return {name: (own.squares / own.samples) ** 0.5 for name, own in found.items() if own.samples}


def one_request(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return one sample of usual length as a batch of one, without its padding."""
    batch = batches[0]
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return {name: value[:1] for name, value in batch.items()}
    lengths = mask.sum(1)
    at = int(lengths.argsort(stable=True)[len(lengths) // 2])
    length, width = int(lengths[at]), mask.shape[1]
    return {
        name: value[at : at + 1, :length] if value.dim() > 1 and value.shape[1] == width else value[at : at + 1]
        for name, value in batch.items()
    }


def as_feeds(inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return tensors as the runtime takes them."""
    return {name: value.numpy() for name, value in inputs.items()}

"""Trainable corrections of a frozen layer: one file per kind.

A kind is a module of this package (or of the entry-point group `lrcompress.adapt`) with one class `Adapter` that
derives from `BaseAdapter`. Every adapter is zero at init and has a live gradient in its first step.

    target = Target((64, 32))
    lora = adapter("lora", weight_shape=target.shape, rank=4, generator=torch.Generator().manual_seed(0))
    y = layer(x) + lora(x, target)              # factor by factor, ΔW is never built where algebra allows
    W_merged = W + lora.delta_weight()
"""

from __future__ import annotations

from typing import Any

import torch

from .. import plugins
from ._base import BaseAdapter
from ._target import Base, Target

__all__ = ["Base", "BaseAdapter", "Target", "adapter", "adapter_class", "kinds"]


def kinds() -> tuple[str, ...]:
    """Return the keys of all adapter kinds."""
    return plugins.names(__name__)


def adapter_class(kind: str) -> type[BaseAdapter]:
    """Return the class of a kind; `KeyError` names the nearest one."""
    cls: type[BaseAdapter] = plugins.load(__name__, kind).Adapter
    return cls


def adapter(
    kind: str,
    *,
    weight_shape: tuple[int, ...],
    rank: int,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> BaseAdapter:
    """Make a fresh adapter for a weight of shape (rows, columns, *k).

    `options`: `groups` of the layer, `core` of its factors, `rslora` (scaling alpha/√rank), and those of the kind:
    `tucker` (lora, loha, lokr), `factor` and `decompose_both` (lokr), `factors` (lokh).
    """
    return adapter_class(kind)(weight_shape, rank, alpha, generator, **options)

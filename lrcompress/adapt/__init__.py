"""Trainable corrections of a frozen layer: one file per kind.

A kind is a module of this package (or of the entry-point group `lrcompress.adapt`) with one class `Adapter` that
derives from `BaseAdapter`. Every adapter is zero at init and has a live gradient in its first step.

    lora = adapter("lora", weight_shape=(64, 32), rank=4, generator=torch.Generator().manual_seed(0))
    y = layer(x) + lora(x)                      # factor by factor, ΔW is never built where algebra allows
    W_merged = W + lora.delta_weight()
"""

from __future__ import annotations

import torch

from .. import plugins
from ._base import BaseAdapter

__all__ = ["BaseAdapter", "adapter", "adapter_class", "kinds"]


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
) -> BaseAdapter:
    """Make a fresh adapter for a weight of shape (out, in, *k)."""
    return adapter_class(kind)(weight_shape, rank, alpha, generator)

"""`--method shared`: layers that read one input get one basis, chosen, paid for and stored once.

Their weights, stacked, are one layer to the allocator. Which layers read the same tensor is seen in calibration, where
they share one accumulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import CommandError
from ..factorize import Factorization, Statistics
from ..factorize.shared import block_diagonal, decompose_group
from ..model.surgery import Layer
from ..plan import Choice, select

Stacks = Mapping[str, Sequence[str]]


def same_input(layers: Sequence[Layer], statistics: Mapping[str, Statistics]) -> dict[str, list[str]]:
    """Return {first: others} for linear layers that read the same tensor. Raises `CommandError` without statistics."""
    if not statistics:
        raise CommandError(
            "lrcompress factorize --method shared",
            "calibration data, which show what layers read",
            "none",
            "give --calib",
        )
    groups: dict[int, list[str]] = {}
    for layer in layers:
        found = statistics.get(layer.name)
        if layer.reason is None and layer.kind == "linear" and found is not None and found.gram is not None:
            groups.setdefault(id(found.gram), []).append(layer.name)
    return {first: others for first, *others in groups.values() if others}


def choose_shared(
    layers: Sequence[Layer], stacks: Stacks, *, total: int, statistics: Mapping[str, Statistics], **how: Any
) -> list[Choice]:
    """Return one choice per layer; each stack is offered as one layer, the rest as the SVD."""
    by_name = {layer.name: layer for layer in layers}
    followers = {n for names in stacks.values() for n in names}
    heads, priced = [], dict(statistics)
    for layer in layers:
        if layer.name in stacks:
            members = [layer, *(by_name[n] for n in stacks[layer.name])]
            own = [statistics[n.name] for n in members]
            priced[layer.name] = replace(own[0], output_gram=block_diagonal([s.output_gram for s in own]))
            layer = replace(
                layer, weight=torch.cat([n.weight for n in members]), has_bias=all(n.has_bias for n in members)
            )
        if layer.name not in followers:
            heads.append(layer)
    fixed = total - sum(n.weight.numel() for n in heads)
    chosen = {c.name: c for c in select(heads, statistics=priced, fixed_params=fixed, **{**how, "method": "svd"})}
    return [_own(layer, stacks, chosen) for layer in layers]


def _own(layer: Layer, stacks: Stacks, chosen: Mapping[str, Choice]) -> Choice:
    """Return what a stack's choice means for one layer: its own U, and V with the first."""
    if layer.name in chosen and layer.name not in stacks:
        return chosen[layer.name]
    first = next(f for f, others in stacks.items() if layer.name == f or layer.name in others)
    stack = chosen[first]
    if stack.form == "dense":
        return Choice(layer.name, "dense", 0, layer.weight.numel(), stack.reason)
    assert isinstance(stack.rank, int)
    rank = min(stack.rank, layer.weight.shape[1])
    numbers = rank * layer.weight.shape[0] + (rank * layer.weight.shape[1] if layer.name == first else 0)
    others = ", ".join(n for n in (first, *stacks[first]) if n != layer.name)
    return Choice(layer.name, "svd", rank, numbers, f"one basis with {others}")


def decompose_stack(
    first: str, stacks: Stacks, layers: Mapping[str, Layer], rank: int, statistics: Mapping[str, Statistics]
) -> dict[str, Factorization]:
    """Return the factors of every layer of a stack, by name."""
    names = [first, *stacks[first]]
    found = decompose_group([layers[n].weight for n in names], rank, [statistics.get(n) for n in names])
    return dict(zip(names, found, strict=True))

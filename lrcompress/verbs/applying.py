"""Put choices into a network: what stands for itself first, then layer after layer in the order of depth.

Embeddings, tied weights, shared bases and layers that are called more than once are decomposed by their own statistics.
All others are, with calibration data, fitted to what the layers before them changed (`fit.apply_in_depth`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..errors import PlanError
from ..factorize import Factorization, Refused, Statistics, form
from ..fit import Fitted, apply_in_depth, fitting_layers, reestimated
from ..model import tensors_of
from ..model.checkpoint import module_layers
from ..model.surgery import Layer, replace_layer
from ..model.ties import for_member, share_factors
from ..plan import Choice
from ..progress import Progress
from .planning import Prepared, copy_of, judged
from .stacked import Stacks, decompose_stack
from .streamed import row


@dataclass(frozen=True)
class Made:
    """What decomposing gave: the module, layer specs and report rows."""

    module: nn.Module
    specs: dict[str, Any]
    rows: list[dict[str, Any]]


def apply_choices(
    prepared: Prepared, choices: Sequence[Choice], stacks: Stacks, progress: Progress, *, anchor: bool = True
) -> Made:
    """Return a copy of the prepared network with every layer what its choice says, and the report's rows."""
    module = copy_of(prepared.network)
    in_depth = _in_depth(prepared, choices, stacks) if anchor else []
    names = {layer.name for layer in in_depth}
    by_choice = {c.name: c for c in choices}
    own = _place(prepared, module, [c for c in choices if c.name not in names], stacks, progress)
    fitted: dict[str, Fitted] = {}
    if in_depth and prepared.data is not None:
        fitted = apply_in_depth(
            prepared.opened, prepared.network, module, in_depth, by_choice, prepared.statistics, prepared.data,
            progress=progress,
        )  # fmt: skip
    if prepared.data is not None and anchor:
        reestimated(prepared.opened, prepared.network, module, prepared.data, judged(prepared.data))
    followers = {f for names in prepared.ties.values() for f in names}
    rows = []
    for layer in prepared.layers:
        choice, found = by_choice[layer.name], own.get(layer.name)
        done = fitted.get(layer.name)
        if done is not None:
            found = done.factors
            if found is not None and (found.form, found.rank) != (choice.form, choice.rank):
                choice = replace(choice, form=found.form, rank=found.rank, n_params=found.n_params)
        line = row(layer, choice, found, tied=layer.name in followers)
        rows.append(line if done is None else {**line, "blend": done.beta, "held_out_error": done.rel_error})
    return Made(module, module_layers(module), rows)


def _in_depth(prepared: Prepared, choices: Sequence[Choice], stacks: Stacks) -> list[Layer]:
    """Return the layers that are fitted one after the other; none where nothing changes, or without data."""
    if prepared.data is None or not len(prepared.data) or all(c.form == "dense" for c in choices):
        return []
    apart = {n for first, others in (*prepared.ties.items(), *stacks.items()) for n in (first, *others)}
    able = [layer for layer in prepared.layers if layer.reason is None and layer.name not in apart]
    able = [layer for layer in able if prepared.statistics[layer.name].count]
    few = tensors_of(next(iter(prepared.data.take(slice(0, 2)).batches(2))).inputs)
    _, order = fitting_layers(prepared.opened, prepared.network, few, able)
    return [layer for layer in able if layer.name in set(order)]


def _place(
    prepared: Prepared, module: nn.Module, choices: Sequence[Choice], stacks: Stacks, progress: Progress
) -> dict[str, Factorization]:
    """Decompose the layers of `choices` by their own statistics, put them in their places, and return the factors."""
    ties = prepared.ties
    leaders = {f: leader for leader, followers in ties.items() for f in followers}
    by_name = {layer.name: layer for layer in prepared.layers}
    made: dict[str, Factorization] = {}
    parts: dict[str, Factorization] = {}
    placed = {}
    with progress.task("factorize", total=len(choices)) as advance:
        for choice in choices:
            layer = by_name[choice.name]
            if choice.form != "dense":
                first = leaders.get(layer.name, layer.name)
                found = made.get(first) or parts.get(layer.name)
                if layer.name in stacks and isinstance(choice.rank, int):
                    parts |= decompose_stack(layer.name, stacks, by_name, choice.rank, prepared.statistics)
                    found = parts[layer.name]
                if found is None:
                    found = _decomposed(choice, by_name[first], prepared.priced.get(first))
                if first in ties:
                    made[first] = found
                    found = for_member(found, layer, prepared.statistics.get(layer.name))
                replace_layer(module, layer.name, found)
                placed[layer.name] = found
            advance(1, layer.name)
    for leader in made:
        share_factors(module, leader, ties[leader])
    for first, others in stacks.items():
        if first in parts:
            share_factors(module, first, others, ["V"])
    return placed


def _decomposed(choice: Choice, layer: Layer, statistics: Statistics | None) -> Factorization:
    try:
        return form(choice.form).decompose(layer.weight, choice.rank, statistics)  # type: ignore[no-any-return]
    except Refused as e:
        raise PlanError(f"{layer.name}: {choice.form}", e.expected, e.got, e.remedy) from e

"""Choose form and rank per layer: by one rank, by energy, or by a budget.

A budget is one problem for the whole model (`allocation`). Losses of different layers are comparable with two-sided
statistics, which price an error by what the answer feels; otherwise each is taken relative to its layer's energy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from ..errors import BudgetError
from ..factorize import Point, Rank, Statistics, form
from ..model.surgery import Layer
from ..threads import WIDE, apart
from .allocation import Allocation, allocate
from .options import Menu, Option, bias_cost, candidates, menu

_WORTH_MORE = "its parameters are worth more than those of other layers"


@dataclass(frozen=True)
class Budget:
    """What the whole model may take: `limit` of `unit` ("params" or "bytes"), `fixed` of which no layer can give back."""

    unit: str
    limit: int
    fixed: int
    #: How the user said it, for messages, and the whole model's size in that unit.
    option: str
    given: object
    whole: int


@dataclass(frozen=True)
class Choice:
    """What one layer becomes; `form` "dense" carries the reason."""

    name: str
    form: str
    rank: Rank
    n_params: int
    reason: str | None = None


def dense(layer: Layer, reason: str) -> Choice:
    return Choice(layer.name, "dense", 0, layer.weight.numel(), reason)


def select(
    layers: Sequence[Layer],
    *,
    method: str,
    statistics: Mapping[str, Statistics],
    rank: int | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    fixed_params: int = 0,
    multiple: int = 1,
) -> list[Choice]:
    """Return one choice per layer, in order. Exactly one of rank, ratio, energy; `fixed_params` is the rest of the model."""
    if ratio is not None:
        menus = menus_of(layers, method, statistics, multiple=multiple)
        return chosen(menus, within(menus, ratio_budget(layers, ratio, fixed_params)).chosen)
    return [_alone(layer, method, statistics.get(layer.name), rank, energy) for layer in layers]


def _alone(layer: Layer, method: str, statistics: Statistics | None, rank: int | None, energy: float | None) -> Choice:
    if layer.reason is not None:
        return dense(layer, layer.reason)
    names = candidates("svd" if method == "auto" and rank is not None else method, layer)
    if not names:
        return dense(layer, f"{method} does not serve {layer.kind} layers")
    best: tuple[int, str, Rank] | None = None
    for name in names:
        if rank is not None:
            wanted: Rank = form(name).clip(layer.shape, rank)
        else:
            assert energy is not None
            found = _smallest(layer.curve(name, statistics), energy, layer.energy(statistics))
            if found is None:
                continue
            wanted = found
        cost = form(name).n_params(layer.shape, wanted) + bias_cost(layer, statistics)
        if best is None or cost < best[0]:
            best = cost, name, wanted
    if best is None or best[0] >= layer.weight.numel():
        got = (
            ""
            if best is None
            else f": {best[1]} at rank {_rank_text(best[2])} would take {best[0]:,} numbers, dense takes {layer.weight.numel():,}"
        )
        return dense(layer, f"would not shrink{got}")
    return Choice(layer.name, best[1], best[2], best[0])


def _rank_text(rank: Rank) -> str:
    return str(rank) if isinstance(rank, int) else "×".join(map(str, rank))


def _smallest(curve: Sequence[Point], energy: float, total: float) -> Rank | None:
    kept = [p for p in curve if p.loss <= (1 - energy) * total + 1e-12 * total]
    return min(kept, key=lambda p: (p.n_params, p.loss)).rank if kept else None


def comparable(layers: Sequence[Layer], statistics: Mapping[str, Statistics]) -> bool:
    """Return whether the losses of all layers that may change are in one unit: all have output moments."""
    return all(statistics.get(n.name, Statistics()).output_gram is not None for n in layers if n.reason is None)


def menus_of(
    layers: Sequence[Layer],
    method: str,
    statistics: Mapping[str, Statistics],
    *,
    unit: str = "params",
    multiple: int = 1,
) -> list[Menu]:
    """Return the options of all layers, in one unit of loss."""
    alike = comparable(layers, statistics)

    def own(layer: Layer) -> Menu:
        return menu(layer, method, statistics.get(layer.name), comparable=alike, unit=unit, multiple=multiple)

    def is_wide(layer: Layer) -> bool:
        return max(layer.plain_shape[0], layer.columns) >= WIDE

    found = {layer.name: own(layer) for layer in layers if is_wide(layer)}
    small = [layer for layer in layers if layer.name not in found]
    with apart() as threads:
        found |= zip((layer.name for layer in small), threads.each(own, small), strict=True)
    return [found[layer.name] for layer in layers]


def ratio_budget(layers: Sequence[Layer], ratio: float, fixed: int, before: int | None = None) -> Budget:
    """Return the budget of `--ratio`: a share of all parameters, `before`, which are those of the layers and the rest if not given."""
    whole = fixed + sum(layer.weight.numel() for layer in layers) if before is None else before
    limit = math.floor(Decimal(repr(float(ratio))) * whole)  # 0.29 of 100 is 29, 0.29 * 100 is less
    return Budget("params", limit, fixed, "--ratio", ratio, whole)


def within(menus: Sequence[Menu], budget: Budget) -> Allocation:
    """Allocate a budget. Raises `BudgetError` with the nearest one that can be met."""
    least = sum(m.options[0].cost(budget.unit) for m in menus) + budget.fixed
    if least > budget.limit:
        nearest = f"{-(-least * 10_000 // budget.whole) / 10_000:.4f}" if budget.option == "--ratio" else str(least)
        raise BudgetError(
            budget.option, f"at least {nearest} for this model and method", f"{budget.given}",
            "ask for more, or for another --method",
        )  # fmt: skip
    return allocate([m.options for m in menus], budget.limit - budget.fixed, budget.unit)


def chosen(menus: Sequence[Menu], options: Sequence[Option]) -> list[Choice]:
    """Return the choices that options mean."""
    return [
        dense(m.layer, m.layer.reason or ("would not shrink" if len(m.options) == 1 else _WORTH_MORE))
        if o.form == "dense"
        else Choice(m.layer.name, o.form, o.rank, o.n_params)
        for m, o in zip(menus, options, strict=True)
    ]

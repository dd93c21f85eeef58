"""Measure what a plan rests on: how much each layer's error matters to the answer, and whether swaps pay.

One measured point per layer turns the curves of all its forms, which agree among themselves, into losses of the
answer; one joint point tells how far they add up. Then a local search trades ranks between layers by what the whole
network loses with them. How many networks are run is fixed beforehand, never by the clock.

Source: one measured loss per layer as LEMS does it (maths.md §7.2); the rest is a local search.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..factorize import Factorization, Refused, Statistics, form
from ..model.surgery import replace_layer, set_submodule
from ..plan import Allocation, Menu, Option
from ..plan.options import half_priced
from ..progress import Progress, Silent
from ..threads import apart
from .judge import Judge

#: Scales are kept within this factor of the predicted ones: a point that lies far off is noise of a tiny loss.
_TRUST = 30.0
#: Swaps that are tried.
TRIALS = 8
#: Changes a network for as long as it is entered.
Changed = Callable[[nn.Module], contextlib.AbstractContextManager[None]]


class Bench:
    """A network whose layers can be exchanged and put back; factors are computed once for each option."""

    def __init__(
        self, judge: Judge, network: nn.Module, menus: Sequence[Menu], statistics: Mapping[str, Statistics]
    ) -> None:
        self.judge, self.network, self.statistics = judge, network, statistics
        self.menus = {m.layer.name: m for m in menus}
        self._made: dict[tuple[str, str, object], Factorization | None] = {}

    def loss(self, options: Mapping[str, Option], changed: Changed | None = None) -> float | None:
        """Return what the network loses with these layers changed and the others as they are; None where a form refuses.

        `changed`: what else is done to it meanwhile.
        """
        kept = {}
        try:
            for name, option in options.items():
                if option.form == "dense":
                    continue
                found = self._factors(name, option)
                if found is None:
                    return None
                kept[name] = self.network.get_submodule(name)
                replace_layer(self.network, name, found)
            with changed(self.network) if changed is not None else contextlib.nullcontext():
                return self.judge.loss(self.network)
        finally:
            for name, module in kept.items():
                set_submodule(self.network, name, module)

    def seen_enough(self, name: str) -> bool:
        """Return whether a layer's moments are of as many positions as it has inputs."""
        own = self.statistics.get(name)
        return own is None or own.gram is None or not 0 < own.count < own.gram.shape[-1]

    def loss_unfitted(self, name: str, option: Option) -> tuple[float | None, float]:
        """Return what the network loses with an option that is fitted to the weight alone, and what the moments say of it."""
        found, own, layer = self._factors(name, option), self.statistics[name], self.menus[name].layer
        if found is None or not found.loss > 0:
            return None, 0.0
        plain = getattr(form(option.form), "PLAIN", option.form)
        with apart(layer.columns):
            other = form(plain).decompose(layer.weight, option.rank, None)
        predicted = own.loss(layer.weight.double() - other.to_tensor().double()) * option.loss / found.loss
        kept = self.network.get_submodule(name)
        try:
            replace_layer(self.network, name, other)
            return self.judge.loss(self.network), predicted
        finally:
            set_submodule(self.network, name, kept)

    def refuses(self, name: str, option: Option) -> bool:
        """Return whether the form does not hold this weight at this rank."""
        return option.form != "dense" and name in self.menus and self._factors(name, option) is None

    def _factors(self, name: str, option: Option) -> Factorization | None:
        key = name, option.form, option.rank
        if key not in self._made:
            layer = self.menus[name].layer
            try:
                with apart(layer.columns):
                    self._made[key] = form(option.form).decompose(layer.weight, option.rank, self.statistics.get(name))
            except Refused:
                self._made[key] = None
        return self._made[key]


def sensitivities(bench: Bench, progress: Progress | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """Return {layer: factor that turns its losses into those of the answer}, and {layer: the loss that was measured}.

    A layer that was seen at fewer positions than it has inputs loses next to nothing at those very positions: it is measured
    with factors that no data chose, and counts as not measured.
    """
    progress = progress or Silent()
    factors: dict[str, float] = {}
    measured: dict[str, float] = {}
    points = {n: half_priced(m.options) for n, m in bench.menus.items()}
    tried = {n: o for n, o in points.items() if o is not None and o.loss > 0}
    with progress.task("measure layers", total=len(tried)) as advance:
        for name, option in tried.items():
            if bench.seen_enough(name):
                loss, predicted = bench.loss({name: option}), option.loss
                if loss is not None and math.isfinite(loss):
                    measured[name] = loss
            else:
                loss, predicted = bench.loss_unfitted(name, option)
            if loss is not None and math.isfinite(loss) and predicted > 0:
                factors[name] = max(loss, 0.0) / predicted
            advance(1, name)
    return _trusted(factors), measured


def _trusted(factors: Mapping[str, float]) -> dict[str, float]:
    """Keep the factors near their own median, and none at zero."""
    ordered = sorted(f for f in factors.values() if f > 0)
    if not ordered:
        return dict.fromkeys(factors, 1.0)
    middle = ordered[len(ordered) // 2]
    return {n: min(max(f, middle / _TRUST), middle * _TRUST) for n, f in factors.items()}


@dataclass(frozen=True)
class Searched:
    """The options that lost least, what they lose together, and what those at the start lost."""

    chosen: tuple[Option, ...]
    loss: float
    before: float


def search(
    bench: Bench, menus: Sequence[Menu], start: Allocation, limit: int, unit: str, *, trials: int = TRIALS,
    progress: Progress | None = None,
) -> Searched:  # fmt: skip
    """Trade ranks between pairs of layers from `start` on, keeping what lowers the measured loss, within `limit`.

    The trades that the predictions call cheapest are tried first; each costs one run of the network over the judge's
    inputs.
    """
    progress = progress or Silent()
    names = [m.layer.name for m in menus]
    best = list(start.chosen)
    first = bench.loss(dict(zip(names, best, strict=True)))
    if first is None:
        return Searched(tuple(best), float("nan"), float("nan"))
    lowest = first
    refused: set[tuple[int, Option, int, Option]] = set()
    with progress.task("search", total=trials) as advance:
        for _ in range(trials):
            trade = _cheapest(menus, best, limit, unit, refused)
            if trade is None:
                break
            giver, down, taker, up = trade
            refused.add(trade)
            trial = list(best)
            trial[giver], trial[taker] = down, up
            loss = bench.loss(dict(zip(names, trial, strict=True)))
            if loss is not None and loss < lowest:
                best, lowest = trial, loss
            advance(1)
    return Searched(tuple(best), lowest, first)


def _cheapest(
    menus: Sequence[Menu], best: Sequence[Option], limit: int, unit: str, refused: set[tuple[int, Option, int, Option]]
) -> tuple[int, Option, int, Option] | None:
    """Return the untried trade (giver, its option, taker, its option) whose predicted cost is least."""
    left = limit - sum(o.cost(unit) for o in best)
    downs = [(k, o) for k, m in enumerate(menus) for o in _below(m, best[k], unit)]
    found: tuple[float, tuple[int, Option, int, Option]] | None = None
    for giver, down in downs:
        freed = left + best[giver].cost(unit) - down.cost(unit)
        for taker, m in enumerate(menus):
            up = None if taker == giver else _above(m, best[taker], freed, unit)
            if up is None or (giver, down, taker, up) in refused:
                continue
            change = down.loss - best[giver].loss + up.loss - best[taker].loss
            if found is None or change < found[0]:
                found = change, (giver, down, taker, up)
    return None if found is None else found[1]


def _below(m: Menu, taken: Option, unit: str) -> list[Option]:
    """Return steps down, of about a tenth and a fifth of what the layer takes."""
    cheaper = [o for o in m.options if o.cost(unit) < taken.cost(unit)]
    near = []
    for share in (0.9, 0.8):
        wanted = share * taken.cost(unit)
        near += sorted(cheaper, key=lambda o: abs(o.cost(unit) - wanted))[:1]
    return list(dict.fromkeys(near))


def _above(m: Menu, taken: Option, freed: int, unit: str) -> Option | None:
    dearer = [o for o in m.options if 0 < o.cost(unit) - taken.cost(unit) <= freed and o.loss < taken.loss]
    return min(dearer, key=lambda o: (o.loss, o.cost(unit)), default=None)


def calibrated(menus: Sequence[Menu], factors: Mapping[str, float]) -> list[Menu]:
    """Return the menus with losses of the answer; a layer without a measured point takes the median factor."""
    ordered = sorted(factors.values())
    usual = ordered[len(ordered) // 2] if ordered else 1.0
    return [m.scaled(factors.get(m.layer.name, usual)) for m in menus]


def jointly(allocation: Allocation, searched: Searched, unit: str) -> Allocation:
    """Return the allocation with what the search chose."""
    loss, cost = sum(o.loss for o in searched.chosen), sum(o.cost(unit) for o in searched.chosen)
    return replace(allocation, chosen=searched.chosen, loss=loss, cost=cost)

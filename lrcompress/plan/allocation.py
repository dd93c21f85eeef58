"""One budget for the whole model: which option each layer takes so that the sum of losses is least.

A multiple-choice knapsack. On the lower hulls the steepest steps are bought first (the Lagrangian solution), then
single upgrades fill what is left, then pairs of layers trade: one gives numbers back, another spends them. `bound` is
what no allocation can beat, so the gap is known.

Source: the Lagrangian bound Σ min_o (c + λ·cost) − λ·B ≤ OPT for every λ ≥ 0; Kellerer et al. 2004, ch. 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .options import Option, hull, slope

_TRADES = 200


@dataclass(frozen=True)
class Allocation:
    """One option per layer, their loss and cost, the price λ of one unit, and the loss that no allocation is below."""

    chosen: tuple[Option, ...]
    loss: float
    cost: int
    price: float
    bound: float


def allocate(options: Sequence[Sequence[Option]], budget: int, unit: str = "params") -> Allocation:
    """Return the best options found within `budget`; `ValueError` where even the cheapest cost more."""
    hulls = [hull(o, unit) for o in options]
    left = budget - sum(h[0].cost(unit) for h in hulls)
    if left < 0:
        raise ValueError(f"the cheapest options cost {budget - left}, the budget is {budget}")
    chosen, left, price = _steepest(hulls, left, unit)
    search = _Search(options, chosen, left, unit)
    search.fill()
    search.trade()
    found = tuple(search.chosen)
    cost = sum(o.cost(unit) for o in found)
    lowest = sum(min(o.loss + price * o.cost(unit) for o in h) for h in hulls) - price * budget
    return Allocation(found, sum(o.loss for o in found), cost, price, max(lowest, 0.0))


def _steepest(hulls: Sequence[Sequence[Option]], left: int, unit: str) -> tuple[list[Option], int, float]:
    """Buy hull steps by falling slope; return the options, what is left, and the slope of the first step not bought."""
    position = [0] * len(hulls)
    steps = sorted(
        ((-slope(h[i], h[i + 1], unit), k, i) for k, h in enumerate(hulls) for i in range(len(h) - 1)),
        key=lambda s: (s[0], s[1], s[2]),
    )
    stopped: set[int] = set()
    price = 0.0
    for negative, k, i in steps:
        if k in stopped or position[k] != i:
            continue
        cost = hulls[k][i + 1].cost(unit) - hulls[k][i].cost(unit)
        if cost > left:
            stopped.add(k)  # a later step of this layer would skip one
            price = price or -negative
            continue
        position[k], left = i + 1, left - cost
    return [h[p] for h, p in zip(hulls, position, strict=True)], left, price


class _Search:
    """Upgrades and trades from one allocation on."""

    def __init__(self, options: Sequence[Sequence[Option]], chosen: list[Option], left: int, unit: str) -> None:
        self.options, self.chosen, self.left, self.unit = options, chosen, left, unit
        self._costs = [np.array([o.cost(unit) for o in layer], dtype=np.float64) for layer in options]
        self._losses = [np.array([o.loss for o in layer]) for layer in options]

    def fill(self) -> None:
        """Spend what is left on the single upgrades that save most per unit, until none fits."""
        best = [self._upgrade(k, self.left) for k in range(len(self.options))]
        while True:
            k = max(range(len(best)), key=lambda j: best[j][0], default=-1)
            if k < 0 or best[k][0] <= 0:
                return
            upgrade = self.options[k][best[k][1]]
            cost = upgrade.cost(self.unit) - self.chosen[k].cost(self.unit)
            if cost <= self.left:
                self.chosen[k], self.left = upgrade, self.left - cost
            best[k] = self._upgrade(k, self.left)

    def _upgrade(self, k: int, left: float) -> tuple[float, int]:
        """Return the best saving per unit of layer k within `left`, and its option."""
        cost = self._costs[k] - self.chosen[k].cost(self.unit)
        gain = self.chosen[k].loss - self._losses[k]
        rate = np.where((cost > 0) & (cost <= left) & (gain > 0), gain / np.maximum(cost, 1), -1.0)
        i = int(rate.argmax())
        return float(rate[i]), i

    def trade(self) -> None:
        """Let one layer step down and another up while that lowers the sum."""
        for _ in range(_TRADES):
            found = self._best_trade()
            if found is None:
                return
            for k, i in found:
                self.left -= self.options[k][i].cost(self.unit) - self.chosen[k].cost(self.unit)
                self.chosen[k] = self.options[k][i]

    def _best_trade(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        best, found = 1e-12 * max(sum(o.loss for o in self.chosen), 1e-300), None
        for giver, costs in enumerate(self._costs):
            freed = self.chosen[giver].cost(self.unit) - costs
            paid = self._losses[giver] - self.chosen[giver].loss
            for i in np.flatnonzero(freed > 0)[-8:]:  # near steps: far ones lose more than a swap can win
                for taker in range(len(self.options)):
                    if taker == giver:
                        continue
                    j, gain = self._largest_gain(taker, self.left + freed[i])
                    if gain - paid[i] > best:
                        best, found = gain - paid[i], ((giver, int(i)), (taker, j))
        return found

    def _largest_gain(self, k: int, left: float) -> tuple[int, float]:
        affordable = self._costs[k] - self.chosen[k].cost(self.unit) <= left
        losses = np.where(affordable, self._losses[k], np.inf)
        i = int(losses.argmin())
        return i, float(self.chosen[k].loss - losses[i])

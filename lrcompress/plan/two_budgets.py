"""Several budgets at once: one option per layer, least loss, within bytes and within milliseconds.

A multiple-choice knapsack with more than one knapsack. Prices λ ≥ 0, one per budget, turn it into a choice per layer;
the best prices come from cutting planes, and with them a bound that nothing can be below. The choice they make is
repaired where it is over a budget, filled where it is below, and what cannot be in any better solution is crossed out:
the few options that are left are solved exactly where they are few enough.

    found = solve(losses, costs, limits)          # losses[k]: (n_k,), costs[k]: (budgets, n_k); None if nothing fits
    found.chosen, found.loss, found.bound

Source: maths.md §7.3; Kelley 1960 (cutting planes); Kellerer, Pferschy & Pisinger 2004, ch. 9 and 11 (reduction by
reduced costs).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

Array = np.ndarray
#: Cutting planes, and by what share of the losses bound and price may differ before more of them are taken.
_PLANES, _CLOSE = 60, 1e-9
#: Options of a layer that are tried when a choice is repaired and filled.
_NEAR = 32
#: Up to how many options the rest is solved exactly, with at most so many branches: a count, never the clock.
_EXACT, _NODES = 200, 200
_DEAREST = 1e6
_SLACK = 1e-9


@dataclass(frozen=True)
class Solution:
    """The option of every layer, their loss and costs, what one unit of each budget is worth, the bound on the loss."""

    chosen: tuple[int, ...]
    loss: float
    costs: tuple[float, ...]
    prices: tuple[float, ...]
    bound: float


def solve(losses: Sequence[Array], costs: Sequence[Array], limits: Sequence[float]) -> Solution | None:
    """Return the best choice found within all `limits`; None where no choice is within them."""
    task = _Task.of(losses, costs, limits)
    prices, bound, seen = task.best_prices()
    if bound > 1 + _SLACK:  # more than all losses together: no choice fits
        return None
    best: Array | None = None
    near, places = task.near(prices)
    for start in seen:
        first = (places == start[:, None]).argmax(axis=1)  # where it is not among the near ones: the nearest
        moved = near.filled(near.repaired(first), prices)
        trial = places[np.arange(len(places)), moved]
        if task.fits(trial) and (best is None or task.loss(trial) < task.loss(best)):
            best = trial
    best = task.exact(best, prices, bound)
    if best is None:
        return None
    found = tuple(int(i) for i in best)
    own = np.array([c[:, i] for c, i in zip(costs, found, strict=True)]).sum(axis=0)
    worth = prices * task.scale / np.where(np.isfinite(limits), limits, np.inf)
    loss = float(sum(v[i] for v, i in zip(losses, found, strict=True)))
    return Solution(
        found, loss, tuple(map(float, own)), tuple(map(float, worth)), min(bound * task.scale + task.offset, loss)
    )


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keep what native code prints off stdout, which is for results: HiGHS has left a line of debugging in."""
    native = ctypes.CDLL(None)
    native.fflush(None)
    kept, sink = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        yield
    finally:
        native.fflush(None)  # what waits in the buffers of C would be written later
        os.dup2(kept, 1)
        os.close(kept)
        os.close(sink)


class _Task:
    """Losses and costs as tables (layers, options), in units of what can be saved and of the budgets."""

    def __init__(self, losses: Array, costs: Array, offset: float, scale: float) -> None:
        self.losses, self.costs, self.offset, self.scale = losses, costs, offset, scale
        self._layers = np.arange(len(losses))

    @classmethod
    def of(cls, losses: Sequence[Array], costs: Sequence[Array], limits: Sequence[float]) -> _Task:
        """Pad every layer to as many options as the largest has; those that are none cost and lose without end."""
        width = max(len(v) for v in losses)
        least = np.array([float(v.min()) for v in losses])
        scale = float(sum(v.max() - v.min() for v in losses)) or 1.0
        table = np.full((len(losses), width), np.inf)
        paid = np.full((len(limits), len(losses), width), np.inf)
        for k, (v, c) in enumerate(zip(losses, costs, strict=True)):
            table[k, : len(v)] = (v - least[k]) / scale
            for b, limit in enumerate(limits):
                share = c[b] / limit if limit > 0 else np.where(c[b] > 0, np.inf, 0.0)
                paid[b, k, : len(v)] = 0.0 if np.isinf(limit) else share
        return cls(table, paid, float(least.sum()), scale)

    def at(self, chosen: Array) -> Array:
        """Return the costs of a choice, 1 being a whole budget."""
        return np.asarray(self.costs[:, self._layers, chosen].sum(axis=1))

    def loss(self, chosen: Array) -> float:
        return float(self.losses[self._layers, chosen].sum())

    def fits(self, chosen: Array) -> bool:
        return bool((self.at(chosen) <= 1 + _SLACK).all())

    def priced(self, prices: Array) -> Array:
        """Return losses with costs at these prices."""
        padded = np.where(np.isfinite(self.costs), self.costs, 0.0)
        return np.asarray(self.losses + np.tensordot(prices, padded, axes=1))

    def best_prices(self) -> tuple[Array, float, list[Array]]:
        """Return the prices with the highest bound, the bound, and the choices that were seen last and best."""
        count = len(self.costs)
        prices, bound, best = np.zeros(count), -np.inf, np.zeros(count)
        planes: list[tuple[float, Array]] = []
        seen: list[tuple[float, Array]] = []
        for _ in range(_PLANES):
            chosen = self.priced(prices).argmin(axis=1)
            loss, over = self.loss(chosen), self.at(chosen) - 1
            value = loss + float(prices @ over)
            seen.append((float(np.maximum(over, 0).sum()) + loss, chosen))
            if value > bound:
                bound, best = value, prices
            planes.append((loss, over))
            prices, highest = _highest(planes, count)
            if highest - bound <= _CLOSE * max(1.0, abs(bound)):
                break
        ordered = sorted(seen, key=lambda s: s[0])[:6]
        return best, bound, [self.priced(best).argmin(axis=1), *(c for _, c in ordered)]

    def near(self, prices: Array) -> tuple[_Task, Array]:
        """Return the task with the options of each layer that are best at these prices, and which they are."""
        width = self.losses.shape[1]
        if width <= _NEAR:
            return self, np.tile(np.arange(width), (len(self.losses), 1))
        order = self.priced(prices).argsort(axis=1, kind="stable")[:, : _NEAR - len(self.costs)]
        places = np.concatenate([order, self.costs.argmin(axis=2).T], axis=1)
        rows = self._layers[:, None]
        return _Task(self.losses[rows, places], self.costs[:, rows, places], self.offset, self.scale), places

    def repaired(self, chosen: Array) -> Array:
        """Step down where a budget is exceeded, by what costs the least per excess that it takes away."""
        chosen = chosen.copy()
        for _ in range(4 * len(chosen)):
            now = self.at(chosen)
            excess = np.maximum(now - 1, 0)
            if excess.sum() <= _SLACK:
                break
            moved = now[:, None, None] - self.costs[:, self._layers, chosen][:, :, None] + self.costs
            after = np.maximum(moved - 1, 0).sum(axis=0)
            gain = excess.sum() - after
            paid = np.maximum(self.losses - self.losses[self._layers, chosen][:, None], 0)
            rate = np.where((gain > 1e-15) & np.isfinite(self.losses), (paid + 1e-15) / np.maximum(gain, 1e-15), np.inf)
            k, i = np.unravel_index(int(rate.argmin()), rate.shape)
            if not np.isfinite(rate[k, i]):
                break
            chosen[k] = i
        return chosen

    def filled(self, chosen: Array, prices: Array) -> Array:
        """Step up where everything still fits, by what saves the most for what it costs."""
        chosen = chosen.copy()
        weights = np.where(prices > 0, prices, prices.max() or 1.0)[:, None, None]
        for _ in range(20 * len(chosen)):
            left = 1 + _SLACK - self.at(chosen)
            if (left < 0).any():
                break
            extra = self.costs - self.costs[:, self._layers, chosen][:, :, None]
            gain = self.losses[self._layers, chosen][:, None] - self.losses
            usable = (gain > 1e-15) & (extra <= left[:, None, None]).all(axis=0)
            if not usable.any():
                break
            spent = (weights * np.maximum(np.where(np.isfinite(extra), extra, 0), 0)).sum(axis=0)
            rate = np.where(usable, gain / (spent + 1e-12), -1.0)
            k, i = np.unravel_index(int(rate.argmax()), rate.shape)
            chosen[k] = i
        return chosen

    def exact(self, best: Array | None, prices: Array, bound: float) -> Array | None:
        """Solve what is left, when options that no better choice can hold are crossed out."""
        reduced = self.priced(prices)
        reduced = reduced - reduced.min(axis=1, keepdims=True)
        gap = np.inf if best is None else self.loss(best) - bound
        if best is not None and gap <= 1e-9:
            return best
        kept = np.isfinite(self.losses) & np.isfinite(self.costs).all(axis=0) & (reduced <= gap + 1e-12)
        if not kept.any(axis=1).all():
            return best
        if best is not None and kept.sum() > _EXACT:
            return best
        if best is None:  # whether anything fits must be known for sure; options that others beat need not be asked
            kept &= self._undominated(kept)
        k, i = np.nonzero(kept)
        one = np.zeros((len(self.losses), len(k)))
        one[k, np.arange(len(k))] = 1
        with _unheard():
            found = milp(
                self.losses[k, i], integrality=np.ones(len(k)), bounds=Bounds(0, 1),
                constraints=[LinearConstraint(one, 1, 1), LinearConstraint(self.costs[:, k, i], -np.inf, 1)],
                options={"node_limit": _NODES, "mip_rel_gap": 1e-6},
            )  # fmt: skip
        if found.x is None:
            return best
        chosen = np.zeros(len(self.losses), dtype=np.int64)
        taken = found.x > 0.5
        chosen[k[taken]] = i[taken]
        better = self.fits(chosen) and (best is None or self.loss(chosen) < self.loss(best))
        return chosen if better else best

    def _undominated(self, kept: Array) -> Array:
        """Mark options that no other of their layer is at most as dear as in every budget, of equal ones the first."""
        out = np.zeros_like(kept)
        for k in range(len(kept)):
            own = np.flatnonzero(kept[k])
            cost = self.costs[:, k, own]
            order = np.lexsort(cost[::-1])
            lowest = np.full(len(cost), np.inf)
            for j in order:
                if (cost[1:, j] < lowest[1:]).all() if len(cost) > 1 else lowest[0] == np.inf:
                    out[k, own[j]] = True
                    lowest = np.minimum(lowest, cost[:, j])
        return out


def _highest(planes: Sequence[tuple[float, Array]], count: int) -> tuple[Array, float]:
    """Return the prices at which the lowest of the planes is highest, and how high that is."""
    rows = np.array([[1.0, *(-over)] for _, over in planes])
    found = linprog(
        [-1.0, *([0.0] * count)], A_ub=rows, b_ub=[loss for loss, _ in planes],
        bounds=[(None, None), *([(0, _DEAREST)] * count)], method="highs",
    )  # fmt: skip
    if found.x is None:
        return np.zeros(count), -np.inf
    return np.asarray(found.x[1:]), float(found.x[0])

"""Everything a layer can become on a device: form × rank × bits, with bytes, milliseconds and loss.

candidates = candidates_of(menu, bits=(32, 8, 4), price=price, noise=noise)
chosen = choose(per_layer, Limits(n_bytes=6_000_000, ms=20.0), Fixed(81_000, 2.5))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BudgetError
from ..factorize import Rank, Statistics, form
from .bits import BLOCK, Precision, parts, precisions, stored_bytes
from .options import Menu, Option
from .two_budgets import solve

#: What a whole budget is worth beside the loss of dense int8: of choices that lose as much the smaller and faster.
_THRIFT = 1e-3


@dataclass(frozen=True)
class Candidate:
    """One form, rank and precision of one layer. `ms` is 0 where nothing is known of the device's times.

    `block`: inputs that share a scale at 4 bits.
    """

    form: str
    rank: Rank
    bits: int
    n_params: int
    n_bytes: int
    ms: float
    loss: float
    block: int = 0

    @property
    def precision(self) -> Precision:
        return Precision(self.bits, self.block)


@dataclass(frozen=True)
class Limits:
    """What the exported file and one request may take; None where it does not matter."""

    n_bytes: int | None = None
    ms: float | None = None

    def as_json(self) -> dict[str, float]:
        found = {"bytes": self.n_bytes, "ms": self.ms}
        return {k: v for k, v in found.items() if v is not None}


@dataclass(frozen=True)
class Fixed:
    """What no layer can give back: the graph, normalizations, products of activations."""

    n_bytes: int = 0
    ms: float = 0.0


def candidates_of(
    menu: Menu,
    *,
    bits: Sequence[int],
    statistics: Statistics | None,
    price: Callable[[str, Rank, int], float | None],
    noise: Mapping[Precision, float],
    multiple: int = 1,
    copies: int = 1,
) -> list[Candidate]:
    """Return what a layer can become, none dominated by another in bytes, milliseconds and loss.

    `price`: ms of a form at a rank in so many bits, None where it cannot be told. `noise`: by precision, what rounding
    the dense weight and its inputs loses; each factor that is rounded adds as much. `copies`: how often a dense weight of
    8 or 4 bits is stored: a table that is a product's weight, too, lies the other way round there.
    """
    layer = menu.layer
    wanted = precisions(bits if layer.may_be_rounded else (32,))
    if layer.reason is not None:  # what was measured, and nothing else
        wanted = [p for p in wanted if p.bits == 32 or p in noise]
    if layer.kind in ("conv", "grouped"):  # whose blocks follow from their own length
        wanted = [p for p in wanted if p.block <= BLOCK]
    offered: list[Option] = [menu.dense]
    for own in menu.forms.values():
        offered += [o for o in own if _is_multiple(o.rank, layer.shape, o.form, multiple)]
    found = []
    for option in offered:
        if not hasattr(form(option.form), "factor_shapes"):
            continue
        count = parts(option.form, layer, option.rank)
        # Rows that others are combinations of: what rounding does to them is amplified.
        pivoted = hasattr(form(option.form), "PLAIN")
        for p in (p for p in wanted if p.bits >= 16 or not pivoted):
            ms = price(option.form, option.rank, p.bits)
            if ms is not None:
                size = stored_bytes(option.form, layer, option.rank, p.bits, statistics, p.block or BLOCK)
                size *= copies if option.form == "dense" and p.bits < 16 else 1
                loss = option.loss + count * noise.get(p, 0.0)
                found.append(Candidate(option.form, option.rank, p.bits, option.n_params, size, ms, loss, p.block))
    return undominated(found)


def rank_multiple(multiple: int, top: int) -> int:
    """Return the multiple for a layer of this full rank: small layers keep a choice of at least eight ranks."""
    return max(1, min(multiple, top // 8))


def _is_multiple(rank: Rank, shape: tuple[int, ...], name: str, multiple: int) -> bool:
    top = form(name).full_rank(shape)
    pairs = [(rank, top)] if isinstance(rank, int) else list(zip(rank, top, strict=True))
    return all(r % rank_multiple(multiple, t) == 0 or r == t for r, t in pairs)


def undominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those that no other equals or beats in bytes, milliseconds and loss; dense ones always."""
    ordered = sorted(candidates, key=lambda c: (c.n_bytes, c.ms, c.loss))
    kept: list[Candidate] = []
    points = np.empty((len(ordered), 2))
    for c in ordered:
        own = points[: len(kept)]
        if c.form == "dense" or not bool(((own[:, 0] <= c.ms) & (own[:, 1] <= c.loss)).any()):
            points[len(kept)] = c.ms, c.loss
            kept.append(c)
    return kept


@dataclass(frozen=True)
class Chosen:
    """The candidate of every layer, what they take with the rest of the model, and what prices they were chosen at."""

    candidates: tuple[Candidate, ...]
    n_bytes: int
    ms: float
    loss: float
    bound: float
    prices: tuple[float, float]

    @classmethod
    def of(
        cls,
        candidates: Sequence[Candidate],
        fixed: Fixed,
        *,
        bound: float = 0.0,
        prices: tuple[float, float] = (0.0, 0.0),
    ) -> Chosen:
        return cls(
            tuple(candidates), fixed.n_bytes + sum(c.n_bytes for c in candidates), fixed.ms + sum(c.ms for c in candidates),
            sum(c.loss for c in candidates), bound, prices,
        )  # fmt: skip

    def fits(self, limits: Limits) -> bool:
        return (limits.n_bytes is None or self.n_bytes <= limits.n_bytes) and (
            limits.ms is None or self.ms <= limits.ms * (1 + 1e-9)
        )


def choose(
    layers: Sequence[Sequence[Candidate]], limits: Limits, fixed: Fixed, *, where: str = "lrcompress plan"
) -> Chosen:
    """Return the choice that loses least within the limits. Raises `BudgetError` with the nearest that can be met."""
    losses = [np.array([c.loss for c in own]) for own in layers]
    costs = [np.array([[c.n_bytes for c in own], [c.ms for c in own]], dtype=np.float64) for own in layers]
    budget = _left(limits, fixed)
    thrift = _thrift(layers)
    found = None
    if min(budget) >= 0:
        found = solve([v + thrift * _share(c, budget) for v, c in zip(losses, costs, strict=True)], costs, budget)
    if found is None:
        raise _too_little(losses, costs, limits, fixed, where)
    taken = [own[i] for own, i in zip(layers, found.chosen, strict=True)]
    prices = found.prices[0], found.prices[1]
    return Chosen.of(taken, fixed, bound=max(found.bound - 2 * thrift, 0.0), prices=prices)


def _left(limits: Limits, fixed: Fixed) -> tuple[float, float]:
    n_bytes = math.inf if limits.n_bytes is None else float(limits.n_bytes - fixed.n_bytes)
    return n_bytes, math.inf if limits.ms is None else limits.ms - fixed.ms


def _share(costs: np.ndarray, budget: Sequence[float]) -> np.ndarray:
    """Return the share of the budgets that options take, budgets without an end left out."""
    return np.asarray(
        sum(c / b for c, b in zip(costs, budget, strict=True) if 0 < b < math.inf) + np.zeros(costs.shape[1])
    )


def _thrift(layers: Sequence[Sequence[Candidate]]) -> float:
    """Return what a whole budget is worth: a small share of what dense layers of 8 bits lose."""
    return _THRIFT * sum(next((c.loss for c in own if c.form == "dense" and c.bits == 8), 0.0) for own in layers)


def _too_little(
    losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], limits: Limits, fixed: Fixed, where: str
) -> BudgetError:
    """Return the error that names the nearest budgets: least bytes within the time, least time within the bytes."""
    least_bytes = fixed.n_bytes + int(sum(c[0].min() for c in costs))
    least_ms = fixed.ms + float(sum(c[1].min() for c in costs))
    given = " and ".join(t for t in (_bytes_text(limits.n_bytes), _ms_text(limits.ms)) if t)
    if limits.n_bytes is not None and least_bytes > limits.n_bytes:
        expected = f"at least {_bytes_text(least_bytes)} for this model and method"
    elif limits.ms is not None and least_ms > limits.ms:
        expected = f"at least {_ms_text(_up(least_ms))} for this model and method, {_up(fixed.ms):g} of which no layer can give back"
    else:
        budget = _left(limits, fixed)
        small = solve([c[0] for c in costs], costs, (math.inf, budget[1]))
        fast = solve([c[1] for c in costs], costs, (budget[0], math.inf))
        either = (
            [f"{_bytes_text(fixed.n_bytes + math.ceil(small.costs[0]))} within {_ms_text(limits.ms)}"] if small else []
        )
        either += [f"{_ms_text(_up(fixed.ms + fast.costs[1]))} within {_bytes_text(limits.n_bytes)}"] if fast else []
        expected = f"at least {', or '.join(either)}"
    return BudgetError(where, expected, given, "allow more, or start from a smaller model")


def _up(ms: float) -> float:
    """Return ms with four digits, rounded up, so that it can be typed as a budget."""
    step = 10.0 ** (math.floor(math.log10(ms)) - 3) if ms > 0 else 1e-6
    return float(f"{math.ceil(ms / step * (1 - 1e-12)) * step:.6g}")


def _bytes_text(value: int | None) -> str:
    return "" if value is None else f"{value} bytes"


def _ms_text(value: float | None) -> str:
    return "" if value is None else f"{value:g} ms"


__all__ = ["Candidate", "Chosen", "Fixed", "Limits", "candidates_of", "choose", "rank_multiple", "undominated"]

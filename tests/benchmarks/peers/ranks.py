"""How the methods spread a budget: from shapes, spectra or losses to one rank per layer. Pure functions.

A layer is a matrix `shape` = (out, in·kernel); rank r stores r·(out + in·kernel) numbers. `None` is the dense layer.

    ranks = lagrangian(shapes, [spectrum(layer) for layer in layers], budget)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

Shape = tuple[int, int]
Ranks = list[int | None]

#: Halvings of a bisection on a real number.
_STEPS = 80


def dense_cost(shape: Shape) -> int:
    return shape[0] * shape[1]


def cost(shape: Shape, rank: int | None) -> int:
    """Return the numbers a layer stores at `rank`."""
    return dense_cost(shape) if rank is None else rank * sum(shape)


def total(shapes: Sequence[Shape], ranks: Ranks) -> int:
    return sum(cost(s, r) for s, r in zip(shapes, ranks, strict=True))


def at_share(shape: Shape, share: float) -> int | None:
    """Return the largest rank that stores at most `share` of the dense layer, at least 1; dense where none is smaller."""
    rank = max(1, math.floor(share * dense_cost(shape) / sum(shape)))
    return rank if share < 1 and cost(shape, rank) < dense_cost(shape) else None


def uniform(shapes: Sequence[Shape], budget: int) -> Ranks:
    """Return the ranks of one share for all layers, the largest that `budget` numbers allow."""
    return _largest(lambda share: [at_share(s, share) for s in shapes], shapes, budget)


def inverse_log(shapes: Sequence[Shape], types: Sequence[str], losses: Sequence[float], budget: int) -> Ranks:
    """Return ranks whose removed share is proportional to 1 / log L within each type of layer.

    `losses`: truncation losses at the uniform ranks. A type with a loss of at most 1 has no such rule and stays uniform.
    Source: SVD-LLM V2, arXiv 2503.12340, algorithm 2.
    """
    weights = [1.0] * len(shapes)
    for kind in set(types):
        members = [i for i, t in enumerate(types) if t == kind]
        if all(losses[i] > 1 for i in members):
            inverse = {i: 1 / math.log(losses[i]) for i in members}
            mean = sum(inverse.values()) / len(members)
            for i in members:
                weights[i] = inverse[i] / mean

    def ranks(share: float) -> Ranks:
        return [at_share(s, 1 - (1 - share) * w) for s, w in zip(shapes, weights, strict=True)]

    return _largest(ranks, shapes, budget)


def _largest(ranks: Callable[[float], Ranks], shapes: Sequence[Shape], budget: int) -> Ranks:
    """Return `ranks(share)` for the largest share within the budget; costs must rise with the share."""
    if total(shapes, ranks(1.0)) <= budget:
        return ranks(1.0)
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(shapes, ranks(middle)) <= budget else (low, middle)
    found = ranks(low)
    _check(shapes, found, budget)
    return found


def lagrangian(shapes: Sequence[Shape], spectra: Sequence[np.ndarray], budget: int) -> Ranks:
    """Return the ranks that maximise Σ (normalised energy) − λ·numbers, by bisection on λ.

    `spectra`: squared singular values of each (whitened) layer, descending. Source: BALF, arXiv 2509.25136.
    """
    choices = [_energies(shape, values) for shape, values in zip(shapes, spectra, strict=True)]

    def ranks(price: float) -> Ranks:
        return [rank[int(np.argmax(energy - price * size))] for rank, size, energy in choices]

    if total(shapes, ranks(0.0)) <= budget:
        return ranks(0.0)
    low, high = -60.0, 5.0  # exponents of the price: free, and too dear for any second rank
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if total(shapes, ranks(math.exp(middle))) <= budget else (middle, high)
    found = ranks(math.exp(high))
    _check(shapes, found, budget)
    return found


def _energies(shape: Shape, values: np.ndarray) -> tuple[Ranks, np.ndarray, np.ndarray]:
    """Return ranks, their costs and the shares of energy they keep; the dense layer is the last one and keeps all."""
    ranks: Ranks = [r for r in range(1, len(values) + 1) if cost(shape, r) < dense_cost(shape)]
    energy = np.cumsum(values) / max(float(np.sum(values)), 1e-300)
    kept = [float(energy[r - 1]) for r in ranks if r is not None]
    return [*ranks, None], np.array([*(cost(shape, r) for r in ranks), dense_cost(shape)]), np.array([*kept, 1.0])


@dataclass(frozen=True)
class Option:
    """What one layer may become: numbers stored, predicted loss, rank."""

    cost: int
    loss: float
    rank: int | None


def knapsack(options: Sequence[Sequence[Option]], budget: int, *, cells: int = 20_000) -> list[Option]:
    """Return one option per layer with the least summed loss within `budget`: dynamic programming over the budget.

    Exact where all costs are multiples of the cell, budget / `cells`; else costs are rounded up to cells.
    """
    unit = max(math.gcd(*(o.cost for layer in options for o in layer)), math.ceil(budget / cells))
    width = budget // unit + 1
    best, picks = np.zeros(width), []
    for layer in options:
        sums = np.full((len(layer), width), np.inf)
        for row, option in zip(sums, layer, strict=True):
            used = -(-option.cost // unit)
            if used < width:
                row[used:] = best[: width - used] + option.loss
        picks.append(sums.argmin(0))
        best = sums.min(0)
    if not math.isfinite(float(best[-1])):
        raise ValueError(f"no choice of options fits {budget} numbers")
    at, chosen = width - 1, []
    for layer, pick in zip(reversed(options), reversed(picks), strict=True):
        option = layer[int(pick[at])]
        chosen.append(option)
        at -= -(-option.cost // unit)
    return chosen[::-1]


def _check(shapes: Sequence[Shape], ranks: Ranks, budget: int) -> None:
    if total(shapes, ranks) > budget:
        raise ValueError(f"even the smallest ranks take {total(shapes, ranks)} numbers, more than {budget}")


#: τ of the threshold is this times √α (the zero of the free energy's gain; exact for a square matrix).
_TAU = 2.5129


def evbmf_edge(alpha: float) -> float:
    """Return the least x = σ² / (columns · noise variance) that empirical variational Bayes keeps, α = rows / columns."""
    tau = _TAU * math.sqrt(alpha)
    return (1 + tau) * (1 + alpha / tau)


def evbmf_energies(x: np.ndarray, alpha: float, *, kept: bool) -> np.ndarray:
    """Return the free energy of singular values x, as signal (`kept`) or as noise; at the edge the two are equal."""
    if not kept:
        return np.asarray(x - np.log(x))
    t = (x - (1 + alpha) + np.sqrt(np.square(x - (1 + alpha)) - 4 * alpha)) / 2
    return np.asarray(x - t + np.log((t + 1) / x) + alpha * np.log(t / alpha + 1))


def evbmf_rank(matrix: np.ndarray) -> int:
    """Return how many singular values empirical variational Bayes keeps; the noise variance is estimated.

    Source: Nakajima, Sugiyama, Babacan & Tomioka, JMLR 14 (2013), theorem 2 and corollary 1.
    """
    rows, columns = sorted(matrix.shape)
    squares = np.square(np.linalg.svd(matrix, compute_uv=False)).astype(np.float64)
    alpha = rows / columns
    edge = evbmf_edge(alpha)

    def free_energy(variance: float) -> float:
        x = np.maximum(squares / (columns * variance), 1e-300)
        noise, signal = (evbmf_energies(x[(x > edge) == kept], alpha, kept=kept) for kept in (False, True))
        return float(noise.sum() + signal.sum())

    # At most this many values can be signal; the rest bounds the variance from below.
    most = min(math.ceil(rows / (1 + alpha)) - 1, rows - 1)
    upper = float(squares.sum()) / (rows * columns)
    lower = max(float(squares[most]) / (columns * edge), float(squares[most:].mean()) / columns)
    if not 0 < lower < upper:
        return 0 if upper <= 0 else int(np.sum(squares > columns * upper * edge))
    variance = float(minimize_scalar(free_energy, bounds=(lower, upper), method="bounded").x)
    return int(np.sum(squares > columns * variance * edge))

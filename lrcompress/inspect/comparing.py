"""Every form at equal parameters: the largest rank of each that the same numbers buy, and what it loses there.

for found in compare(layer, statistics, spectrum, budget): ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..factorize import Rank, Refused, Statistics, form, forms
from ..model.surgery import Layer
from ..plan.options import serves
from .spectra import Spectrum

#: Multiply-adds of the largest matrix problem that a form may pose before it is left out: some seconds on one core.
WORK_LIMIT = 10_000_000_000
#: Their loss is a tail of the spectrum, which is there already.
_TRUNCATIONS = {"svd", "pivoted", "grouped_svd"}
#: How far the last of several ranks is tried from the even share, and how fine.
_SKEWS = (0.5, 0.65, 0.8, 1.0, 1.25, 1.55, 2.0)


@dataclass(frozen=True)
class Candidate:
    """One form at the budget. `loss` is squared, in the metric of the layer.

    `macs_ratio`: multiply-adds over those of the dense layer; None for an embedding, which looks rows up.
    """

    form: str
    rank: Rank
    n_params: int
    loss: float
    macs_ratio: float | None


@dataclass(frozen=True)
class LeftOut:
    """A form that serves the layer but was not compared: for its `cost`, its `size` or its `accuracy`."""

    form: str
    cause: str
    why: str


def work(layer: Layer, statistics: Statistics | None) -> float:
    """Return the multiply-adds of the largest matrix problem that a product form poses for this weight.

    Without statistics that is the SVD of its squarest unfolding, N^1.5 for N numbers; with them, also a solve as
    large as the input, (in·kernel)³.
    """
    size = layer.weight.numel()
    inputs = statistics.gram.shape[-1] if statistics is not None and statistics.gram is not None else 0
    return float(max(size**1.5, inputs**3))


def compare(
    layer: Layer, statistics: Statistics | None, spectrum: Spectrum, budget: int, *, all_forms: bool = False
) -> tuple[list[Candidate], list[LeftOut]]:
    """Return the forms at most `budget` numbers large, lowest loss first, and those that were left out."""
    found: list[Candidate] = []
    left_out: list[LeftOut] = []
    heavy = work(layer, statistics)
    for name in (n for n in forms() if serves(n, layer)):
        module = form(name)
        if not all_forms and not getattr(module, "AUTO", True):
            continue
        if not all_forms and name not in _TRUNCATIONS and heavy > WORK_LIMIT:
            left_out.append(LeftOut(name, "cost", f"about {heavy:.0e} multiply-adds, above {WORK_LIMIT:.0e}"))
            continue
        ranks = ranks_within(name, layer.shape, budget)
        if not ranks:
            left_out.append(LeftOut(name, "size", f"its least rank takes more than {budget:,} numbers"))
            continue
        try:
            tried = [_measured(name, layer, r, statistics, spectrum) for r in ranks]
        except Refused as e:
            left_out.append(LeftOut(name, "accuracy", str(e)))
            continue
        found.append(min(tried, key=lambda c: (c.loss, c.n_params)))
    return sorted(found, key=lambda c: (c.loss, c.n_params, c.form)), left_out


def _measured(name: str, layer: Layer, rank: Rank, statistics: Statistics | None, spectrum: Spectrum) -> Candidate:
    module = form(name)
    if name in _TRUNCATIONS:
        assert isinstance(rank, int)
        loss = spectrum.tail(rank)
    else:
        loss = module.decompose(layer.weight.double(), rank, statistics).loss
    macs = None if layer.kind == "embedding" else module.n_macs(layer.shape, rank, 1) / layer.weight.numel()
    return Candidate(name, rank, module.n_params(layer.shape, rank), loss, macs)


def ranks_within(name: str, shape: tuple[int, ...], budget: int) -> list[Rank]:
    """Return the ranks worth trying at `budget` numbers: the largest one, or a few shapes of several ranks; [] if none fits."""
    module = form(name)
    full = module.full_rank(shape)
    if isinstance(full, int):
        best = _largest(full, lambda r: module.n_params(shape, r) <= budget)
        return [best] if best else []
    return _several(full, lambda r: module.n_params(shape, r) <= budget)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest r in 1…most that fits, 0 if none: sizes grow with the rank."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _several(full: Sequence[int], fits: Callable[[tuple[int, ...]], bool]) -> list[Rank]:
    """Return rank tuples that fill the budget: all an even share of full, then the last one moved and the first refilled."""
    steps = 1000

    def even(step: int) -> tuple[int, ...]:
        return tuple(max(1, math.floor(n * step / steps)) for n in full)

    step = _largest(steps, lambda s: fits(even(s)))
    if not step:
        return []
    middle = even(step)
    out: set[tuple[int, ...]] = set()
    for skew in _SKEWS:
        last = min(full[-1], max(1, round(middle[-1] * skew)))
        rest = (*middle[1:-1], last)
        first = _largest(full[0], lambda r, rest=rest: fits((r, *rest)))  # type: ignore[misc]
        if first:
            # What the first could not use, the last may.
            room = _largest(full[-1], lambda r, first=first, rest=rest: fits((first, *rest[:-1], r)))  # type: ignore[misc]
            out.add((first, *rest[:-1], room))
    return [*sorted(out)]

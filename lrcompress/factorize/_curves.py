"""Which ranks a curve offers; and the curve of a form whose losses have no closed expression: decompose, and see."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ._types import Point, Statistics

#: Shares of the largest rank that are tried, where a form names no others.
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


def measured(
    name: str,
    weight: Tensor,
    statistics: Statistics | None,
    *,
    shares: Sequence[float] = SHARES,
    most: int | None = None,
) -> list[Point]:
    """Return ranks of the form `name` up to `most` (default: full rank) with the losses that were reached."""
    from . import form

    module, shape = form(name), tuple(weight.shape)
    top = module.full_rank(shape) if most is None else most
    ranks = sorted({max(1, round(top * share)) for share in shares})
    return [Point(r, module.n_params(shape, r), module.decompose(weight.double(), r, statistics).loss) for r in ranks]


def ranks_to(most: int, points: int = 32) -> list[int]:
    """Return about `points` ranks up to `most`, even steps of 1, 2, 4 or multiples of 8, and `most` itself."""
    step = next((s for s in (1, 2, 4) if most <= points * s), 8 * math.ceil(most / (8 * points)))
    return sorted({*range(step, most + 1, step), most})

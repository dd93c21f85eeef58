"""Rounding with the error fed forward: what one column is rounded by, the columns after it make up for.

    min E‖(W − Q)x‖²,  H = E[x xᵀ] + λI,  H⁻¹ = Rᵀ R, R upper:   q_j = Q(w_j),  w_{j:} −= (w_j − q_j)/R_jj · R_{j,j:}

With a diagonal H, or none, this is rounding to nearest. Rows are independent; each has its own scales, chosen when its
block begins, from the weights as they are then. A row that loses more than rounding to nearest would is rounded so: where
its largest entry has to keep its code, what it cannot make up for may be far more than was rounded.

Source: Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1 (in the order of the columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grids import Coded, Grid, limits, nearest, pinned, scale_of

#: Share of the mean of H's diagonal that is added to it, and columns whose updates are done at once.
DAMPING, _BATCH = 0.01, 64


def quantize(weight: Tensor, grid: Grid, h: Tensor | None = None, *, damping: float = DAMPING) -> Coded:
    """Return the codes of `weight` (rows, columns) on `grid`, least in the metric of `h` (columns, columns).

    Inputs that are never active are rounded to nearest. Raises `ValueError` for a weight that is not finite.
    """
    w = weight.detach().double()
    if not bool(torch.isfinite(w).all()):
        raise ValueError("expected a finite weight")
    upper, importance = _factor(h, w.shape[1], damping)
    found = _rounded(w, grid, upper, importance)
    if upper is None or h is None:
        return found
    nearer = _rounded(w, grid, None, importance)
    near, fed = (((q.values().double() - w) @ h.double() * (q.values().double() - w)).sum(1) for q in (nearer, found))
    pick = (near < fed)[:, None]
    pairs = ((nearer.codes, found.codes), (nearer.scales, found.scales), (nearer.zeros, found.zeros))
    return Coded(grid, *(torch.where(pick, a, b) for a, b in pairs))


def _rounded(weight: Tensor, grid: Grid, upper: Tensor | None, importance: Tensor) -> Coded:
    """Return the codes of one pass over the columns, which feeds errors forward where `upper` says how."""
    w = weight.clone()
    rows, columns = w.shape
    width = grid.width(columns)
    n_blocks = -(-columns // width) if columns else 0
    scales, zeros = torch.ones(rows, n_blocks), torch.zeros(rows, n_blocks)
    codes = torch.zeros(rows, columns, dtype=torch.float64)
    largest = w.abs().argmax(1) if pinned(grid) and columns else None
    step = min(width, _BATCH) if upper is not None else width
    for start in range(0, columns, max(step, 1)):
        stop = min(start + step, columns)
        if start % width == 0:
            block = slice(start, min(start + width, columns))
            scales[:, start // width], zeros[:, start // width] = scale_of(w[:, block], importance[block], grid)
        scale, zero = scales[:, start // width], zeros[:, start // width]
        if upper is None:
            codes[:, start:stop] = nearest(w[:, start:stop], scale, zero, grid)
        else:
            _feed_forward(w, codes, upper, (start, stop), scale, zero, grid, largest)
    return Coded(grid, codes.to(torch.int16), scales, zeros)


def _feed_forward(
    w: Tensor, codes: Tensor, upper: Tensor, span: tuple[int, int], scale: Tensor, zero: Tensor, grid: Grid,
    largest: Tensor | None,
) -> None:  # fmt: skip
    """Round the columns of `span`, one after the other; the columns after it take all errors at once."""
    start, stop = span
    errors = torch.zeros(len(w), stop - start, dtype=w.dtype)
    wide, offset = scale.double(), zero.double()
    low, high = limits(grid)
    for j in range(start, stop):
        column = w[:, j]
        code = torch.clamp(torch.round(column / wide) + offset, low, high)
        if largest is not None:
            # The tools take the largest code for the largest entry: that entry keeps it, whatever is fed to it.
            code = torch.where(largest == j, torch.where(column < 0, float(low), float(high)), code)
        codes[:, j] = code
        error = (column - (code - offset) * wide) / upper[j, j]
        errors[:, j - start] = error
        w[:, j + 1 : stop] -= error[:, None] * upper[j, j + 1 : stop]
    w[:, stop:] -= errors @ upper[start:stop, stop:]


def _factor(h: Tensor | None, columns: int, damping: float) -> tuple[Tensor | None, Tensor]:
    """Return R with (H + λI)⁻¹ = Rᵀ R, upper, and how much each input counts; None where H says nothing."""
    ones = torch.ones(columns, dtype=torch.float64)
    if h is None or columns == 0:
        return None, ones
    metric = h.double()
    diagonal = metric.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        return None, ones
    if bool((metric - torch.diag(diagonal) == 0).all()):
        return None, diagonal.clamp_min(1e-6 * mean)
    damped = metric + damping * mean * torch.eye(columns, dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True), diagonal.clamp_min(1e-6 * mean)

"""Mean and centred second moment of rows, in float64, from products in the dtype of the activations.

Rows are centred before they are squared, products cover at most `BLOCK_ROWS` rows, and everything longer is summed in
float64: the error does not grow with the number of rows, and a mean a thousand times the deviation costs no digits.

    moments = Moments()
    for rows in batches:                                    # (N, n), or (groups, N, n)
        moments.add(rows)
    moments.second / moments.count
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Rows per product in the dtype of the rows: the rounding of a sum of so many stays near that of one.
BLOCK_ROWS = 1024
#: Columns per product of a Gram matrix that is worth computing by its upper triangle alone.
BLOCK_COLUMNS = 512


@dataclass
class Moments:
    """Mean and centred second moment of rows, merged exactly: M₂ ← M₂ᵃ + M₂ᵇ + δδᵀ·NₐN_b/(Nₐ+N_b).

    Rows are (N, n), or (groups, N, n) for a grouped convolution, whose groups read different channels.
    """

    count: int = 0
    mean: Tensor | None = None
    second: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Merge rows: products in the dtype of the rows (float32 for a shorter one), sums in float64."""
        n = rows.shape[-2]
        if n == 0:
            return
        rows = wide(rows)
        centre = rows.mean(-2)
        centred = rows - centre.unsqueeze(-2)
        self.merge(about(centre.double(), n, column_sums(centred), gram(centred)))

    def merge(self, other: Moments) -> None:
        """Add what `other` saw; it must not be used afterwards."""
        if other.mean is None or other.second is None:
            return
        if self.mean is None or self.second is None:
            self.count, self.mean, self.second = other.count, other.mean, other.second
            return
        total, delta = self.count + other.count, other.mean - self.mean
        self.second += other.second
        add_outer(self.second, delta, self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    def copy(self) -> Moments:
        """Return moments that may be merged into."""
        return Moments(self.count, self.mean, None if self.second is None else self.second.clone())


def about(centre: Tensor, count: int, sums: Tensor, second: Tensor) -> Moments:
    """Return the moments of `count` rows x from Σ(x − centre) and Σ(x − centre)(x − centre)ᵀ, which is overwritten.

    `centre` is near the mean, so what is subtracted is small.
    """
    slip = sums / count
    add_outer(second, slip, -float(count))
    return Moments(count, centre + slip, second)


def wide(x: Tensor) -> Tensor:
    """Return activations in a dtype whose products are worth summing: at least float32."""
    return x.float() if x.element_size() < 4 else x


def add_outer(into: Tensor, v: Tensor, scale: float) -> None:
    """Add scale·vvᵀ in place: into (…, n, n), v (…, n)."""
    if v.dim() == 1:
        into.addr_(v, v, alpha=scale)
    else:
        into.baddbmm_(v.unsqueeze(-1), v.unsqueeze(-2), alpha=scale)


def column_sums(rows: Tensor) -> Tensor:
    """Return Σ over rows in float64: rows (…, N, n), the result (…, n)."""
    total = rows.new_zeros((*rows.shape[:-2], rows.shape[-1]), dtype=torch.float64)
    for part in torch.split(rows, BLOCK_ROWS, dim=-2):
        total += part.sum(-2)
    return total


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ over rows of aᵀb in float64: a (…, N, n), b (…, N, m), the result (…, n, m)."""
    total = a.new_zeros((*a.shape[:-2], a.shape[-1], b.shape[-1]), dtype=torch.float64)
    for x, y in zip(torch.split(a, BLOCK_ROWS, dim=-2), torch.split(b, BLOCK_ROWS, dim=-2), strict=True):
        total += x.mT @ y
    return total


def gram(rows: Tensor) -> Tensor:
    """Return Σ xxᵀ over rows in float64: rows (…, N, n), the result (…, n, n); a wide one by its upper triangle."""
    n = rows.shape[-1]
    if 2 * n < 3 * BLOCK_COLUMNS:
        return product(rows, rows)
    out = rows.new_empty((*rows.shape[:-2], n, n), dtype=torch.float64)
    for start in range(0, n, BLOCK_COLUMNS):
        own = slice(start, start + BLOCK_COLUMNS)
        found = product(rows[..., own], rows[..., start:])
        out[..., own, start:] = found
        out[..., start:, own] = found.mT
    return out

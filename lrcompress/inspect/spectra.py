"""What a spectrum says: how many directions a weight really uses, plain or in the metric of its statistics.

    found = Spectrum.of(weight, statistics)
    found.stable_rank, found.effective_rank, found.rank_at(0.95)

With p_i = σ_i² / Σσ²: stable rank Σσ² / σ₁² (Rudelson & Vershynin 2007); effective rank exp(−Σ p_i ln p_i), the
exponential of the entropy of the squared spectrum (entropy as in Alter, Brown & Botstein 2000; Roy & Vetterli 2007
take the same exponential over σ instead of σ²); rank at an energy e: the least r with Σ_{i≤r} p_i ≥ e.
All are 0 for a weight of zeros. The groups of a grouped convolution share one rank: its spectrum is the sum of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..factorize import Statistics, svd

#: A share of the energy counts as reached when rounding alone keeps it from being.
_SLACK = 1e-12


@dataclass(frozen=True)
class Spectrum:
    """The squared singular values of one weight, descending, in the named norm."""

    squares: Tensor
    norm: str

    @classmethod
    def of(cls, weight: Tensor, statistics: Statistics | None = None, *, grouped: bool = False) -> Spectrum:
        """Measure a weight (out, in, *k) as the matrix (out, in·kernel), or (groups, out, in, *k) group by group."""
        norm = (statistics or Statistics()).norm
        if not grouped:
            return cls(svd.spectrum(weight, statistics), norm)
        parts = [svd.spectrum(w, None if statistics is None else statistics.group(i)) for i, w in enumerate(weight)]
        return cls(torch.stack(parts).sum(0), norm)

    @property
    def energy(self) -> float:
        return float(self.squares.sum())

    @property
    def stable_rank(self) -> float:
        return self.energy / float(self.squares[0]) if self.energy > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        if not self.energy > 0:
            return 0.0
        return float(torch.exp(torch.special.entr(self.squares / self.squares.sum()).sum()))

    def rank_at(self, share: float) -> int:
        """Return the least rank that keeps `share` of the energy."""
        if not self.energy > 0:
            return 0
        short = self.squares.cumsum(0) < (share - _SLACK) * self.squares.sum()
        return min(int(short.sum()) + 1, len(self.squares))

    def tail(self, rank: int) -> float:
        """Return the energy that the best weight of rank `rank` leaves out."""
        return float(self.squares[rank:].sum())

    @property
    def relative(self) -> list[float]:
        """The singular values over the largest; zeros for a weight of zeros."""
        values = self.squares.sqrt()
        return (values / values[0]).tolist() if self.energy > 0 else [0.0] * len(values)  # type: ignore[no-any-return]

    @property
    def lost(self) -> list[float]:
        """The share of the energy that rank 0, 1, 2, … leaves out."""
        if not self.energy > 0:
            return [0.0] * (len(self.squares) + 1)
        # Summed from the small end: the tails keep their digits.
        tails = self.squares.flip(0).cumsum(0).flip(0) / self.squares.sum()
        return [*tails.tolist(), 0.0]

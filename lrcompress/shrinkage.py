"""What a covariance says of directions that too few positions showed: a share of the mean variance, not nothing.

Of n positions of p numbers each, n < p, no more than n − 1 directions have a variance at all: a form of that rank would
cost nothing, and be worth nothing on other data. S′ = (1 − ρ) S + ρ (tr S / p) I with the ρ that comes closest to the truth
in the mean square, were the positions Gaussian and independent.

Source: Chen, Wiesel, Eldar and Hero 2010, "Shrinkage algorithms for MMSE covariance estimation", eq. 23 (OAS).
"""

from __future__ import annotations


def share(trace: float, squares: float, p: int, count: int) -> float:
    """Return ρ in 0…1 for a covariance (p, p) of `count` positions with tr S and tr S²; 0 where they are not fewer than p."""
    if not 0 < count < p:
        return 0.0
    below = (count + 1 - 2 / p) * (squares - trace**2 / p)
    return 1.0 if below <= 0 else min(1.0, ((1 - 2 / p) * squares + trace**2) / below)

"""The freedom between two factors, used before they are rounded: U V = (U T)(T⁻¹ V) for every invertible T.

With U orthonormal, E‖U δV x‖² = E‖δV x‖²: the rows of V are independent, which is what feeding errors forward assumes.
Any further rotation keeps that, and spreads what a few directions carry over all of them: the largest entry of
z = V x, which decides how coarsely z is rounded to int8, falls to that of a mean direction. It costs nothing to run.

Source: incoherence by rotation as in QuIP (Chee et al., arXiv 2307.13304), here inside the rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .moments import Walk


def orthonormal(first: Tensor, second: Tensor, *, rotate: bool, seed: int = 0) -> tuple[Tensor, Tensor] | None:
    """Return (first', second') of the same product, the columns of second' orthonormal; None where it has too few rows.

    `first` (r, n); `second` (m, r, taps), whose rows for all taps count.
    """
    rows, rank, taps = second.shape
    if rows * taps < rank:
        return None
    flat = second.double().permute(0, 2, 1).reshape(rows * taps, rank)
    q, r = torch.linalg.qr(flat)
    if float(r.diagonal().abs().min()) <= 1e-10 * float(r.diagonal().abs().max()):
        return None
    if rotate:
        turn = rotation(rank, seed)
        q, r = q @ turn, turn.T @ r
    return r @ first.double(), q.reshape(rows, taps, rank).permute(0, 2, 1)


def rotation(n: int, seed: int = 0) -> Tensor:
    """Return a random orthogonal matrix (n, n), the same one for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    turn: Tensor = q * torch.sign(r.diagonal())
    return turn


def step(z: Tensor | None, g: Tensor) -> float:
    """Return the step to which int8 rounds an activation: its range over 255, or four deviations where it was not seen."""
    if z is not None:
        return (float(z.max().clamp_min(0)) - float(z.min().clamp_max(0))) / 255
    return 8.0 * float(g.diagonal(dim1=-2, dim2=-1).clamp_min(0).max().sqrt()) / 255


def rounding(weight: Tensor, width: float, walk: Walk | None = None) -> float:
    """Return E‖W ε‖² of a rounding error ε that is uniform over a step of `width`."""
    return width**2 / 12 * float(weight.double().square().sum())

"""Spatial SVD without redundancy: one tap of the second filters is trivial."""

from __future__ import annotations

import torch
from torch import Tensor

from ...factorize import form
from ._statement import Case, Size, Statement, dimension, distance, random, same
from .spatial_svd import text

FORMULA = "W[o, i, h, w] = Σ_r A[r, i, h] B[o, r, w], B[·, ·, c] = Π [1; T] for r < O, [1 0] for r ≥ O"


def _shapes(size: Size) -> list[Size]:
    o, i, kh, kw, r = size
    return [(r, i, kh), (o - r, r), (o, r, kw - 1)]


def _build(a: Tensor, t: Tensor, others: Tensor) -> Tensor:
    head = torch.cat([torch.eye(a.shape[0], dtype=a.dtype), t])
    return torch.einsum("rih,orw->oihw", a, torch.cat([others, head[..., None]], 2))


def _same_kernels(size: Size, g: torch.Generator) -> Case:
    o, i, kh, kw, r = size
    w = random(g, o, i, kh, kw)
    gauge, plain = (form(n).decompose(w, r).to_tensor() for n in ("pivoted_spatial", "spatial_svd"))
    return same(text(size), distance(gauge, plain))


def _saved(size: Size, g: torch.Generator) -> Case:
    """Decompose at the size and count what is stored."""
    o, i, kh, kw, r = size
    w = random(g, o, i, kh, kw)
    stored = [form(n).decompose(w, r).n_params for n in ("spatial_svd", "pivoted_spatial")]
    saved, expected = stored[0] - stored[1], r * min(r, o)
    return Case(text(size), f"{expected} fewer than {stored[0]}", f"{saved} fewer", saved == expected)


STATEMENTS = (
    dimension(
        "Below as many terms as outputs it has as many numbers as the set has dimensions: none is redundant.",
        "dim = r(I·k_h + O·k_w) − r² = its parameter count, r < O",
        [(4, 3, 3, 3, 2), (5, 2, 3, 2, 3), (6, 3, 3, 3, 5)],
        shapes=_shapes,
        build=_build,
        count=lambda s: form("pivoted_spatial").n_params(s[:4], s[4]),
        text=text,
    ),
    Statement(
        "It represents the same kernels as the spatial SVD of that rank.",
        "(A, B) and (M A, B M⁻¹) are one kernel",
        [(6, 4, 3, 3, 2), (6, 5, 3, 3, 6), (5, 6, 3, 3, 9)],
        _same_kernels,
    ),
    Statement(
        "It stores one tap less from O terms on, and r² numbers less below.",
        "saved = r · min(r, O)",
        [(6, 4, 3, 3, 2), (6, 5, 3, 3, 6), (5, 6, 3, 3, 9)],
        _saved,
    ),
)

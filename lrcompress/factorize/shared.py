"""One basis for layers that read the same input: V is stored, and multiplied, once.

The rows of q, k and v (or gate and up) stacked are one matrix with one input metric, so the best common V is that of
the SVD form on the stack: r(n + Σ mᵢ) numbers against Σ r(n + mᵢ). Rows may be weighed by importance first. For a
single layer it is the SVD.

Source: Eckart & Young 1936 on the stacked matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import svd
from ._linalg import unfolded
from ._types import Factorization, Statistics

LAYERS = frozenset({"linear"})
#: It is chosen for groups of layers, not for one.
AUTO = False

full_rank, clip, n_params, n_macs, curve = svd.full_rank, svd.clip, svd.n_params, svd.n_macs, svd.curve
decompose, to_tensor, linear = svd.decompose, svd.to_tensor, svd.linear


def group_params(shapes: Sequence[tuple[int, ...]], rank: int) -> int:
    """Return the numbers that a group stores: V once, and every layer's U."""
    return rank * (shapes[0][1] + sum(s[0] for s in shapes))


def decompose_group(
    weights: Sequence[Tensor],
    rank: int,
    statistics: Sequence[Statistics | None] = (),
    *,
    importance: Sequence[float] = (),
) -> list[Factorization]:
    """Return one factorization per weight (mᵢ, n); their `V` (r, n) are one and the same tensor.

    `statistics`: one per weight, of the same input; their output metrics weigh each layer's own rows. Raises
    `ValueError` for weights of different width.
    """
    widths = {w.shape[1] for w in weights}
    if len(widths) != 1:
        raise ValueError(f"expected weights of one width, got {sorted(widths)}")
    given = list(statistics) or [None] * len(weights)
    scales = list(importance) or [1.0] * len(weights)
    stacked = torch.cat([s * unfolded(w).double() for w, s in zip(weights, scales, strict=True)])
    first = next((s for s in given if s is not None), None)
    metric = (
        Statistics()
        if first is None
        else Statistics(
            gram=first.gram,
            mean=first.mean,
            output_gram=block_diagonal([None if s is None else s.output_gram for s in given]),
        )
    )
    best = svd.decompose(stacked, rank, metric)
    v, u = best.factors["V"].to(weights[0].dtype), best.factors["U"]
    found, at = [], 0
    for w, s, own in zip(weights, scales, given, strict=True):
        factors = {"U": u[at : at + len(w)] / s, "V": v}
        at += len(w)
        found.append(Factorization.of("svd", factors, w, rank, own))
    return found


def block_diagonal(grams: Sequence[Tensor | None]) -> Tensor | None:
    """Return the output metrics of a stack's layers as one; None unless every layer has its own."""
    if any(g is None for g in grams):
        return None
    blocks: Tensor = torch.block_diag(*(g.double() for g in grams if g is not None))  # type: ignore[no-untyped-call]
    return blocks

"""Several adapters of one layer as one: exact by stacking, or cut to a rank with the error that costs.

ΔW = Σ wᵢ BᵢAᵢ is [w₁B₁ …][A₁; …], of rank Σ rᵢ. Cutting it to rank r needs no dense matrix: with B = Q_B R_B and
Aᵀ = Q_A R_A, the SVD of R_B R_Aᵀ is that of B A.

Source: Eckart & Young 1936, after two QR decompositions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._base import BaseAdapter
from ._target import Base
from .core import Adapter as Core
from .interop.peft import of_pair


def stacked(parts: Sequence[tuple[BaseAdapter, float]], base: Base | None = None) -> BaseAdapter:
    """Return the one adapter that equals the weighted sum of `parts`, exactly: a core of cores, else a LoRA.

    Raises `ValueError` for parts of different layers, and for weight-decomposed ones, which do not add up.
    """
    first = parts[0][0]
    for a, _ in parts:
        if (a.weight_shape, a.groups, a.core if a.in_core else first.core) != (
            first.weight_shape,
            first.groups,
            first.core,
        ):
            raise ValueError(f"expected corrections of one layer, got {first.weight_shape} and {a.weight_shape}")
        if a.magnitude is not None:
            raise ValueError("weight-decomposed corrections do not add up; merge them instead")
    if len(parts) == 1 and parts[0][1] == 1.0:
        return first
    if all(isinstance(a, Core) for a, _ in parts):
        total = torch.stack([w * a.matrix().detach() for a, w in parts if isinstance(a, Core)]).sum(0)
        made = Core(first.weight_shape, first.core, groups=first.groups, core=first.core, layer_kind=first.layer_kind)
        made.load({"core_R": total})
        return made
    pairs = [(a.expand(base), w) for a, w in parts]
    left = torch.cat([w * b.detach() for (_, b), w in pairs], 1)
    return of_pair(torch.cat([a.detach() for (a, _), _ in pairs]), left, first.target)


def expanded(a: BaseAdapter, base: Base | None = None) -> BaseAdapter:
    """Return `a` as a LoRA, exactly; `ValueError` for a weight-decomposed one, which has no low-rank form."""
    if a.magnitude is not None:
        raise ValueError("a weight-decomposed correction has no low-rank form; merge it instead")
    right, left = a.expand(base)
    return of_pair(right.detach(), left.detach(), a.target)


def truncated(a: BaseAdapter, rank: int, base: Base | None = None) -> tuple[BaseAdapter, float]:
    """Return the best LoRA of at most `rank` for the correction, and ‖ΔW − ΔŴ‖/‖ΔW‖."""
    right, left = (t.detach().double() for t in expanded(a, base).expand())
    q_b, r_b = torch.linalg.qr(left)
    q_a, r_a = torch.linalg.qr(right.flatten(1).T)
    p, d, yt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = max(1, min(rank, int(torch.count_nonzero(d > d[0] * 1e-12))))
    total, lost = float(d.square().sum()), float(d[kept:].square().sum())
    dtype = a.expand(base)[0].dtype
    new_left, new_right = q_b @ (p[:, :kept] * d[:kept]), (q_a @ yt[:kept].T).T
    shape = (kept, *right.shape[1:])
    return of_pair(_as(new_right.reshape(shape), dtype), _as(new_left, dtype), a.target), (
        lost / total
    ) ** 0.5 if total else 0.0


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).contiguous()

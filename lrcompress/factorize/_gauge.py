"""The pivot gauge: some rows of a basis as they are, the others as combinations of them.

    kept, t, place = pivot_rows(u)          # u = [u[kept]; t @ u[kept]].index_select(0, place)

Source: PIFA (ICML 2025) for the gauge; pivots by column-pivoted QR of Uᵀ, then exchanges until no entry of T exceeds
2 (Gu & Eisenstat 1996), so that neither half precision nor quantization meets a large T.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

MAX_ENTRY = 2.0


def pivot_rows(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return pivot rows p (r,) of `u` (m, r), T = U_q U_p⁻¹ (m − r, r) and, for every row, its place in [p; q], int32.

    Columns that depend on others do no harm: T is taken from an orthonormal basis that holds their span.
    """
    rank = u.shape[1]
    q, _ = np.linalg.qr(u.numpy())
    _, _, pivot = scipy.linalg.qr(q.T, mode="economic", pivoting=True)
    chosen, rest = sorted(pivot[:rank]), sorted(pivot[rank:])
    for _ in range(4 * len(pivot)):
        t = np.linalg.solve(q[chosen].T, q[rest].T).T if rest else np.zeros((0, rank))
        if not t.size or np.abs(t).max() <= MAX_ENTRY:
            break
        i, j = np.unravel_index(np.abs(t).argmax(), t.shape)
        rest[i], chosen[j] = chosen[j], rest[i]  # |det U_p| grows by that entry: this ends
    place = np.empty(len(pivot), np.int32)
    place[[*chosen, *rest]] = np.arange(len(pivot), dtype=np.int32)
    return torch.tensor(chosen), torch.from_numpy(np.ascontiguousarray(t)), torch.from_numpy(place)


def unpivoted(others: Tensor, place: Tensor) -> Tensor:
    """Return the basis (m, r) in which T (m − r, r) and the places of its rows leave the pivot rows as they are."""
    rank = others.shape[1]
    own = torch.eye(rank, dtype=others.dtype, device=others.device)
    return torch.cat([own, others]).index_select(0, place)

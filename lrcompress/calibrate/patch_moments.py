"""Moments of the patches of a convolution without writing the patches out.

Two kernel rows i ≤ i' of one patch are rows y + i and y + i' of the padded input, so that all pairs with one distance
i' − i need one product of the input with itself, shifted; they differ only in the rows at the upper and lower edge,
which are added one by one. A 3×3 kernel needs 3 products of width 3·channels instead of one of width 9·channels:
a third of the multiply-adds on a third of the memory, and exact for any padding, mode, dilation and grouping.
Strides along the first axis leave little to share; there the patches are written out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..model.views import Walk, patches
from ..model.views.walk import padded
from .moments import Moments, about, column_sums, product, wide

#: Longer kernels have so many pairs of rows that writing the patches out is faster.
_LONGEST = 16


def patch_moments(x: Tensor, walk: Walk) -> Moments:
    """Return the moments of the patches of x (batch, in, *space), ordered (channel, *kernel), padding included."""
    if walk.stride[0] == 1 and 1 < walk.kernel[0] <= _LONGEST:
        return by_shifts(wide(x), walk)
    moments = Moments()
    moments.add(by_group(patches(x, walk), walk.groups))
    return moments


def by_group(rows: Tensor, groups: int) -> Tensor:
    """Return rows (N, n) as they are, or as (groups, N, n / groups): channels of a group are neighbours."""
    return rows if groups == 1 else rows.reshape(len(rows), groups, -1).movedim(1, 0)


def by_shifts(x: Tensor, walk: Walk) -> Moments:
    """Return the moments of patches at stride 1 along the first axis, from shifted products."""
    (kernel, *others), groups = walk.kernel, walk.groups
    centre = x.mean([0, *range(2, x.dim())])
    z = _unfolded(padded(x, walk) - centre.reshape(-1, *[1] * (x.dim() - 2)), walk)
    step = walk.dilation[0]
    height = z.shape[1] - (kernel - 1) * step
    second = _shifted_products(z, kernel, step, height)
    rows = column_sums(z)
    sums = torch.stack([rows[:, i * step : i * step + height].sum(1) for i in range(kernel)], 1)
    # Columns are (kernel row, other kernel axes, channel) so far.
    parts = (groups, kernel, math.prod(others), -1)
    sums = sums.reshape(parts).permute(0, 3, 1, 2).reshape(groups, -1)
    size = sums.shape[1]
    second = second.reshape(*parts, *parts[1:3], x.shape[1] // groups)
    second = second.permute(0, 3, 1, 2, 6, 4, 5).reshape(groups, size, size)
    where = centre.double().reshape(groups, -1).repeat_interleave(math.prod(walk.kernel), 1)
    if groups == 1:
        where, sums, second = where[0], sums[0], second[0]
    return about(where, height * z.shape[2], sums, second)


def _unfolded(x: Tensor, walk: Walk) -> Tensor:
    """Return padded x as (groups, rows, batch · positions, kernel · channels) of all axes but the first."""
    x = torch.unflatten(x, 1, (walk.groups, -1)).movedim((1, 3), (0, 1)).movedim(3, -1).contiguous()
    axes = len(walk.kernel) - 1  # (groups, rows, batch, *others, channel)
    for axis, (k, d, s) in enumerate(zip(walk.kernel[1:], walk.dilation[1:], walk.stride[1:], strict=True)):
        x = x.unfold(3 + axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.movedim(3 + axes, -1)  # (groups, rows, batch, *positions, *kernel, channel)
    return x.reshape(*x.shape[:2], math.prod(x.shape[2 : 3 + axes]), math.prod(x.shape[3 + axes :]))


def _shifted_products(z: Tensor, kernel: int, step: int, height: int) -> Tensor:
    """Return Σ over `height` rows y of z[y + i·step]ᵀ z[y + i'·step] for all i, i': (groups, kernel, q, kernel, q)."""
    groups, _, _, q = z.shape
    out = z.new_empty((groups, kernel, q, kernel, q), dtype=torch.float64)
    for distance in range(kernel):
        shift, last = distance * step, (kernel - 1 - distance) * step
        # Rows last … height are in every sum of this distance, the others in some.
        inner = range(last, max(height, last))
        shared = product(
            z[:, inner.start : inner.stop].flatten(1, 2), z[:, inner.start + shift : inner.stop + shift].flatten(1, 2)
        )
        edges = [y for y in range(height + last) if y not in inner]
        single = product(z[:, edges], z[:, [y + shift for y in edges]])
        for i in range(kernel - distance):
            own = [k for k, y in enumerate(edges) if i * step <= y < i * step + height]
            block = shared + single[:, own].sum(1)
            out[:, i, :, i + distance] = block
            out[:, i + distance, :, i] = block.mT
    return out

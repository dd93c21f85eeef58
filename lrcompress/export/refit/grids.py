"""The grids that ONNX Runtime's operators read, and the codes of a matrix on one.

    value = (code − zero) · scale          in float32, with one scale (and zero) per row, or per block of a row

A row is what one output reads: blocks run along the inputs. `Coded.values()` is, bit for bit, what the operator makes of
the codes, so that whatever is fitted against it holds on the device.

    ROW8      s8, one scale per output, codes −127…127: what `quantize_dynamic` and `quantize_static` write
    blocks    u4 (u2, u8) in blocks of 16…256, scales stored in 16 bits: MatMulNBits, GatherBlockQuantized
    signed    s4 or s8, zero 0, blocks of any length: constants that are multiplied out when the graph is loaded
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Shares of the largest entry that a block's scale is tried for; the last is no clipping at all.
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72)


@dataclass(frozen=True)
class Grid:
    """`bits` of a code; `block` inputs share a scale (None: the whole row). `symmetric`: no zero is stored."""

    bits: int
    block: int | None = None
    symmetric: bool = True
    #: Scales are stored in 16 bits; codes have a sign, and no zero.
    half_scales: bool = False
    signed: bool = False

    def width(self, columns: int) -> int:
        """Return how many inputs share a scale."""
        return columns if self.block is None else self.block

    def n_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of codes, scales and zeros of a (rows, columns) matrix."""
        width = self.width(columns)
        blocks = -(-columns // width)
        codes = rows * (columns if self.block is None else blocks * width) * self.bits
        zeros = 0 if self.symmetric else rows * -(-blocks * self.bits // 8) * 8
        return (codes + zeros) // 8 + rows * blocks * (2 if self.half_scales else 4)


#: What the int8 tools of ONNX Runtime write, row by row.
ROW8 = Grid(8, signed=True)


def blocks(bits: int, block: int = 32, *, symmetric: bool = True) -> Grid:
    """Return the grid of MatMulNBits and GatherBlockQuantized."""
    return Grid(bits, block, symmetric, half_scales=True)


def signed(bits: int, columns: int, longest: int = 64) -> Grid:
    """Return the grid of a constant that is multiplied out at load: equal blocks of at most `longest` inputs."""
    fitting = [b for b in range(16, longest + 1) if columns % b == 0]
    return Grid(bits, max(fitting, default=None), half_scales=True, signed=True)


@dataclass
class Coded:
    """A (rows, columns) matrix on a grid: `codes` of its shape; `scales`, `zeros` (rows, blocks), float32."""

    grid: Grid
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        """Return what the runtime makes of the codes, float32."""
        columns = self.codes.shape[1]
        width = self.grid.width(columns)
        spread = [t.repeat_interleave(width, 1)[:, :columns] for t in (self.scales, self.zeros)]
        return (self.codes.float() - spread[1]) * spread[0]


def limits(grid: Grid) -> tuple[int, int]:
    """Return the smallest and the largest code that is written."""
    half = 2 ** (grid.bits - 1)
    if grid.signed:
        return (-127, 127) if grid.bits == 8 else (-half, half - 1)
    return 0, 2 * half - 1


def pinned(grid: Grid) -> bool:
    """Return whether the scale of a row is that of its largest entry, which keeps the largest code."""
    return grid.block is None and grid.bits == 8 and not grid.half_scales


def scale_of(part: Tensor, weights: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero (rows,) of one block (rows, width), float32.

    One scale per row is what the tools take: the largest entry over 127. Blocks take the one of several with the least
    Σ weights·(value − part)². `weights`: (width,).
    """
    if pinned(grid):
        top = part.abs().amax(1).float()
        return torch.where(top > 0, top / 127, 1.0), torch.zeros_like(top)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    low, high = limits(grid)
    # Single precision: this only compares; a table has millions of entries.
    single, share = part.float(), (weights / weights.mean()).float()
    for scale, zero in _candidates(part, grid):
        codes = torch.clamp(torch.round(single / scale[:, None]) + zero[:, None], low, high)
        loss = ((codes - zero[:, None]).mul_(scale[:, None]).sub_(single).square_() * share).sum(1)
        if best is None:
            best = loss, scale, zero
        else:
            better = loss < best[0]
            best = tuple(torch.where(better, a, b) for a, b in zip((loss, scale, zero), best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return best[1], best[2]


def _candidates(part: Tensor, grid: Grid):  # type: ignore[no-untyped-def]
    levels = 2**grid.bits - 1
    low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
    for share in _SHRINKS:
        if grid.symmetric:
            middle = torch.full_like(low, 0 if grid.signed else 2 ** (grid.bits - 1)).float()
            # The range is lopsided by one code: it may point either way, so the sign of the scale is free.
            top = torch.maximum(high, -low) * share / (levels // 2 + 1)
            for sign in (1.0, -1.0):
                yield _stored(sign * top, grid), middle
            yield _stored(torch.maximum(high, -low) * share / (levels // 2), grid), middle
        else:
            scale = _stored((high - low) * share / levels, grid)
            yield scale, torch.round(-low * share / scale.double()).clamp(0, levels).float()


def _stored(scale: Tensor, grid: Grid) -> Tensor:
    """Return scales as they are stored; a block of zeros, or one too small for 16 bits, gets a harmless one."""
    kept = scale.to(torch.float16).float() if grid.half_scales else scale.float()
    return torch.where((kept == 0) | ~torch.isfinite(kept), torch.ones_like(kept), kept)


def nearest(part: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Return the codes (rows, width) nearest to `part`, as float64."""
    low, high = limits(grid)
    return torch.clamp(torch.round(part / scale[:, None].double()) + zero[:, None].double(), low, high)

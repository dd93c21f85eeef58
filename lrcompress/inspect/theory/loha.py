"""LoHa, the adapter: an entrywise product of two rank-r matrices, between LoRA of rank r and of rank r²."""

from __future__ import annotations

import torch

from ...adapt.loha import Adapter
from ...adapt.lora import Adapter as Lora
from . import hadamard
from ._statement import Case, Size, Statement, dimension, distance, equal, random, rank_of, same

FORMULA = "ΔW = s·(B₁A₁)∘(B₂A₂), both of rank r"


def _text(size: Size) -> str:
    m, n, r = size
    return f"{m}×{n}, r={r}"


def _both(size: Size) -> Size:
    m, n, r = size
    return m, n, r, r


def _adapter(size: Size, g: torch.Generator) -> Adapter:
    m, n, r = size
    adapter = Adapter((m, n), r, alpha=2.0 * r).double()
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(random(g, *p.shape))
    return adapter


def _expansion(size: Size, g: torch.Generator) -> Case:
    adapter = _adapter(size, g)
    a, b = (t.detach() for t in adapter.expand())
    case = same(_text(size), distance(b @ a, adapter.delta_weight().detach()))
    r = size[2]
    return Case(
        case.size, f"rank {r * r}, {case.expected}", f"rank {len(a)}, {case.found}", case.holds and len(a) == r * r
    )


def _contains(size: Size, g: torch.Generator) -> Case:
    m, n, r = size
    adapter, (b, a) = _adapter(size, g), (random(g, m, r), random(g, r, n))
    with torch.no_grad():
        adapter.hada_w1_a.copy_(b / adapter.scaling)
        adapter.hada_w1_b.copy_(a)
        adapter.hada_w2_a.zero_()[:, 0] = 1.0
        adapter.hada_w2_b[0] = 1.0
    return same(_text(size), distance(adapter.delta_weight().detach(), b @ a))


def _strict(size: Size, g: torch.Generator) -> Case:
    return hadamard.strict(_both(size), g)


def _rank(size: Size, g: torch.Generator) -> Case:
    m, n, r = size
    return equal(_text(size), min(r * r, m, n), rank_of(_adapter(size, g).delta_weight().detach()))


def _numbers(size: Size, g: torch.Generator) -> Case:
    m, n, r = size
    expected = (2 * r * (m + n), r * (m + n), r * r * (m + n))
    adapters = (_adapter(size, g), Lora((m, n), r), Lora((m, n), r * r))
    found = tuple(sum(p.numel() for p in a.parameters()) for a in adapters)
    wanted, got = (f"{one:,} against {two:,} and {three:,}" for one, two, three in (expected, found))
    return Case(_text(size), wanted, got, found == expected)


STATEMENTS = (
    Statement("LoRA of rank r is inside: the second product is all ones.", "LoRA_r ⊂ LoHa_r", [(8, 9, 2), (12, 7, 3)], _contains),
    Statement("It is inside LoRA of rank r², exactly.", "LoHa_r ⊂ LoRA_{r²}: (B₁•B₂)(A₁⊙A₂)", [(8, 9, 2), (20, 15, 4)], _expansion),
    Statement("It reaches rank r².", "rank ΔW = min(r², m, n) generically", [(12, 15, 3), (20, 20, 4), (6, 9, 3)], _rank),
    Statement(
        "It does not reach every matrix of rank r²: the inclusion in LoRA of rank r² is strict from r = 2 on.",
        "dim LoHa_r < dim LoRA_{r²}", [(5, 5, 2), (4, 6, 2), (12, 12, 3)], _strict,
    ),
    dimension(
        "What it does reach has this dimension.",
        "dim = 2r(m + n) − 2r² − (m + n − 1), at most mn and r²(m + n − r²)",
        [(5, 5, 2), (4, 6, 2), (12, 10, 3)],
        shapes=lambda s: hadamard.shapes(_both(s)), build=hadamard.build, count=lambda s: hadamard.count(_both(s)), text=_text,
    ),
    Statement("It has twice the numbers of LoRA at r, and 2/r of those of LoRA at r².", "2r(m + n) against r(m + n) and r²(m + n)", [(96, 64, 4), (96, 64, 8)], _numbers),
)  # fmt: skip

"""Give layers their ranks within a budget of bytes, by how much of the gradient each byte can follow.

The first step of an adapter can follow the gradient G of the loss by its weight up to rank r: Σ_{i≤r} σᵢ²(G). A step
from one rank of one layer to a larger one is worth that gain per byte; the best one that fits is taken, until none
does. Of other kinds than LoRA this is a proxy: their numbers reach other matrices, not fewer layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: Ranks that are tried.
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

#: rank → bytes that it takes, ascending in both
Prices = Sequence[tuple[int, int]]


def prices(bytes_of: Mapping[int, int]) -> Prices:
    """Return the ranks that are worth asking for: of those that take the same bytes, or more, the largest."""
    found: list[tuple[int, int]] = []
    for rank, n_bytes in sorted(bytes_of.items()):
        while found and found[-1][1] >= n_bytes:
            found.pop()
        found.append((rank, n_bytes))
    return found


def ranks_within(offers: Mapping[str, Prices], spectra: Mapping[str, Tensor], most: int) -> dict[str, int]:
    """Return {layer: rank} of at most `most` bytes; layers that get none are left out.

    `spectra`: squared singular values of each layer's gradient, descending.
    """
    reached = {name: torch.cat([torch.zeros(1), s.double().cpu().float()]).cumsum(0) for name, s in spectra.items()}
    taken: dict[str, tuple[int, int]] = {}
    left = most
    while True:
        best: tuple[float, str, int, int] | None = None
        for name, offer in offers.items():
            rank, spent = taken.get(name, (0, 0))
            for more, cost in offer:
                if more <= rank or cost - spent > left:
                    continue
                worth = (_at(reached[name], more) - _at(reached[name], rank)) / (cost - spent)
                if best is None or worth > best[0]:
                    best = worth, name, more, cost
        if best is None or best[0] <= 0:
            return {name: rank for name, (rank, _) in taken.items()}
        _, name, rank, cost = best
        left -= cost - taken.get(name, (0, 0))[1]
        taken[name] = rank, cost


def _at(reached: Tensor, rank: int) -> float:
    return float(reached[min(rank, len(reached) - 1)])

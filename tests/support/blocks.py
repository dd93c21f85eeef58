"""A network of blocks that repeat, as residual networks and transformers have them; also named by --arch in tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """x + W₂ tanh(W₁ norm(x)): what is between the two products is four times as wide as x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(torch.tanh(self.up(self.norm(x)))))


class Stack(nn.Module):
    """x (batch, 12) → scores (batch, 5)."""

    def __init__(self, depth: int = 3, width: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()

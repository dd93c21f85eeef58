"""LoRA: ΔW = s·B A with A (r, in, *k) and B (out, r); on a convolution A walks like the layer and B is 1×1.

Source: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..factorize import ConvGeometry
from ..factorize._linalg import convolve, pointwise
from ._base import BaseAdapter


class Adapter(BaseAdapter):
    """B is zero at init, A uniform within ±1/√(in·kernel)."""

    kind = "lora"
    tensor_names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def reset(self, generator: torch.Generator | None) -> None:
        out, n = self.sides
        bound = 1 / math.sqrt(n)
        a = torch.empty(self.rank, *self.weight_shape[1:]).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(out, self.rank, *(1,) * (len(self.weight_shape) - 2)))

    def delta_weight(self) -> Tensor:
        return (self.scaling * self.lora_B.flatten(1) @ self.lora_A.flatten(1)).reshape(self.weight_shape)

    def expand(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.scaling * self.lora_B.flatten(1)

    def forward(self, x: Tensor, geometry: ConvGeometry | None = None) -> Tensor:
        if geometry is None:
            return F.linear(F.linear(x, self.lora_A), self.scaling * self.lora_B)
        return pointwise(convolve(x, self.lora_A, geometry), self.scaling * self.lora_B.flatten(1))

    @classmethod
    def n_params(cls, weight_shape: tuple[int, ...], rank: int) -> int:
        return rank * (weight_shape[0] + math.prod(weight_shape[1:]))

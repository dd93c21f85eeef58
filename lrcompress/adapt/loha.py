"""LoHa: ΔW = s·(B₁A₁) ∘ (B₂A₂), rank up to r² from 2r(out + in·kernel) numbers.

There is no cheap factor-wise forward; for runtimes that only know LoRA it expands exactly to rank r² by
(B₁A₁)∘(B₂A₂) = (B₁ • B₂)(A₁ ⊙ A₂), rows of the left and columns of the right being Kronecker products.

Source: Hyeon-Woo et al., arXiv 2108.06098 (FedPara).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..factorize import ConvGeometry
from ..factorize._linalg import convolve
from ._base import BaseAdapter


class Adapter(BaseAdapter):
    """B₂ (w2_a) is zero at init, the others Gaussian."""

    kind = "loha"
    tensor_names = {
        "hada_w1_a": "hada_w1_a",
        "hada_w1_b": "hada_w1_b",
        "hada_w2_a": "hada_w2_a",
        "hada_w2_b": "hada_w2_b",
    }

    def reset(self, generator: torch.Generator | None) -> None:
        out, n = self.sides

        def normal(rows: int, columns: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, columns).normal_(0, std, generator=generator))

        self.hada_w1_a = normal(out, self.rank, 0.1)
        self.hada_w1_b = normal(self.rank, n, 1.0)
        self.hada_w2_a = nn.Parameter(torch.zeros(out, self.rank))
        # A₂ small as LoRA's A is, so that one step moves the outputs by an amount that does not depend on the width.
        self.hada_w2_b = normal(self.rank, n, 1 / math.sqrt(n))

    def delta_weight(self) -> Tensor:
        product = (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)
        return (self.scaling * product).reshape(self.weight_shape)

    def expand(self) -> tuple[Tensor, Tensor]:
        b = torch.einsum("or,os->ors", self.hada_w1_a, self.hada_w2_a).flatten(1)
        a = torch.einsum("rn,sn->rsn", self.hada_w1_b, self.hada_w2_b).flatten(0, 1)
        return a.reshape(-1, *self.weight_shape[1:]), self.scaling * b

    def forward(self, x: Tensor, geometry: ConvGeometry | None = None) -> Tensor:
        delta = self.delta_weight()
        return F.linear(x, delta) if geometry is None else convolve(x, delta, geometry)

    @classmethod
    def n_params(cls, weight_shape: tuple[int, ...], rank: int) -> int:
        return 2 * rank * (weight_shape[0] + math.prod(weight_shape[1:]))

"""LoKH: ΔW = s·Σ_k A₁⊙A₂⊙…⊙A_t, chained Khatri-Rao products, generically of full rank from few numbers.

Column j of ΔW is a₁ⱼ ⊗ a₂ⱼ ⊗ … with a_iⱼ of length m_i and Π m_i = rows; `rank` is the number K of terms. It costs
as many multiply-adds as the dense weight and has no low-rank expansion: merge it before it runs. On an embedding a
row is the entrywise product of one row of each factor.

Source: Lu, arXiv 2408.05883 (proposed there); the two-factor relative is Albert et al., arXiv 2508.00230 (KRAdapter).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import BaseAdapter
from ._target import Base, Target

#: Smallest factor of a fresh chain: shorter ones save nothing more than a few numbers.
_SMALLEST = 4
#: Most factors of a chain.
MAX_FACTORS = 8


def chain(rows: int) -> tuple[int, ...]:
    """Return ascending factors of `rows`, none below 4 where two others are left; a prime is its own only factor."""
    found, rest, p = [], rows, 2
    while rest > 1:
        while rest % p == 0:
            found.append(p)
            rest //= p
        p = p + 1 if p * p <= rest else max(rest, p + 1)
    found.sort()
    while len(found) > 2 and (found[0] < _SMALLEST or len(found) > MAX_FACTORS):
        first, second, *others = found
        found = sorted([first * second, *others])
    return tuple(found) or (1,)


class Adapter(BaseAdapter):
    """A₁ is zero at init, columns of the others have unit expected norm. Tensors `lokh_i` are (K, m_i, columns·kernel)."""

    kind = "lokh"
    tensor_names = tuple(f"lokh_{i}" for i in range(1, MAX_FACTORS + 1))

    def fresh(self, generator: torch.Generator | None, *, factors: tuple[int, ...] = ()) -> dict[str, Tensor]:
        rows, n = self.sides
        sizes = factors or chain(rows)
        if math.prod(sizes) != rows or len(sizes) > MAX_FACTORS:
            raise ValueError(f"expected at most {MAX_FACTORS} factors whose product is {rows}, got {sizes}")
        found = {"lokh_1": torch.zeros(self.rank, sizes[0], n)}
        for i, m in enumerate(sizes[1:], 2):
            found[f"lokh_{i}"] = torch.empty(self.rank, m, n).normal_(0, 1 / math.sqrt(m), generator=generator)
        return found

    def shapes(self, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        rows, n = self.sides
        count = len([name for name in given if name in self.tensor_names])
        names = [f"lokh_{i}" for i in range(1, max(count, 1) + 1)]
        sizes = []
        for name in names:
            if len(given.get(name, ())) != 3:
                raise ValueError(f"{name}: expected three axes, got {given.get(name, 'nothing')}")
            sizes.append(given[name][1])
        if math.prod(sizes) != rows:
            raise ValueError(f"expected factors whose product is {rows}, got {sizes}")
        return {name: (self.rank, m, n) for name, m in zip(names, sizes, strict=True)}

    @property
    def factors(self) -> list[Tensor]:
        """A₁ … A_t, each (K, m_i, columns·kernel)."""
        return [p for name in self.tensor_names if (p := self._parameters.get(name)) is not None]

    def plain_delta(self, base: Base | None = None) -> Tensor:
        # The chain in two halves of about equal length: only their product, summed over the terms, is as large as ΔW.
        factors, sizes = self.factors, [a.shape[1] for a in self.factors]
        cut = min(range(1, len(sizes)), key=lambda i: math.prod(sizes[:i]) + math.prod(sizes[i:]), default=0)
        if not cut:
            return (self.scaling * factors[0].sum(0)).reshape(self.weight_shape)
        upper, lower = (_multiplied(part) for part in (factors[:cut], factors[cut:]))
        return torch.einsum("kin,kjn->ijn", self.scaling * upper, lower).reshape(self.weight_shape)

    def expand(self, base: Base | None = None) -> tuple[Tensor, Tensor]:
        return as_full_rank(self.plain_delta())

    def forward(self, x: Tensor, target: Target) -> Tensor:
        if target.kind != "embedding":
            return target.apply(x, self.plain_delta())
        rest: Tensor = x
        product: Tensor | None = None
        for a in reversed(self.factors):
            rows = F.embedding(rest % a.shape[1], a.transpose(0, 1).flatten(1)).reshape(*rest.shape, a.shape[0], -1)
            product = rows if product is None else rows * product
            rest = rest // a.shape[1]
        assert product is not None
        return self.scaling * product.sum(-2)

    @classmethod
    def rank_for(cls, target: Target, rank: int) -> int:
        return max(1, rank)


def _multiplied(factors: list[Tensor]) -> Tensor:
    """Return the chained product of factors (K, m_i, n), term by term: (K, Π m_i, n)."""
    product = factors[0]
    for a in factors[1:]:
        product = (product[:, :, None] * a[:, None]).flatten(1, 2)
    return product


def as_full_rank(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return (A, B) with B·A = ΔW where one of them is an identity: the expansion of what has no low rank."""
    rows, n = delta.shape[0], math.prod(delta.shape[1:])
    if rows <= n:
        return delta, torch.eye(rows, dtype=delta.dtype, device=delta.device)
    eye = torch.eye(n, dtype=delta.dtype, device=delta.device)
    return eye.reshape(n, *delta.shape[1:]), delta.flatten(1)

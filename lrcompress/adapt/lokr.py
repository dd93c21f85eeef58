"""LoKr: ΔW = s·W₁ ⊗ W₂, W₁ (m₁, n₁) and W₂ (m₂, n₂, *k), either of them a product where that is smaller.

W₂ = a b with a (m₂, r), b (r, n₂·kernel); the layer is applied factor by factor, Y = W₁ (X bᵀ) aᵀ with X the input
as n₁ × n₂. Exact as LoRA of rank min(m₁, n₁)·r: W₁⊗(a b) = (W₁⊗a)(I⊗b) = (I⊗a)(W₁⊗b). Shapes of loaded tensors are
read from the tensors: PEFT and LyCORIS order the two factors of a dimension differently.

Source: Edalati et al., arXiv 2212.10650 (KronA); Yeh et al., arXiv 2309.14859 (LyCORIS).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..factorize import ConvGeometry
from ..factorize._linalg import convolve
from ._adding import added
from ._base import BaseAdapter
from ._target import Base, Target, blocked


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Return divisors (m, n) of `dimension`, m ≤ n, one of them `factor` or m just below it; -1: as near as it gets to the root."""
    if factor > 0 and dimension % factor == 0:
        m, n = sorted((factor, dimension // factor))
        return m, n
    top = math.isqrt(dimension) if factor < 1 else min(factor, math.isqrt(dimension))
    m = max(d for d in range(1, top + 1) if dimension % d == 0)
    return m, dimension // m


class Adapter(BaseAdapter):
    """W₂ (or its b) is zero at init, the others uniform within ±1/√columns."""

    lokr_w1_a: nn.Parameter
    lokr_w1_b: nn.Parameter
    lokr_w2_a: nn.Parameter
    lokr_w2_b: nn.Parameter

    kind = "lokr"
    tensor_names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def fresh(
        self, generator: torch.Generator | None, *, factor: int = -1, decompose_both: bool = False, tucker: bool = False
    ) -> dict[str, Tensor]:
        shapes = structure(self.weight_shape, self.rank, factor=factor, decompose_both=decompose_both, tucker=tucker)
        zero = "lokr_w2" if "lokr_w2" in shapes else "lokr_w2_b"

        def uniform(shape: tuple[int, ...]) -> Tensor:
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        return {name: torch.zeros(s) if name == zero else uniform(s) for name, s in shapes.items()}

    def shapes(self, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        rows, columns, *kernel = self.weight_shape
        r, found = self.rank, dict[str, tuple[int, ...]]()
        if "lokr_w1" in given:
            m1, n1 = _two(given, "lokr_w1")
            found["lokr_w1"] = (m1, n1)
        else:
            m1, n1 = _two(given, "lokr_w1_a")[0], _two(given, "lokr_w1_b")[1]
            found |= {"lokr_w1_a": (m1, r), "lokr_w1_b": (r, n1)}
        if min(m1, n1) < 1 or rows % m1 or columns % n1:
            raise ValueError(f"lokr_w1: {m1}×{n1} does not divide the weight {self.weight_shape}")
        m2, n2 = rows // m1, columns // n1
        if "lokr_w2" in given:
            found["lokr_w2"] = (m2, n2, *kernel)
        elif "lokr_t2" in given:
            found |= {"lokr_w2_a": (r, m2), "lokr_w2_b": (r, n2), "lokr_t2": (r, r, *kernel)}
        else:
            found |= {"lokr_w2_a": (m2, r), "lokr_w2_b": (r, n2 * math.prod(kernel))}
        return found

    @property
    def first(self) -> Tensor:
        """W₁ (m₁, n₁)."""
        w1 = self._parameters.get("lokr_w1")
        return self.lokr_w1_a @ self.lokr_w1_b if w1 is None else w1

    def second(self) -> tuple[Tensor, Tensor] | Tensor:
        """Return W₂ (m₂, n₂, *k) where it is whole, else its a (m₂, r) and b (r, n₂, *k)."""
        w2 = self._parameters.get("lokr_w2")
        if w2 is not None:
            return w2
        t2 = self._parameters.get("lokr_t2")
        if t2 is not None:
            return self.lokr_w2_a.T, torch.einsum("ij...,jr->ir...", t2, self.lokr_w2_b)
        columns, *kernel = self.weight_shape[1:]
        return self.lokr_w2_a, self.lokr_w2_b.reshape(self.rank, columns // self.first.shape[1], *kernel)

    def plain_delta(self, base: Base | None = None) -> Tensor:
        w1, second = self.first, self.second()
        w2 = second if isinstance(second, Tensor) else torch.einsum("mr,r...->m...", *second)
        return (_apart(self.scaling * w1) * _together(w2)).reshape(self.weight_shape)

    def summed(self, weight: Tensor, share: float) -> Tensor:
        w1, second = self.first, self.second()
        w2 = second if isinstance(second, Tensor) else torch.einsum("mr,r...->m...", *second)
        if w1.dtype != weight.dtype:
            return super().summed(weight, share)
        (m1, n1), (m2, n2) = w1.shape, w2.shape[:2]
        blocks = weight.reshape(m1, m2, n1, n2, -1)
        return torch.addcmul(blocks, _apart(w1), _together(w2), value=share * self.scaling).reshape(weight.shape)

    def n_macs(self, target: Target) -> int:
        rows, columns = self.weight_shape[:2]
        (m1, n1), second, kernel = self.first.shape, self.second(), math.prod(self.weight_shape[2:])
        if target.kind not in ("linear", "conv") or target.groups > 1:
            return math.prod(self.weight_shape)
        whole = isinstance(second, Tensor)
        if target.kind == "conv":
            m2, n2 = rows // m1, columns // n1
            thin = n1 * blocked(n2) * kernel * blocked(m2 if whole else self.rank) + m1 * n1 * (
                m2 if whole else self.rank
            )
            return thin if whole else thin + m1 * blocked(self.rank) * blocked(m2)
        # W₁ mixes one small matrix per position, which runs at half the speed of a large product.
        if whole:
            return (columns + 2 * m1 * n1) * len(second)
        return self.rank * (columns + 2 * m1 * n1 + rows)

    def add_to(self, y: Tensor, x: Tensor, target: Target, share: float) -> Tensor:
        if target.kind != "linear":
            return super().add_to(y, x, target, share)
        w1, second, scale = self.first, self.second(), share * self.scaling
        h = x.reshape(-1, w1.shape[1], x.shape[-1] // w1.shape[1])
        if isinstance(second, Tensor):
            return added(y, F.linear(h, second), w1, scale, channels_first=True)
        return added(y, w1 @ F.linear(h, second[1]), second[0], scale, channels_first=False)

    def expand(self, base: Base | None = None) -> tuple[Tensor, Tensor]:
        w1, second = self.scaling * self.first, self.second()
        (m1, n1), (columns, *kernel) = w1.shape, self.weight_shape[1:]
        if isinstance(second, Tensor):
            # The smaller side of W₂ as an identity: (W₁⊗I)(I⊗W₂), still without an SVD.
            flat = second.flatten(1)
            if flat.shape[0] <= flat.shape[1]:
                second = torch.eye(len(flat), dtype=flat.dtype, device=flat.device), second
            else:
                eye = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
                second = flat, eye.reshape(-1, *second.shape[1:])
        a, b = second[0], second[1].flatten(2) if second[1].dim() > 2 else second[1][..., None]
        if self._parameters.get("lokr_w1") is None and self.rank < min(m1, n1):
            u, v = self.scaling * self.lokr_w1_a, self.lokr_w1_b
            left, right = _kron(u, a), torch.einsum("pb,rdk->prbdk", v, b)
        elif n1 <= m1:
            left = _kron(w1, a)
            right = torch.einsum("pb,rdk->prbdk", torch.eye(n1, dtype=b.dtype, device=b.device), b)
        else:
            left = _kron(torch.eye(m1, dtype=a.dtype, device=a.device), a)
            right = torch.einsum("pb,rdk->prbdk", w1, b)
        return right.reshape(left.shape[1], columns, *kernel), left

    def forward(self, x: Tensor, target: Target) -> Tensor:
        if target.kind in ("linear", "embedding"):
            return self._linear(x) if target.kind == "linear" else self._embedding(x)
        if target.kind == "conv" and target.groups == 1:
            return self._conv(x, target)
        return target.apply(x, self.plain_delta())

    def _linear(self, x: Tensor) -> Tensor:
        w1, second = self.scaling * self.first, self.second()
        h = x.reshape(*x.shape[:-1], w1.shape[1], -1)
        if isinstance(second, Tensor):
            return (w1 @ F.linear(h, second)).flatten(-2)
        return F.linear(w1 @ F.linear(h, second[1]), second[0]).flatten(-2)

    def _embedding(self, ids: Tensor) -> Tensor:
        """Row t = i·m₂ + i′ is W₁[i] ⊗ W₂[i′]."""
        w1, second = self.scaling * self.first, self.second()
        m2 = self.weight_shape[0] // w1.shape[0]
        table = second if isinstance(second, Tensor) else second[0]
        rows = F.embedding(ids % m2, table)
        rows = rows if isinstance(second, Tensor) else rows @ second[1]
        return (F.embedding(ids // m2, w1)[..., :, None] * rows[..., None, :]).flatten(-2)

    def _conv(self, x: Tensor, target: Target) -> Tensor:
        """The same filters on each of the n₁ slices of channels, then W₁ across the slices, then a on the channels of each."""
        assert target.geometry is not None
        w1, second = self.scaling * self.first, self.second()
        n1 = w1.shape[1]
        kernels = second if isinstance(second, Tensor) else second[1]
        h = convolve(x.reshape(len(x) * n1, -1, *x.shape[2:]), kernels, target.geometry)
        h = h.reshape(len(x), n1, *h.shape[1:])
        h = torch.einsum("ab,nbc...->nac...", w1, h)
        if not isinstance(second, Tensor):
            mix = second[0].reshape(*second[0].shape, *(1,) * (x.dim() - 2))
            h = convolve(h.flatten(0, 1), mix, ConvGeometry.default(x.dim() - 2))
        return h.reshape(len(x), -1, *h.shape[-(x.dim() - 2) :])


def structure(
    weight_shape: tuple[int, ...], rank: int, *, factor: int = -1, decompose_both: bool = False, tucker: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a fresh LoKr: a factor is kept whole where a product of rank `rank` would not be smaller."""
    rows, columns, *kernel = weight_shape
    (m1, m2), (n1, n2) = factorization(rows, factor), factorization(columns, factor)
    split = decompose_both and rank < max(m1, n1) / 2
    found: dict[str, tuple[int, ...]] = (
        {"lokr_w1_a": (m1, rank), "lokr_w1_b": (rank, n1)} if split else {"lokr_w1": (m1, n1)}
    )
    if rank >= max(m2, n2) / 2:
        found["lokr_w2"] = (m2, n2, *kernel)
    elif tucker and math.prod(kernel) > 1:
        found |= {"lokr_w2_a": (rank, m2), "lokr_w2_b": (rank, n2), "lokr_t2": (rank, rank, *kernel)}
    else:
        found |= {"lokr_w2_a": (m2, rank), "lokr_w2_b": (rank, n2 * math.prod(kernel))}
    return found


def _apart(w1: Tensor) -> Tensor:
    """Return W₁ as (m₁, 1, n₁, 1, 1), to be multiplied into W₂ `_together`: their product is W₁⊗W₂, reshaped."""
    return w1[:, None, :, None, None]


def _together(w2: Tensor) -> Tensor:
    return (w2.flatten(2) if w2.dim() > 2 else w2[..., None])[None, :, None]


def _kron(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ab,cd->acbd", a, b).reshape(a.shape[0] * b.shape[0], -1)


def _two(given: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    shape = given.get(name)
    if shape is None:
        raise ValueError(f"tensor {name} is missing")
    if len(shape) != 2:
        raise ValueError(f"{name}: expected a matrix, got shape {shape}")
    return shape[0], shape[1]

"""Core: W' = U(I + s·R)V, a correction between the factors of a layer: r² numbers, merged without any more.

It acts where the activation has passed the first factors and not yet the last: after V of an SVD, the core of
Tucker-2, the first filters of a spatial pair, the kept rows of a pivoted layer, the first factor of CP, between the
terms of a Kronecker sum, at the last bond of a tensor train. Other forms have no such place (`why_none`). R is whole, (r, r), or R = P Q with
P (r, k) and Q (k, r); at rank k ≥ r it is whole. A grouped convolution has a core per group: R (groups, r, r), P and Q
likewise. R has no meaning on other factors: bind it to a digest of them.

Source: the maths is that of LoRA-XS, Bałazy et al., arXiv 2405.17604, with the layer's own factors as the frozen sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..factorize import ConvGeometry, cp, form, pivoted_spatial, pivoted_tucker, spatial_svd
from ..factorize._linalg import convolve, pointwise
from ._base import BaseAdapter
from ._target import Base, Target
from .lokh import as_full_rank

_Step = Callable[[Mapping[str, Tensor], Tensor, Target], Tensor]


@dataclass(frozen=True)
class Position:
    """Where a form has its core: `tail` names the factor one axis of which it is; the layer is after(before(x)).

    On an embedding the looked-up row is the activation, and the core acts on it from the right. `layers`: the kinds of
    layer whose chain passes that place with one activation. `folded`: the form may multiply in another order, so a core is
    multiplied into the tail, which is small, and the form goes its own way; only a graph's slot goes between.
    """

    tail: str
    before: _Step
    after: _Step
    axis: int = 0
    layers: frozenset[str] = frozenset({"linear", "conv", "embedding"})
    folded: bool = False
    #: The tail's other axes are the weight's own: the weight is one matrix times the tail, whatever the tail is.
    own_axes: bool = False

    def turned(self, matrix: Tensor, tail: Tensor) -> Tensor:
        """Return `matrix` (r, r), or one per group (groups, r, r), multiplied into the core's axis of the factor."""
        if matrix.dim() == 3:
            return torch.einsum("gij,gj...->gi...", matrix.to(tail.dtype), tail)
        moved: Tensor = torch.tensordot(matrix.to(tail.dtype), tail.movedim(self.axis, 0), 1)
        return moved.movedim(0, self.axis)


def _down(f: Mapping[str, Tensor], x: Tensor, t: Target) -> Tensor:
    if t.kind == "embedding":
        return F.embedding(x, f["U"])
    return F.linear(x, f["V"]) if t.kind == "linear" else t.apply(x, f["V"])


def _up(f: Mapping[str, Tensor], z: Tensor, t: Target) -> Tensor:
    if t.kind == "embedding":
        return z @ f["V"]
    return F.linear(z, f["U"]) if t.kind == "linear" else pointwise(z, f["U"])


def _grouped_down(f: Mapping[str, Tensor], x: Tensor, t: Target) -> Tensor:
    return t.apply(x, f["V"].flatten(0, 1))


def _grouped_up(f: Mapping[str, Tensor], z: Tensor, t: Target) -> Tensor:
    return _by_group(z, f["U"])


def _by_group(z: Tensor, matrices: Tensor) -> Tensor:
    """Apply `matrices` (groups, out, in) to the channels of z (batch, groups·in, *space), each to those of its group."""
    kernel = matrices.flatten(0, 1).reshape(-1, matrices.shape[2], *(1,) * (z.dim() - 2))
    return convolve(z, kernel, ConvGeometry.default(z.dim() - 2), len(matrices))


def _tucker_down(f: Mapping[str, Tensor], x: Tensor, t: Target) -> Tensor:
    return t.apply(pointwise(x, f["I"]), f["core"])


def _pivoted_tucker_down(f: Mapping[str, Tensor], x: Tensor, t: Target) -> Tensor:
    return pivoted_tucker.conv({k: v for k, v in f.items() if k not in ("T", "order")}, x, _walk(t))


def _spatial_down(f: Mapping[str, Tensor], x: Tensor, t: Target) -> Tensor:
    return pivoted_spatial.before(f, x, _walk(t))


def _spatial_svd_down(f: Mapping[str, Tensor], x: Tensor, t: Target) -> Tensor:
    first = f["first"]
    if first.dim() == 3:
        return convolve(x, first, _walk(t))
    axis = 0 if first.shape[3] == 1 and (first.shape[2] > 1 or f["second"].shape[2] == 1) else 1
    return convolve(x, first, spatial_svd.only(_walk(t), axis))


def _spatial_up(f: Mapping[str, Tensor], z: Tensor, t: Target) -> Tensor:
    if f["first"].dim() == 3:
        return convolve(z, f["second"], ConvGeometry.default(1))
    axis = 0 if f["first"].shape[3] == 1 and (f["first"].shape[2] > 1 or f["second"].shape[2] == 1) else 1
    return convolve(z, f["second"], spatial_svd.only(_walk(t), 1 - axis))


def _walk(t: Target) -> ConvGeometry:
    assert t.geometry is not None
    return t.geometry


def _pivoted_down(f: Mapping[str, Tensor], x: Tensor, t: Target) -> Tensor:
    return F.linear(x, f["P"]) if t.kind == "linear" else t.apply(x, f["P"])


def _pivoted_up(f: Mapping[str, Tensor], z: Tensor, t: Target) -> Tensor:
    """Both pivoted forms: [z; T z] in the order of the outputs."""
    if "order" not in f:
        return z
    axis = -1 if t.kind == "linear" else 1
    if not len(f["T"]):
        return z.index_select(axis, f["order"])
    others = F.linear(z, f["T"]) if t.kind == "linear" else pointwise(z, f["T"])
    return torch.cat([z, others], axis).index_select(axis, f["order"])


def _kronecker_down(f: Mapping[str, Tensor], x: Tensor, t: Target) -> Tensor:
    """Return C_k x per block of inputs: (…, n₁, m₂, K), of a convolution (batch·n₁·m₂, K, *space)."""
    (terms, _, n1), (_, m2, n2) = f["B"].shape, f["C"].shape[:3]
    if t.kind == "linear":
        z = x.reshape(*x.shape[:-1], n1, n2) @ f["C"].reshape(terms * m2, n2).T
        return z.reshape(*z.shape[:-1], terms, m2).transpose(-1, -2)
    z = convolve(x.reshape(-1, n2, *x.shape[2:]), f["C"].flatten(0, 1), _walk(t))
    return z.reshape(-1, terms, m2, *z.shape[2:]).transpose(1, 2).flatten(0, 1)


def _kronecker_up(f: Mapping[str, Tensor], z: Tensor, t: Target) -> Tensor:
    b, m2 = f["B"], f["C"].shape[1]
    if t.kind == "linear":
        return torch.einsum("...jck,kaj->...ac", z, b).flatten(-2)
    y = torch.einsum("njcks,kaj->nacs", z.flatten(2).reshape(-1, b.shape[2], m2, len(b), z[0, 0].numel()), b)
    return y.reshape(-1, b.shape[1] * m2, *z.shape[2:])


def _train_down(f: Mapping[str, Tensor], x: Tensor, t: Target) -> Tensor:
    """Return the last digit contracted: (…, n₁, n₂, m₃, r₂)."""
    g0, g1, g2 = f["G0"], f["G1"], f["G2"]
    grid = x.reshape(*x.shape[:-1], g0.shape[1], g1.shape[2], g2.shape[2])
    return torch.einsum("...ijk,qck->...ijcq", grid, g2)


def _train_up(f: Mapping[str, Tensor], z: Tensor, t: Target) -> Tensor:
    z = torch.einsum("...ijcq,pbjq->...ipbc", z, f["G1"])
    return torch.einsum("...ipbc,aip->...abc", z, f["G0"]).flatten(-3)


_FACTORS = Position("V", _down, _up, own_axes=True)
POSITIONS: dict[str, Position] = {
    "svd": _FACTORS,
    "shared": _FACTORS,
    "als": _FACTORS,
    "nmf": _FACTORS,
    "grouped_svd": Position("V", _grouped_down, _grouped_up, axis=1, layers=frozenset({"conv"})),
    "tucker": Position("core", _tucker_down, lambda f, z, t: pointwise(z, f["O"])),
    "pivoted_tucker": Position("core", _pivoted_tucker_down, _pivoted_up),
    "spatial_svd": Position("first", _spatial_svd_down, _spatial_up),
    "pivoted_spatial": Position("first", _spatial_down, lambda f, z, t: pivoted_spatial.after(f, z, _walk(t))),
    "pivoted": Position("P", _pivoted_down, _pivoted_up, own_axes=True),
    "cp": Position("I", lambda f, x, t: pointwise(x, f["I"].T), lambda f, z, t: cp.after(f, z, _walk(t)), axis=1),
    "kronecker": Position("C", _kronecker_down, _kronecker_up, layers=frozenset({"linear", "conv"}), folded=True),
    "tensor_train": Position("G2", _train_down, _train_up, layers=frozenset({"linear"})),
}  # fmt: skip

_REBUILT = "its weight is rebuilt from an entrywise product, so no activation passes between its factors"
#: Why the others have none.
_WITHOUT = {
    "dense": "the layer is not factorized",
    "hadamard": _REBUILT,
    "khatri_rao": _REBUILT,
}


def core_size(form_name: str, factors: Mapping[str, Tensor], layer_kind: str) -> int:
    """Return r of a layer whose chain has a core, that of one group where there are several; else 0."""
    position = POSITIONS.get(form_name)
    if position is None or layer_kind not in position.layers:
        return 0
    return factors[position.tail].shape[position.axis]


def why_none(form_name: str, layer_kind: str) -> str:
    """Return why a layer of this form has no core; empty where it has one."""
    position = POSITIONS.get(form_name)
    if position is None:
        return _WITHOUT.get(form_name, "the form does not say where its core would be")
    if layer_kind in position.layers:
        return ""
    return "a row of the table is a product over all of its digits, with no activation between them"


#: Directions of the core that are weaker than this share of the strongest are not stretched any more.
_WEAKEST = 1e-3


def metric_of(base: Base) -> tuple[Tensor, Tensor]:
    """Return (left, right), shaped like R: for R = left · R' · right, ‖ΔW‖ = ‖R'‖·‖W‖/√r, r the rows of all groups.

    In the layer's own gauge some components of the core move the weight a thousand times further than others (the
    kept rows of a pivoted layer nearly depend on each other); a step of an optimizer should move it as far along all.
    """
    position = POSITIONS[base.form]
    factors = {k: v.detach().double() if v.is_floating_point() else v for k, v in base.factors.items()}
    if base.form == "grouped_svd":
        u, v = factors["U"], factors["V"].flatten(2)
        size = float((u @ v).norm()) / math.sqrt(u.shape[0] * u.shape[2])
        left, right = (torch.stack([_inverse_root(g) for g in grams]) for grams in (u.mT @ u, v @ v.mT))
        return size * left, right
    tail = factors[position.tail].movedim(position.axis, 0)
    rows, r = tail.flatten(1), len(tail)

    def weight(step: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the weight of this shape with `step` (r, …) in the tail's place."""
        changed = {**factors, position.tail: step.movedim(0, position.axis)}
        found: Tensor = form(base.form).to_tensor(changed, shape)
        return found

    if position.own_axes:
        ones = (1,) * (tail.dim() - 2)
        units = torch.eye(r, dtype=rows.dtype, device=rows.device).reshape(r, r, *ones)
        basis = weight(units, (base.shape[0], r, *ones)).flatten(1)
        left, right = basis.T @ basis, rows @ rows.T
    else:
        # ‖weight(u tᵀ)‖² = (uᵀMu)(tᵀCt): both metrics from their effect on one vector of the other side.
        generator = torch.Generator().manual_seed(0)
        u, t = (torch.randn(n, generator=generator, dtype=torch.float64).to(rows.device) for n in rows.shape)

        def along(a: Tensor, b: Tensor) -> Tensor:
            return weight(torch.outer(a, b).view_as(tail), base.shape)

        left = _gram(lambda a: along(a, t), rows[:, 0])
        right = _gram(lambda b: along(u, b @ rows), rows[:, 0]) / along(u, t).square().sum()
    size = float(weight(tail, base.shape).norm()) / math.sqrt(r)
    return size * _inverse_root(left), _inverse_root(right)


def _gram(linear: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Return JᵀJ (n, n) of a linear map of n numbers, a column at a time: its answers may be large."""
    pull = torch.func.vjp(linear, torch.zeros_like(like))[1]
    units = torch.eye(len(like), dtype=like.dtype, device=like.device)
    return torch.stack([pull(linear(e))[0] for e in units])


def _inverse_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    strongest = float(values[-1])
    kept = values.clamp_min(_WEAKEST**2 * strongest if strongest > 0 else 1.0)
    out: Tensor = (vectors * kept.rsqrt()) @ vectors.T
    return out


class Adapter(BaseAdapter):
    """R (whole) or P is zero at init; Q is uniform within ±1/√r."""

    core_P: nn.Parameter
    core_Q: nn.Parameter

    kind = "core"
    tensor_names = ("core_R", "core_P", "core_Q")
    in_core = True
    #: While it is trained: R = left · R' · right (`metric_of`), and the parameters hold R', or P' and Q'.
    metric: tuple[Tensor, Tensor] | None = None

    def fresh(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        if self.core < 1:
            raise ValueError("expected a layer whose factors have a core, got none")
        shapes = self.shapes({"core_R": ()} if self.rank >= self.core else {})
        found = {name: torch.zeros(shape) for name, shape in shapes.items()}
        if "core_Q" in found:
            bound = 1 / math.sqrt(self.core)
            found["core_Q"].uniform_(-bound, bound, generator=generator)
        return found

    def shapes(self, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        r, k, own = self.core, self.rank, (self.groups,) if self.groups > 1 else ()
        return {"core_R": (*own, r, r)} if "core_R" in given else {"core_P": (*own, r, k), "core_Q": (*own, k, r)}

    def chain(self) -> list[Tensor]:
        """Return the matrices whose product, last first, is R: R itself, or Q and P."""
        whole = self._parameters.get("core_R")
        left, right = self.metric or (None, None)
        if whole is not None:
            return [whole if left is None or right is None else left @ whole @ right]
        p, q = self.core_P, self.core_Q
        return [q if right is None else q @ right, p if left is None else left @ p]

    def enter(self, left: Tensor, right: Tensor) -> None:
        """Hold R' instead of R = left · R' · right, as trained in."""
        with torch.no_grad():
            for name, p in self._parameters.items():
                if p is not None and name in self.tensor_names:
                    moved = p if name == "core_Q" else torch.linalg.solve(left, p)
                    p.copy_(moved if name == "core_P" else torch.linalg.solve(right, moved, left=False))
        self.metric = left, right

    def leave(self) -> None:
        """Hold R again."""
        with torch.no_grad():
            names = ("core_R",) if "core_R" in self._parameters else ("core_Q", "core_P")
            for name, value in zip(names, [v.detach().clone() for v in self.chain()], strict=True):
                getattr(self, name).copy_(value)
        self.metric = None

    @property
    def random_side(self) -> nn.Parameter | None:
        return self._parameters.get("core_Q")

    def matrix(self) -> Tensor:
        """Return s·R, (r, r), or (groups, r, r)."""
        first, *rest = self.chain()
        return self.scaling * (rest[0] @ first if rest else first)

    def shift(self, z: Tensor, target: Target) -> Tensor:
        """Return s·R z for an activation z between the factors."""
        parts = self.chain()
        parts[-1] = self.scaling * parts[-1]
        if target.kind == "embedding":
            parts = [p.T for p in reversed(parts)]
        for p in parts:
            if p.dim() == 3:
                z = _by_group(z, p)
            else:
                z = F.linear(z, p) if target.kind in ("linear", "embedding") else pointwise(z, p)
        return z

    def moved(self, base: Base, weight: float = 1.0) -> dict[str, Tensor]:
        """Return the factors of `base` with (I + weight·s·R) multiplied into them: the exact merge."""
        position = POSITIONS[base.form]
        tail = base.factors[position.tail]
        step = position.turned(weight * self.matrix(), tail)
        return {**base.factors, position.tail: tail + step}

    def plain_delta(self, base: Base | None = None) -> Tensor:
        if base is None:
            raise ValueError("expected the layer: a core adapter depends on its factors")
        position = POSITIONS[base.form]
        tail = base.factors[position.tail]
        step = position.turned(self.matrix(), tail)
        delta: Tensor = form(base.form).to_tensor({**base.factors, position.tail: step}, base.shape)
        return delta

    def expand(self, base: Base | None = None) -> tuple[Tensor, Tensor]:
        """On U V it is B = U R, A = V, group by group; other forms have no such pair of matrices."""
        delta = self.plain_delta(base)
        assert base is not None
        if set(base.factors) != {"U", "V"}:
            return as_full_rank(delta)
        u, v = base.factors["U"], base.factors["V"]
        turned = u @ self.matrix().to(u.dtype)
        if turned.dim() == 3:
            return v.flatten(0, 1), torch.block_diag(*turned)  # type: ignore[no-untyped-call]
        return v, turned

    def forward(self, x: Tensor, target: Target) -> Tensor:
        raise RuntimeError("a core adapter acts between the factors: the layer calls `shift`")

    @classmethod
    def rank_for(cls, target: Target, rank: int) -> int:
        return max(1, min(rank, target.core))

"""Closed forms of recovery: what lowers the error of a layer's answers most, by one eigenproblem or least squares.

A layer should answer t and reads x̂, with Ŵ in its place. Everything follows from the moments of both (`Drift`):

    E* = A* − Ŵ,  A* = E[t x̂ᵀ] Ŝ⁻¹             what is missing; W − Ŵ where x̂ = x
    residual      P = top_c(E* Ŝ E*ᵀ), ΔW = P (Pᵀ E*), which leaves tail_c(E* Ŝ E*ᵀ)
    core          R = (UᵀU)⁻¹Uᵀ E* Ŝ Vᵀ(V Ŝ Vᵀ)⁻¹ in U(I + R)V, and its best rank-c part in that metric
    one factor    U = T Vᵀ(V Ŝ Vᵀ)⁻¹ or V = U⁺A*, pulled to what they are; the bias carries both means
    affine        sᵢ = (T Ŵᵀ)ᵢᵢ / (Ŵ Ŝ Ŵᵀ)ᵢᵢ per output

An adapter leaves the bias as it is, so its moments are about zero (`about_zero`); refits of the base move the bias, so
theirs are centred.

Source: EoRA, Liu et al., arXiv 2410.21271, and QERA, Zhang et al., arXiv 2410.06040 (residual, in a form without an
inverse root); the normal equations for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..adapt.core import POSITIONS
from ..factorize import Drift, Statistics, form, pivoted_tucker
from ..factorize._anchor import DAMPING
from ..factorize._linalg import root, unfolded
from ..factorize._refit import refit
from ..factorize.grouped_svd import apart

#: Eigenvalues below this share of the largest are none: a direction that the data do not have.
_RANK_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Wanted:
    """What a layer should stand for while its bias stays: `weight`, the original's, as it is stored.

    `metric` holds moments about zero (or the row weights of an embedding). Without `drift` the layer reads what the
    original reads and should answer what `weight` answers.
    """

    weight: Tensor
    metric: Statistics
    drift: Drift | None = None

    @classmethod
    def of_drift(cls, weight: Tensor, drift: Drift, bias: Tensor | None) -> Wanted:
        """Return what a layer that keeps `bias` (out,) should stand for."""
        moved = about_zero(drift, bias)
        return cls(weight, Statistics(gram=moved.drifted, groups=_groups(moved)), moved)

    @classmethod
    def of_rows(cls, table: Tensor, bias: Tensor | None, statistics: Statistics) -> Wanted:
        """Return what an embedding that adds `bias` (width,) to its rows should look up."""
        rows = table.double() if bias is None else table.double() - bias.double()
        return cls(rows, Statistics(row_weights=statistics.row_weights))

    def target(self, beta: float = 1.0, damping: float = DAMPING) -> Tensor:
        """Return A*, shaped like the weight, float64: the weight that answers best, or blended with the original's."""
        if self.drift is None or beta == 0:
            return self.weight.double()
        if damping != DAMPING:
            return self.drift.target(self.weight, beta, damping)
        return self.weight.double() + beta * self._step

    @cached_property
    def _step(self) -> Tensor:
        assert self.drift is not None
        return self.drift.target(self.weight) - self.weight.double()

    def loss(self, rebuilt: Tensor) -> float:
        """Return E‖t − Ŵ x̂‖² of a layer that stands for `rebuilt`."""
        if self.drift is not None:
            d = self.drift
            w = rebuilt.double().reshape(*d.cross.shape[:-1], -1)
            # E‖t‖² − 2⟨T, Ŵ⟩ + ⟨Ŵ Ŝ, Ŵ⟩: the diagonal alone of what `Drift.loss` weighs.
            total = d.answers.diagonal(dim1=-2, dim2=-1).sum() - 2 * (d.cross * w).sum() + ((w @ d.drifted) * w).sum()
            return max(float(total), 0.0)
        return self.metric.loss(apart_of(self.weight.double() - rebuilt.double(), self.metric.groups))


def about_zero(drift: Drift, bias: Tensor | None) -> Drift:
    """Return moments about zero, of answers without `bias`: those of a layer whose bias stays as it is."""
    t, mean = drift.answer_mean.double(), drift.drifted_mean.double()
    if bias is not None:
        t = t - bias.double().reshape(t.shape)
    return Drift(
        drift.drifted + _outer(mean, mean), torch.zeros_like(mean), drift.cross + _outer(t, mean),
        drift.answers + _outer(t, t), torch.zeros_like(t),
    )  # fmt: skip


def without_drift(weight: Tensor, bias: Tensor | None, statistics: Statistics) -> Drift:
    """Return the moments of a layer that reads what the original's does: t = W x + b."""
    s, mean = statistics.gram, statistics.mean
    assert s is not None and mean is not None
    w = weight.double().reshape(*s.shape[:-2], -1, s.shape[-1])
    t = (w @ mean[..., None])[..., 0]
    if bias is not None:
        t = t + bias.double().reshape(t.shape)
    return Drift(s, mean, w @ s, w @ s @ w.mT, t)


def residual(error: Tensor, rank: int, metric: Statistics) -> tuple[Tensor, Tensor]:
    """Return B (out, c) and A (c, in, *k), float64, with `metric` least for `error` − B A; rows and width of a table.

    Of a grouped convolution every group has `rank` filters of its own: A (groups·c, in/groups, *k).
    """
    groups = metric.groups
    split = apart_of(error.double(), groups)
    found = form("svd" if groups == 1 else "grouped_svd")
    kept = min(rank, found.full_rank(tuple(split.shape)))
    factors = found.decompose(split, kept, metric).factors
    b, a = factors["U"], factors["V"]
    if kept < rank:  # what a layer's own rank exceeds is zero
        axis = a.dim() - error.dim()
        b = torch.nn.functional.pad(b, (0, rank - kept))
        a = torch.cat([a, a.new_zeros(*a.shape[:axis], rank - kept, *a.shape[axis + 1 :])], axis)
    return (b, a) if groups == 1 else (b.flatten(0, 1), a.flatten(0, 1))


def core_sides(form_name: str, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return U (out, r) and V (r, in·kernel) around the core of a layer, float64; None where no such pair exists."""
    f = {k: v.double() if v.is_floating_point() else v for k, v in factors.items()}
    if set(f) == {"U", "V"}:
        return f["U"], unfolded(f["V"])
    if form_name == "tucker":
        return f["O"], unfolded(torch.einsum("ab...,bi->ai...", f["core"], f["I"]))
    if form_name == "pivoted":
        return _pivoted_left(f, len(f["P"])), unfolded(f["P"])
    if form_name == "pivoted_tucker":
        inner = {k: v for k, v in f.items() if k not in ("T", "order")}
        columns = f["core"].shape[1] + (f["S"].shape[1] if "S" in f else 0)
        rows = len(f["core"])
        kernel = pivoted_tucker.to_tensor(inner, (rows, columns, *f["core"].shape[2:]))
        return _pivoted_left(f, rows), unfolded(kernel)
    return None


def core(error: Tensor, form_name: str, factors: Mapping[str, Tensor], rank: int, metric: Statistics) -> list[Tensor]:
    """Return [R] (r, r), or [P, Q] at a `rank` below r, float64: the core with `metric` least for `error` − U R V.

    Of a grouped convolution one core per group, (groups, …).

    `ValueError` for a low rank in a form whose core is not between two matrices.
    """
    if form_name == "grouped_svd":
        split = apart(error, len(factors["U"]))
        own = [
            core(e, "svd", {n: f[g] for n, f in factors.items()}, rank, metric.group(g)) for g, e in enumerate(split)
        ]
        return [torch.stack(parts) for parts in zip(*own, strict=True)]
    sides = core_sides(form_name, factors)
    if sides is None:
        r = factors[POSITIONS[form_name].tail].shape[0]
        if rank < r:
            raise ValueError("only a whole core has a closed form in this form")
        return [_core_of_any(error, form_name, factors, metric)]
    u, v = sides
    e = unfolded(error.double())
    du = u if metric.row_weights is None else metric.row_weights.double()[:, None] * u
    sv = v.mT if metric.gram is None else metric.gram.double() @ v.mT
    left, right = du.mT @ u, v @ sv
    whole = _pinv(left) @ (du.mT @ e @ sv) @ _pinv(right)
    if rank >= len(whole):
        return [whole]
    # tr (R − R*)ᵀ UᵀU (R − R*) V Ŝ Vᵀ is what is lost: an SVD of (UᵀU)^½ R* in the metric V Ŝ Vᵀ.
    half, inverse = root(left)
    found = form("svd").decompose(half @ whole, rank, Statistics(gram=right)).factors
    return [inverse @ found["U"], found["V"]]


def left_given_right(v: Tensor, drift: Drift, current: Tensor, damping: float = DAMPING) -> Tensor:
    """Return U (out, r) that is best with V (r, in·kernel), pulled to `current`: (T Vᵀ + λU₀)(V Ŝ Vᵀ + λI)⁻¹."""
    h = v @ drift.drifted @ v.mT
    ridge = damping * float(h.diagonal().mean())
    if not ridge + float(h.diagonal().mean()) > 0:
        return current.double()
    raised = h + ridge * torch.eye(len(h), dtype=h.dtype)
    found: Tensor = (drift.cross @ v.mT + ridge * current.double()) @ _pinv(raised)
    # Directions that no data have stay what they are.
    return found + current.double() @ (torch.eye(len(h), dtype=h.dtype) - raised @ _pinv(raised))


def right_given_left(u: Tensor, drift: Drift, current: Tensor, damping: float = DAMPING) -> Tensor:
    """Return V (r, in·kernel) that is best with U (out, r), pulled to `current`: V₀ + U⁺(T − U V₀ Ŝ)(Ŝ + λI)⁻¹."""
    base = u @ current.double()
    step = drift.target(base, 1.0, damping) - base
    return current.double() + _pinv(u.mT @ u) @ (u.mT @ step)


def affine(weight: Tensor, drift: Drift) -> Tensor:
    """Return the gain (out,) of every output that is best with the mean carried by the bias; 1 where nothing varies."""
    w = weight.double().reshape(*drift.cross.shape[:-1], -1)
    power = ((w @ drift.drifted) * w).sum(-1)
    gain = (drift.cross * w).sum(-1) / power.clamp_min(1e-300)
    return torch.where(power > _RANK_TOLERANCE * power.max(), gain, 1.0).flatten()


def apart_of(weight: Tensor, groups: int) -> Tensor:
    """Return a weight as moments of so many groups want it."""
    return weight if groups == 1 else apart(weight, groups)


def _core_of_any(error: Tensor, form_name: str, factors: Mapping[str, Tensor], metric: Statistics) -> Tensor:
    """Return the whole core by conjugate gradients: every form is linear in it."""
    f = {k: v.double() if v.is_floating_point() else v for k, v in factors.items()}
    tail, shape = POSITIONS[form_name].tail, tuple(error.shape)

    def build(found: Mapping[str, Tensor]) -> Tensor:
        step = torch.einsum("rq,q...->r...", found["R"], f[tail])
        built: Tensor = form(form_name).to_tensor({**f, tail: step}, shape)
        return built

    r = len(f[tail])
    start = {"R": torch.zeros(r, r, dtype=torch.float64)}
    return refit(build, start, "R", error.double(), metric, steps=min(4 * r * r, 400))


def _pivoted_left(f: Mapping[str, Tensor], rows: int) -> Tensor:
    eye = torch.eye(rows, dtype=torch.float64)
    return eye if "order" not in f else torch.cat([eye, f["T"]]).index_select(0, f["order"])


def _pinv(h: Tensor) -> Tensor:
    found: Tensor = torch.linalg.pinv(h, hermitian=True, rtol=_RANK_TOLERANCE)
    return found


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _groups(drift: Drift) -> int:
    return drift.drifted.shape[0] if drift.drifted.dim() == 3 else 1


def relative(loss: float, total: float) -> float:
    """Return √(loss/total), the relative error of answers; of answers that are always zero it is that loss's root."""
    return math.sqrt(max(loss, 0.0) / total) if total > 0 else math.sqrt(max(loss, 0.0))

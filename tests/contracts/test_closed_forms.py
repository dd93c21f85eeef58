"""Closed forms of recovery equal what theory says, in float64: losses, optima, gradients, and their degenerate cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompress.adapt.core import POSITIONS
from lrcompress.factorize import Drift, Statistics, form
from lrcompress.factorize._linalg import root, unfolded
from lrcompress.model.views.walk import Walk, patches
from lrcompress.recover.closed import (
    Wanted,
    about_zero,
    affine,
    apart_of,
    core,
    core_sides,
    left_given_right,
    residual,
    right_given_left,
    without_drift,
)  # fmt: skip

F64 = torch.float64


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


def gram(n: int, samples: int, seed: int = 1) -> torch.Tensor:
    """Moments about zero of so many rows, with a mean and with directions of very different size."""
    x = (normal(samples, n, seed=seed) + 0.5) * torch.logspace(0, -1.5, n, dtype=F64)
    return x.T @ x / samples


def size(error: torch.Tensor, s: torch.Tensor) -> float:
    e = unfolded(error)
    return float((e @ s * e).sum())


def drifting(
    m: int, n: int, samples: int = 400, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Drift]:
    """Return W, x̂, t (both with means) and their centred moments: t is W x + b and something else."""
    w, x = normal(m, n, seed=seed), normal(samples, n, seed=seed + 1) + 1
    seen = x + 0.4 * normal(samples, n, seed=seed + 2) @ normal(n, n, seed=seed + 3) / n**0.5
    t = x @ w.T + normal(m, seed=seed + 4) + 0.3 * normal(samples, m, seed=seed + 5)
    xc, tc = seen - seen.mean(0), t - t.mean(0)
    moments = (xc.T @ xc / samples, seen.mean(0), tc.T @ xc / samples, tc.T @ tc / samples, t.mean(0))
    return w, seen, t, Drift(*moments)


# residual -------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 14), n=st.integers(1, 14), c=st.integers(1, 14), samples=st.sampled_from([3, 200]))
def test_what_a_residual_leaves_is_the_tail(m, n, c, samples):
    """Of every shape, and for fewer samples than inputs: the loss is tail_c(E S Eᵀ), and that of SVD_c(E L)L⁻¹."""
    e, s, c = normal(m, n, seed=m + n), gram(n, samples), min(c, m, n)
    b, a = residual(e, c, Statistics(gram=s))
    assert b.shape == (m, c) and a.shape == (c, n)
    tail = torch.linalg.eigvalsh(e @ s @ e.T).flip(0)[c:].clamp_min(0).sum()
    assert size(e - b @ a, s) == pytest.approx(float(tail), rel=1e-8, abs=1e-9 * size(e, s))
    if samples > n:
        p, d, q = torch.linalg.svd(e @ root(s)[0], full_matrices=False)
        published = (p[:, :c] * d[:c]) @ q[:c] @ root(s)[1]
        torch.testing.assert_close(b @ a, published, rtol=1e-6, atol=1e-6)


def test_a_residual_sees_the_metric():
    """The plain truncated SVD of the error leaves more; a planted use of it is seen."""
    e, s = normal(9, 12), gram(12, 300)
    b, a = residual(e, 3, Statistics(gram=s))
    plain = form("svd").decompose(e, 3).to_tensor()
    assert size(e - b @ a, s) < 0.9 * size(e - plain, s)


def test_on_the_best_of_its_rank_a_residual_is_the_rest_of_the_best():
    """Worthless: rank r and a correction of rank c are exactly the optimum of rank r + c."""
    w, metric = normal(10, 14), Statistics(gram=gram(14, 500))
    base = form("svd").decompose(w, 4, metric).to_tensor()
    b, a = residual(w - base, 3, metric)
    torch.testing.assert_close(base + b @ a, form("svd").decompose(w, 7, metric).to_tensor(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_on_a_base_that_ignores_the_metric_it_pays_but_does_not_beat_rank(seed):
    w, s = normal(10, 14, seed=seed), gram(14, 500)
    metric = Statistics(gram=s)
    base = form("svd").decompose(w, 4).to_tensor()
    b, a = residual(w - base, 3, metric)
    best = form("svd").decompose(w, 7, metric).to_tensor()
    more_of_the_same = form("svd").decompose(w, 7).to_tensor()
    assert size(w - best, s) <= size(w - base - b @ a, s) < size(w - more_of_the_same, s)


def test_nothing_missing_is_nothing():
    b, a = residual(torch.zeros(5, 6, dtype=F64), 2, Statistics(gram=gram(6, 50)))
    assert torch.equal(b @ a, torch.zeros(5, 6, dtype=F64)) and bool(torch.isfinite(b).all())


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_residual_of_a_convolution_leaves_the_tails_of_its_groups(axes, groups):
    """Measured on outputs, position by position, strided, dilated and padded; every group has filters of its own."""
    kernel, space = (3, 2, 2)[:axes], (9, 8, 7)[:axes]
    walk = Walk(kernel, (2,) * axes, (1, 2, 1)[:axes], ((1, 1),) * axes, groups=groups)
    x, e = normal(6, 4, *space), normal(6, 4 // groups, *kernel, seed=3)
    rows = patches(x, walk)
    own = rows.reshape(len(rows), groups, -1).movedim(1, 0)
    s = own.mT @ own / len(rows)
    metric = Statistics(gram=s if groups > 1 else s[0], groups=groups)
    b, a = residual(e, 2, metric)
    assert b.shape == (6, 2) and a.shape == (2 * groups, 4 // groups, *kernel)
    split, filters = apart_of(e, groups), a.reshape(groups, 2, -1)
    tails = missed = 0.0
    for g in range(groups):
        error = unfolded(split[g] if groups > 1 else split)
        left = error - b.reshape(groups, -1, 2)[g] @ filters[g]
        missed += float((own[g] @ left.T).square().sum(1).mean())
        tails += float(torch.linalg.eigvalsh(error @ s[g] @ error.T)[:-2].sum())
    assert missed == pytest.approx(tails, rel=1e-8)


def test_a_rank_above_that_of_a_group_is_filled_with_zeros():
    e, s = normal(4, 6, 1, 1), torch.stack([gram(6, 50), gram(6, 50, seed=2)])
    b, a = residual(e, 5, Statistics(gram=s, groups=2))
    assert b.shape == (4, 5) and a.shape == (10, 6, 1, 1)
    whole = (b.reshape(2, 2, 5) @ a.reshape(2, 5, 6)).reshape(4, 6)
    torch.testing.assert_close(whole, unfolded(e), rtol=1e-9, atol=1e-9)


def test_a_residual_of_a_table_is_weighed_by_its_rows():
    table, p = normal(20, 7), torch.rand(20, generator=rng(5), dtype=F64)
    b, a = residual(table, 2, Statistics(row_weights=p))
    tail = torch.linalg.eigvalsh(table.T @ (p[:, None] * table))[:-2].sum()
    assert float((p[:, None] * (table - b @ a).square()).sum()) == pytest.approx(float(tail), rel=1e-8)


# drift ----------------------------------------------------------------------------------------------------------------


def test_with_drift_the_loss_is_what_nothing_reaches_and_the_tail():
    """E* = E[t x̂ᵀ] Ŝ⁻¹ − Ŵ about zero; the loss equals the mean over the data for a bias that stays."""
    w, seen, t, drift = drifting(8, 11)
    bias, base = normal(8, seed=20), form("svd").decompose(w, 3).to_tensor()
    wanted = Wanted.of_drift(w, drift, bias)
    error = wanted.target(damping=0.0) - base
    b, a = residual(error, 2, wanted.metric)
    measured = float((t - bias - seen @ (base + b @ a).T).square().sum(1).mean())
    assert wanted.loss(base + b @ a) == pytest.approx(measured, rel=1e-9)
    s = seen.T @ seen / len(seen)
    best = torch.linalg.lstsq(seen, t - bias).solution.T
    torch.testing.assert_close(wanted.target(damping=0.0), best, rtol=1e-8, atol=1e-8)
    floor = float((t - bias - seen @ best.T).square().sum(1).mean())
    tail = float(torch.linalg.eigvalsh(error @ s @ error.T)[:-2].sum())
    assert measured == pytest.approx(floor + tail, rel=1e-8)
    # One that looks at the weights, or at the variance alone, misses more.
    for other in (residual(w - base, 2, wanted.metric), residual(error, 2, Statistics(gram=drift.drifted))):
        assert wanted.loss(base + other[0] @ other[1]) > measured * 1.001


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_blends_lie_between_the_weight_and_the_target(beta):
    w, _, _, drift = drifting(6, 9)
    wanted = Wanted.of_drift(w, drift, None)
    assert wanted.drift is not None
    torch.testing.assert_close(wanted.target(beta), wanted.drift.target(w, beta), rtol=1e-12, atol=1e-12)
    assert beta or torch.equal(wanted.target(beta), w)


def test_without_drift_the_target_is_the_weight():
    w, bias, x = normal(6, 9), normal(6, seed=2), normal(300, 9, seed=3) + 1
    statistics = Statistics(gram=torch.cov(x.T, correction=0), mean=x.mean(0), count=300)
    drift = without_drift(w, bias, statistics)
    torch.testing.assert_close(Wanted.of_drift(w, drift, bias).target(damping=0.0), w, rtol=1e-9, atol=1e-9)
    # A bias that is off is made up for through the mean of the inputs.
    off = Wanted.of_drift(w, drift, bias - 0.5)
    assert off.loss(off.target()) < 0.5 * off.loss(w)
    assert off.loss(w) == pytest.approx(0.25 * 6, rel=1e-9)


def test_moments_about_zero_of_groups():
    parts = [drifting(3, 5, seed=s)[3] for s in (0, 7)]
    both = Drift(*(torch.stack([getattr(p, k) for p in parts]) for k in Drift.__dataclass_fields__))
    bias = normal(6, seed=9)
    moved = about_zero(both, bias)
    for i, p in enumerate(parts):
        one = about_zero(p, bias[3 * i : 3 * i + 3])
        assert all(torch.equal(getattr(moved, k)[i], getattr(one, k)) for k in Drift.__dataclass_fields__)


# core -----------------------------------------------------------------------------------------------------------------

CORES = [
    ("svd", (10, 12), 4), ("svd", (8, 4, 3, 3), 5), ("tucker", (8, 6, 3, 3), (4, 3)), ("pivoted", (10, 12), 4),
    ("pivoted_tucker", (8, 6, 3, 3), (4, 3)), ("spatial_svd", (8, 4, 3, 3), 5), ("pivoted_spatial", (8, 4, 3, 3), 5),
]  # fmt: skip


def moved(name: str, factors: dict, shape: tuple, r: torch.Tensor) -> torch.Tensor:
    """Return U R V in the shape of the weight."""
    tail = POSITIONS[name].tail
    step = torch.einsum("rq,q...->r...", r, factors[tail])
    return form(name).to_tensor({**factors, tail: step}, shape)


def compressed(name: str, shape: tuple, rank) -> tuple[torch.Tensor, dict, Statistics]:
    """Return factors, and a weight that has moved since: of the weight itself a plain SVD has the best core already."""
    w = normal(*shape)
    metric = Statistics(gram=gram(unfolded(w).shape[1], 800))
    return w + 0.5 * normal(*shape, seed=7), dict(form(name).decompose(w, rank).factors), metric


@pytest.mark.parametrize(("name", "shape", "rank"), CORES)
def test_the_gradient_of_the_core_is_zero(name, shape, rank):
    w, factors, metric = compressed(name, shape, rank)
    error = w - form(name).to_tensor(factors, shape)
    r = len(factors[POSITIONS[name].tail])
    [found] = core(error, name, factors, r, metric)
    at = found.clone().requires_grad_(True)
    zero = torch.zeros_like(found).requires_grad_(True)
    for point in (at, zero):
        e = unfolded(error - moved(name, factors, shape, point))
        (e @ metric.gram * e).sum().backward()
    assert float(at.grad.norm()) < 1e-7 * float(zero.grad.norm())
    assert metric.loss(error - moved(name, factors, shape, found)) < metric.loss(error)


def test_a_plain_svd_has_its_best_core_in_any_metric():
    """Its residual is orthogonal to U: a core there makes up for drift alone."""
    w, metric = normal(10, 12), Statistics(gram=gram(12, 800))
    factors = form("svd").decompose(w, 4).factors
    [r] = core(w - factors["U"] @ factors["V"], "svd", factors, 4, metric)
    torch.testing.assert_close(r, torch.zeros_like(r), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "shape", "rank"), [c for c in CORES if "spatial" not in c[0]])
def test_sides_of_a_core_are_those_of_the_form(name, shape, rank):
    _, factors, _ = compressed(name, shape, rank)
    u, v = core_sides(name, factors)
    r = normal(u.shape[1], u.shape[1], seed=4)
    torch.testing.assert_close((u @ r @ v).reshape(shape), moved(name, factors, shape, r), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "shape", "rank"), [c for c in CORES if "spatial" not in c[0]])
def test_a_low_rank_core_is_the_best_of_its_rank(name, shape, rank):
    """What it leaves is what the whole core leaves, and the tail of that core in the metric of both sides."""
    w, factors, metric = compressed(name, shape, rank)
    error = w - form(name).to_tensor(factors, shape)
    u, v = core_sides(name, factors)
    [whole] = core(error, name, factors, u.shape[1], metric)
    p, q = core(error, name, factors, 2, metric)
    assert p.shape == (u.shape[1], 2) and q.shape == (2, u.shape[1])
    floor = metric.loss(error - moved(name, factors, shape, whole))
    scaled = root(u.T @ u)[0] @ whole @ root(v @ metric.gram @ v.T)[0]
    tail = float(torch.linalg.svdvals(scaled)[2:].square().sum())
    assert tail > 0
    assert metric.loss(error - moved(name, factors, shape, p @ q)) == pytest.approx(floor + tail, rel=1e-7)


def test_a_core_of_a_table_is_weighed_by_its_rows():
    table, p = normal(30, 8), torch.rand(30, generator=rng(1), dtype=F64)
    factors = dict(form("svd").decompose(table, 3).factors)
    error = table + 0.1 * normal(30, 8, seed=3) - factors["U"] @ factors["V"]
    [r] = core(error, "svd", factors, 3, Statistics(row_weights=p))
    left = error - factors["U"] @ r @ factors["V"]
    gradient = factors["U"].T @ (p[:, None] * left) @ factors["V"].T
    assert float(gradient.abs().max()) < 1e-10


def test_a_core_between_factors_that_miss_a_direction():
    """A column of U that is zero, an input that never varies: finite, and no worse than before."""
    w, factors, metric = compressed("svd", (10, 12), 4)
    factors["U"] = factors["U"].clone()
    factors["U"][:, 1] = 0
    error = w - factors["U"] @ factors["V"]
    for rank in (4, 2):
        parts = core(error, "svd", factors, rank, metric)
        r = parts[0] if len(parts) == 1 else parts[0] @ parts[1]
        assert bool(torch.isfinite(r).all()) and size(error - factors["U"] @ r @ factors["V"], metric.gram) < size(
            error, metric.gram
        )


@pytest.mark.parametrize("rank", [3, 2])
def test_groups_have_the_best_core_each(rank):
    w = normal(2, 5, 4, 3)
    factors = dict(form("grouped_svd").decompose(w, 3).factors)
    metric = Statistics(gram=torch.stack([gram(12, 800), gram(12, 900)]), groups=2)
    error = w + 0.5 * normal(2, 5, 4, 3, seed=7) - form("grouped_svd").to_tensor(factors, tuple(w.shape))
    parts = core(error.flatten(0, 1), "grouped_svd", factors, rank, metric)
    assert [tuple(p.shape) for p in parts] == ([(2, 3, 3)] if rank == 3 else [(2, 3, 2), (2, 2, 3)])
    for g in range(2):
        own = core(error[g], "svd", {n: f[g] for n, f in factors.items()}, rank, Statistics(gram=metric.gram[g]))
        for one, all_ in zip(own, parts, strict=True):
            torch.testing.assert_close(one, all_[g])


def test_a_low_rank_core_between_filters_is_refused():
    w, factors, metric = compressed("spatial_svd", (8, 4, 3, 3), 5)
    with pytest.raises(ValueError, match="whole core"):
        core(w, "spatial_svd", factors, 2, metric)


# refits ---------------------------------------------------------------------------------------------------------------


def gradient(drift: Drift, u: torch.Tensor, v: torch.Tensor, which: str) -> float:
    """Return the size of the gradient of E‖t − U V x̂‖² (means apart) by one factor, against that at zero."""
    sizes = []
    for scale in (1.0, 0.0):
        parts = {"u": u.clone(), "v": v.clone()}
        parts[which] = (scale * parts[which]).requires_grad_(True)
        w = parts["u"] @ parts["v"]
        loss = ((w @ drift.drifted) * w).sum() - 2 * (drift.cross * w).sum()
        loss.backward()
        sizes.append(float(parts[which].grad.norm()))
    return sizes[0] / sizes[1]


@pytest.mark.parametrize("shape", [(8, 11, 3), (11, 8, 3), (6, 6, 6)])
def test_a_refit_ends_where_its_gradient_is_zero(shape):
    m, n, r = shape
    w, _, _, drift = drifting(m, n)
    f = form("svd").decompose(w, r).factors
    u, v = f["U"], f["V"]
    before = drift.loss(u @ v)
    better_u = left_given_right(v, drift, u, 0.0)
    better_v = right_given_left(u, drift, v, 0.0)
    assert gradient(drift, better_u, v, "u") < 1e-10 and gradient(drift, u, better_v, "v") < 1e-10
    both = right_given_left(better_u, drift, v, 0.0)
    losses = [before, drift.loss(better_u @ v), drift.loss(better_u @ both)]
    assert losses[0] > losses[1] >= losses[2] * (1 - 1e-12) and drift.loss(u @ better_v) < before


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_a_ridge_pulls_to_what_is_there(damping):
    """The gradient of loss + λ‖U − U₀‖² is zero, and the loss alone never rises."""
    w, _, _, drift = drifting(8, 11)
    f = form("svd").decompose(w, 3).factors
    u, v = f["U"], f["V"]
    h = v @ drift.drifted @ v.T
    ridge = damping * float(h.diagonal().mean())
    found = left_given_right(v, drift, u, damping)
    torch.testing.assert_close(
        found @ h - drift.cross @ v.T + ridge * (found - u), torch.zeros_like(u), atol=1e-9, rtol=0
    )
    assert drift.loss(found @ v) < drift.loss(u @ v)
    assert drift.loss(u @ right_given_left(u, drift, v, damping)) < drift.loss(u @ v)
    far = left_given_right(v, drift, u, 1e12)
    torch.testing.assert_close(far, u, rtol=1e-6, atol=1e-6)


def test_refits_without_any_input_change_nothing():
    zero = Drift(*(torch.zeros(s, dtype=F64) for s in ((5, 5), (5,), (4, 5), (4, 4), (4,))))
    u, v = normal(4, 2), normal(2, 5, seed=1)
    assert torch.equal(left_given_right(v, zero, u), u)
    torch.testing.assert_close(right_given_left(u, zero, v), v)
    assert torch.equal(affine(u @ v, zero), torch.ones(4, dtype=F64))


def test_directions_that_no_data_have_stay():
    """A singular moment without a ridge: what is there keeps its part where the data say nothing."""
    drift = drifting(6, 8)[3]
    keep = torch.diag(torch.tensor([1.0, 1, 0, 0], dtype=F64))
    v = keep[:2] @ normal(4, 8)
    v = torch.cat([v, v[:1]])  # two of three rows alike
    u = normal(6, 3, seed=3)
    found = left_given_right(v, drift, u, 0.0)
    lone = torch.tensor([1.0, 0, -1], dtype=F64) / 2**0.5
    torch.testing.assert_close(found @ lone, u @ lone, rtol=1e-7, atol=1e-7)
    assert gradient(drift, found, v, "u") < 1e-9


def test_gains_are_best_and_nothing_on_an_optimum():
    """s solves its normal equation per output; a whitened optimum has s = 1; a refit of U does at least as well."""
    w, seen, t, drift = drifting(8, 11)
    base = form("svd").decompose(w, 3)
    u, v = base.factors["U"], base.factors["V"]
    weight = u @ v
    gain = affine(weight, drift)
    y, tc = (seen - seen.mean(0)) @ weight.T, t - t.mean(0)
    torch.testing.assert_close(gain, (y * tc).sum(0) / (y * y).sum(0), rtol=1e-9, atol=1e-9)
    scaled = drift.loss(gain[:, None] * weight)
    assert drift.loss(left_given_right(v, drift, u, 0.0) @ v) <= scaled < drift.loss(weight)
    metric = Statistics(gram=drift.drifted)
    best = form("svd").decompose(drift.target(w, damping=0.0), 3, metric).to_tensor()
    torch.testing.assert_close(affine(best, drift), torch.ones(8, dtype=F64), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["svd", "kronecker", "hadamard"])
def test_the_bias_that_carries_both_means_is_best(name):
    """For any form the mean of what is missed is zero, so every other bias loses more, by the square of the distance."""
    w, seen, t, drift = drifting(8, 12)
    weight = form(name).decompose(w, form(name).clip((8, 12), 2)).to_tensor()
    bias = drift.shift(weight)
    missed = t - seen @ weight.T - bias
    torch.testing.assert_close(missed.mean(0), torch.zeros(8, dtype=F64), rtol=0, atol=1e-10)
    off = normal(8, seed=30)
    assert drift.loss(weight, None, bias + off) == pytest.approx(
        drift.loss(weight) + float(off.square().sum()), rel=1e-9
    )

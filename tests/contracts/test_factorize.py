"""The theory every decomposition must satisfy, for every form the directory lists."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompress.factorize import ConvGeometry, Refused, Statistics, form, forms
from lrcompress.factorize._linalg import convolve
from lrcompress.factorize.kronecker import blocks, rearrange
from tests.support.weights import statistics, weight

SHAPES = {
    "linear": [(12, 20), (24, 8), (7, 11)],
    "conv": [(12, 8, 3, 3), (8, 6, 5), (6, 10, 1, 1)],
    "embedding": [(30, 12)],
    "grouped": [],
}  # grouped: in test_special_forms
CASES = [(name, kind, shape) for name in forms() for kind in sorted(form(name).LAYERS) for shape in SHAPES[kind]]


def some_rank(module, shape):
    return module.clip(shape, max(1, min(shape[0], math.prod(shape[1:])) // 3))


def to_compare(kind: str, w: torch.Tensor) -> list[Statistics | None]:
    if kind == "embedding":
        p = torch.rand(len(w), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        d = torch.randn(40, w.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return [None, Statistics(row_weights=p / p.sum()), Statistics(row_weights=p / p.sum(), output_gram=d.T @ d)]
    return [None, statistics(w), statistics(w, two_sided=True)]


@pytest.mark.parametrize(("name", "kind", "shape"), CASES)
class TestEveryForm:
    def test_full_rank_is_exact(self, name, kind, shape):
        w = weight(shape)
        for stats in to_compare(kind, w):
            f = form(name).decompose(w, form(name).full_rank(shape), stats)
            torch.testing.assert_close(f.to_tensor(), w, rtol=0, atol=1e-7)

    def test_counts_are_the_stored_numbers(self, name, kind, shape):
        module = form(name)
        f = module.decompose(weight(shape), some_rank(module, shape))
        numbers = sum(t.numel() for _, t in f.named_factors() if t.is_floating_point())
        assert f.n_params == numbers == module.n_params(shape, f.rank)

    def test_error_is_measured_in_its_norm(self, name, kind, shape):
        w, module = weight(shape), form(name)
        for stats in to_compare(kind, w):
            f = module.decompose(w, some_rank(module, shape), stats)
            e, metric = w - f.to_tensor(), stats or Statistics()
            assert f.norm == metric.norm
            assert f.rel_error == pytest.approx(math.sqrt(metric.loss(e) / metric.loss(w)), rel=1e-9, abs=1e-12)
            assert f.rel_error_frobenius == pytest.approx(float(e.norm() / w.norm()), rel=1e-9, abs=1e-12)

    def test_statistics_never_hurt_in_their_metric(self, name, kind, shape):
        w, module = weight(shape), form(name)
        rank = some_rank(module, shape)
        for stats in to_compare(kind, w)[1:]:
            plain = stats.loss(w - module.decompose(w, rank).to_tensor())
            assert module.decompose(w, rank, stats).loss <= plain * (1 + 1e-9)

    def test_the_layer_equals_the_rebuilt_weight(self, name, kind, shape):
        w, module = weight(shape), form(name)
        f = module.decompose(w, some_rank(module, shape))
        g = torch.Generator().manual_seed(3)
        if kind == "embedding":
            ids = torch.randint(shape[0], (2, 5), generator=g)
            torch.testing.assert_close(module.embedding(f.factors, ids), f.to_tensor()[ids])
        elif kind == "linear":
            x = torch.randn(2, 3, shape[1], generator=g, dtype=torch.float64)
            torch.testing.assert_close(f.apply(x), x @ f.to_tensor().T)
        else:
            axes = len(shape) - 2
            for geometry in (ConvGeometry.default(axes), ConvGeometry((2,) * axes, (2,) * axes, (2,) * axes)):
                x = torch.randn(2, shape[1], *(9,) * axes, generator=g, dtype=torch.float64)
                torch.testing.assert_close(f.apply(x, geometry), convolve(x, f.to_tensor(), geometry))

    def test_the_bias_carries_the_mean(self, name, kind, shape):
        if kind == "embedding":
            return
        w, module = weight(shape), form(name)
        stats = statistics(w)
        f = module.decompose(w, some_rank(module, shape), stats)
        e = (w - f.to_tensor()).reshape(len(w), -1)
        torch.testing.assert_close(f.bias_shift, e @ stats.mean, rtol=1e-9, atol=1e-12)

    def test_same_input_same_bytes(self, name, kind, shape):
        w, module = weight(shape), form(name)
        one, two = (module.decompose(w.clone(), some_rank(module, shape)) for _ in range(2))
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one.named_factors(), two.named_factors(), strict=True))

    def test_degenerate_weights_and_statistics_stay_finite(self, name, kind, shape):
        module, n = form(name), math.prod(shape[1:])
        rank = some_rank(module, shape)
        zero, one = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
        dead = Statistics(gram=torch.zeros(n, n), mean=torch.zeros(n))
        single = torch.zeros(n, n)
        single[0, 0] = 1.0
        for w in (zero, one, weight(shape)):
            for stats in (None, dead, Statistics(gram=single, mean=torch.ones(n))):
                try:
                    f = module.decompose(w, rank, stats if kind != "embedding" else None)
                except Refused:  # outputs that are all alike have no two independent values at one tap
                    assert name == "pivoted_spatial" and torch.equal(w, one)
                    continue
                assert all(torch.isfinite(t).all() for _, t in f.named_factors())
                assert math.isfinite(f.rel_error) and (w.any() or f.rel_error == 0)

    def test_statistics_of_another_shape_are_refused(self, name, kind, shape):
        with pytest.raises(ValueError, match="expected shape"):
            form(name).decompose(
                weight(shape), some_rank(form(name), shape), Statistics(gram=torch.eye(3, dtype=torch.float64))
            )

    def test_rank_out_of_range_is_refused(self, name, kind, shape):
        module = form(name)
        top = module.full_rank(shape)
        over = top + 1 if isinstance(top, int) else (top[0] + 1, top[1])
        under = 0 if isinstance(top, int) else (0, 1)
        for rank in (over, under):
            with pytest.raises(ValueError, match="expected"):
                module.decompose(weight(shape), rank)


def slow_beyond_the_first(name: str, kind: str, shape: tuple[int, ...]):
    """Iterative forms fit every rank anew: their larger weights are for the long tests."""
    quick = getattr(form(name), "AUTO", True) or shape == min(SHAPES[kind], key=math.prod)
    return pytest.param(name, kind, shape, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "kind", "shape"), [slow_beyond_the_first(*c) for c in CASES])
class TestEveryRank:
    def test_error_falls_with_the_rank(self, name, kind, shape):
        w, module = weight(shape), form(name)
        for stats in to_compare(kind, w):
            top = min(shape[0], math.prod(shape[1:]))
            ranks = list(dict.fromkeys(module.clip(shape, n) for n in range(1, top + 1, 2)))
            losses = [module.decompose(w, r, stats).loss for r in ranks]
            slack = 1.02 if name in ("tucker", "pivoted_tucker", "kronecker") else 1.0
            assert all(b <= a * slack + 1e-9 for a, b in itertools.pairwise(losses)), losses

    def test_curve_holds_what_decompose_reaches(self, name, kind, shape):
        w, module = weight(shape), form(name)
        for stats in to_compare(kind, w):
            curve = module.curve(w, stats)
            for point in curve[:: max(1, len(curve) // (6 if getattr(module, "AUTO", True) else 2))]:
                f = module.decompose(w, point.rank, stats)
                assert point.n_params == f.n_params
                if name == "kronecker" and stats is not None:  # the refit only lowers what the curve promises
                    continue
                slack = 0.03 if name in ("tucker", "pivoted_tucker") and stats is None else 1e-6
                assert f.loss <= point.loss * (1 + slack) + 1e-9
                if getattr(module, "AUTO", True) and slack == 1e-6:
                    assert f.loss == pytest.approx(point.loss, rel=1e-6, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 16), st.integers(2, 16), st.integers(0, 10_000))
def test_eckart_young(m, n, seed):
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    r = 1 + seed % min(m, n)
    tail = torch.linalg.svdvals(w)[r:].square().sum()
    f = form("svd").decompose(w, r)
    torch.testing.assert_close((w - f.to_tensor()).square().sum(), tail, rtol=1e-9, atol=1e-12)
    # No other matrix of that rank is nearer, however it is found.
    u = torch.randn(m, r, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    for _ in range(3):
        v = torch.linalg.lstsq(u, w).solution
        u = torch.linalg.lstsq(v.T, w.T).solution.T
        assert float((w - u @ v).square().sum()) >= float(tail) - 1e-9


@pytest.mark.parametrize("shape", [(10, 16), (40, 6)])
@pytest.mark.parametrize("two_sided", [False, True])
def test_weighted_svd_is_the_tail_and_no_root_matters(shape, two_sided):
    w, r = weight(shape), 4
    stats = statistics(w, two_sided=two_sided)
    f = form("svd").decompose(w, r, stats)
    left = torch.eye(len(w), dtype=torch.float64) if stats.g is None else torch.linalg.cholesky(stats.g)
    whitened = left.T @ w @ torch.linalg.cholesky(stats.s)
    d = torch.linalg.svd(whitened)
    assert f.loss == pytest.approx(float(d.S[r:].square().sum()), rel=1e-8)
    best = (
        torch.linalg.inv(left.T) @ (d.U[:, :r] * d.S[:r]) @ d.Vh[:r] @ torch.linalg.inv(torch.linalg.cholesky(stats.s))
    )
    torch.testing.assert_close(f.to_tensor(), best, rtol=0, atol=1e-7)


def test_scaling_the_output_metric_changes_nothing():
    w = weight((9, 14))
    a = statistics(w, two_sided=True)
    b = Statistics(gram=a.gram, mean=a.mean, output_gram=7 * a.output_gram)
    one, two = (form("svd").decompose(w, 3, s).to_tensor() for s in (a, b))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


def test_the_bias_is_worth_at_most_one_rank():
    """tail_{r+1}(K) ≤ centred loss ≤ tail_r(K) with K from the uncentred moments."""
    w = weight((12, 20))
    stats = statistics(w)
    raw = stats.gram + torch.outer(stats.mean, stats.mean)
    tails = torch.linalg.eigvalsh(w @ raw @ w.T).flip(0)
    for r in range(1, 11):
        loss = form("svd").decompose(w, r, stats).loss
        assert float(tails[r + 1 :].sum()) - 1e-9 <= loss <= float(tails[r:].sum()) + 1e-6


@pytest.mark.parametrize("shape", [(12, 20), (16, 36)])
def test_van_loan(shape):
    w = weight(shape)
    d = torch.linalg.svdvals(rearrange(w, *blocks(shape)))
    for k in (1, 3):
        f = form("kronecker").decompose(w, k)
        torch.testing.assert_close((w - f.to_tensor()).square().sum(), d[k:].square().sum(), rtol=1e-9, atol=1e-12)
        terms = sum(
            torch.kron(b.contiguous(), c.contiguous()) for b, c in zip(f.factors["B"], f.factors["C"], strict=True)
        )
        torch.testing.assert_close(terms, f.to_tensor())


def test_one_kronecker_term_has_all_products_as_singular_values():
    f = form("kronecker").decompose(weight((12, 20)), 1)
    b, c = torch.linalg.svdvals(f.factors["B"][0]), torch.linalg.svdvals(f.factors["C"][0])
    products = torch.outer(b, c).flatten().sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(f.to_tensor())[: len(products)], products, rtol=1e-9, atol=1e-12)


def test_tucker_lies_between_its_bounds():
    w, ranks = weight((12, 8, 3, 3)), (5, 4)
    f = form("tucker").decompose(w, ranks)
    out = torch.linalg.svdvals(w.reshape(12, -1))[ranks[0] :].square().sum()
    inner = torch.linalg.svdvals(w.transpose(0, 1).reshape(8, -1))[ranks[1] :].square().sum()
    loss = (w - f.to_tensor()).square().sum()
    assert float(torch.maximum(out, inner)) - 1e-9 <= float(loss) <= float(out + inner) + 1e-9
    # Orthonormal bases: what is lost is what the core does not hold.
    torch.testing.assert_close(loss, w.square().sum() - f.factors["core"].square().sum(), rtol=1e-8, atol=1e-9)


def test_tucker_joint_update_is_never_beaten_by_its_own_projection():
    """For fixed U_in no other (U_out, core) is better: random perturbations of the optimum lose."""
    w = weight((10, 6, 3, 3))
    stats = statistics(w, two_sided=True)
    f = form("tucker").decompose(w, (4, 3), stats)
    g = torch.Generator().manual_seed(5)
    for _ in range(10):
        moved = dict(f.factors)
        for key in ("O", "core"):
            moved[key] = moved[key] + 1e-3 * torch.randn(moved[key].shape, generator=g, dtype=torch.float64)
        assert stats.loss(w - form("tucker").to_tensor(moved, tuple(w.shape))) >= f.loss


def test_convolution_svd_loss_is_the_measured_output_error():
    """The predicted loss is the mean squared output difference per position, zero padding included."""
    import torch.nn.functional as F

    g = torch.Generator().manual_seed(7)
    x = torch.randn(6, 5, 10, 10, generator=g, dtype=torch.float64)
    w = weight((8, 5, 3, 3))
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 45)
    mean = patches.mean(0)
    stats = Statistics(gram=(patches - mean).T @ (patches - mean) / len(patches), mean=mean)
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1))
    f = form("svd").decompose(w, 3, stats)
    difference = convolve(x, w, geometry) - f.apply(x, geometry) - f.bias_shift[:, None, None]
    assert f.loss == pytest.approx(float(difference.square().sum(1).mean()), rel=1e-7)
    assert float(difference.mean((0, 2, 3)).abs().max()) < 1e-10


def test_frequent_rows_of_an_embedding_are_kept_best():
    w = weight((30, 12), 4)
    p = torch.full((30,), 1e-6, dtype=torch.float64)
    p[:5] = 0.2
    f = form("svd").decompose(w, 5, Statistics(row_weights=p))
    error = (w - f.to_tensor()).square().sum(1)
    assert float(error[:5].max()) < 1e-6 < float(error[5:].min())
    tail = torch.linalg.eigvalsh(w.T @ (p[:, None] * w)).flip(0)[5:].sum()
    assert f.loss == pytest.approx(float(tail), rel=1e-6, abs=1e-12)


def test_unknown_form_names_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'tucker'"):
        form("tuker")

"""What a form would lose at every rank, before it is made: curves, what is remembered of them, and their fits."""

from __future__ import annotations

import gc
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lrcompress.factorize import Statistics, form, kronecker
from lrcompress.factorize import tucker as tucker_form
from lrcompress.factorize._curves import ranks_to
from lrcompress.factorize._filters import View
from lrcompress.factorize._memo import Memo
from lrcompress.factorize._refit import refit, sweep
from tests.support.weights import randn, statistics, weight


def test_a_memo_answers_for_the_same_weight_in_the_same_metric_only():
    asked = []
    memo = Memo(lambda w, s: asked.append(w) or float(w.sum()))
    w, stats = randn(4, 5), statistics(weight((4, 5)))
    assert memo(w, stats) == memo(w.clone(), stats) and len(asked) == 1
    w += 1  # in place: the same tensor, another weight
    assert memo(w, stats) == float(w.sum()) and len(asked) == 2
    for other in (w.float(), w.reshape(5, 4)):
        memo(other, stats)
    memo(w, stats)
    assert len(asked) == 5
    memo(w, Statistics(gram=stats.gram)), memo(w, None), memo(w, None)
    assert len(asked) == 8
    memo(w, stats)
    kept = weakref.ref(stats)
    del stats
    gc.collect()
    assert kept() is None and all(own.entry is None for own in memo._all), "nothing is kept alive"


def test_a_memo_of_each_thread_is_its_own_and_ends_with_it():
    asked = []
    memo = Memo(lambda w, s: asked.append(1) or float(w.sum()))
    first, second, stats = randn(4, 5), randn(4, 5), statistics(weight((4, 5)))
    memo(first, stats)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            assert memo(first, stats) == float(first.sum())
            assert pool.submit(memo, second, stats).result() == float(second.sum())
    gc.collect()
    assert len(asked) == 2 and len(memo._all) == 1


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("swap", [False, True])
def test_both_banks_are_updated_to_where_no_neighbour_is_better(two_sided, swap):
    """At the fixed point of the two updates the gradient in either bank is zero, and every update lowers the loss."""
    w = randn(6, 5, 3, 3)
    stats = statistics(w, two_sided=two_sided)
    view = View.of(w, stats, swap=swap)
    a = view.bases(4)[0]
    b, loss = view.fitted(a)
    losses = [loss]
    for _ in range(400):
        a = view.refined(a, b)
        b, loss = view.fitted(a)
        losses.append(loss)
    assert all(y <= x * (1 + 1e-9) for x, y in itertools.pairwise(losses)) and losses[-1] < 0.999 * losses[0]

    def measured(a, b):
        kernel = torch.einsum("rn,orw->onw", a, b).reshape(6, 5, 3, 3)
        return stats.loss(w - (kernel.transpose(2, 3) if swap else kernel))

    assert measured(a, b) == pytest.approx(losses[-1], rel=1e-7)
    for seed in range(4):
        assert measured(a, b + 1e-4 * randn(*b.shape, seed=seed)) > measured(a, b)
        assert measured(a + 1e-3 * randn(*a.shape, seed=seed), b) > measured(a, b) * (1 - 1e-6)


@pytest.mark.parametrize("swap", [False, True])
def test_heads_of_one_basis_have_the_losses_of_their_own_least_squares(swap):
    w = randn(5, 4, 3, 3)
    stats = statistics(w, two_sided=True)
    view = View.of(w, stats, swap=swap)
    for basis in view.bases(8):
        torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)
        losses = view.losses(basis)
        for r in (1, 3, 8):
            build = lambda f, a=basis[:r]: rebuilt(a, f["b"], swap)  # noqa: E731
            b = refit(build, {"b": torch.zeros(5, r, 3, dtype=torch.float64)}, "b", w, stats, 3000)
            assert float(losses[r - 1]) == pytest.approx(stats.loss(w - build({"b": b})), rel=1e-5)


def rebuilt(a, b, swap):
    kernel = torch.einsum("rn,orw->onw", a, b).reshape(len(b), -1, 3, 3)
    return kernel.transpose(2, 3) if swap else kernel


def test_two_filter_banks_are_exact_for_a_product_metric():
    """Where S is S₁ ⊗ S₂ over (in, height) and width, the SVD in that metric is the optimum: no update gains."""
    w = randn(6, 4, 3, 3)
    one, two, out = (m.T @ m / len(m) for m in (randn(40, 12), randn(30, 3, seed=1), randn(25, 6, seed=2)))
    stats = Statistics(gram=torch.kron(one, two), output_gram=out)
    left, l1, l2 = (torch.linalg.cholesky(m) for m in (stats.g, one, two))
    scaled = torch.einsum("po,pnw,nm,wv->ovm", left, w.reshape(6, 12, 3), l1, l2).reshape(18, 12)
    tail = float(torch.linalg.svdvals(scaled)[5:].square().sum())
    f = form("spatial_svd").decompose(w, 5, stats)
    assert tail * (1 - 1e-6) <= f.loss <= tail * 1.01
    for seed in range(3):  # nor does any other pair of banks reach below
        start = {"first": randn(5, 4, 3, 1, seed=seed), "second": randn(6, 5, 1, 3, seed=seed + 9)}
        build = lambda f: form("spatial_svd").to_tensor(f, (6, 4, 3, 3))  # noqa: E731
        found = sweep(build, start, w, stats, names=("second", "first"), sweeps=30, steps=60)
        assert stats.loss(w - build(found)) >= tail * (1 - 1e-6)


def test_tucker_is_the_better_of_two_input_bases_and_its_curve_knows():
    w = randn(10, 8, 3, 3)
    stats = statistics(w, two_sided=True)
    losses = {p.rank: p.loss for p in form("tucker").curve(w, stats)}
    assert len(losses) >= 8 * 9
    for rank in ((3, 4), (8, 2), (10, 8)):
        f = form("tucker").decompose(w, rank, stats)
        assert f.loss == pytest.approx(losses[rank], rel=1e-6, abs=1e-9)
        for basis in tucker_form._input_bases(w, rank[1], stats):
            alone = tucker_form._Projected.of(w, basis, stats)
            u_out, core = alone.fitted(rank[0])
            kernel = torch.einsum("oa,aik,ji->ojk", u_out, core.reshape(rank[0], rank[1], 9), basis)
            assert f.loss <= stats.loss(w - kernel.reshape(w.shape)) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("limit", [10, 1024])
def test_the_curve_of_kronecker_terms_is_what_decompose_reaches(limit, monkeypatch):
    """Whether all terms are refitted, or only the leading ones."""
    from lrcompress.factorize import kronecker

    monkeypatch.setattr(kronecker, "_REFIT_LIMIT", limit)
    w = randn(12, 20)
    for stats in (
        statistics(w),
        statistics(w, two_sided=True),
        Statistics(output_gram=statistics(w, two_sided=True).output_gram),
    ):
        for point in kronecker.curve(w, stats):
            assert kronecker.decompose(w, point.rank, stats).loss == pytest.approx(point.loss, rel=1e-6, abs=1e-9)
    plain = kronecker.decompose(w, 3)
    assert kronecker.decompose(w, 3, statistics(w)).loss < statistics(w).loss(w - plain.to_tensor())


@pytest.mark.parametrize("most", [1, 7, 40, 57, 115, 128, 460, 4096])
def test_ranks_offered_are_dense_and_round(most):
    ranks = ranks_to(most)
    steps = {b - a for a, b in itertools.pairwise(ranks[:-1])}
    assert ranks[-1] == most and ranks[0] >= 1 and len(steps) <= 1 and len(ranks) <= 33
    step = ranks[0]
    assert step in (1, 2, 4) or step % 8 == 0
    assert step <= max(1, 0.07 * most)


@pytest.mark.parametrize("two_sided", [False, True])
def test_tucker_with_all_outputs_is_the_input_tail_of_a_product_metric(two_sided):
    """Where S is S_I ⊗ S_K, no U_in is better than the leading directions of the weight in that metric."""
    w = randn(10, 8, 3, 3)
    own, taps, out = (m.T @ m / len(m) for m in (randn(30, 8), randn(20, 9, seed=1), randn(25, 10, seed=2)))
    stats = Statistics(gram=torch.kron(own, taps), output_gram=out if two_sided else None)
    left = torch.linalg.cholesky(stats.g) if two_sided else torch.eye(10, dtype=torch.float64)
    one, two = torch.linalg.cholesky(own), torch.linalg.cholesky(taps)
    scaled = torch.einsum("po,pik,ij,kl->jol", left, w.reshape(10, 8, 9), one, two).reshape(8, -1)
    for inner in (2, 5):
        tail = float(torch.linalg.svdvals(scaled)[inner:].square().sum())
        assert form("tucker").decompose(w, (10, inner), stats).loss == pytest.approx(tail, rel=1e-5)


def psd(n: int, seed: int) -> torch.Tensor:
    root = randn(n, n + 3, seed=seed)
    return root @ root.T / n


@pytest.mark.parametrize("swap", [False, True])
def test_product_metric_of_outputs_alone_gives_the_best_filters_at_once(swap):
    """Banks of a kernel are the SVD of its view; weighted by G = LLᵀ, that of Lᵀ times it."""
    w, g = randn(6, 4, 3, 3), psd(6, 1)
    view = View.of(w, Statistics(output_gram=g), swap=swap)
    g = Statistics(output_gram=g).g
    turned = torch.einsum("po,pnk->okn", torch.linalg.cholesky(g), view.w).reshape(18, 12)
    tails = torch.linalg.svdvals(turned).square().flip(0).cumsum(0).flip(0)
    found = view.losses(view.bases(5)[0])
    torch.testing.assert_close(found, tails[1:6], rtol=1e-9, atol=1e-9 * float(tails[0]))


@pytest.mark.parametrize("two_sided", [False, True])
def test_banks_by_conjugate_gradients_solve_the_normal_equations(monkeypatch, two_sided):
    """With as many steps as unknowns, and some for rounding, the first filters are those of a dense solve."""
    monkeypatch.setattr("lrcompress.factorize._filters._STEPS", 60)
    w, s = randn(5, 3, 3, 3), psd(27, 2)
    view = View.of(w, Statistics(gram=s, output_gram=psd(5, 3) if two_sided else None), swap=False)
    rank, (out, n, k) = 2, view.w.shape
    a = torch.linalg.qr(randn(n, rank, seed=4))[0].T
    b, _ = view.fitted(a)
    columns = [torch.einsum("orw,rn->onw", b, e.reshape(rank, n)).flatten() for e in torch.eye(rank * n, dtype=w.dtype)]
    design, metric = torch.stack(columns, 1), view.s.reshape(n * k, n * k)
    metric = torch.kron(torch.eye(out, dtype=w.dtype) if view.g is None else view.g, metric)
    exact = torch.linalg.solve(design.T @ metric @ design, design.T @ metric @ view.w.flatten()).reshape(rank, n)
    found, (basis, _) = view.refined(a, b), torch.linalg.qr(exact.T)
    torch.testing.assert_close(found.T @ found, basis @ basis.T, rtol=0, atol=1e-8)


def test_a_product_metric_of_inputs_gives_the_best_filters_at_once():
    """With S = S₁ ⊗ S₂ of rows and columns, the filters are the SVD of what both roots turn the view into."""
    w, s1, s2 = randn(5, 3, 3, 3), psd(9, 1), psd(3, 2)
    view = View.of(w, Statistics(gram=torch.kron(s1, s2)), swap=False)
    turned = torch.einsum("onk,nm,kl->olm", view.w, torch.linalg.cholesky(s1), torch.linalg.cholesky(s2)).reshape(15, 9)
    tails = torch.linalg.svdvals(turned).square().flip(0).cumsum(0).flip(0)
    found = torch.stack([view.losses(a) for a in view.bases(4)]).min(0).values
    assert bool((found >= tails[1:5] * (1 - 1e-9)).all())
    torch.testing.assert_close(found, tails[1:5], rtol=1e-3, atol=0)  # a metric is raised a little before its root


def test_kronecker_terms_beyond_the_refit_are_taken_as_they_are(monkeypatch):
    """The refitted terms are the least squares of what the others leave: no neighbour of them is better."""
    monkeypatch.setattr("lrcompress.factorize.kronecker._REFIT_LIMIT", 8)
    w, s = randn(12, 12), psd(12, 3)
    stats = Statistics(gram=s)
    terms = kronecker._Terms.of(w, 4, stats)
    b, c = terms.fitted(4)
    lead = len(terms.root) // b.shape[2]
    assert 0 < lead < 4 and torch.equal(b[lead:], terms.b[lead:])
    best = stats.loss(w - kronecker._product(b, c))
    for seed in range(6):
        moved = b.clone()
        moved[:lead] += 1e-3 * randn(*b[:lead].shape, seed=seed)
        assert stats.loss(w - kronecker._product(moved, c)) > best

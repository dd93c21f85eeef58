"""Theory of the forms beyond the plain ones: what each is exact for, what bounds it, what it may never do."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lrcompress.factorize import Statistics, form
from lrcompress.factorize import als as als_form
from lrcompress.factorize import nmf as nmf_form
from lrcompress.factorize import svd as svd_form
from lrcompress.factorize._refit import refit
from lrcompress.factorize.tensor_train import _grid, _paired
from tests.support.weights import randn, statistics, weight

# pivoted --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rank"), [((12, 20), 5), ((24, 8), 8), ((10, 6, 3, 3), 4)])
def test_the_pivoted_gauge_is_the_svd_for_r_squared_fewer_numbers(shape, rank):
    w = weight(shape)
    for stats in (None, statistics(w, two_sided=True)):
        f, g = form("pivoted").decompose(w, rank, stats), form("svd").decompose(w, rank, stats)
        torch.testing.assert_close(f.to_tensor(), g.to_tensor(), rtol=0, atol=1e-9)
        assert f.n_params == g.n_params - rank**2
        assert float(f.factors["T"].abs().max()) <= 2.0
    assert sorted(f.factors["order"].tolist()) == list(range(shape[0]))


def test_the_pivoted_gauge_is_below_dense_at_every_rank():
    for m, n in ((7, 7), (5, 40), (40, 5)):
        counts = [form("pivoted").n_params((m, n), r) for r in range(1, min(m, n) + 1)]
        assert counts[-1] == m * n and all(c < m * n for c in counts[:-1])


def test_pivots_survive_rows_that_are_nearly_alike():
    rows = randn(4, 30)
    w = torch.cat([rows + 1e-9 * randn(4, 30, seed=i) for i in range(5)])
    f = form("pivoted").decompose(w, 4)
    assert float(f.factors["T"].abs().max()) <= 2.0
    torch.testing.assert_close(f.to_tensor(), w, rtol=0, atol=1e-7)


# randomized -----------------------------------------------------------------------------------------------------------


def test_randomized_is_exact_at_the_true_rank_and_never_beats_eckart_young():
    low = randn(300, 12) @ randn(12, 260, seed=1)
    _, p = svd_form.randomized_eigenvectors(lambda x: low @ (low.T @ x), 300, 12)
    assert float((low - p @ (p.T @ low)).norm() / low.norm()) < 1e-10
    u, _ = torch.linalg.qr(randn(300, 300))
    v, _ = torch.linalg.qr(randn(260, 260, seed=2))
    d = 0.9 ** torch.arange(260, dtype=torch.float64)
    w, rank = (u[:, :260] * d) @ v.T, 10
    _, p = svd_form.randomized_eigenvectors(lambda x: w @ (w.T @ x), 300, rank)
    error, tail = float((w - p @ (p.T @ w)).square().sum()), float(d[rank:].square().sum())
    assert tail * (1 - 1e-12) <= error <= 1.001 * tail


def test_randomized_gives_the_same_bytes():
    w = randn(200, 100)
    one, two = (svd_form.randomized_eigenvectors(lambda x: w @ (w.T @ x), 200, 8)[1] for _ in range(2))
    assert torch.equal(one, two)


def test_randomized_is_chosen_by_cost_and_agrees(monkeypatch):
    assert svd_form.prefers_randomized((4096, 4096), 64)
    assert not svd_form.prefers_randomized((4096, 4096), 2000)
    assert not svd_form.prefers_randomized((400, 400), 4)
    w = weight((60, 90))
    for stats in (None, statistics(w, two_sided=True)):
        exact = form("svd").decompose(w, 6, stats)
        monkeypatch.setattr(svd_form, "prefers_randomized", lambda shape, rank: True)
        quick = form("svd").decompose(w, 6, stats)
        monkeypatch.undo()
        assert exact.loss * (1 - 1e-9) <= quick.loss <= exact.loss * 1.001


@pytest.mark.parametrize("shape", [(600, 700), (700, 600)])
def test_large_plain_matrices_take_the_gram_route_to_the_same_answer(shape):
    w = randn(*shape) * 0.97 ** torch.arange(shape[1], dtype=torch.float64)
    d = torch.linalg.svdvals(w)
    f = form("svd").decompose(w, 40)
    assert float((w - f.to_tensor()).square().sum()) == pytest.approx(float(d[40:].square().sum()), rel=1e-9)


def test_principal_components_of_the_outputs():
    w = weight((9, 14))
    x = randn(500, 14) @ randn(14, 14, seed=1) + 2.0
    centred = x - x.mean(0)
    stats = Statistics(gram=centred.T @ centred / len(x), mean=x.mean(0), output_gram=torch.eye(9, dtype=torch.float64))
    f = svd_form.pca(w, 3, stats)
    outputs = (centred @ w.T).numpy()
    _, vectors = np.linalg.eigh(np.cov(outputs.T, bias=True))
    span = torch.from_numpy(vectors[:, ::-1][:, :3].copy())
    torch.testing.assert_close(f.factors["U"] @ f.factors["U"].T, span @ span.T, rtol=0, atol=1e-8)
    torch.testing.assert_close(f.factors["U"].T @ f.factors["U"], torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="moments"):
        svd_form.pca(w, 3, Statistics())


# refits ---------------------------------------------------------------------------------------------------------------


def test_a_refit_reaches_the_least_squares_optimum_and_never_rises():
    w, stats = weight((8, 12)), statistics(weight((8, 12)), two_sided=True)
    u, v = randn(8, 3), randn(3, 12, seed=1)
    build = lambda f: f["U"] @ f["V"]  # noqa: E731
    losses = [
        stats.loss(w - build({"U": u, "V": refit(build, {"U": u, "V": v}, "V", w, stats, steps)}))
        for steps in (0, 1, 2, 5, 40, 2000)
    ]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
    lu = stats.g @ u
    best = torch.linalg.solve(lu.T @ u, lu.T @ w)
    assert losses[-1] == pytest.approx(stats.loss(w - u @ best), rel=1e-7)


# CP -------------------------------------------------------------------------------------------------------------------


def test_a_planted_cp_is_found():
    modes = [randn(n, 3, seed=i) for i, n in enumerate((9, 7, 3, 3))]
    w = torch.einsum("or,ir,hr,wr->oihw", *modes)
    assert form("cp").decompose(w, 3).rel_error < 1e-5


def test_terms_that_would_grow_against_each_other_are_held():
    """u⊗u⊗w + u⊗w⊗u + w⊗u⊗u has border rank 2: the best rank-2 approximation does not exist."""
    u, v = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    product = lambda *m: torch.einsum("i,j,k->ijk", *m)  # noqa: E731
    w = product(u, u, v) + product(u, v, u) + product(v, u, u)
    f = form("cp").decompose(w, 2)
    norms = torch.stack([t.norm(dim=0) for _, t in f.named_factors()]).prod(0)
    assert float(norms.norm()) <= 50 * float(w.norm())
    assert f.rel_error < 0.5


def test_a_solution_that_outgrows_its_weight_is_done_again_with_more_ridge(monkeypatch):
    asked = []

    def exploding(tensor, rank, *, l2_reg, **options):
        asked.append(l2_reg)
        big = 1e6 if l2_reg < 1e-2 else 1.0
        modes = [torch.ones(n, rank, dtype=torch.float64) for n in tensor.shape]
        modes[0] = modes[0] * torch.tensor([big, -big]) + randn(tensor.shape[0], rank)
        return None, modes

    monkeypatch.setattr("lrcompress.factorize.cp.parafac", exploding)
    w = weight((8, 6, 3, 3))
    f = form("cp").decompose(w, 2)
    norms = torch.stack([t.norm(dim=0) for _, t in f.named_factors()]).prod(0)
    assert float(norms.norm()) <= 50 * float(w.norm()) and max(asked) >= 1e-2


def test_the_gram_matrix_of_cp_terms_is_the_product_of_the_gram_matrices():
    f = form("cp").decompose(weight((8, 6, 3, 3)), 4)
    o, i, h, w = (f.factors[n] for n in ("O", "I", "K0", "K1"))
    terms = torch.einsum("or,ir,hr,wr->roihw", o, i, h, w).flatten(1)
    torch.testing.assert_close(terms @ terms.T, (o.T @ o) * (i.T @ i) * (h.T @ h) * (w.T @ w))


# tensor train ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 60), (64, 27)])
def test_the_train_lies_between_the_tails_of_its_unfoldings(shape):
    w, rank = weight(shape), 6
    f = form("tensor_train").decompose(w, rank)
    t = _paired(w, _grid(shape))
    bonds = f.factors["G0"].shape[-1], f.factors["G2"].shape[0]
    tails = [
        float(torch.linalg.svdvals(t.reshape(math.prod(t.shape[: i + 1]), -1))[r:].square().sum())
        for i, r in enumerate(bonds)
    ]
    error = float((w - f.to_tensor()).square().sum())
    assert max(tails) - 1e-9 <= error <= sum(tails) + 1e-9


# Hadamard and Khatri-Rao ----------------------------------------------------------------------------------------------


def test_hadamard_is_never_worse_than_the_svd_it_starts_from():
    w = weight((14, 18))
    for rank in (1, 2, 4):
        assert form("hadamard").decompose(w, rank).loss <= form("svd").decompose(w, rank).loss * (1 + 1e-9)


def test_hadamard_blocks_end_where_their_gradient_is_zero():
    w, stats = weight((10, 12)), statistics(weight((10, 12)))
    f = dict(form("hadamard").decompose(w, 2, stats).factors)
    build = lambda f: form("hadamard").to_tensor(f, (10, 12))  # noqa: E731
    before = stats.loss(w - build(f))
    for name in ("B1", "A1", "B2", "A2"):
        exact = refit(build, f, name, w, stats, 200)
        after = stats.loss(w - build({**f, name: exact}))
        assert after >= before * 0.9, name  # a block step from the end gains next to nothing
    value = f["B1"].clone().requires_grad_(True)
    f["B1"] = refit(build, f, "B1", w, stats, 400)
    value = f["B1"].clone().requires_grad_(True)
    error = w - build({**f, "B1": value})
    (stats.weighted(error.detach()) * error).sum().backward()
    assert float(value.grad.norm()) <= 1e-4 * float(w.norm()) * float(stats.gram.norm())


def test_a_hadamard_product_reaches_rank_r_squared():
    planted = (randn(16, 3) @ randn(3, 20, seed=1)) * (randn(16, 3, seed=2) @ randn(3, 20, seed=3))
    assert int(torch.linalg.matrix_rank(planted)) == 9
    f, low = form("hadamard").decompose(planted, 3), form("svd").decompose(planted, 6)
    assert f.n_params == low.n_params
    assert int(torch.linalg.matrix_rank(f.to_tensor(), rtol=1e-6)) > 3


def test_khatri_rao_is_the_svd_of_every_column():
    w = weight((24, 10))
    d = torch.linalg.svdvals(w.T.reshape(10, 4, 6))
    for k in (1, 2, 3):
        f = form("khatri_rao").decompose(w, k)
        assert float((w - f.to_tensor()).square().sum()) == pytest.approx(float(d[:, k:].square().sum()), rel=1e-9)
    a, b = f.factors["A"][0], f.factors["B"][0]
    one = form("khatri_rao").to_tensor({"A": a[None], "B": b[None]}, (24, 10))
    torch.testing.assert_close(
        one, torch.stack([torch.kron(a[:, j].contiguous(), b[:, j].contiguous()) for j in range(10)], 1)
    )


# ALS ------------------------------------------------------------------------------------------------------------------


def test_rank_one_entry_weights_have_a_closed_form():
    w = weight((9, 12))
    a, b = torch.rand(9, dtype=torch.float64) + 0.2, torch.rand(12, dtype=torch.float64) + 0.2
    omega = torch.outer(a, b)
    f = als_form.decompose(w, 3, entry_weights=omega)
    p, d, qt = torch.linalg.svd(a.sqrt()[:, None] * w * b.sqrt(), full_matrices=False)
    best = (p[:, :3] * d[:3]) @ qt[:3] / a.sqrt()[:, None] / b.sqrt()
    torch.testing.assert_close(f.to_tensor(), best, rtol=0, atol=1e-4)


def test_missing_entries_of_a_low_rank_matrix_are_recovered():
    w = randn(20, 3) @ randn(3, 15, seed=1)
    seen = (torch.rand(20, 15, generator=torch.Generator().manual_seed(5)) < 0.7).double()
    f = als_form.decompose(torch.where(seen > 0, w, 1e6), 3, entry_weights=seen, ridge=1e-6)
    assert float((f.to_tensor() - w).norm() / w.norm()) < 1e-2


def test_a_ridge_shrinks_the_singular_values_by_itself():
    w = weight((10, 14))
    d = torch.linalg.svdvals(w)
    for f in (
        als_form.decompose(w, 4, ridge=0.3),
        als_form.decompose(w, 4, entry_weights=torch.ones_like(w), ridge=0.3),
    ):
        torch.testing.assert_close(
            torch.linalg.svdvals(f.to_tensor())[:4], (d[:4] - 0.3).clamp_min(0), rtol=1e-3, atol=1e-3
        )


def test_als_half_steps_head_for_the_weighted_svd():
    w, stats = weight((12, 20)), statistics(weight((12, 20)), two_sided=True)
    plain = stats.loss(w - form("svd").decompose(w, 4).to_tensor())
    best, found = form("svd").decompose(w, 4, stats).loss, als_form.decompose(w, 4, stats).loss
    assert best * (1 - 1e-9) <= found < plain
    assert found - best < 0.2 * (plain - best)


@pytest.mark.parametrize(
    ("omega", "ridge"),
    [(torch.ones(3, 3), 0.0), (-torch.ones(4, 5), 1.0), (torch.zeros(4, 5), 0.0), (torch.full((4, 5), math.nan), 1.0)],
)
def test_entry_weights_that_make_no_problem_are_refused(omega, ridge):
    with pytest.raises(ValueError, match="entry_weights"):
        als_form.decompose(weight((4, 5)), 2, entry_weights=omega, ridge=ridge)


# NMF ------------------------------------------------------------------------------------------------------------------


def test_nmf_ends_at_a_kkt_point_above_eckart_young():
    w = randn(14, 18).abs()
    u, v = nmf_form.hals(w, *nmf_form._start(w, 5), sweeps=4000)
    assert float(u.min()) >= 0 and float(v.min()) >= 0
    for factor, gradient in ((u, (u @ v - w) @ v.T), (v, u.T @ (u @ v - w))):
        assert float(torch.minimum(factor, gradient).abs().max()) < 1e-3 * float(w.norm())
    assert float((w - u @ v).square().sum()) >= form("svd").decompose(w, 5).loss


def test_nmf_splits_the_signs():
    f = form("nmf").decompose(weight((10, 12)), 3)
    assert float(f.factors["V"].min()) >= 0
    assert float(f.factors["U"][:, :3].min()) >= 0 and float(f.factors["U"][:, 3:].max()) <= 0
    positive = randn(6, 2).abs() @ randn(2, 9, seed=1).abs()
    f = form("nmf").decompose(positive, 2)
    assert not f.factors["U"][:, 2:].any() and f.rel_error < 0.02

"""Theory of the forms beyond the plain ones: what each is exact for, what bounds it, what it may never do."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import torch

from lrcompress.factorize import ConvGeometry, Refused, Statistics, form, kronecker
from lrcompress.factorize import als as als_form
from lrcompress.factorize import nmf as nmf_form
from lrcompress.factorize import svd as svd_form
from lrcompress.factorize import tucker as tucker_form
from lrcompress.factorize._curves import ranks_to
from lrcompress.factorize._filters import View
from lrcompress.factorize._linalg import convolve
from lrcompress.factorize._memo import Memo
from lrcompress.factorize._refit import refit, sweep
from lrcompress.factorize.grouped_svd import apart
from lrcompress.factorize.shared import decompose_group, group_params
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


# groups and shared bases ----------------------------------------------------------------------------------------------


def test_a_grouped_convolution_is_factorized_group_by_group():
    groups, w = 3, weight((12, 4, 3, 3))
    split = apart(w, groups)
    f = form("grouped_svd").decompose(split, 2)
    tails = sum(float(torch.linalg.svdvals(g.flatten(1))[2:].square().sum()) for g in split)
    assert float((split - f.to_tensor()).square().sum()) == pytest.approx(tails, rel=1e-9)
    x, geometry = randn(2, 12, 8, 8), ConvGeometry((2, 2), (1, 1), (1, 1))
    torch.testing.assert_close(
        form("grouped_svd").conv(f.factors, x, geometry), convolve(x, f.to_tensor().reshape(w.shape), geometry, groups)
    )
    assert (
        f.n_params
        == sum(t.numel() for _, t in f.named_factors())
        == form("grouped_svd").n_params(tuple(split.shape), 2)
    )


def test_every_group_has_its_own_metric():
    split = apart(weight((8, 3, 3, 3)), 2)
    own = [statistics(g, seed=i, two_sided=True) for i, g in enumerate(split)]
    stacked = {k: torch.stack([getattr(s, k) for s in own]) for k in ("gram", "mean", "output_gram")}
    stats = Statistics(**stacked, groups=2)
    f = form("grouped_svd").decompose(split, 2, stats)
    alone = [form("svd").decompose(g, 2, s) for g, s in zip(split, own, strict=True)]
    assert f.loss == pytest.approx(sum(a.loss for a in alone), rel=1e-8)
    torch.testing.assert_close(f.bias_shift, torch.cat([a.bias_shift for a in alone]), rtol=1e-7, atol=1e-9)
    assert form("grouped_svd").curve(split, stats)[1].loss == pytest.approx(f.loss, rel=1e-8)
    with pytest.raises(ValueError, match="expected shape"):
        form("grouped_svd").decompose(split, 2, Statistics(gram=stats.gram[:, :5, :5], groups=2))


def test_a_shared_basis_is_the_best_one_for_the_stack():
    weights = [weight((n, 16), seed=i) for i, n in enumerate((10, 10, 6))]
    base = statistics(weights[0])
    stats = [Statistics(gram=base.gram, mean=base.mean) for _ in weights]
    found = decompose_group(weights, 5, stats)
    assert all(f.factors["V"] is found[0].factors["V"] for f in found)
    stacked = torch.cat(weights)
    tail = torch.linalg.eigvalsh(stacked @ Statistics(gram=base.gram).s @ stacked.T).flip(0)[5:].sum()
    assert sum(f.loss for f in found) == pytest.approx(float(tail), rel=1e-7)
    assert group_params([w.shape for w in weights], 5) == 5 * (16 + 26) < sum(f.n_params for f in found)
    with pytest.raises(ValueError, match="one width"):
        decompose_group([weight((4, 5)), weight((4, 6))], 2)


def test_importance_moves_a_shared_basis_towards_a_layer():
    weights = [weight((8, 12), seed=i) for i in range(2)]
    even, first = decompose_group(weights, 3), decompose_group(weights, 3, importance=(10.0, 1.0))
    assert first[0].loss < even[0].loss and first[1].loss > even[1].loss


def test_a_network_with_groups_from_weights_to_the_runtime(tmp_path):
    import lrcompress
    from lrcompress.data import Data
    from lrcompress.model import InputSpec
    from lrcompress.model.checkpoint import load_compressed
    from lrcompress.runtime import Session
    from tests.support.nets import grouped

    torch.save(grouped().state_dict(), tmp_path / "m.pt")
    x = randn(64, 8, 9, 9).float().numpy()
    spec = (InputSpec("x", "float32", ("batch", 8, 9, 9)),)
    made = lrcompress.factorize(
        tmp_path / "m.pt",
        rank=4,
        method="svd",
        calib=Data.of_arrays({"x": x}),
        inputs=spec,
        arch="tests.support.nets:grouped",
        output=tmp_path / "c",
    )
    rows = {r["name"]: r for r in made.data["layers"]}
    assert (rows["wide"]["form"], rows["wide"]["shape"]) == ("grouped_svd", [24, 4, 3, 3])
    assert rows["wide"]["norm"] == "two_sided" and rows["wide"]["params_after"] == 2 * 4 * (12 + 36)
    assert (rows["deep"]["form"], rows["deep"]["reason"]) == ("dense", "depthwise: nothing to save")
    back = load_compressed(tmp_path / "c").module
    with torch.no_grad():
        expected = made.model(torch.as_tensor(x))
        assert torch.equal(back(torch.as_tensor(x)), expected)
        torch.testing.assert_close(lrcompress.to_dense(back)(torch.as_tensor(x)), expected, rtol=1e-4, atol=1e-5)
    lrcompress.export(tmp_path / "c", output=tmp_path / "e")
    np.testing.assert_allclose(Session(tmp_path / "e").run({"x": x})["output"], expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{"rank": 6}, {"ratio": 0.6}])
def test_projections_of_one_input_share_a_basis_from_weights_to_the_runtime(tmp_path, how):
    import lrcompress
    from lrcompress.data import Data
    from lrcompress.errors import CommandError
    from lrcompress.model import InputSpec
    from lrcompress.model.checkpoint import load_compressed
    from lrcompress.runtime import Session
    from tests.support.nets import attending

    torch.save(attending().state_dict(), tmp_path / "m.pt")
    x = randn(80, 6, 24).float().numpy()
    about = {
        "inputs": (InputSpec("x", "float32", ("batch", 6, 24)),),
        "arch": "tests.support.nets:attending",
        "method": "shared",
    }
    with pytest.raises(CommandError, match="--calib"):
        lrcompress.factorize(tmp_path / "m.pt", **how, **about)
    made = lrcompress.factorize(
        tmp_path / "m.pt", calib=Data.of_arrays({"x": x}), output=tmp_path / "c", **how, **about
    )
    rows = {r["name"]: r for r in made.data["layers"]}
    rank = rows["q"]["rank"]
    assert [rows[n]["params_after"] for n in "qkv"] == [rank * 48, rank * 24, rank * 16]
    back = load_compressed(tmp_path / "c").module
    for net in (made.model, back):
        assert net.q.factors["V"] is net.k.factors["V"] is net.v.factors["V"]
        assert sum(p.numel() for p in net.parameters()) == made.data["params_after"]
    if "ratio" in how:
        assert made.data["params_after"] <= 0.6 * made.data["params_before"]
    with torch.no_grad():
        expected = made.model(torch.as_tensor(x))
        assert torch.equal(back(torch.as_tensor(x)), expected)
    lrcompress.export(tmp_path / "c", output=tmp_path / "e")
    np.testing.assert_allclose(Session(tmp_path / "e").run({"x": x})["output"], expected.numpy(), rtol=1e-4, atol=1e-5)


# pivoted gauges of a convolution --------------------------------------------------------------------------------------

KERNELS = [(12, 8, 3, 3), (6, 9, 3, 3), (8, 8, 2, 2), (6, 5, 5, 5), (7, 6, 2, 3), (7, 6, 3, 2)]


def some_ranks(name, shape):
    top = form(name).full_rank(shape)
    if isinstance(top, tuple):
        return [(1, 1), (top[0] // 2, top[1]), (top[0], top[1] // 2), (top[0] - 1, top[1] - 2), top]
    return sorted({1, shape[0] // 2, shape[0] - 1, shape[0], min(shape[0] + 1, top), min(2 * shape[0], top)})


@pytest.mark.parametrize("shape", KERNELS)
@pytest.mark.parametrize(("name", "plain"), [("pivoted_spatial", "spatial_svd"), ("pivoted_tucker", "tucker")])
def test_the_gauge_is_the_plain_form_without_its_redundant_numbers(name, plain, shape):
    w = randn(*shape)
    for stats in (None, statistics(w, two_sided=True)):
        for rank in some_ranks(name, shape):
            f, g = form(name).decompose(w, rank, stats), form(plain).decompose(w, rank, stats)
            torch.testing.assert_close(f.to_tensor(), g.to_tensor(), rtol=0, atol=1e-9)
            assert f.loss == pytest.approx(g.loss, rel=1e-6, abs=1e-9)
            redundant = sum(r * r for r in rank) if isinstance(rank, tuple) else rank * min(rank, shape[0])
            assert f.n_params == form(name).n_params(shape, rank) == g.n_params - redundant
            assert all(float(f.factors[k].abs().max()) <= 2.0 for k in ("S", "T") if k in f.factors)


@pytest.mark.parametrize("shape", [(9, 6, 3, 3), (6, 9, 3, 3), (8, 8, 2, 2), (6, 5, 5, 5), (7, 6, 2, 3), (7, 6, 3, 2)])
@pytest.mark.parametrize("name", ["pivoted_spatial", "pivoted_tucker"])
def test_every_walk_over_every_tap(name, shape, monkeypatch):
    """Any stride, padding and dilation, unlike along the two axes, whichever tap is the trivial one."""
    from lrcompress.factorize import pivoted_spatial

    w, x, seen = randn(*shape), randn(2, shape[1], 15, 14, seed=4), set()
    every = pivoted_spatial._choices(max(shape[2:])) if name == "pivoted_spatial" else [None]
    for i in range(len(every)):
        monkeypatch.setattr(
            pivoted_spatial, "_choices", lambda taps, i=i, f=pivoted_spatial._choices: f(taps)[i : i + 1] or f(taps)[:1]
        )
        for rank in some_ranks(name, shape):
            f = form(name).decompose(w, rank)
            seen |= set(f.factors)
            for stride, padding, dilation in itertools.product(
                ((1, 1), (2, 3)), ((0, 0), (1, 1), (2, 0), (0, 3)), ((1, 1), (1, 2))
            ):
                geometry = ConvGeometry(stride, padding, dilation)
                torch.testing.assert_close(
                    f.apply(x, geometry), convolve(x, f.to_tensor(), geometry), rtol=0, atol=1e-8
                )
        monkeypatch.undo()
    if name == "pivoted_spatial":
        assert {"before", "after", "T", "order"} <= seen and ("around" in seen) == (shape[3] == 3)


def test_both_orders_of_the_filters_are_taken():
    """A kernel of low rank with its height first, or with its width first, keeps that order, and its rank."""
    for swap, axes in ((False, (2, 3)), (True, (3, 2))):
        w = torch.einsum("rih,orw->oihw", randn(5, 8, 3), randn(12, 5, 3, seed=1))
        w = w.transpose(2, 3).contiguous() if swap else w
        f = form("pivoted_spatial").decompose(w, 5)
        assert f.rel_error < 1e-6 and [f.factors["first"].shape[i] for i in axes] == [3, 1]


@pytest.mark.parametrize("leak", [0.0, 1e-6, 0.1])
def test_a_gauge_that_float32_would_feel_is_refused(leak):
    """Terms that live at one tap each, but for a leak: no tap alone has the rank that all have together."""
    second = randn(8, 4, 3)
    second[:, :3] *= leak + (1 - leak) * torch.eye(3, dtype=torch.float64)
    w = torch.einsum("rih,orw->oihw", randn(4, 6, 3, seed=1), second)
    offered = {p.rank for p in form("pivoted_spatial").curve(w)}
    assert form("spatial_svd").decompose(w, 4).rel_error < 1e-6
    if leak > 0.01:
        assert form("pivoted_spatial").decompose(w, 4).rel_error < 1e-6 and 4 in offered
        return
    with pytest.raises(Refused, match="use spatial_svd") as refusal:
        form("pivoted_spatial").decompose(w, 4)
    assert 4 not in offered and ("inf" in refusal.value.got) == (leak == 0)


def test_what_is_accepted_holds_in_float32():
    for seed in range(6):
        w = randn(16, 12, 3, 3, seed=seed) * 0.5 ** torch.arange(3)
        for rank in (5, 15, 16, 20):
            plain = form("spatial_svd").decompose(w, rank).to_tensor()
            f = form("pivoted_spatial").decompose(w.float(), rank)
            assert float((f.to_tensor() - plain).abs().max()) < 1e-4 * float(w.abs().max())


@pytest.mark.parametrize(
    ("method", "rank"), [("pivoted_spatial", 6), ("pivoted_spatial", 40), ("pivoted_tucker", 6), ("pivoted_tucker", 16)]
)
def test_the_gauge_from_weights_to_the_runtime(tmp_path, method, rank):
    import lrcompress
    from lrcompress.data import Data
    from lrcompress.model import InputSpec
    from lrcompress.model.checkpoint import load_compressed
    from lrcompress.runtime import Session
    from tests.support.nets import images, small

    torch.save(small().state_dict(), tmp_path / "m.pt")
    x, _ = images(120)
    about = {"inputs": (InputSpec("x", "float32", ("batch", 3, 8, 8)),), "arch": "tests.support.nets:small"}
    made = lrcompress.factorize(
        tmp_path / "m.pt", rank=rank, method=method, calib=Data.of_arrays({"x": x}), output=tmp_path / "c", **about
    )
    rows = {r["name"]: r for r in made.data["layers"]}
    assert rows["conv2"]["form"] == method and rows["conv2"]["params_after"] < rows["conv2"]["params_before"]
    back = load_compressed(tmp_path / "c").module
    with torch.no_grad():
        expected = made.model(torch.as_tensor(x))
        assert torch.equal(back(torch.as_tensor(x)), expected)
        torch.testing.assert_close(lrcompress.to_dense(back)(torch.as_tensor(x)), expected, rtol=1e-4, atol=1e-5)
    lrcompress.export(tmp_path / "c", output=tmp_path / "e")
    have = {t.name for t in onnx.load(str(tmp_path / "e" / "model.onnx")).graph.initializer}
    assert {f"conv2.{k}" for k in back.conv2.factors} <= have
    for n in (1, 7):
        np.testing.assert_allclose(
            Session(tmp_path / "e").run({"x": x[:n]})["output"], expected[:n].numpy(), rtol=1e-4, atol=1e-5
        )


# curves and their fits ------------------------------------------------------------------------------------------------


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

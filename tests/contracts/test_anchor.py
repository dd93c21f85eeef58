"""Anchoring: the layer is fitted to what it should answer on what now reaches it, against the explicit regression."""

from __future__ import annotations

import pytest
import torch

from lrcompress.factorize import Drift, Statistics, anchored, form
from tests.support.weights import randn, weight


def drifting(n=14, seed=0):
    x = randn(400, n, seed=seed) @ randn(n, n, seed=seed + 1) + 0.5
    turned = x + 0.3 * x @ randn(n, n, seed=seed + 4) / n**0.5  # C is not symmetric
    y = turned + 0.3 * randn(400, n, seed=seed + 2) @ randn(n, n, seed=seed + 3) + 0.2
    return x, y, lambda w: moments(w, x, y)


def moments(w, x, y):
    """Return the drift of W x over explicit rows."""
    a, b = x - x.mean(0), y - y.mean(0)
    return Drift.of_inputs(
        w, clean=a.T @ a / len(a), cross=a.T @ b / len(a), drifted=b.T @ b / len(a), clean_mean=x.mean(0), drifted_mean=y.mean(0)
    )  # fmt: skip


def test_the_anchored_loss_is_the_measured_one():
    x, y, of = drifting()
    w = weight((9, 14))
    drift = of(w)
    for beta in (0.0, 0.5, 1.0):
        f = anchored("svd", w, 4, drift, beta=beta)
        wanted = ((1 - beta) * y + beta * x) @ w.T
        residual = wanted - y @ f.to_tensor().T - f.bias_shift
        assert f.loss == pytest.approx(float(residual.square().sum(1).mean()), rel=1e-6)
        assert float(residual.mean(0).abs().max()) < 1e-9


def test_at_full_rank_anchoring_is_the_regression_on_the_drifted_input():
    x, y, of = drifting()
    w = weight((9, 14))
    drift = of(w)
    regression = torch.linalg.lstsq(y - y.mean(0), (x - x.mean(0)) @ w.T).solution.T
    torch.testing.assert_close(anchored("svd", w, 9, drift, damping=1e-13).to_tensor(), regression, rtol=0, atol=1e-6)


def test_no_other_matrix_of_that_rank_answers_the_drifted_input_better():
    x, y, of = drifting()
    w = weight((9, 14))
    drift = of(w)
    best = anchored("svd", w, 4, drift)
    own = form("svd").decompose(w, 4, Statistics(gram=drift.drifted, mean=drift.drifted_mean))
    a, b = x - x.mean(0), y - y.mean(0)
    assert best.loss < float((a @ w.T - b @ own.to_tensor().T).square().sum(1).mean())
    for seed in range(5):
        moved = best.factors["U"] + 1e-2 * randn(9, 4, seed=seed)
        other = moved @ best.factors["V"]
        assert float((a @ w.T - b @ other.T).square().sum(1).mean()) > best.loss


def test_anchoring_without_drift_or_without_an_anchor_is_the_plain_problem():
    w, (_, y, of) = weight((9, 14)), drifting()
    drift = of(w)
    stats = Statistics(gram=drift.drifted, mean=drift.drifted_mean)
    expected = form("svd").decompose(w, 4, stats).to_tensor()
    torch.testing.assert_close(anchored("svd", w, 4, drift, beta=0.0).to_tensor(), expected, rtol=0, atol=1e-8)
    still = moments(w, y, y)
    torch.testing.assert_close(anchored("svd", w, 4, still).to_tensor(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["tucker", "pivoted"])
def test_every_form_can_be_anchored(name):
    x, y, _ = drifting(45)
    a, b = x - x.mean(0), y - y.mean(0)
    w = weight((8, 5, 3, 3))
    drift = moments(w, x, y)
    rank = form(name).clip(tuple(w.shape), 3)
    f = anchored(name, w, rank, drift)
    own = form(name).decompose(w, rank, Statistics(gram=drift.drifted, mean=drift.drifted_mean))
    flat = w.reshape(8, -1)
    before = float((a @ flat.T - b @ own.to_tensor().reshape(8, -1).T).square().sum(1).mean())
    assert f.loss < before


def test_what_is_missing_beside_the_answer_is_made_up_for():
    """Where the sum's other part lost something that the layer's input tells, a full-rank layer adds exactly that."""
    x, w, lost = randn(300, 6) + 0.3, weight((4, 6)), weight((4, 6), seed=5)
    wanted, a = x @ (w + lost).T, x - x.mean(0)
    t = wanted - wanted.mean(0)
    drift = Drift(a.T @ a / 300, x.mean(0), t.T @ a / 300, t.T @ t / 300, wanted.mean(0))
    found = anchored("svd", w, 4, drift, damping=1e-13)
    torch.testing.assert_close(found.to_tensor(), w + lost, rtol=0, atol=1e-8)
    assert found.loss < 1e-12 and float(found.bias_shift.abs().max()) < 1e-8


def test_the_loss_with_a_given_shift_is_the_measured_one():
    x, y, of = drifting()
    w, other, shift = weight((9, 14)), weight((9, 14), seed=3), randn(9, seed=4)
    g = randn(9, 9, seed=6)
    g = g @ g.T
    residual = x @ w.T - y @ other.T - shift
    expected = float(torch.einsum("ni,ij,nj->n", residual, g, residual).mean())
    assert of(w).loss(other, g, shift) == pytest.approx(expected, rel=1e-9)


def test_groups_are_anchored_group_by_group():
    w, rows = weight((2, 3, 5)), [(randn(50, 5, seed=i), randn(50, 5, seed=i + 7)) for i in range(2)]
    parts = [moments(w[i], x, 0.5 * x + y) for i, (x, y) in enumerate(rows)]
    fields = ("drifted", "drifted_mean", "cross", "answers", "answer_mean")
    both = Drift(*(torch.stack([getattr(p, f) for p in parts]) for f in fields))
    for i, part in enumerate(parts):
        torch.testing.assert_close(both.target(w, 0.7)[i], part.target(w[i], 0.7))
    assert both.loss(w) == pytest.approx(sum(p.loss(w[i]) for i, p in enumerate(parts)))

"""Undoing the drift: the moments of a `Drift` say what the data say, and no replacement answers them better."""

from __future__ import annotations

import pytest
import torch

from lrcompress.factorize import Drift, Statistics, anchored, form
from tests.support.weights import randn, statistics, weight

BETAS = (0.0, 0.3, 1.0)


def inputs(n=14, count=400, seed=0):
    """What a layer reads in the network, x, and in the copy, y, unlike in mean and direction."""
    x = randn(count, n, seed=seed) @ randn(n, n, seed=seed + 1) + 0.5
    turned = x + 0.3 * x @ randn(n, n, seed=seed + 4) / n**0.5  # C is not symmetric
    return x, turned + 0.3 * randn(count, n, seed=seed + 2) @ randn(n, n, seed=seed + 3) + 0.2


def centred(x):
    return x - x.mean(0)


def of_inputs(w, x, y):
    a, b, n = centred(x), centred(y), len(x)
    means = {"clean_mean": x.mean(0), "drifted_mean": y.mean(0)}
    return Drift.of_inputs(w, clean=a.T @ a / n, cross=a.T @ b / n, drifted=b.T @ b / n, **means)


def of_answers(t, y):
    a, b, n = centred(t), centred(y), len(y)
    return Drift(b.T @ b / n, y.mean(0), a.T @ b / n, a.T @ a / n, t.mean(0))


def drifting(w, n=14):
    x, y = inputs(n)
    return x, y, of_inputs(w, x, y)


def test_moments_of_the_inputs_are_those_of_the_answers():
    w = weight((9, 14))
    x, y, drift = drifting(w)
    explicit = of_answers(x @ w.T, y)
    for name in ("drifted", "drifted_mean", "cross", "answers", "answer_mean"):
        torch.testing.assert_close(getattr(drift, name), getattr(explicit, name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_blended_moments_are_those_of_the_blended_answers(beta):
    w = weight((9, 14))
    x, y = inputs()
    t = x @ w.T + 0.4 * randn(400, 9, seed=8) + 1.0  # answers that W does not give
    found = of_answers(t, y).blended(w, beta)
    explicit = of_answers((1 - beta) * y @ w.T + beta * t, y)
    for name in ("drifted", "drifted_mean", "cross", "answers", "answer_mean"):
        torch.testing.assert_close(getattr(found, name), getattr(explicit, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighed", [False, True])
def test_the_loss_is_the_mean_over_the_data(weighed):
    w, other = weight((9, 14)), weight((9, 14), seed=5)
    x, y = inputs()
    t = x @ w.T + 0.4 * randn(400, 9, seed=8) + 1.0
    drift, shift = of_answers(t, y), randn(9, seed=3)
    g = randn(30, 9, seed=4).T @ randn(30, 9, seed=4) if weighed else torch.eye(9, dtype=torch.float64)
    residual = t - y @ other.T - shift
    given = g if weighed else None
    assert drift.loss(other, given, shift) == pytest.approx(float(((residual @ g) * residual).sum(1).mean()), rel=1e-10)
    best = residual - residual.mean(0)  # without a shift the bias carries the mean in full
    assert drift.loss(other, given) == pytest.approx(float(((best @ g) * best).sum(1).mean()), rel=1e-10)
    torch.testing.assert_close(drift.shift(other), (t - y @ other.T).mean(0))
    assert drift.loss(other, given, drift.shift(other)) == pytest.approx(drift.loss(other, given), rel=1e-10)
    a = centred(t)
    assert drift.total(given) == pytest.approx(float(((a @ g) * a).sum(1).mean()), rel=1e-10)


def test_the_target_is_the_ridge_regression_that_is_pulled_to_the_weight():
    """A* minimizes E‖t_β − A x̂‖² + λ‖A − W‖²·(…): its gradient is zero there, also for a share β of the step."""
    w = weight((9, 14))
    x, y = inputs()
    t = x @ w.T + 0.4 * randn(400, 9, seed=8)
    drift, damping = of_answers(t, y), 0.05
    lam = damping * float(drift.drifted.diagonal().mean())
    a, b = centred(t), centred(y)
    for beta in BETAS:
        found = drift.target(w, beta, damping)
        wanted = (1 - beta) * b @ w.T + beta * a
        gradient = (b @ found.T - wanted).T @ b / 400 + lam * (found - w)
        assert float(gradient.abs().max()) < 1e-10 * float(w.abs().max())
    assert torch.equal(drift.target(w, 0.0), w)


def test_what_is_missing_beside_the_answer_is_made_up_for():
    """Where the sum's other part lost something that the layer's input tells, a full-rank layer adds exactly that."""
    x, w, lost = randn(300, 6) + 0.3, weight((4, 6)), weight((4, 6), seed=5)
    found = anchored("svd", w, 4, of_answers(x @ (w + lost).T, x), damping=1e-13)
    torch.testing.assert_close(found.to_tensor(), w + lost, rtol=0, atol=1e-8)
    assert found.loss < 1e-12 and float(found.bias_shift.abs().max()) < 1e-8


def test_nothing_that_arrives_leaves_the_weight_as_it_is():
    w = weight((3, 4))
    nothing = Drift(torch.zeros(4, 4), torch.zeros(4), torch.zeros(3, 4), torch.zeros(3, 3), torch.zeros(3))
    assert torch.equal(nothing.target(w), w)


def test_the_anchored_loss_is_the_measured_one():
    w = weight((9, 14))
    x, y, drift = drifting(w)
    for beta in BETAS:
        f = anchored("svd", w, 4, drift, beta=beta)
        wanted = ((1 - beta) * y + beta * x) @ w.T
        residual = wanted - y @ f.to_tensor().T - f.bias_shift
        assert f.loss == pytest.approx(float(residual.square().sum(1).mean()), rel=1e-6)
        assert f.rel_error == pytest.approx((f.loss / float(centred(wanted).square().sum(1).mean())) ** 0.5, rel=1e-6)
        assert f.rel_error_frobenius == pytest.approx(float((w - f.to_tensor()).norm() / w.norm()), rel=1e-9)
        assert float(residual.mean(0).abs().max()) < 1e-9


def test_at_full_rank_anchoring_is_the_regression_on_the_drifted_input():
    w = weight((9, 14))
    x, y, drift = drifting(w)
    regression = torch.linalg.lstsq(centred(y), centred(x) @ w.T).solution.T
    found = anchored("svd", w, 9, drift, damping=1e-13).to_tensor()
    torch.testing.assert_close(found, regression, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighed", [False, True])
def test_no_other_matrix_of_that_rank_answers_the_drifted_input_better(weighed):
    w = weight((9, 14))
    x, y, drift = drifting(w)
    gram = statistics(w, two_sided=True).output_gram if weighed else None
    g = Statistics(output_gram=gram).g if weighed else torch.eye(9, dtype=torch.float64)
    a, b = centred(x), centred(y)

    def measured(other):
        off = a @ w.T - b @ other.T
        return float(((off @ g) * off).sum(1).mean())

    best = anchored("svd", w, 4, drift, output_gram=gram, damping=1e-9)
    assert best.loss == pytest.approx(measured(best.to_tensor()), rel=1e-6)
    metric = Statistics(gram=drift.drifted, mean=drift.drifted_mean, output_gram=gram)
    assert best.loss < measured(form("svd").decompose(w, 4, metric).to_tensor())
    for seed in range(5):
        for moved in (
            (best.factors["U"] + 1e-2 * randn(9, 4, seed=seed)) @ best.factors["V"],
            best.factors["U"] @ (best.factors["V"] + 1e-2 * randn(4, 14, seed=seed)),
        ):
            assert measured(moved) > best.loss


def test_anchoring_without_drift_or_without_an_anchor_is_the_plain_problem():
    w = weight((9, 14))
    _, y, drift = drifting(w)
    stats = Statistics(gram=drift.drifted, mean=drift.drifted_mean)
    expected = form("svd").decompose(w, 4, stats).to_tensor()
    torch.testing.assert_close(anchored("svd", w, 4, drift, beta=0.0).to_tensor(), expected, rtol=0, atol=1e-8)
    still = of_inputs(w, y, y)
    torch.testing.assert_close(anchored("svd", w, 4, still).to_tensor(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["tucker", "pivoted"])
def test_every_form_can_be_anchored(name):
    x, y = inputs(45)
    w = weight((8, 5, 3, 3))
    drift = of_inputs(w, x, y)
    rank = form(name).clip(tuple(w.shape), 3)
    f = anchored(name, w, rank, drift)
    own = form(name).decompose(w, rank, Statistics(gram=drift.drifted, mean=drift.drifted_mean))
    flat = w.reshape(8, -1)
    before = float((centred(x) @ flat.T - centred(y) @ own.to_tensor().reshape(8, -1).T).square().sum(1).mean())
    assert f.loss < before


def test_groups_are_anchored_one_by_one():
    """All moments of a grouped convolution have a first axis: each group is a problem of its own."""
    w = weight((8, 3, 3, 3)).reshape(2, 4, 3, 3, 3)
    pairs = [inputs(27, seed=10 * i) for i in range(2)]
    alone = [of_inputs(w[i].reshape(4, 27), *pair) for i, pair in enumerate(pairs)]
    names = ("drifted", "drifted_mean", "cross", "answers", "answer_mean")
    both = Drift(**{n: torch.stack([getattr(d, n) for d in alone]) for n in names})
    f = anchored("grouped_svd", w, 2, both)
    own = [anchored("svd", w[i], 2, alone[i]) for i in range(2)]
    assert f.loss == pytest.approx(sum(o.loss for o in own), rel=1e-8)
    torch.testing.assert_close(f.to_tensor(), torch.stack([o.to_tensor() for o in own]), rtol=0, atol=1e-8)
    torch.testing.assert_close(f.bias_shift, torch.cat([o.bias_shift for o in own]), rtol=1e-7, atol=1e-9)


def test_single_precision_weights_keep_what_is_stored():
    w = weight((9, 14))
    _, _, drift = drifting(w)
    f = anchored("svd", w.float(), 4, drift)
    assert {t.dtype for t in f.factors.values()} == {torch.float32} == {f.bias_shift.dtype}
    assert f.loss == pytest.approx(drift.loss(f.to_tensor()), rel=1e-6), "the loss is that of the stored numbers"

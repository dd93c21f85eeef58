"""Few positions: what a covariance does not show is not free, and what it shows is not all there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lrcompress.calibrate import measure
from lrcompress.data import Data
from lrcompress.factorize import Drift, Statistics, form, shrunk
from lrcompress.graphs.moments import Drift as GraphDrift
from lrcompress.graphs.moments import Moments
from lrcompress.model import InputSpec, open_model
from lrcompress.model.views import view_of
from lrcompress.progress import Silent
from lrcompress.shrinkage import share
from lrcompress.verbs.planning import prepare


def rows(n: int, p: int, seed: int, decay: float = 0.97) -> np.ndarray:
    """Positions whose directions, turned at random, have standard deviations 1, decay, decay², …"""
    turned = np.linalg.qr(np.random.default_rng(p).standard_normal((p, p)))[0]
    return (np.random.default_rng(seed).standard_normal((n, p)) * decay ** np.arange(p)) @ turned.T


def truth(p: int, decay: float = 0.97) -> np.ndarray:
    turned = np.linalg.qr(np.random.default_rng(p).standard_normal((p, p)))[0]
    return turned * decay ** (2 * np.arange(p)) @ turned.T


@pytest.mark.parametrize(("n", "p", "decay"), [(20, 64, 1.0), (30, 100, 0.97), (10, 100, 0.97), (90, 100, 0.95)])
def test_the_share_is_the_one_that_an_oracle_takes(n: int, p: int, decay: float) -> None:
    """The oracle knows Σ: Chen et al. 2010, eq. 10."""
    sigma = truth(p, decay)
    trace, squares = np.trace(sigma), (sigma**2).sum()
    oracle = ((1 - 2 / p) * squares + trace**2) / ((n + 1 - 2 / p) * squares + (1 - n / p) * trace**2)
    found, nearer = [], []
    for seed in range(20):
        s = np.cov(rows(n, p, seed, decay).T, bias=True)
        rho = share(float(s.trace()), float((s * s).sum()), p, n)
        better = (1 - rho) * s + rho * s.trace() / p * np.eye(p)
        found.append(rho)
        nearer.append(np.linalg.norm(better - sigma) / np.linalg.norm(s - sigma))
    assert np.mean(found) == pytest.approx(oracle, abs=0.08)
    assert np.mean(nearer) < 1 and max(nearer) < 1.02


def test_enough_positions_say_all_there_is() -> None:
    s = torch.as_tensor(np.cov(rows(64, 64, 0).T, bias=True))
    assert shrunk(s, 64) is s and shrunk(s, 0) is s
    assert share(1.0, 1.0, 64, 64) == share(1.0, 1.0, 64, 0) == 0.0
    assert share(0.0, 0.0, 64, 3) == 1.0, "of nothing nothing is left"


def test_what_was_not_seen_is_not_free() -> None:
    """A rank of as many as positions is exact where they are; what it loses elsewhere is told within a factor of two."""
    x, fresh, w = (
        rows(24, 96, 1),
        rows(4000, 96, 2),
        torch.as_tensor(np.random.default_rng(3).standard_normal((48, 96))),
    )
    s = torch.as_tensor(np.cov(x.T, bias=True))
    told = form("svd").decompose(w, 24, Statistics(gram=shrunk(s, 24)))
    free = form("svd").decompose(w, 24, Statistics(gram=s))
    lost = lambda f: float(((fresh - fresh.mean(0)) @ (w - f.to_tensor()).numpy().T).__pow__(2).sum(1).mean())  # noqa: E731
    assert free.loss < 1e-6 * lost(free)
    assert 0.5 < told.loss / lost(told) < 2, (told.loss, lost(told))
    assert lost(told) <= lost(free)


def test_calibration_does_so_in_both_readers_of_networks() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(96, 8)).eval()
    x = rows(24, 96, 1).astype(np.float32)
    opened = open_model(net, inputs=(InputSpec("x", "float32", ("batch", 96)),))
    view = view_of(opened, opened.module)
    found = measure(view, Data.of_arrays({"x": x}), view.layers)["0"]
    expected = shrunk(torch.as_tensor(np.cov(x.T, bias=True)), 24)
    torch.testing.assert_close(found.gram, expected, rtol=1e-4, atol=1e-6)
    moments = Moments()
    moments.add(x)
    np.testing.assert_allclose(moments.shrunk, expected, rtol=1e-4, atol=1e-6)


def test_a_last_layer_of_many_outputs_answers_for_each_of_them_alike() -> None:
    """Every output is an answer, so that the metric of a last layer is the identity: few probes must not say otherwise."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 400)).eval()
    opened = open_model(net, inputs=(InputSpec("x", "float32", ("batch", 8)),))
    data = Data.of_arrays({"x": rows(40, 8, 1).astype(np.float32)})
    ready = prepare(
        opened, include=(), exclude=(), calib=data, seed=0, compute="cpu", cache=False, progress=Silent(), verb="plan"
    )
    g = ready.priced["2"].output_gram
    assert g is not None
    values = torch.linalg.eigvalsh(g / g.diagonal().mean())
    assert values.max() < 2 and values.min() > 0.5, (
        "400 outputs, 40 samples: without it a tenth of the values are 10 and the others 0"
    )


def test_without_drift_the_best_replacement_is_the_weight() -> None:
    x, w = rows(24, 96, 1), torch.as_tensor(np.random.default_rng(3).standard_normal((8, 96)))
    s, mean = torch.as_tensor(np.cov(x.T, bias=True)), torch.as_tensor(x.mean(0))
    drift = Drift.of_inputs(w, clean=s, cross=s, drifted=s, clean_mean=mean, drifted_mean=mean).shrunk(w, 24)
    torch.testing.assert_close(drift.target(w), w)
    torch.testing.assert_close(drift.loss(w, shift=torch.zeros(8, dtype=torch.float64)) + 1, 1.0)


def test_drift_that_few_positions_show_is_undone_less() -> None:
    """What arrives is what was sent and noise: of few positions, the noise is mostly fitted."""
    w, rng = torch.as_tensor(np.random.default_rng(3).standard_normal((8, 96))), np.random.default_rng(4)

    def joint(n: int, seed: int) -> np.ndarray:
        x = rows(n, 96, seed)
        return np.concatenate([x, x + 0.3 * rng.standard_normal((n, 96))], 1)

    few, many = joint(60, 1), joint(8000, 2)
    s, judge = np.cov(few.T, bias=True), np.cov(many.T, bias=True)
    drift = Drift.of_inputs(
        w,
        clean=_t(s[:96, :96]),
        cross=_t(s[:96, 96:]),
        drifted=_t(s[96:, 96:]),
        clean_mean=_t(np.zeros(96)),
        drifted_mean=_t(np.zeros(96)),
    )
    judged = Drift.of_inputs(
        w,
        clean=_t(judge[:96, :96]),
        cross=_t(judge[:96, 96:]),
        drifted=_t(judge[96:, 96:]),
        clean_mean=_t(np.zeros(96)),
        drifted_mean=_t(np.zeros(96)),
    )
    assert judged.loss(drift.shrunk(w, 60).target(w)) < 0.7 * judged.loss(drift.target(w))
    own = Moments()
    own.add(few.astype(np.float32))
    graph = GraphDrift.of(own).shrunk()
    np.testing.assert_allclose(w.numpy() @ graph.cross, drift.shrunk(w, 60).cross, rtol=1e-3, atol=1e-4)


def _t(a: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(a))

"""The formulas that other methods are measured by: exact where they are theorems, checked against brute force elsewhere."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompress.factorize import Statistics, form
from tests.benchmarks.peers import formulas, ranks, table
from tests.benchmarks.peers.ranks import Option
from tests.benchmarks.peers.rows import ROWS

SHAPES = [(16, 144), (32, 144), (64, 288), (10, 64)]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectra(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.sort(rng.exponential(size=min(s)) ** 3)[::-1] for s in SHAPES]


class TestUniform:
    @given(kept=st.floats(0.1, 1.0))
    @settings(max_examples=50, deadline=None)
    def test_takes_the_largest_share_within_the_budget(self, kept: float) -> None:
        budget = math.floor(kept * sum(map(ranks.dense_cost, SHAPES)))
        found = ranks.uniform(SHAPES, budget)
        assert ranks.total(SHAPES, found) <= budget
        # One share: whatever is one rank above would need a share at which the whole does not fit.
        up = [None if r is None else r + 1 for r in found]
        shares = [ranks.cost(s, r) / ranks.dense_cost(s) for s, r in zip(SHAPES, up, strict=True)]
        at_next = [ranks.at_share(s, min(shares) + 1e-9) for s in SHAPES]
        assert ranks.total(SHAPES, at_next) > budget or all(r is None for r in found)

    def test_leaves_all_dense_where_the_budget_is_the_network(self) -> None:
        assert ranks.uniform(SHAPES, sum(map(ranks.dense_cost, SHAPES))) == [None] * 4

    def test_says_where_rank_one_is_too_much(self) -> None:
        with pytest.raises(ValueError, match="even the smallest ranks take 762 numbers, more than 700"):
            ranks.uniform(SHAPES, 700)

    def test_never_stores_more_than_the_dense_layer(self) -> None:
        assert ranks.at_share((10, 64), 0.999) == 8  # 8·74 = 592 < 640
        assert ranks.at_share((3, 2), 0.9) == 1  # 5 of 6 numbers
        assert ranks.at_share((2, 2), 0.9) is None  # 4 of 4


class TestInverseLog:
    def test_removes_in_proportion_to_one_over_log(self) -> None:
        shape, losses = (1000, 1000), [math.e, math.e**2, math.e**4]
        found = ranks.inverse_log([shape] * 3, ["q"] * 3, losses, 3 * 600_000)
        removed = [1 - ranks.cost(shape, r) / 1e6 for r in found]
        assert removed[0] / removed[1] == pytest.approx(2, rel=0.02)
        assert removed[0] / removed[2] == pytest.approx(4, rel=0.02)
        assert sum(removed) / 3 == pytest.approx(0.4, abs=0.003)

    def test_is_uniform_for_equal_losses_and_where_the_rule_is_not_defined(self) -> None:
        even = ranks.uniform(SHAPES, 12_000)
        assert ranks.inverse_log(SHAPES, ["a"] * 4, [7.0] * 4, 12_000) == even
        assert ranks.inverse_log(SHAPES, ["a"] * 4, [7.0, 50.0, 1.0, 3.0], 12_000) == even

    def test_compares_only_layers_of_one_type(self) -> None:
        assert ranks.inverse_log(SHAPES, list("abcd"), [3.0, 9.0, 27.0, 81.0], 12_000) == ranks.uniform(SHAPES, 12_000)


def gained(values: list[np.ndarray], chosen: ranks.Ranks) -> float:
    return sum(1.0 if r is None else float(v[:r].sum() / v.sum()) for v, r in zip(values, chosen, strict=True))


class TestLagrangian:
    @pytest.mark.parametrize("seed", range(4))
    def test_no_choice_of_its_own_cost_keeps_more_energy(self, seed: int) -> None:
        shapes, values = (
            [(6, 12), (8, 8), (4, 20)],
            [s[: min(k)] for s, k in zip(spectra(seed), [(6,), (8,), (4,)], strict=False)],
        )
        found = ranks.lagrangian(shapes, values, 130)
        spent = ranks.total(shapes, found)
        assert spent <= 130
        best = 0.0
        for choice in itertools.product(*([*range(1, min(s) + 1), None] for s in shapes)):
            if ranks.total(shapes, list(choice)) <= spent:
                best = max(best, gained(values, list(choice)))
        assert gained(values, found) == pytest.approx(best, abs=1e-12)

    def test_spends_what_some_price_can_spend(self) -> None:
        values, budget = spectra(7), 14_000
        found = gained(values, ranks.lagrangian(SHAPES, values, budget))
        for price in np.geomspace(1e-8, 1, 300):
            choice: ranks.Ranks = []
            for shape, v in zip(SHAPES, values, strict=True):
                options = [r for r in range(1, len(v) + 1) if ranks.cost(shape, r) < ranks.dense_cost(shape)]
                worth = {r: float(v[:r].sum() / v.sum()) - price * ranks.cost(shape, r) for r in options}
                best = max(worth, key=lambda r: worth[r])
                choice.append(None if 1 - price * ranks.dense_cost(shape) > worth[best] else best)
            if ranks.total(SHAPES, choice) <= budget:
                assert gained(values, choice) <= found + 1e-12

    def test_scaling_a_layer_changes_nothing(self) -> None:
        values = spectra()
        scaled = [1000 * values[0], *values[1:]]
        assert ranks.lagrangian(SHAPES, values, 12_000) == ranks.lagrangian(SHAPES, scaled, 12_000)

    def test_gives_rank_where_the_spectrum_is_flat(self) -> None:
        steep, flat = np.array([1.0] + [1e-6] * 63), np.ones(64)
        found = ranks.lagrangian([(64, 64)] * 2, [steep, flat], 4096 + 128)
        assert found[0] == 1 and (found[1] is None or found[1] > 20)


class TestKnapsack:
    @given(
        layers=st.lists(
            st.lists(st.tuples(st.integers(1, 30), st.floats(0, 10)), min_size=1, max_size=4), min_size=1, max_size=4
        ),
        spare=st.integers(0, 60),
    )
    @settings(max_examples=150, deadline=None)
    def test_equals_brute_force(self, layers: list[list[tuple[int, float]]], spare: int) -> None:
        options = [[Option(c, loss, i) for i, (c, loss) in enumerate(layer)] for layer in layers]
        budget = sum(min(o.cost for o in layer) for layer in options) + spare
        found = ranks.knapsack(options, budget)
        fitting = [c for c in itertools.product(*options) if sum(o.cost for o in c) <= budget]
        assert sum(o.cost for o in found) <= budget
        assert sum(o.loss for o in found) == pytest.approx(min(sum(o.loss for o in c) for c in fitting))
        assert all(o in layer for o, layer in zip(found, options, strict=True))

    @given(
        layers=st.lists(st.lists(st.integers(1, 97), min_size=1, max_size=5), min_size=1, max_size=5),
        spare=st.integers(0, 200),
        cells=st.integers(3, 40),
    )
    @settings(max_examples=100, deadline=None)
    def test_keeps_the_budget_with_coarse_cells(self, layers: list[list[int]], spare: int, cells: int) -> None:
        options = [[Option(c, 1 / c, None) for c in layer] for layer in layers]
        budget = sum(map(min, layers)) + spare
        exact = ranks.knapsack(options, budget)
        try:
            found = ranks.knapsack(options, budget, cells=cells)
        except ValueError:
            # Every cost is rounded up by less than a cell.
            assert sum(map(min, layers)) + len(layers) * -(-budget // cells) > budget
            return
        assert sum(o.cost for o in found) <= budget
        assert sum(o.loss for o in exact) <= sum(o.loss for o in found) + 1e-12

    def test_says_that_nothing_fits(self) -> None:
        with pytest.raises(ValueError, match="no choice of options fits 5 numbers"):
            ranks.knapsack([[Option(4, 0.0, 1)], [Option(3, 0.0, 1)]], 5)


class TestEvbmf:
    def test_keeps_nothing_of_noise(self) -> None:
        assert [ranks.evbmf_rank(gaussian(40, 200, seed=s).numpy()) for s in range(5)] == [0] * 5

    @pytest.mark.parametrize("planted", [1, 4, 9])
    def test_finds_a_planted_rank(self, planted: int) -> None:
        signal = 2 * gaussian(48, planted) @ gaussian(planted, 160, seed=1)
        noisy = (signal + gaussian(48, 160, seed=2)).numpy()
        assert ranks.evbmf_rank(noisy) == ranks.evbmf_rank(noisy.T) == planted
        assert ranks.evbmf_rank(1e-3 * noisy) == planted

    def test_agrees_with_the_closed_threshold_on_a_square(self) -> None:
        """Square case of maths: 2.216 √n σ, just above the edge 2 √n σ, with the true σ known to be 1."""
        noise = gaussian(120, 120, seed=3)
        p, d, q = torch.linalg.svd(noise)
        for size, kept in ((2.0, 0), (2.6, 1)):
            d[0] = size * math.sqrt(120)
            assert ranks.evbmf_rank(((p * d) @ q).numpy()) == kept

    @pytest.mark.parametrize(("alpha", "off"), [(1.0, 1e-4), (0.5, 0.02), (0.1, 0.05)])
    def test_signal_and_noise_cost_the_same_at_the_edge(self, alpha: float, off: float) -> None:
        """What defines the edge; 2.5129 √α is exact for α = 1 and close for others."""
        edge = np.array([ranks.evbmf_edge(alpha)])
        signal, noise = (ranks.evbmf_energies(edge, alpha, kept=kept)[0] for kept in (True, False))
        assert signal == pytest.approx(noise, abs=off)
        above = ranks.evbmf_energies(edge + 1, alpha, kept=True) - ranks.evbmf_energies(edge + 1, alpha, kept=False)
        assert above[0] < -0.05

    def test_a_matrix_and_its_transpose_keep_alike(self) -> None:
        left, right = (torch.linalg.qr(gaussian(n, 12, seed=n))[0] for n in (30, 90))
        weak = (left * torch.linspace(6, 30, 12, dtype=torch.float64)) @ right.T  # some below, some above the edge
        for seed in range(4):
            matrix = (weak + gaussian(30, 90, seed=10 + seed)).numpy()
            assert 0 < ranks.evbmf_rank(matrix) == ranks.evbmf_rank(matrix.T)

    def test_survives_zeros(self) -> None:
        assert ranks.evbmf_rank(np.zeros((4, 9))) == 0


class TestFactors:
    def test_cholesky_whitening_is_the_packages_svd(self) -> None:
        weight, x = gaussian(12, 20), gaussian(500, 20, seed=1) @ gaussian(20, 20, seed=2)
        moment = x.T @ x / len(x)
        published = formulas.cholesky_svd(weight, moment, 5)
        ours = form("svd").decompose(weight, 5, Statistics(gram=moment))
        torch.testing.assert_close(published.to_tensor(), ours.to_tensor(), rtol=1e-6, atol=1e-8)
        error = weight - published.to_tensor()
        measured = float((x @ error.T).square().sum(1).mean())
        values = form("svd").spectrum(weight, Statistics(gram=moment))
        assert measured == pytest.approx(float(values[5:].sum()), rel=1e-6)

    def test_scaling_is_optimal_in_its_own_norm_and_only_there(self) -> None:
        weight, scale = gaussian(12, 20), gaussian(20, seed=4).abs() + 0.1
        scaled, plain = formulas.scaled_svd(weight, scale, 5), form("svd").decompose(weight, 5)

        def size(found: Any, by: torch.Tensor) -> float:
            return float(((weight - found.to_tensor()) * by).square().sum())

        values = torch.linalg.svdvals(weight * scale).square()
        assert size(scaled, scale) == pytest.approx(float(values[5:].sum()), rel=1e-10)
        assert size(scaled, scale) < size(plain, scale)
        assert size(plain, torch.ones(20)) < size(scaled, torch.ones(20))

    def test_unit_scale_is_the_plain_svd_of_a_convolution(self) -> None:
        weight = gaussian(8, 4, 3, 3)
        found = formulas.scaled_svd(weight, torch.ones(36, dtype=torch.float64), 3)
        assert found.to_tensor().shape == weight.shape
        torch.testing.assert_close(found.to_tensor(), form("svd").decompose(weight, 3).to_tensor())

    def test_lems_damps_as_published(self) -> None:
        gram, output = torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([2.0, 0.0]))
        for kind, share in ((formulas.Damped, 0.7), (formulas.DampedText, 0.3)):
            damped = formulas._as(kind, Statistics(gram=gram, output_gram=output))
            assert damped.s is not None and damped.g is not None
            torch.testing.assert_close(damped.s.diagonal(), torch.tensor([1.2, 3.2], dtype=torch.float64))
            expected = torch.tensor([2 + share, share], dtype=torch.float64)
            torch.testing.assert_close(damped.g.diagonal(), expected)


def result(row: str, **more: Any) -> dict[str, Any]:
    base = {
        "network": "resnet20", "row": row, "label": ROWS[row].label, "kept": 0.5, "seed": 0, "budgeted": True,
        "partial": False, "bytes": 1000, "params_share": 0.5, "scope_share": 0.4, "metric": "accuracy", "value": 0.8,
        "n": 100, "stderr": 0.04, "seconds": 10.0, "cpu_seconds": 8.0, "peak_rss_bytes": 5_000_000, "notes": "",
    }  # fmt: skip
    return {**base, **more}


class TestTable:
    def test_means_and_spread_over_seeds_and_times_to_the_others(self) -> None:
        runs = [
            result("balf", seconds=4.0, cpu_seconds=2.0), result("aimet", seconds=40.0, cpu_seconds=32.0),
            result("lrcompress", value=0.8), result("lrcompress", value=0.9, seed=1, seconds=14.0),
            result("greenformer", error="No module named 'greenformer'"),
        ]  # fmt: skip
        lines = table.summary(runs)
        ours = next(n for n in lines if n["row"] == "lrcompress")
        assert ours["value"] == pytest.approx(0.85) and ours["spread"] == pytest.approx(0.1 / math.sqrt(2))
        assert ours["seeds"] == [0, 1] and ours["times_balf"] == pytest.approx(4.0)
        text = table.text(lines)
        assert "lrcompress at 0.5 takes 4.00 × the CPU seconds of balf, 3.00 × by the clock" in text
        assert "lrcompress at 0.5 takes 0.25 × the CPU seconds of aimet, 0.30 × by the clock" in text
        assert "greenformer                  0.50  not run: No module named 'greenformer'" in text

    def test_draws_what_could_be_measured(self, tmp_path: Any) -> None:
        lines = table.summary([result("int8", budgeted=False), result("balf"), result("aimet", error="x")])
        table.plot(lines, tmp_path / "peers.png")
        assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")

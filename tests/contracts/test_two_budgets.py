"""Two budgets at once: never worse than the bound, equal to an exact solver where that is quick, and fast."""

from __future__ import annotations

import ctypes
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from lrcompress.errors import BudgetError
from lrcompress.plan import two_budgets
from lrcompress.plan.candidates import Candidate, Chosen, Fixed, Limits, choose, undominated
from lrcompress.plan.two_budgets import solve


def instance(rng, layers, options, smooth):
    losses, costs = [], []
    for _ in range(layers):
        b, t = rng.uniform(1, 100, options), rng.uniform(1, 100, options)
        losses.append(100 * (1 / b + 1 / t) * rng.uniform(0.8, 1.2, options) if smooth else rng.uniform(0, 1, options))
        costs.append(np.stack([b, t]))
    return losses, costs


def exact(losses, costs, limits):
    count = [len(v) for v in losses]
    one, at = np.zeros((len(count), sum(count))), 0
    for k, n in enumerate(count):
        one[k, at : at + n], at = 1, at + n
    found = milp(
        np.concatenate(losses), integrality=np.ones(sum(count)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(np.concatenate(costs, 1), -np.inf, limits)],
    )  # fmt: skip
    return None if found.x is None else float(found.fun)


@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 6),
    options=st.integers(1, 8),
    smooth=st.booleans(),
    tight=st.floats(0.0, 0.7),
)
@settings(max_examples=60, deadline=None)
def test_equal_to_an_exact_solver_on_small_cases(seed, layers, options, smooth, tight):
    rng = np.random.default_rng(seed)
    losses, costs = instance(rng, layers, options, smooth)
    low, high = (np.array([sum(f(c[b]) for c in costs) for b in (0, 1)]) for f in (np.min, np.max))
    limits = low + (high - low) * tight * rng.uniform(0.5, 1, 2)
    best, found = exact(losses, costs, limits), solve(losses, costs, limits)
    assert (best is None) == (found is None)
    if best is None:
        return
    assert found.bound <= best + 1e-7
    assert found.loss == pytest.approx(best, rel=1e-5, abs=1e-7)
    assert all(c <= limit * (1 + 1e-8) for c, limit in zip(found.costs, limits, strict=True))
    assert found.loss == pytest.approx(sum(v[i] for v, i in zip(losses, found.chosen, strict=True)))


@pytest.mark.parametrize(("layers", "options"), [(100, 1000), (1000, 100), (40, 2500)])
@pytest.mark.parametrize("smooth", [True, False])
def test_a_hundred_thousand_options_take_less_than_a_second(layers, options, smooth):
    losses, costs = instance(np.random.default_rng(1), layers, options, smooth)
    limits = [layers * 20.0, layers * 30.0]
    times = []
    for _ in range(2):
        started = time.process_time()
        found = solve(losses, costs, limits)
        times.append(time.process_time() - started)
    assert min(times) < 1.0
    assert found.bound <= found.loss <= found.bound + 0.03 * abs(found.bound)
    assert all(c <= limit * (1 + 1e-8) for c, limit in zip(found.costs, limits, strict=True))


def test_no_choice_within_the_budgets_is_known_quickly():
    losses, costs = instance(np.random.default_rng(2), 100, 1000, True)
    assert solve(losses, costs, [150.0, 150.0]) is None


def test_budgets_without_an_end_take_the_least_loss():
    losses, costs = instance(np.random.default_rng(3), 5, 9, True)
    found = solve(losses, costs, [np.inf, np.inf])
    assert found.loss == pytest.approx(sum(v.min() for v in losses)) and found.prices == (0.0, 0.0)


def test_a_price_is_what_a_unit_is_worth():
    """Two layers whose loss falls by 1 per byte, down to a floor: a byte more saves 1."""
    sizes = np.arange(1.0, 11)
    losses = [10 - sizes, 10 - sizes]
    costs = [np.stack([sizes, np.zeros(10)])] * 2
    found = solve(losses, costs, [12.0, 5.0])
    assert found.loss == pytest.approx(8.0) and found.prices[0] == pytest.approx(1.0) and found.prices[1] == 0.0


# candidates -----------------------------------------------------------------------------------------------------------


def candidate(n_bytes, ms, loss, form="svd", bits=32):
    return Candidate(form, 1, bits, n_bytes, n_bytes, ms, loss)


def test_only_what_is_beaten_in_all_three_is_left_out():
    kept = [candidate(10, 1.0, 0.5), candidate(5, 2.0, 0.5), candidate(5, 3.0, 0.4)]
    beaten = [candidate(11, 1.0, 0.5), candidate(10, 1.5, 0.6)]
    dense = candidate(40, 9.0, 0.9, "dense")
    assert set(undominated([*beaten, dense, *kept])) == {*kept, dense}


LAYERS = [[candidate(b, t, 1 / b + 1 / t) for b in (10, 20, 40) for t in (1.0, 2.0, 4.0)] for _ in range(4)]
FIXED = Fixed(100, 2.0)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(120, 50.0), "at least 140 bytes"),
        (Limits(1000, 5.9), "at least 6 ms"),
        (Limits(1000, 1.0), "2 of which no layer can give back"),
        (Limits(99, None), "at least 140 bytes"),
    ],
)
def test_what_cannot_be_met_names_the_nearest(limits, words):
    with pytest.raises(BudgetError, match=words) as e:
        choose(LAYERS, limits, FIXED)
    assert e.value.exit_code == 11


def test_budgets_that_only_fail_together_name_both_ways_out_and_both_can_be_met():
    layers = [[candidate(10, 4.0, 0.1), candidate(40, 1.0, 0.1)] for _ in range(4)]
    with pytest.raises(BudgetError) as e:
        choose(layers, Limits(200, 8.0), FIXED)
    assert e.value.expected == "at least 260 bytes within 8 ms, or 12 ms within 200 bytes"
    found = choose(layers, Limits(260, 8.0), FIXED)
    assert (found.n_bytes, found.ms) == (260, 6.0)
    assert choose(layers, Limits(200, 12.0), FIXED).fits(Limits(200, 12.0))


def test_of_choices_that_lose_as_much_the_smaller_and_faster_is_taken():
    layers = [
        [candidate(10, 1.0, 0.2, "dense", 8), candidate(40, 1.0, 0.0, "dense"), candidate(20, 1.0, 0.0)]
        for _ in range(3)
    ]
    found = choose(layers, Limits(1000, 50.0), FIXED)
    assert {c.n_bytes for c in found.candidates} == {20} and found == Chosen.of(
        found.candidates, FIXED, bound=found.bound, prices=found.prices
    )


def test_a_looser_budget_never_loses_more():
    losses = [choose(LAYERS, Limits(b, 20.0), FIXED).loss for b in range(140, 265, 5)]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(losses))


def test_what_the_solver_prints_by_itself_is_kept_off_stdout(monkeypatch, capfd):
    """HiGHS calls printf at times; with --json, stdout holds one object and nothing else."""
    native, asked = ctypes.CDLL(None), []

    def talking(*args, **kwargs):
        asked.append(native.printf(b"a line of debugging\n"))
        return milp(*args, **kwargs)

    monkeypatch.setattr(two_budgets, "milp", talking)
    for seed in range(20):
        losses, costs = instance(np.random.default_rng(seed), 4, 5, False)
        solve(losses, costs, (150.0, 150.0))
    native.fflush(None)
    print("results")
    assert asked and capfd.readouterr().out == "results\n"

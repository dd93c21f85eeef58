"""The verb `plan` and its file from outside: what was asked exactly, what is said truly, what is refused early."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lrcompress.errors import BudgetError
from lrcompress.factorize import form
from lrcompress.model.surgery import Layer
from lrcompress.plan import (
    Budget,
    Option,
    allocate,
    chosen,
    menus_of,
    ratio_budget,
    within,
)
from tests.support.plans import LAYERS, plan_of
from tests.support.weights import randn

# budgets --------------------------------------------------------------------------------------------------------------


@given(whole=st.integers(1, 10**7), parts=st.integers(1, 10_000))
@example(whole=100, parts=2900)
def test_a_ratio_is_the_decimal_number_that_was_typed(whole, parts):
    """0.29 of 100 is 29, though 0.29 * 100 is 28.999999999999996."""
    layers = [replace(LAYERS[2], weight=torch.empty(0))]
    assert ratio_budget(layers, parts / 10_000, whole).limit == whole * parts // 10_000


@given(least=st.integers(1, 10**6), more=st.integers(0, 10**6))
@example(least=29, more=71)
@settings(deadline=None)
def test_the_nearest_ratio_that_is_named_can_be_met(least, more):
    """Whatever the sizes are: asked again with the number of the message, there is an answer."""
    whole = least + more
    layer = Layer("z", "linear", torch.empty(0), "in --exclude")
    menus = menus_of([layer], "svd", {})
    too_few = Budget("params", least - 1, least, "--ratio", 0.1, whole)
    with pytest.raises(BudgetError) as e:
        within(menus, too_few)
    nearest = float(e.value.expected.split()[2])
    limit = ratio_budget([layer], nearest, least, whole).limit
    assert limit >= least and limit - least <= whole * 1e-4 + 1
    within(menus, replace(too_few, limit=limit))


@pytest.mark.parametrize("unit", ["params", "bytes"])
def test_the_nearest_number_is_one_that_can_be_typed(unit):
    menus = menus_of(LAYERS, "svd", {}, unit=unit)
    budget = Budget(unit, 10, 5000, f"--max-{unit}", 10, 100_000)
    with pytest.raises(BudgetError) as e:
        within(menus, budget)
    nearest = int(e.value.expected.split()[2])  # without commas, as the command line takes it
    assert within(menus, replace(budget, limit=nearest)).cost == nearest - 5000
    with pytest.raises(BudgetError):
        within(menus, replace(budget, limit=nearest - 1))


@pytest.mark.parametrize("unit", ["params", "bytes"])
def test_a_looser_budget_never_costs_more(unit):
    """With one step per layer per unit the hull is everything, and greedy steps are the optimum."""
    options = []
    for k in range(5):
        losses = [100.0 * (k + 1) * 0.8**i for i in range(12)] + [0.0]
        options.append([Option(i + 1, v, "dense" if v == 0 else "svd", i + 1, i + 1) for i, v in enumerate(losses)])
    losses = [allocate(options, budget, unit).loss for budget in range(5, 66)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses)) and losses[-1] == 0.0


def option(cost, loss):
    return Option(cost, loss, "dense" if loss == 0 else "svd", 1, cost)


def test_what_is_left_is_spent_on_an_upgrade_that_is_not_on_the_hull():
    """From 1 the hull goes to 10 at once, which does not fit; the step to 6 does."""
    found = allocate([[option(1, 10.0), option(6, 9.0), option(10, 0.0)]], 7)
    assert found.cost == 6 and found.loss == 9.0


def test_two_layers_trade_where_no_single_step_pays():
    """Greedy steps buy the steeper one and leave no room; giving it back pays for the larger gain."""
    options = [[option(0, 10.0), option(4, 4.0), option(9, 0.0)], [option(0, 20.0), option(8, 9.0), option(30, 0.0)]]
    found = allocate(options, 8)
    assert found.cost == 8 and found.loss == 19.0


@pytest.mark.parametrize("seed", range(30))
def test_the_bound_is_the_best_that_any_price_gives(seed):
    """max over λ ≥ 0 of Σ min (loss + λ cost) − λ budget, which is piecewise linear: its corners are at slopes."""
    rng = np.random.default_rng(seed)
    options = []
    for _ in range(5):
        costs = np.unique(rng.integers(1, 60, 6))
        losses = np.sort(rng.random(len(costs)))[::-1]
        options.append(
            [option(int(c), float(v)) for c, v in zip(costs[:-1], losses, strict=False)] + [option(int(costs[-1]), 0.0)]
        )
    least, most = (sum(o[i].n_params for o in options) for i in (0, -1))
    budget = least + int(rng.uniform(0.1, 0.9) * (most - least))
    slopes = {(a.loss - b.loss) / (b.n_params - a.n_params) for o in options for a, b in itertools.combinations(o, 2)}
    best = max(sum(min(p.loss + s * p.n_params for p in o) for o in options) - s * budget for s in {0.0, *slopes})
    assert allocate(options, budget).bound == pytest.approx(max(best, 0.0), abs=1e-12)


@pytest.mark.parametrize("multiple", [1, 4, 7, 8])
def test_ranks_are_multiples_or_whole(multiple):
    for m in menus_of(LAYERS, "auto", {}, multiple=multiple):
        for o in m.options:
            if o.form == "dense":
                continue
            top = form(o.form).full_rank(m.layer.shape)
            pairs = [(o.rank, top)] if isinstance(top, int) else list(zip(o.rank, top, strict=True))
            assert all(r % multiple == 0 or r == t for r, t in pairs), o


@pytest.mark.parametrize("method", ["svd", "auto"])
@pytest.mark.parametrize("unit", ["params", "bytes"])
def test_no_option_is_as_large_as_its_layer_and_none_is_beaten(method, unit):
    for m in menus_of(LAYERS, method, {}, unit=unit):
        costs = [o.cost(unit) for o in m.options]
        losses = [o.loss for o in m.options]
        assert m.dense.form == "dense" and m.dense.loss == 0.0 and m.dense.n_bytes == 4 * m.dense.n_params
        assert costs == sorted(set(costs)) and losses == sorted(losses, reverse=True)
        assert len(set(losses[:-1])) == len(losses) - 1, "dense is kept beside an option that loses nothing either"
        if m.layer.reason is not None:
            assert m.options == (m.dense,)


# what is said ---------------------------------------------------------------------------------------------------------


def test_reasons_are_true():
    menus = menus_of([Layer("t", "linear", randn(2, 2).float())], "svd", {})  # rank 1 takes 4 numbers of 4
    [choice] = chosen(menus, [menus[0].dense])
    assert len(menus[0].options) == 1 and choice.reason == "would not shrink"
    [m] = menus_of([LAYERS[0]], "svd", {})
    assert "worth more" in chosen([m], [m.dense])[0].reason
    kept = chosen(menus_of([LAYERS[3]], "svd", {}), [menus_of([LAYERS[3]], "svd", {})[0].dense])
    assert kept[0].reason == "in --exclude"


def test_a_form_is_called_slow_only_where_it_would_be_smaller():
    for m in menus_of(LAYERS, "auto", {}):
        for name in m.slow:
            points = m.layer.curve(name, None)
            smaller = [p for p in points if p.n_params < m.layer.weight.numel()]
            assert smaller, f"{m.layer.name}: {name} never shrinks it"
            assert all(form(name).n_macs(m.layer.shape, p.rank, 1) > m.layer.weight.numel() for p in smaller)
    [tiny] = menus_of([Layer("t", "linear", randn(2, 2).float())], "svd", {})
    assert tiny.slow == ()


def test_every_rejected_alternative_compares_itself_rightly():
    plan, menus = plan_of(), {m.layer.name: m for m in menus_of(LAYERS, "auto", {})}
    seen = 0
    for row in plan.layers:
        own = menus[row.choice.name]
        assert len({r.form for r in row.rejected}) == len(row.rejected)
        for r in row.rejected:
            if r.form == "dense" or r.form in own.slow:
                continue
            option = next(o for o in own.forms[r.form] if o.rank == r.rank)
            more = option.n_params - row.choice.n_params
            assert (f"{more:,} params more" in r.why) == (more > 0)
            assert (f"{-more:,} params fewer" in r.why) == (more < 0)
            assert option.loss > row.predicted_loss or more > 0 or "no gain" in r.why or "as many" in r.why
            seen += 1
    assert seen >= 4

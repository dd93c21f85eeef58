"""Which layer takes which form and rank: budgets hold, no layer grows, the allocation is near the best there is."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from lrcompress.errors import BudgetError, PlanError
from lrcompress.factorize import Statistics, form
from lrcompress.model.surgery import Layer, tensors_as_layers
from lrcompress.plan import Option, allocate, read_plan, select
from lrcompress.plan.options import hull


def layer(
    name: str, *shape: int, seed: int = 0, decay: float = 0.8, bias: bool = True, reason: str | None = None
) -> Layer:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, v = torch.linalg.svd(w.reshape(shape[0], -1), full_matrices=False)
    w = ((u * decay ** torch.arange(len(s), dtype=torch.float64)) @ v).reshape(shape)
    return Layer(name, "conv" if len(shape) > 2 else "linear", w, reason, bias)


LAYERS = [
    layer("a", 32, 48),
    layer("b", 24, 16, 3, 3, seed=1, decay=0.9),
    layer("c", 40, 20, seed=2, decay=0.6),
    layer("d", 4, 4, seed=3),
]


@pytest.mark.parametrize("method", ["svd", "auto", "kronecker", "tucker", "spatial_svd"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8, 1.0])
def test_a_ratio_is_never_exceeded(method, ratio):
    fixed = 100
    try:
        choices = select(LAYERS, method=method, statistics={}, ratio=ratio, fixed_params=fixed)
    except BudgetError as e:
        assert method in ("tucker", "spatial_svd", "kronecker", "svd") and float(e.expected.split()[2]) > ratio
        return
    before = fixed + sum(n.weight.numel() for n in LAYERS)
    after = fixed + sum(c.n_params for c in choices)
    assert after <= ratio * before
    assert all(c.n_params <= n.weight.numel() for c, n in zip(choices, LAYERS, strict=True))
    if ratio < 1:
        assert after >= (ratio - 0.06) * before, "a budget is there to be used"


def test_the_numbers_promised_are_the_numbers_stored():
    for c, n in zip(select(LAYERS, method="auto", statistics={}, ratio=0.5), LAYERS, strict=True):
        if c.form != "dense":
            assert form(c.form).decompose(n.weight, c.rank).n_params == c.n_params


def test_a_bias_that_the_mean_needs_is_counted():
    bare = layer("a", 32, 48, bias=False)
    stats = {"a": Statistics(gram=torch.eye(48, dtype=torch.float64), mean=torch.ones(48, dtype=torch.float64))}
    [choice] = select([bare], method="svd", statistics=stats, rank=4)
    assert choice.n_params == 4 * (32 + 48) + 32


def test_rank_and_break_even():
    [a, b, c, d] = select(LAYERS, method="svd", statistics={}, rank=16)
    assert (a.rank, b.rank) == (16, 16) and a.n_params == 16 * 80
    assert c.form == "dense" and "would not shrink" in (c.reason or "")  # 16·60 numbers, dense has 800
    assert d.form == "dense" and d.rank == 0


def test_tucker_takes_the_rank_on_both_sides():
    [choice] = select([layer("b", 24, 16, 3, 3)], method="tucker", statistics={}, rank=8)
    assert choice.rank == (8, 8) and choice.n_params == 16 * 8 + 8 * 8 * 9 + 8 * 24


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_is_the_smallest_rank_that_keeps_it(energy):
    [choice] = select([LAYERS[0]], method="svd", statistics={}, energy=energy)
    s = torch.linalg.svdvals(LAYERS[0].weight).square()
    kept = s.cumsum(0) / s.sum()
    expected = int((kept < energy - 1e-12).sum()) + 1
    if choice.form == "svd":
        assert choice.rank == expected
    else:
        assert form("svd").n_params((32, 48), expected) >= 32 * 48


def test_reasons_are_kept():
    grouped = layer("g", 8, 8, reason="grouped convolution (2 groups)")
    [choice] = select([grouped], method="svd", statistics={}, ratio=1.0)
    assert (choice.form, choice.reason) == ("dense", "grouped convolution (2 groups)")


def test_an_impossible_ratio_names_the_nearest():
    with pytest.raises(BudgetError, match="at least 0") as e:
        select(LAYERS, method="svd", statistics={}, ratio=0.001)
    assert e.value.exit_code == 11


def test_the_allocation_is_near_the_best_by_brute_force():
    """Over random instances: within the budget, never worse than 1.35 times the optimum, equal to it in most."""
    g = torch.Generator().manual_seed(0)
    exact = 0
    for _ in range(60):
        options = []
        for _ in range(4):
            costs = torch.randint(1, 60, (5,), generator=g).sort().values.unique()
            losses = torch.rand(len(costs), generator=g).sort(descending=True).values
            losses[-1] = 0.0
            options.append(
                [Option(int(c), float(v), "dense" if v == 0 else "svd", 1) for c, v in zip(costs, losses, strict=True)]
            )
        least, most = sum(o[0].n_params for o in options), sum(o[-1].n_params for o in options)
        budget = (least + most) // 2
        best = min(
            sum(o.loss for o in pick) for pick in itertools.product(*options) if sum(o.n_params for o in pick) <= budget
        )
        chosen = allocate(options, budget).chosen
        assert sum(o.n_params for o in chosen) <= budget
        loss = sum(o.loss for o in chosen)
        assert loss <= best * 1.35 + 0.12
        exact += abs(loss - best) < 1e-12
    assert exact >= 25


def test_the_hull_is_convex_and_keeps_both_ends():
    options = [
        Option(1, 10.0, "svd", 1),
        Option(2, 9.5, "svd", 2),
        Option(3, 4.0, "svd", 3),
        Option(6, 0.0, "dense", 0),
    ]
    kept = hull(options)
    assert kept[0] is options[0] and kept[-1] is options[-1] and options[1] not in kept


def plan_file(tmp_path, layers, schema=1):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"schema": schema, "layers": layers}))
    return path


def test_a_plan_is_followed_and_the_rest_stays_dense(tmp_path):
    path = plan_file(
        tmp_path, [{"name": "a", "form": "svd", "rank": 3}, {"name": "b", "form": "tucker", "rank": [4, 5]}]
    )
    a, b, c, d = read_plan(path, LAYERS)
    assert (a.form, a.rank, b.form, b.rank) == ("svd", 3, "tucker", (4, 5))
    assert c.form == d.form == "dense" and c.reason == "not in the plan"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "a", "form": "svd", "rank": 33}, ["layers[0] (a)", "1…32", "33"]),
        ({"name": "a", "form": "svd", "rank": 0}, ["1…32", "got 0"]),
        ({"name": "a", "form": "svd", "rank": [3, 3]}, ["a rank in"]),
        ({"name": "a", "form": "svd", "rank": True}, ["a rank in"]),
        ({"name": "b", "form": "tucker", "rank": [25, 3]}, ["ranks in", "[25, 3]"]),
        ({"name": "a", "form": "tucker", "rank": [3, 3]}, ["a form for a linear layer"]),
        ({"name": "zz", "form": "svd", "rank": 3}, ["a layer of this model", "zz"]),
        ({"name": "a"}, ["name, form and rank"]),
        ("a", ["an object"]),
    ],
)
def test_a_wrong_plan_is_refused_with_where_and_why(tmp_path, entry, words):
    with pytest.raises(PlanError) as e:
        read_plan(plan_file(tmp_path, [entry]), LAYERS)
    assert e.value.exit_code == 3 and all(w in str(e.value) for w in words), str(e.value)


def test_files_that_are_no_plan(tmp_path):
    (tmp_path / "x").write_text("{")
    for path in (tmp_path / "x", tmp_path / "missing", plan_file(tmp_path, [], schema=2)):
        with pytest.raises(PlanError):
            read_plan(path, LAYERS)
    with pytest.raises(PlanError, match="each layer once"):
        read_plan(plan_file(tmp_path, [{"name": "a", "form": "svd", "rank": 3}] * 2), LAYERS)


def test_layers_of_a_bare_state_dict():
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 4), "fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3),
        "conv.weight": torch.zeros(4, 3, 3, 3), "dw.weight": torch.zeros(4, 1, 3, 3), "bn.weight": torch.zeros(4), "ids.weight": torch.zeros(2, 2, dtype=torch.int64),
    }  # fmt: skip
    found = {n.name: (n.kind, n.reason, n.has_bias) for n in tensors_as_layers(tensors)}
    assert found["model.embed_tokens"][0] == "embedding" and found["fc"] == ("linear", None, True)
    assert found["conv"] == ("conv", None, False) and "depthwise" in found["dw"][1] and "int64" in found["ids"][1]
    assert "bn" not in found

"""Plans: budgets in two units, bounds that hold, a file that people can read, edit and be told what is wrong with."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

import lrcompress
from lrcompress.cli.main import run
from lrcompress.data import Data
from lrcompress.errors import BudgetError, CommandError, PlanError
from lrcompress.factorize import form
from lrcompress.plan import Option, allocate
from lrcompress.plan.options import menu
from tests.contracts.test_depth import SPEC, images
from tests.support.residual import residual

DATA = Data.of_arrays({"x": images(96).numpy()})


def instance(seed, layers=4, options=5):
    """Return random options per layer: losses fall as costs rise, dense last."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(layers):
        costs = torch.randint(1, 60, (options,), generator=g).unique()
        losses = torch.rand(len(costs), generator=g).sort(descending=True).values
        losses[-1] = 0.0
        out.append(
            [Option(int(c), float(v), "dense" if v == 0 else "svd", 1) for c, v in zip(costs, losses, strict=True)]
        )
    return out


@pytest.mark.parametrize("seed", range(40))
def test_no_allocation_is_below_the_bound_and_the_one_found_is_not_below_the_best(seed):
    options = instance(seed)
    least, most = (sum(o[i].n_params for o in options) for i in (0, -1))
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        budget = least + int(share * (most - least))
        best = min(sum(o.loss for o in p) for p in itertools.product(*options) if sum(o.n_params for o in p) <= budget)
        found = allocate(options, budget)
        assert found.cost == sum(o.n_params for o in found.chosen) <= budget
        assert found.bound <= best + 1e-9 and best <= found.loss + 1e-12
        assert found.loss <= best * 1.35 + 0.12


def test_a_budget_below_the_cheapest_is_an_error():
    with pytest.raises(ValueError, match="the budget is 1"):
        allocate(instance(0), 1)


def test_ranks_are_multiples_and_bytes_count_permutations():
    from lrcompress.plan.selection import Layer

    layer = Layer("a", "linear", torch.randn(48, 64, generator=torch.Generator().manual_seed(0)))
    found = menu(layer, "pivoted", None, comparable=False, unit="bytes", multiple=8)
    assert {o.rank for o in found.options if o.form == "pivoted"} <= set(range(8, 49, 8))
    for o in found.options[:-1]:
        made = form("pivoted").decompose(layer.weight, o.rank)
        assert o.n_params == made.n_params
        assert o.n_bytes == sum(t.numel() * t.element_size() for t in made.factors.values())
    assert found.dense.n_bytes == layer.weight.numel() * 4 and all(
        o.n_bytes < found.dense.n_bytes for o in found.options[:-1]
    )


def planned(tmp_path, **how):
    torch.save(residual().state_dict(), tmp_path / "m.pt")
    arch = {"arch": "tests.support.residual:residual", "inputs": SPEC, "calib": DATA, "cache": False}
    return lrcompress.plan(tmp_path / "m.pt", **arch, **how), arch


def test_the_file_says_what_was_chosen_rejected_and_why(tmp_path):
    found, _ = planned(tmp_path, ratio=0.5, output=tmp_path / "plan.json")
    value = json.loads((tmp_path / "plan.json").read_text())
    assert value["schema"] == 1 and set(value["budget"]) == {"params"} and len(value["model_digest"]) == 64
    for layer in value["layers"]:
        assert {"name", "form", "rank", "bits", "predicted_loss", "measured_loss", "bytes", "ms", "rejected"} <= set(
            layer
        )
        assert all({"form", "rank", "bits", "why"} == set(r) and r["why"] for r in layer["rejected"])
        assert layer["form"] not in {r["form"] for r in layer["rejected"]}
    changed = [n for n in value["layers"] if n["form"] != "dense"]
    assert changed and all("dense" in {r["form"] for r in n["rejected"]} for n in changed)
    assert all(n["measured_loss"] is not None for n in changed)
    assert value["bound"] <= value["predicted_loss"] * (1 + 1e-5) and value["measured_loss"] > 0
    assert found.data["params_after"] <= 0.5 * found.data["params_before"]
    planned(tmp_path, ratio=0.5, output=tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_plan_applied_is_the_budget_asked_for(tmp_path):
    _, arch = planned(tmp_path, ratio=0.5, output=tmp_path / "plan.json")
    by_plan = lrcompress.factorize(tmp_path / "m.pt", plan=tmp_path / "plan.json", **arch)
    by_ratio = lrcompress.factorize(tmp_path / "m.pt", ratio=0.5, **arch)
    ranks = lambda made: [(n["name"], n["form"], n["rank"]) for n in made.data["layers"]]  # noqa: E731
    assert ranks(by_plan) == ranks(by_ratio)
    for name, value in by_plan.model.state_dict().items():
        assert torch.equal(value, by_ratio.model.state_dict()[name])


def test_an_edited_plan_is_followed_and_checked(tmp_path):
    _, arch = planned(tmp_path, ratio=0.5, output=tmp_path / "plan.json")
    path, value = tmp_path / "plan.json", json.loads((tmp_path / "plan.json").read_text())
    [conv2] = [n for n in value["layers"] if n["name"] == "conv2"]

    def ask(**change):
        conv2.update(change)
        path.write_text(json.dumps(value))
        return lrcompress.factorize(tmp_path / "m.pt", plan=path, **arch)

    rows = {n["name"]: n for n in ask(form="svd", rank=3).data["layers"]}
    assert (rows["conv2"]["form"], rows["conv2"]["rank"]) == ("svd", 3)
    with pytest.raises(PlanError, match="1…12, got 13"):
        ask(rank=13)
    for wrong in (3, 8.0, "8", True):
        with pytest.raises(PlanError, match="bits 32, 16, 8, 4"):
            ask(rank=3, bits=wrong)
    for wrong in (8, 32.0, "32", True):
        with pytest.raises(PlanError, match="block 16, 32, 64, 128, 256"):
            ask(bits=4, block=wrong)
    del conv2["block"]
    conv2["bits"], digest = 32, value["model_digest"]
    value["model_digest"] = "0" * 64
    with pytest.raises(PlanError, match="a plan for this model") as e:
        ask()
    assert e.value.exit_code == 3 and digest[:12] in str(e.value)
    del value["model_digest"]
    assert ask().data["layers"]


def test_an_impossible_budget_names_one_that_works(tmp_path):
    for how, ask in (("ratio", float), ("max_params", int), ("max_bytes", int)):
        with pytest.raises(BudgetError) as e:
            planned(tmp_path, **{how: ask(1) if how != "ratio" else 0.01}, quick=True)
        assert e.value.exit_code == 11
        nearest = ask(e.value.expected.split()[2].replace(",", ""))
        found, _ = planned(tmp_path, **{how: nearest}, quick=True)
        assert found.plan.layers


def test_a_file_that_is_no_plan_is_not_replaced(tmp_path):
    (tmp_path / "plan.json").write_text('{"mine": 1}')
    with pytest.raises(CommandError, match="a plan to replace"):
        planned(tmp_path, ratio=0.5, quick=True, output=tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 2), (["--ratio", "0.5", "--max-bytes", "1MB"], 2), (["--ratio", "1.5"], 2), (["--max-bytes", "6 parsecs"], 2),
        (["--ratio", "0.5", "--method", "svdd"], 2), (["--ratio", "0.5", "--rank-multiple", "0"], 2), (["--max-bytes", "1kB"], 11),
    ],
)  # fmt: skip
def test_the_command_refuses_what_makes_no_sense(tmp_path, monkeypatch, capsys, options, code):
    monkeypatch.chdir(tmp_path)
    torch.save(residual().state_dict(), "m.pt")
    command = [
        "plan",
        "m.pt",
        "--arch",
        "tests.support.residual:residual",
        "--input",
        "x:float32:batch,3,8,8",
        "--json",
    ]
    assert run([*command, *options]) == code, capsys.readouterr()
    assert not (tmp_path / "plan.json").exists()


def test_the_command_writes_and_shows_a_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(residual().state_dict(), "m.pt")
    np.savez("x.npz", x=images(48).numpy())
    command = ["plan", "m.pt", "--arch", "tests.support.residual:residual", "--calib", "x.npz", "--max-bytes", "14kB"]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "conv2" in shown and "budget 14,000 bytes" in shown
    value = json.loads((tmp_path / "plan.json").read_text())
    assert sum(n["bytes"] for n in value["layers"]) <= 14_000
    assert run([*command, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["output"] == "plan.json" and found["layers"] == value["layers"]

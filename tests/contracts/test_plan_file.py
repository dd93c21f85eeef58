"""The file of a plan, sizes and options: what was planned is what is applied, and what does not fit is said early."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompress
from lrcompress.cli.main import run
from lrcompress.cli.plan import Size
from lrcompress.data import Data
from lrcompress.errors import CommandError, HostError, PlanError
from lrcompress.factorize import form, forms
from lrcompress.model import open_model
from lrcompress.plan import (
    Choice,
    read_plan,
    write_plan,
)
from lrcompress.plan.options import serves
from lrcompress.plan.selection import dense
from tests.support.plans import LAYERS, plan_of

# the file -------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    plan = plan_of()
    write_plan(tmp_path / "p.json", plan)
    found = read_plan(tmp_path / "p.json", LAYERS, "f" * 64)
    assert [(c.name, c.form, c.rank) for c in found] == [(c.name, c.form, c.rank) for c in plan.choices]
    assert {c.name: c.reason for c in found}["d"] == "in --exclude"
    text = (tmp_path / "p.json").read_text()
    value = json.loads(text)
    assert text == json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_plan(tmp_path / "p.json", plan)
    assert (tmp_path / "p.json").read_text() == text and [p.name for p in tmp_path.iterdir()] == ["p.json"]
    assert [n["name"] for n in value["layers"]] == [n.name for n in LAYERS], "layers keep the order of the network"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_takes_nothing_keeps_the_plan_that_is_there(tmp_path, monkeypatch, number):
    write_plan(tmp_path / "p.json", plan_of())
    before = (tmp_path / "p.json").read_bytes()

    def refuse(self, target):
        raise OSError(number, "refused")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(HostError) as e:
        write_plan(tmp_path / "p.json", plan_of(ratio=0.4))
    assert e.value.exit_code == 10
    assert (tmp_path / "p.json").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["p.json"]


RANKS = st.one_of(
    st.integers(-2, 60),
    st.lists(st.integers(-1, 40), max_size=4),
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=3),
)
ENTRIES = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b", "c", "d", "g", "zz", 5, None, ["a"]]), "form": st.sampled_from([*forms(), "dense", "x", 7, None, []])},
    optional={"rank": RANKS, "bits": st.sampled_from([32, 8, None, "32", 32.0, True, []]), "why": st.text(max_size=3)},
)  # fmt: skip


@given(entries=st.lists(st.one_of(ENTRIES, st.none(), st.integers(), st.lists(st.integers(), max_size=2)), max_size=4))
@settings(deadline=None, max_examples=300)
def test_any_list_of_layers_is_a_plan_or_says_why_not(tmp_path_factory, entries):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps({"schema": 1, "layers": entries}))
    try:
        found = read_plan(path, LAYERS)
    except PlanError as e:
        assert "layers[" in str(e) and "\n" not in str(e)
        return
    assert [c.name for c in found] == [n.name for n in LAYERS]
    for c, layer in zip(found, LAYERS, strict=True):
        if c.form != "dense":
            assert layer.reason is None and serves(c.form, layer)
            assert c.n_params == form(c.form).n_params(layer.shape, c.rank)


def test_a_layer_that_must_stay_dense_stays_so(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"schema": 1, "layers": [{"name": "d", "form": "svd", "rank": 2}]}))
    with pytest.raises(PlanError, match="in --exclude") as e:
        read_plan(path, LAYERS)
    assert "layers[0] (d)" in str(e.value)


@given(data=st.binary(max_size=60))
def test_any_bytes_are_no_plan_and_are_not_replaced(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(data)
    with pytest.raises(PlanError):
        read_plan(path, LAYERS)
    with pytest.raises(CommandError):
        write_plan(path, plan_of(LAYERS[2:4], ratio=1.0))
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"schema": 1}', '{"schema": 1, "layers": {}}', '{"schema": 2, "layers": []}', '{"schema": null, "layers": []}',
     "[" * 100_000, '{"schema": 1, "layers": 3}'],
    ids=range(8),
)  # fmt: skip
def test_values_that_are_no_plan(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(PlanError) as e:
        read_plan(tmp_path / "p.json", LAYERS)
    assert e.value.exit_code == 3 and len(str(e.value)) < 900


# sizes and options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6MB", 6_000_000), ("512 KiB", 524_288), ("1500000", 1_500_000), ("1.005MB", 1_005_000), ("0.1gb", 100_000_000), (" 7 b ", 7),
     ("1.0000000000000001kb", 1000)],
)  # fmt: skip
def test_sizes_are_exact(text, expected):
    assert Size().convert(text, None, None) == expected


@given(whole=st.integers(0, 999_999), part=st.integers(0, 999))
def test_thousandths_of_a_megabyte_are_whole(whole, part):
    assert Size().convert(f"{whole}.{part:03}MB", None, None) == whole * 10**6 + part * 1000


@pytest.mark.parametrize("text", ["6 parsecs", "MB", "-3MB", "1e3", "0x10", "", "1,5MB", "nanMB"])
def test_what_is_no_size(text):
    import click

    with pytest.raises(click.UsageError):
        Size().convert(text, None, None)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(24, 32), nn.Linear(32, 6)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def wide():
    torch.manual_seed(0)
    return Wide().eval()


X = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)


@pytest.mark.parametrize(
    "how",
    [{"ratio": math.nan}, {"ratio": math.inf}, {"ratio": -0.5}, {"ratio": 0.0}, {"max_params": 0}, {"max_bytes": -4},
     {"ratio": 0.5, "max_params": 3}, {}, {"ratio": 0.5, "multiple": 0}, {"ratio": 0.5, "method": "shared"}],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_any_work(how):
    with pytest.raises(CommandError) as e:
        lrcompress.plan(wide(), **how)
    assert e.value.exit_code == 2


def test_a_foreign_file_is_refused_before_any_work(tmp_path, monkeypatch):
    from lrcompress.verbs import plan as verb

    (tmp_path / "plan.json").write_text("mine")
    monkeypatch.setattr(verb, "prepare", lambda *a, **k: pytest.fail("an hour of work would end in a refusal"))
    with pytest.raises(CommandError, match="a plan to replace"):
        lrcompress.plan(wide(), ratio=0.5, output=tmp_path / "plan.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CommandError):
        lrcompress.plan(wide(), ratio=0.5, output=tmp_path / "folder")


def test_a_missing_folder_is_made_and_a_file_is_none(tmp_path):
    lrcompress.plan(wide(), ratio=0.8, output=tmp_path / "new" / "er" / "plan.json")
    assert json.loads((tmp_path / "new" / "er" / "plan.json").read_text())["schema"] == 1
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CommandError, match="below folders"):
        lrcompress.plan(wide(), ratio=0.8, output=tmp_path / "file" / "plan.json")
    assert (tmp_path / "file").read_text() == "mine"


def stored_bytes(module):
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["ratio", "max_params", "max_bytes"])
def test_budgets_hold_for_what_is_stored(tmp_path, how, dtype):
    net = wide().to(dtype)
    numbers, size = sum(p.numel() for p in net.parameters()), stored_bytes(net)
    asked = {"ratio": 0.7, "max_params": int(0.7 * numbers), "max_bytes": int(0.7 * size)}[how]
    data = Data.of_arrays({"x": X.astype(str(dtype).removeprefix("torch."))})
    about = {"calib": data, "cache": False}
    found = lrcompress.plan(net, **{how: asked}, **about, output=tmp_path / "p.json")
    made = lrcompress.factorize(net, plan=tmp_path / "p.json", **about)
    if how == "max_bytes":
        assert stored_bytes(made.model) <= asked
        assert stored_bytes(made.model) - size == sum(
            p.n_bytes - dense(n, "").n_params * n.weight.element_size()
            for p, n in zip(found.plan.layers, linear_layers(net), strict=True)
        )
    else:
        left = sum(p.numel() for p in made.model.parameters())
        assert left <= 0.7 * numbers and found.data["params_after"] == left


def linear_layers(net):
    from lrcompress.model.surgery import find_layers

    return find_layers(net)


def test_a_plan_is_the_same_whatever_ran_before(tmp_path):
    about = {"calib": Data.of_arrays({"x": X}), "cache": False, "ratio": 0.6}
    lrcompress.plan(wide(), **about, output=tmp_path / "one.json")
    torch.manual_seed(123)
    torch.randn(7)
    network = wide()
    kept = {k: v.clone() for k, v in network.state_dict().items()}
    lrcompress.plan(network, **about, output=tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert all(torch.equal(kept[k], v) for k, v in network.state_dict().items()), "the network is left as it is"


def test_quick_measures_nothing(monkeypatch):
    from lrcompress.fit import Judge

    monkeypatch.setattr(Judge, "loss", lambda self, network: pytest.fail("measured"))
    found = lrcompress.plan(wide(), ratio=0.6, calib=Data.of_arrays({"x": X}), cache=False, quick=True)
    assert found.data["measured_loss"] is None and all(n["measured_loss"] is None for n in found.data["layers"])


def test_select_is_what_is_measured_on(monkeypatch):
    from lrcompress.verbs import planning

    seen = []
    judged = planning.judged
    monkeypatch.setattr(planning, "judged", lambda data: seen.append(data) or judged(data))
    select = Data.of_arrays({"x": X[:32] + 1})
    lrcompress.plan(wide(), ratio=0.6, calib=Data.of_arrays({"x": X}), select=select, cache=False)
    assert seen == [select]


@pytest.mark.parametrize("multiple", [4, 8])
def test_multiples_from_the_command_line_to_the_layers(tmp_path, monkeypatch, capsys, multiple):
    monkeypatch.chdir(tmp_path)
    torch.save(wide().state_dict(), "m.pt")
    np.savez("x.npz", x=X)
    common = ["m.pt", "--arch", "tests.contracts.test_plan_file:wide", "--calib", "x.npz", "--no-cache", "--json"]
    asked = ["--ratio", "0.7", "--rank-multiple", str(multiple), "--method", "svd"]
    assert run(["plan", *common, *asked]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["ok"] and planned["output"] == "plan.json"
    ranks = {n["name"]: (n["form"], n["rank"]) for n in planned["layers"]}
    assert any(f != "dense" for f, _ in ranks.values())
    assert all(f == "dense" or r % multiple == 0 or r == 6 for f, r in ranks.values())
    for how in (asked, ["--plan", "plan.json"]):
        assert run(["factorize", *common, *how, "-o", "made"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert {n["name"]: (n["form"], n["rank"]) for n in made["layers"]} == ranks


def test_a_plan_for_another_model_and_a_digest_that_was_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(wide().state_dict(), "m.pt")
    other = wide()
    with torch.no_grad():
        other.one.weight.mul_(2)
    torch.save(other.state_dict(), "other.pt")
    arch = ["--arch", "tests.contracts.test_plan_file:wide", "--json"]
    assert run(["plan", "m.pt", *arch, "--ratio", "0.7"]) == 0
    capsys.readouterr()
    assert run(["factorize", "other.pt", *arch, "--plan", "plan.json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "plan" and "model_digest" in error["remedy"] and not Path("compressed").exists()
    value = json.loads(Path("plan.json").read_text())
    del value["model_digest"]
    Path("plan.json").write_text(json.dumps(value))
    assert run(["factorize", "other.pt", *arch, "--plan", "plan.json"]) == 0
    assert run(["plan", "m.pt", *arch, "--ratio", "0.7"]) == 0, "an edited plan is ours all the same"


def test_choices_of_a_plan_are_values():
    plan = plan_of()
    assert all(isinstance(c, Choice) for c in plan.choices) and json.dumps(plan.as_json(), allow_nan=False)
    assert open_model(wide()).digest == lrcompress.plan(wide(), ratio=0.8).data["model_digest"]

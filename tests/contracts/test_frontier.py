"""The pieces of `make bench-frontier`: rows are files, domination is told beyond noise, promises that break are named."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from lrcompress.data import Data
from lrcompress.model import InputSpec, open_model
from tests.benchmarks.bench_frontier import budgets
from tests.benchmarks.frontier.comparing import broken_promises, dominated, dominates, measure, table
from tests.benchmarks.frontier.rows import ONE_LINE, OURS, PLANNER, Kept, Row, dense_rows
from tests.benchmarks.frontier.subjects import Subject
from tests.support.archs import mobilenet, resnet8
from tests.support.nets import small


def row(name, n_bytes, value, ms, group=OURS, stderr=0.01, spread=0.01):
    return Row(name, group, b"x" * n_bytes, value, stderr, 100, {1: ms, 2: ms / 1.5}, {1: spread, 2: spread})


def test_better_in_all_three_dominates_and_better_in_two_does_not():
    base = row("base", 1000, 0.90, 1.0)
    assert dominates(row("a", 900, 0.92, 0.8), base, "max")
    assert dominates(row("a", 900, 0.90, 1.0), base, "max")
    assert not dominates(row("a", 900, 0.92, 1.1), base, "max")
    assert not dominates(row("a", 1100, 0.92, 0.8), base, "max")
    assert not dominates(row("a", 900, 0.89, 0.8), base, "max")
    assert not dominates(base, base, "max")


def test_less_is_better_where_the_metric_says_so():
    base = row("base", 1000, 1.50, 1.0)
    assert dominates(row("a", 900, 1.40, 0.9), base, "min") and not dominates(row("a", 900, 1.60, 0.9), base, "min")


def test_differences_within_noise_are_none():
    base = row("base", 1000, 0.900, 1.0, spread=0.05)
    assert not dominates(row("a", 999, 0.902, 0.97), base, "max")
    assert dominates(row("a", 999, 0.902, 0.90), base, "max")


def test_every_thread_counts():
    base, other = row("base", 1000, 0.9, 1.0), row("a", 900, 0.9, 0.9)
    other.ms[2] = 2.0
    assert not dominates(other, base, "max")


def test_a_choice_that_one_line_beats_is_a_broken_promise():
    plain, ours = row("quantize_static", 900, 0.91, 0.9, ONE_LINE), row("dense int8", 800, 0.92, 0.8)
    good, bad = row("planned", 700, 0.90, 0.7, PLANNER), row("planned badly", 1000, 0.88, 1.0, PLANNER)
    lost = Row("planned, not had", PLANNER, why_not="no budget")
    rows = [plain, ours, good, bad, lost]
    assert broken_promises(rows, "max") == ["planned badly is beaten by quantize_static"]
    assert dominated(rows, "max") == {
        "quantize_static": ["dense int8"],
        "dense int8": [],
        "planned": [],
        "planned badly": ["quantize_static", "dense int8", "planned"],
    }
    text = table("net", rows, "max")
    assert "not had: no budget" in text and "planned badly" in text.splitlines()[5]
    assert text.splitlines()[5].endswith("quantize_static, dense int8, planned")


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    where = tmp_path_factory.mktemp("frontier")
    torch.save(small().state_dict(), where / "m.pt")
    opened = open_model(
        where / "m.pt", arch="tests.support.nets:small", inputs=(InputSpec("x", "float32", ("batch", 3, 8, 8)),)
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 3, 8, 8)).astype(np.float32)
    return Subject(
        "small", opened, Data.of_arrays({"x": x}), Data.of_arrays({"x": x}, labels=rng.integers(0, 4, 80)), "accuracy"
    )


def test_the_lines_of_the_runtime_give_smaller_files_that_run(subject):
    rows = list(dense_rows(subject))
    assert [r.name for r in rows] == ["dense fp32", "quantize_dynamic", "quantize_static"]
    assert all(r.graph or r.why_not for r in rows) and rows[0].graph and rows[2].graph
    measure(rows, subject.request(), [1], rounds=2, seconds=0.01)
    assert all(r.ms[1] > 0 for r in rows if r.graph)
    assert "QuantizeLinear" in {n.op_type for n in onnx.ModelProto.FromString(rows[2].graph).graph.node}


def test_the_networks_without_a_recipe_have_the_shapes_of_their_files():
    with torch.no_grad():
        assert mobilenet()(torch.zeros(1, 3, 160, 160)).shape == (1, 1000)
        assert resnet8()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in mobilenet().parameters()) == 1_326_120 - 0


def test_rows_that_are_kept_come_back_without_their_times(tmp_path):
    kept = Kept(tmp_path)
    assert kept.get("planned, 8 MB") is None
    kept.put(row("planned, 8 MB", 10, 0.9, 1.0, PLANNER))
    kept.put(Row("planned as none", PLANNER, why_not="no budget"))
    back, lost = kept.get("planned, 8 MB"), kept.get("planned as none")
    assert back is not None and (back.graph, back.value, back.group, back.ms) == (b"x" * 10, 0.9, PLANNER, {})
    assert lost is not None and not lost.graph and lost.why_not == "no budget"


def test_budgets_are_those_of_each_line_and_those_that_were_asked_for():
    plain = [row("dense fp32", 1000, 0.9, 1.0, ONE_LINE), row("quantize_static", 300, 0.9, 0.8, ONE_LINE)]
    found = list(budgets(plain, 1, [0.0002]))
    assert [f[1:] for f in found] == [(300, 0.8), (300, None), (1000, 0.7), (200, None)]

"""Operator times: graphs without onnx are what they say, timing shrugs off disturbance, tables are checked, prices follow."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from lrcompress.cli.main import run
from lrcompress.errors import CommandError, ProfileError
from lrcompress.latency import KINDS, Probe, profile_device, profiling, read_table, sizes, timing, wire, write_table
from lrcompress.latency import measuring as timed
from lrcompress.latency.operators import network
from lrcompress.plan.prices import Prices
from lrcompress.runtime import session_options
from tests.support.latency import formula, table

# graphs ---------------------------------------------------------------------------------------------------------------


@given(
    value=st.one_of(
        st.integers(-(2**63), 2**63 - 1), st.floats(width=32, allow_nan=False), st.lists(st.integers(-5, 2**40))
    )
)
@settings(max_examples=60, deadline=None)
def test_attributes_are_read_back_by_onnx(value):
    node = wire.Node("Op", ["x"], ["y"], {"a": value})
    data = wire.model([node], inputs={"x": (wire.FLOAT, (1,))}, outputs={"y": wire.FLOAT}, constants={})
    [attribute] = onnx.ModelProto.FromString(data).graph.node[0].attribute
    found = onnx.helper.get_attribute_value(attribute)
    assert list(found) == value if isinstance(value, list) else found == value


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int8", "int32", "int64"])
def test_constants_are_read_back_by_onnx(dtype):
    value = np.arange(300, dtype=np.int64).astype(dtype).reshape(3, 100)
    data = wire.model([], inputs={}, outputs={}, constants={"w": value})
    [tensor] = onnx.ModelProto.FromString(data).graph.initializer
    assert tensor.name == "w" and np.array_equal(numpy_helper.to_array(tensor), value)
    assert numpy_helper.to_array(tensor).dtype == value.dtype


CONTEXT = onnx.checker.C.CheckerContext()
CONTEXT.ir_version, CONTEXT.opset_imports = wire.IR_VERSION, {"": wire.OPSET}
SMALLEST = {(p.kind, p.bits): p for p in sorted(sizes(True), key=lambda p: -np.prod(p.dims))}


@pytest.mark.parametrize("key", sorted(SMALLEST), ids=lambda k: f"{k[0]}-{k[1]}")
def test_every_probe_is_a_valid_graph_that_runs(key):
    probe = SMALLEST[key]
    for copies in (0, 1, 3):
        graph = probe.graph(copies)
        for node in onnx.ModelProto.FromString(graph.data).graph.node:
            if not node.domain:
                onnx.checker.check_node(node, CONTEXT)
        session = ort.InferenceSession(graph.data, session_options(1), providers=["CPUExecutionProvider"])
        assert len(session.run(list(graph.outputs), dict(graph.feeds))) == len(graph.outputs)


def _optimized(probe, tmp_path):
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    ort.InferenceSession(probe.graph(3).data, options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node]


@pytest.mark.parametrize(
    ("probe", "op"),
    [
        (Probe("matmul", 32, (4, 32, 48)), "MatMul"),
        (Probe("matmul", 8, (4, 32, 48)), "DynamicQuantizeMatMul"),
        (Probe("matmul", 4, (4, 32, 48)), "MatMulNBits"),
        (Probe("conv", 8, (16, 16, 3, 3, 8, 8, 1)), "QLinearConv"),
        (Probe("conv", 32, (16, 16, 3, 3, 8, 8, 2)), "Conv"),
        (Probe("Softmax", 32, (16, 8)), "Softmax"),
        (Probe("Slice", 32, (1024,)), "Slice"),
        (Probe("LayerNormalization", 32, (16, 64)), "LayerNormalization"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_what_runs_is_what_is_called_so(probe, op, tmp_path):
    """The optimizer neither merges the copies nor leaves an int8 product in pieces."""
    found = _optimized(probe, tmp_path)
    assert found.count(op) >= 3, found


def test_the_network_of_mixed_operators_is_what_it_is_priced_as(tmp_path):
    graph, block = network(32, 2)
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    ort.InferenceSession(graph.data, options, providers=["CPUExecutionProvider"])
    assert len(onnx.load(tmp_path / "o.onnx").graph.node) == 2 * len(block)
    assert {Probe(*o) for o in block} <= set(sizes()) and {k for k, _, _ in block} <= set(KINDS)


# timing ---------------------------------------------------------------------------------------------------------------


def test_a_disturbed_round_does_not_count():
    quiet = timing([1.0, 1.02, 0.99, 1.01])
    assert timing([1.0, 1.02, 0.99, 7.0, 30.0]).ms == pytest.approx(quiet.ms, rel=0.01)
    assert timing([1.0, 1.02, 0.99, 7.0, 30.0]).spread < 0.05 < timing([1.0, 1.2, 1.4]).spread
    assert timing([2.0]).ms == 2.0 and timing([0.0, 0.0]).ms > 0


def test_what_surrounds_the_copies_is_taken_off(monkeypatch):
    """A graph of n copies takes the surroundings and n times the operator."""
    own = Probe("Add", 32, (4096,))

    def fake(graph, threads, seconds, least=5):
        return 0.5 + 0.02 * sum(n.op_type == "Add" for n in onnx.ModelProto.FromString(graph.data).graph.node)

    monkeypatch.setattr(timed, "run_ms", fake)
    found = timed.measure([own], 1, rounds=2, seconds=0.001, progress=profiling.Silent())
    assert found[own].ms == pytest.approx(0.02) and found[own].spread < 1e-9


def test_rounding_ranks_up_is_free_where_kernels_work_in_blocks():
    def times(block):
        return {r: timed.Timing(-(-r // block) * block * 1e-3, 0.0) for r in range(32, 65)}

    assert [profiling.rank_multiple(times(b)) for b in (1, 4, 16)] == [1, 4, 16]


# tables ---------------------------------------------------------------------------------------------------------------


def test_a_table_comes_back_as_it_was(tmp_path):
    written = replace(table(), rank_multiple={32: 8, 8: 4}, among={1: [(80.0, 2e5, 0.001)], 2: []}, seconds=12.3)
    write_table(tmp_path / "t.json", written)
    found = read_table(tmp_path / "t.json")
    assert found.rows[5].ms == pytest.approx(written.rows[5].ms, rel=1e-4)
    assert replace(found, rows=written.rows) == written and found.differs_from_here() is None
    write_table(tmp_path / "t.json", written)  # its own kind is replaced
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CommandError, match="something else"):
        write_table(tmp_path / "other.json", written)
    assert (tmp_path / "other.json").read_text() == "{}"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "t.json"
    write_table(path, table((1,)))
    return path.read_text()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t[: len(t) // 2], "whole JSON"),
        (lambda t: t[:-40], "whole JSON"),
        (lambda t: "", "whole JSON"),
        (lambda t: "[1, 2]", "got list"),
        (lambda t: "[" * 100_000, "whole JSON"),
        (lambda t: json.dumps({"made_by": "lrcompress plan"}), "lrcompress plan"),
        (lambda t: t.replace('"schema": 1', '"schema": 7'), "schema 1"),
        (lambda t: t.replace("0.01", "0.02", 1), "altered"),
    ],
)
def test_a_file_that_is_no_whole_table_is_told(text, tmp_path, change, word):
    path = tmp_path / "t.json"
    path.write_text(change(text))
    with pytest.raises(ProfileError, match=word) as e:
        read_table(path)
    assert e.value.exit_code == 3 and "device profile" in e.value.remedy


@pytest.mark.parametrize(
    "rows", [[], [["matmul", 32, 1, [8, 8, 8], 0.0, 0.0]], [["matmul", 32, 1, [8, 8, 8], 1.0, 0.0]], [["matmul"]]]
)
def test_rows_that_mean_nothing_are_told_even_with_a_good_digest(tmp_path, rows):
    from lrcompress.files import sha256_json

    body = {k: v for k, v in table((1,)).as_json().items() if k != "digest"} | {"rows": rows}
    (tmp_path / "t.json").write_text(json.dumps({**body, "digest": sha256_json(body)}))
    with pytest.raises(ProfileError, match="rows of a latency table"):
        read_table(tmp_path / "t.json")


def test_another_machine_and_another_runtime_are_told():
    own = table((1,))
    assert "ONNX Runtime 1.0.0" in replace(own, ort="1.0.0").differs_from_here()
    assert "Cray" in replace(own, machine={**own.machine, "cpu": "Cray"}).differs_from_here()


# prices ---------------------------------------------------------------------------------------------------------------


def test_measured_sizes_cost_what_was_measured():
    own = table((1,))
    prices = Prices(own, 1)
    for row in own.rows:
        assert prices.ms(row.kind, row.bits, row.dims) == pytest.approx(row.ms, rel=0.05), row


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("dims", [(1, 384, 1536), (32, 384, 96), (77, 200, 333), (128, 64, 64), (5, 24, 700)])
def test_sizes_between_are_interpolated(bits, dims):
    probe = Probe("matmul", bits, dims)
    assert Prices(table((1,), quick=False), 1).ms("matmul", bits, dims) == pytest.approx(formula(probe), rel=0.1)


def test_convolutions_between_are_interpolated():
    prices = Prices(table((1,), quick=False), 1)
    for dims in ((48, 48, 3, 3, 14, 14, 1), (96, 24, 1, 1, 28, 28, 1), (24, 40, 3, 3, 10, 10, 2)):
        for bits in (32, 8):
            assert prices.ms("conv", bits, dims) == pytest.approx(formula(Probe("conv", bits, dims)), rel=0.15), dims


def test_what_a_kernel_likes_is_learnt_beside_the_roofline():
    """One size that is half as fast as the roofline says is priced so, its neighbours partly, far ones not."""
    own = table((1,), quick=False)
    odd = (32, 384, 384)
    rows = tuple(replace(r, ms=2 * r.ms) if (r.kind, r.bits, r.dims) == ("matmul", 32, odd) else r for r in own.rows)
    prices, plain = Prices(replace(own, rows=rows), 1), Prices(own, 1)
    assert prices.ms("matmul", 32, odd) > 1.8 * formula(Probe("matmul", 32, odd))
    ratio = prices.ms("matmul", 32, (1, 8, 8)) / plain.ms("matmul", 32, (1, 8, 8))
    assert abs(ratio - 1) < 0.05


def test_what_was_not_measured_is_guessed_and_said():
    prices = Prices(table((1,)), 1)
    assert prices.ms("Bernoulli", 32, (4096,)) == pytest.approx(prices.ms("Add", 32, (4096,)))
    assert prices.guessed == {"Bernoulli"}
    assert prices.ms("conv_odd", 8, (16, 13, 3, 3, 8, 8, 1)) == prices.ms("conv", 8, (16, 13, 3, 3, 8, 8, 1))
    with pytest.raises(ProfileError, match="times for 4 threads"):
        Prices(table((1,)), 4)


def test_more_threads_are_their_own_prices():
    own = table()
    one, two = Prices(own, 1), Prices(own, 2)
    assert one.ms("matmul", 32, (32, 96, 96)) / two.ms("matmul", 32, (32, 96, 96)) == pytest.approx(1.6, rel=0.01)


# the command ----------------------------------------------------------------------------------------------------------

FEW = [
    Probe("matmul", 32, (1, 8, 8)),
    Probe("Add", 32, (4,)),
    Probe("Add", 32, (4096,)),
    Probe("conv", 32, (16, 16, 3, 3, 8, 8, 1)),
]


@pytest.fixture
def few(monkeypatch):
    blocks = [Probe(*o) for width in (32, 128, 384) for o in network(width, 1)[1]]
    monkeypatch.setattr(profiling, "sizes", lambda quick=False: [*FEW, *blocks])


def test_the_command_measures_this_machine(few, tmp_path, capsys):
    out = tmp_path / "t.json"
    assert run(["device", "profile", "-o", str(out), "--threads", "1", "--quick", "--json", "-q"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = read_table(out)
    assert told["ok"] and told["threads"] == [1] and told["ort"] == ort.__version__ and told["rows"] == len(found.rows)
    assert {(r.kind, r.dims) for r in found.rows} >= {(p.kind, p.dims) for p in FEW}
    assert all(0 < r.ms < 1e3 for r in found.rows) and found.run_ms[1] > 0
    by_dims = {r.dims: r.ms for r in found.rows if r.kind == "Add"}
    assert by_dims[(4,)] < 1.0


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--threads", "0"], "at least 1"), (["--threads", "200"], "cores"), (["--threads", "x"], "list of numbers")],
)
def test_threads_that_are_none_are_refused(options, word, tmp_path, capsys):
    assert run(["device", "profile", "-o", str(tmp_path / "t.json"), *options]) == 2
    assert word in capsys.readouterr().err and not (tmp_path / "t.json").exists()


def test_a_file_that_is_something_else_is_refused_before_minutes_are_spent(tmp_path, monkeypatch):
    (tmp_path / "t.json").write_text("mine")
    monkeypatch.setattr("lrcompress.latency.profile_device", lambda **k: pytest.fail("measured"))
    assert run(["device", "profile", "-o", str(tmp_path / "t.json")]) == 2
    assert (tmp_path / "t.json").read_text() == "mine"


def test_layout_changes_are_priced_by_what_a_convolution_that_does_nothing_takes_more():
    dims = (16, 16, 1, 1, 8, 8, 1)
    rows = [profiling.Row("reorder", 32, 1, dims, 0.5, 0.0), profiling.Row("depthwise", 32, 1, dims, 0.1, 0.0)]
    [reorder, _] = profiling._without_convolutions(rows)
    assert reorder.dims == (16 * 64,) and reorder.ms == pytest.approx(0.2)


def test_a_quick_profile_measures_fewer_sizes():
    assert len(sizes(True)) < len(sizes()) / 2 and {p.kind for p in sizes(True)} == {p.kind for p in sizes()}
    assert profile_device is not None

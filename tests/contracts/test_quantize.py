"""int8 shrinks what it should, answers close to fp32, and leaves adapter slots exactly as they were."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from lrcompress.errors import LrcompressWarning, ModelError
from lrcompress.export.quantize import branch_nodes, quantize, quantize_int8, renamed
from tests.support.graphs import Graph, adapter, batches, cnn, mlp, run


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def images(n: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("slot", [True, False])
def test_a_calibrated_cnn_is_a_quarter_of_the_size_and_close(slot: bool) -> None:
    model, slots = cnn(slot)
    small = quantize_int8(model, slots=slots, calibration=batches(images(32)))
    weights = sum(np.prod(t.dims) for t in model.graph.initializer if t.name.endswith("weight"))
    stored = {t.name: t for t in small.graph.initializer}
    assert sum(np.prod(t.dims) for t in stored.values() if t.data_type == TensorProto.INT8) >= weights
    assert not [
        n for n, t in stored.items() if t.data_type == TensorProto.FLOAT and np.prod(t.dims) > 64 and n not in slots
    ]
    assert small.ByteSize() < (0.5 if slot else 0.36) * model.ByteSize()
    x = images(64)
    assert relative(run(model, x=x), run(small, x=x)) < 0.03
    if slot:
        feeds = adapter(model, slots, rank=4)
        moved, expected = run(small, x=x, **feeds), run(model, x=x, **feeds)
        assert relative(run(model, x=x), expected) > 0.2, "the adapter must matter for this test"
        assert relative(expected, moved) < 0.03


@pytest.mark.parametrize("form", ["matmul", "gemm", "transposed"])
@pytest.mark.parametrize("slot", [True, False])
def test_products_are_quantized_in_every_form(form: str, slot: bool) -> None:
    model, slots = mlp(form, slot)
    small = quantize_int8(model, slots=slots, calibration=None)
    assert sum(n.op_type == "MatMulInteger" for n in small.graph.node) == 2
    assert sum(n.op_type == "MatMul" for n in small.graph.node) == (4 if slot else 0), "branches stay as they are"
    x = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    assert relative(run(model, x=x), run(small, x=x)) < 0.03
    assert sorted(renamed(small, ["fc0.weight", "fc1.weight", "fc0.bias"])) == ["fc0.bias", "fc0.weight", "fc1.weight"]
    if slot:
        feeds = adapter(model, slots, rank=5)
        assert relative(run(model, x=x, **feeds), run(small, x=x, **feeds)) < 0.03


def test_slots_are_what_they_were_and_the_source_is_not_touched() -> None:
    model, slots = cnn()
    before = model.SerializeToString(deterministic=True)
    small = quantize_int8(model, slots=slots, calibration=batches(images(8)))
    assert model.SerializeToString(deterministic=True) == before
    assert [i.SerializeToString() for i in small.graph.input] == [i.SerializeToString() for i in model.graph.input]
    defaults = {t.name: numpy_helper.to_array(t) for t in small.graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.name in slots:
            assert np.array_equal(defaults[tensor.name], numpy_helper.to_array(tensor))
    session = ort.InferenceSession(small.SerializeToString(), providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_overridable_initializers()} == set(slots)
    assert [i.name for i in session.get_inputs()] == ["x"]
    assert (small.ir_version, small.producer_name) == (10, "tests") and not small.metadata_props


def test_the_same_model_gives_the_same_bytes() -> None:
    model, slots = cnn()
    one, two = (quantize_int8(model, slots=slots, calibration=batches(images(8))) for _ in range(2))
    assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)


def test_without_calibration_convolutions_stay_and_this_is_said() -> None:
    model, slots = cnn()
    with pytest.warns(LrcompressWarning, match="calibration"):
        small = quantize_int8(model, slots=slots, calibration=None)
    assert not any(n.op_type == "QuantizeLinear" for n in small.graph.node)
    assert any(n.op_type == "MatMulInteger" for n in small.graph.node)
    x = images(8)
    assert relative(run(model, x=x), run(small, x=x)) < 0.02


def test_an_embedding_is_rows_of_int8_with_their_scales() -> None:
    g = Graph()
    table = (g.rng.standard_normal((500, 32)) * np.geomspace(1e-3, 10, 500)[:, None]).astype(np.float32)
    table[7] = 0
    x = g.node("Gather", [g.constant("emb.weight", table), "ids"], "rows", axis=0)
    model = g.model("ids", TensorProto.INT64, ["batch"], x, 32)
    small = quantize_int8(model, slots=[], calibration=None)
    assert small.ByteSize() < 0.3 * model.ByteSize()
    ids = np.arange(500)
    difference = np.abs(run(small, ids=ids) - table)
    assert (difference <= np.abs(table).max(axis=1, keepdims=True) / 254 * 1.001).all(), (
        "half a step of the row's own scale"
    )
    assert not difference[7].any()


@pytest.mark.parametrize("by_name", [False, True])
def test_a_table_that_is_also_a_weight_works_in_both_places(by_name: bool) -> None:
    g = Graph()
    table = g.weight("emb.weight", 300, 32)
    x = g.node("Gather", [table, "ids"], "rows", axis=0)
    w = g.node("Transpose", [table], "emb.t", perm=[1, 0])
    model = g.model("ids", TensorProto.INT64, ["batch"], g.node("MatMul", [x, w], "scores"), 300)
    small = quantize(model, {"emb.weight": 8} if by_name else 8, slots=[], calibration=None).model
    ids = np.arange(64)
    assert relative(run(model, ids=ids), run(small, ids=ids)) < 0.03
    assert not [t.name for t in small.graph.initializer if t.data_type == TensorProto.FLOAT and np.prod(t.dims) > 300]


def test_branches_end_where_they_are_added() -> None:
    model, slots = mlp("matmul")
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}{i}:{node.output[0]}"
    found = {n.partition(":")[2] for n in branch_nodes(model.graph, slots)}
    assert found == {"fc0.h", "fc0.d", "fc0.sum", "fc1.h", "fc1.d", "fc1.sum"}


def test_a_slot_that_is_none_is_refused() -> None:
    model, slots = mlp("matmul")
    with pytest.raises(ModelError, match=r"slot fc9\.lora_A: expected a graph input with a default, got none"):
        quantize_int8(model, slots=[*slots, "fc9.lora_A"], calibration=None)


def test_the_tools_say_nothing_and_leave_logging_alone(capfd: pytest.CaptureFixture[str]) -> None:
    handlers, disabled = list(logging.getLogger().handlers), logging.root.manager.disable
    model, slots = cnn()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_int8(model, slots=slots, calibration=batches(images(8)))
    assert logging.getLogger().handlers == handlers and logging.root.manager.disable == disabled
    assert capfd.readouterr() == ("", "")

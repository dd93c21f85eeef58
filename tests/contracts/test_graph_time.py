"""Whole graphs: operators as the runtime leaves them, by their sizes at run time; forms by their own forward pass."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from lrcompress.errors import ModelError
from lrcompress.factorize import ConvGeometry, form, forms
from lrcompress.latency import Probe
from lrcompress.latency.profiling import keeps_blocks
from lrcompress.model.surgery import Layer
from lrcompress.plan.form_time import Place, layer_ms, steps_of
from lrcompress.plan.graph_time import graph_time, request_operators
from lrcompress.plan.prices import Prices
from tests.support.latency import formula, table

BLOCKS = keeps_blocks()


def graph(nodes, inputs, constants, outputs=("y",)):
    made = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, t, d) for n, t, d in inputs],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def products(dims=("n", 32)):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Gemm", ["h", "v", "b"], ["y"], transB=1)]
    constants = {"w": normal(32, 48), "v": normal(24, 48), "b": normal(24)}
    return graph(nodes, [("x", TensorProto.FLOAT, dims)], constants)


def kinds(found):
    return sorted((o.kind, o.bits, o.dims, o.times) for o in found if o.kind not in ("Relu", "Transpose"))


def test_products_are_priced_by_their_rows_at_run_time():
    data = products().SerializeToString()
    for rows in (1, 7):
        found = request_operators(data, {"x": normal(rows, 32)}, blocked=False)
        assert kinds(found) == [("matmul", 32, (rows, 32, 48), 1), ("matmul", 32, (rows, 48, 24), 1)]


@pytest.mark.parametrize(
    ("axis", "priced"),
    [(2, ("take", 32, (2 * 6 * 4,), 1)), (1, ("gather", 32, (2 * 4, 5), 1)), (0, ("gather", 32, (4, 30), 1))],
)
def test_picking_along_the_last_axis_goes_number_by_number(axis, priced):
    data = graph(
        [helper.make_node("Gather", ["x", "order"], ["y"], axis=axis)], [("x", TensorProto.FLOAT, [2, 6, 5])],
        {"order": np.array([1, 0, 1, 0])},
    ).SerializeToString()  # fmt: skip
    assert kinds(request_operators(data, {"x": normal(2, 6, 5)}, blocked=False)) == [priced]


def test_products_of_two_activations_are_priced_apart():
    nodes = [helper.make_node("MatMul", ["a", "b"], ["y"])]
    inputs = [("a", TensorProto.FLOAT, [2, 3, 5, 8]), ("b", TensorProto.FLOAT, [2, 3, 8, 9])]
    data = graph(nodes, inputs, {}).SerializeToString()
    found = request_operators(data, {"a": normal(2, 3, 5, 8), "b": normal(2, 3, 8, 9)}, blocked=False)
    assert kinds(found) == [("bmm", 32, (6, 5, 8, 9), 1)]


def test_dynamic_int8_is_one_operator(tmp_path):
    onnx.save(products(), tmp_path / "f.onnx")
    quantize_dynamic(tmp_path / "f.onnx", tmp_path / "q.onnx", weight_type=QuantType.QInt8)
    found = request_operators(tmp_path / "q.onnx", {"x": normal(3, 32)}, blocked=False)
    assert [k for k in kinds(found) if k[0] == "matmul"] == [
        ("matmul", 8, (3, 32, 48), 1),
        ("matmul", 8, (3, 48, 24), 1),
    ]


@pytest.mark.parametrize(
    ("weight", "about", "expected"),
    [
        ((16, 8, 3, 3), {"pads": [1, 1, 1, 1]}, ("conv", 32, (8, 16, 3, 3, 12, 10, 1), 1)),
        ((16, 8, 1, 1), {"strides": [2, 2]}, ("conv", 32, (8, 16, 1, 1, 6, 5, 2), 1)),
        ((13, 8, 3, 1), {"pads": [1, 0, 1, 0]}, ("conv_odd", 32, (8, 13, 3, 1, 12, 10, 1), 1)),
        ((8, 1, 3, 3), {"group": 8, "pads": [1, 1, 1, 1]}, ("depthwise", 32, (8, 8, 3, 3, 12, 10, 1), 1)),
        ((16, 4, 1, 1), {"group": 2}, ("conv", 32, (4, 8, 1, 1, 12, 10, 1), 2)),
    ],
)
@pytest.mark.parametrize("blocked", [False, *([True] if BLOCKS else [])])
def test_convolutions_are_priced_by_what_they_write(weight, about, expected, blocked):
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], **about)]
    data = graph(nodes, [("x", TensorProto.FLOAT, ["n", 8, 12, 10])], {"w": normal(*weight)}).SerializeToString()
    found = request_operators(data, {"x": normal(1, 8, 12, 10)}, blocked=blocked)
    kind, bits, dims, times = expected
    if blocked and kind == "conv_odd":  # blocks are filled up
        kind, dims = "conv", (dims[0], 16, *dims[2:])
    # Blocks are of 8 channels, of 16 with AVX-512.
    possible = [dims, (16, 16, *dims[2:])] if blocked and kind == "depthwise" else [dims]
    assert any((kind, bits, d, times) in kinds(found) for d in possible)


def test_a_graph_takes_the_sum_of_its_operators(tmp_path):
    onnx.save(products(), tmp_path / "m.onnx")
    prices = Prices(table((1,), quick=False), 1)
    found = graph_time(tmp_path / "m.onnx", {"x": normal(32, 32)}, prices)
    parts = sum(formula(Probe("matmul", 32, d)) for d in ((32, 32, 48), (32, 48, 24)))
    assert found.ms == pytest.approx(prices.run_ms + parts, rel=0.1)
    assert found.ms == pytest.approx(prices.run_ms + sum(found.parts.values()))


def test_operators_among_others_take_longer_by_the_weights_that_pass(tmp_path):
    onnx.save(products(), tmp_path / "m.onnx")
    own = table((1,), among={1: [(10.0, 100.0, 0.01), (10.0, 1e4, 0.11)]})
    plain = graph_time(tmp_path / "m.onnx", {"x": normal(4, 32)}, Prices(table((1,)), 1))
    more = graph_time(tmp_path / "m.onnx", {"x": normal(4, 32)}, Prices(own, 1))
    assert more.ms - plain.ms == pytest.approx(more.parts["(among others)"])
    few = Prices(own, 1)
    assert few.among_ms(100.0, 5) == pytest.approx(0.005)  # each operator as in the smallest network
    assert few.among_ms(1e4, 10) == pytest.approx(0.11) and few.among_ms(2e4, 10) == pytest.approx(0.21)
    assert few.among_ms(0.0, 0) == 0.0


def test_a_graph_that_does_not_run_is_told(tmp_path):
    onnx.save(products(), tmp_path / "m.onnx")
    (tmp_path / "half.onnx").write_bytes((tmp_path / "m.onnx").read_bytes()[:200])
    prices = Prices(table((1,)), 1)
    with pytest.raises(ModelError, match=r"half\.onnx"):
        graph_time(tmp_path / "half.onnx", {"x": normal(4, 32)}, prices)
    with pytest.raises(ModelError, match=r"m\.onnx"):
        graph_time(tmp_path / "m.onnx", {"x": normal(4, 31)}, prices)


# forms ----------------------------------------------------------------------------------------------------------------

SAME = ConvGeometry((1, 1), (1, 1), (1, 1))
CASES = {
    "linear": ((48, 32), 8, Place(rows=16)), "conv": ((24, 16, 3, 3), 8, Place(image=(8, 8), geometry=SAME)),
    "grouped": ((4, 4, 4, 3, 3), 2, Place(image=(8, 8), geometry=SAME)), "embedding": ((64, 32), 8, Place(rows=16)),
}  # fmt: skip
PRICED = [(n, k) for n in forms() if hasattr(form(n), "factor_shapes") for k in sorted(form(n).LAYERS)]


@pytest.mark.parametrize(("name", "kind"), PRICED)
def test_factors_have_the_shapes_that_are_told(name, kind):
    """Bytes and times are told from them. Which way round a spatial pair stands depends on the weight, not its sizes."""
    shape, n, _ = CASES[kind]
    module = form(name)
    rank = module.clip(shape, n)
    made = module.decompose(torch.randn(shape, generator=torch.Generator().manual_seed(0)), rank).factors
    told = module.factor_shapes(shape, rank)
    assert set(made) == set(told)
    assert all(sorted(made[k].shape) == sorted(told[k]) for k in told)
    assert sum(np.prod(told[k]) for k in told if k not in getattr(module, "INTEGER", ())) == module.n_params(
        shape, rank
    )


def test_every_form_that_auto_offers_can_be_priced():
    assert {n for n in forms() if getattr(form(n), "AUTO", True)} == {n for n, _ in PRICED}


@pytest.mark.parametrize(("name", "kind"), PRICED)
def test_a_form_multiplies_what_it_says(name, kind):
    """The products that are watched are the multiply-adds that the form counts (embeddings look rows up instead)."""
    if kind == "embedding":
        return
    shape, n, place = CASES[kind]
    layer, module = Layer("l", kind, torch.empty(shape)), form(name)
    rank = module.clip(shape, n)
    macs = sum(
        s.times * int(np.prod(s.dims[:6]))
        for s in steps_of(name, layer, rank, place)
        if s.kind in ("matmul", "bmm", "conv", "conv_odd")
    )
    assert macs == module.n_macs(shape, rank, 16 if kind == "linear" else 64)


def test_the_dense_layer_is_one_operator():
    for kind, (shape, _, place) in CASES.items():
        [step] = [
            s
            for s in steps_of("dense", Layer("l", kind, torch.empty(shape)), 0, place)
            if s.weighted or s.kind == "gather"
        ]
        assert step.kind == {"linear": "matmul", "conv": "conv", "grouped": "conv", "embedding": "gather"}[kind]


def test_a_form_that_tells_no_shapes_has_no_price():
    assert steps_of("hadamard", Layer("l", "linear", torch.empty(8, 8)), 2, Place(rows=4)) is None


def test_bits_are_those_of_the_constants():
    prices = Prices(table((1,), quick=False), 1)
    layer = Layer("l", "linear", torch.empty(384, 384))
    steps = steps_of("dense", layer, 0, Place(rows=128))
    by_bits = {b: layer_ms(steps, "linear", b, prices) for b in (32, 16, 8, 4)}
    assert by_bits[16] == by_bits[32] > by_bits[4] > by_bits[8]
    image = steps_of("dense", Layer("l", "conv", torch.empty(64, 64, 3, 3)), 0, Place(image=(32, 32), geometry=SAME))
    conv = {b: layer_ms(image, "conv", b, prices) for b in (32, 8, 4)}
    assert conv[4] == conv[32] > conv[8]  # 4 bits of a convolution are widened when the model is loaded
    half = steps_of("svd", layer, 96, Place(rows=128))
    assert layer_ms(half, "linear", 32, prices) < by_bits[32]

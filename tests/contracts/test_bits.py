"""Bits per tensor: what is written is what was fitted, bit for bit; slots survive; what cannot be held says why."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper

import lrcompress
from lrcompress.data import Data
from lrcompress.errors import CommandError, ModelError, ProfileError
from lrcompress.export.needs import Need, check_device, needs
from lrcompress.export.packing.nbits import pack
from lrcompress.export.products import products, put
from lrcompress.export.quantize import quantize, renamed
from lrcompress.export.rewrites import Refusal
from lrcompress.manifest import Manifest
from lrcompress.model import InputSpec, open_model
from lrcompress.plan.profile import load_profile
from lrcompress.runtime import Session
from tests.support.graphs import Graph, adapter, batches, cnn, mlp, run
from tests.support.nets import images, small

SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
X, Y = images(128)


def pictures(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, 32, 32)).astype(np.float32)


def rows(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 64)).astype(np.float32)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def optimized(model: onnx.ModelProto, path) -> onnx.ModelProto:
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(path)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


# what is written is what was fitted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["matmul", "gemm", "transposed"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_products_of_four_bits_hold_the_refitted_values(form, calibrated):
    model, slots = mlp(form)
    calibration = batches(rows(64)) if calibrated else None
    found = quantize(model, 4, slots=slots, calibration=calibration)
    assert sum(n.op_type == "MatMulNBits" for n in found.model.graph.node) == 2
    arrays = stored(found.model)
    for name in ("fc0.weight", "fc1.weight"):
        name = renamed(found.model, [name])[name].removesuffix("_quantized")
        packed, coded = arrays[f"{name}_quantized"], found.coded[name]
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)[:, : coded.codes.shape[1]]
        assert np.array_equal(codes, coded.codes.numpy())
        assert arrays[f"{name}_scale"].dtype == np.float16
        assert np.array_equal(arrays[f"{name}_scale"].astype(np.float32), coded.scales.numpy())
    x = rows(64, seed=5)
    assert relative(run(model, x=x), run(found.model, x=x)) < 0.2
    if slots:
        moved = adapter(model, slots, rank=5)
        base = run(found.model, x=x)
        shift = run(found.model, x=x, **moved) - base
        assert relative(run(model, x=x, **moved) - run(model, x=x), shift) < 0.25, "the branch is where it was"


def test_our_packing_is_that_of_the_runtimes_own_quantizer():
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    w = np.random.default_rng(0).standard_normal((96, 24)).astype(np.float32)
    packed, scale = np.zeros((24, 3, 16), np.uint8), np.zeros((24, 3), np.float32)
    quantize_matmul_4bits(packed, w, scale, np.zeros((24, 2), np.uint8), 32, 24, 96, True)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(24, 96)
    from lrcompress.export.packing import Packed
    from lrcompress.export.refit.grids import Coded, blocks

    g = Graph()
    model = g.model("x", TensorProto.FLOAT, ["batch", 96], g.node("MatMul", ["x", g.constant("w", w)], "y"), 24)
    coded = Coded(
        blocks(4, 32), torch.from_numpy(codes.astype(np.int16)), torch.from_numpy(scale), torch.full((24, 3), 8.0)
    )
    import onnx_ir as ir

    inside = ir.from_proto(model)
    [product] = products(model.graph)
    assert pack(inside, [Packed(product, coded)]).fired == 1
    assert np.array_equal(stored(ir.to_proto(inside))["w_quantized"], packed)


def test_the_int8_tools_reproduce_the_refitted_values():
    """Codes and scales in the graph are those that were fitted, for products and for convolutions."""
    model, slots = cnn(False)
    found = quantize(model, 8, slots=slots, calibration=batches(pictures(32)))
    arrays = stored(found.model)
    checked = 0
    for p in products(model.graph):
        name = renamed(found.model, [p.weight])[p.weight]
        codes, scale = arrays[name], arrays[name.removesuffix("_quantized") + "_scale"]
        if p.kind != "conv":
            codes, scale = codes.T, scale.reshape(-1)
        mine = found.coded[p.weight]
        assert np.array_equal(codes.reshape(len(codes), -1), mine.codes.numpy()), p.weight
        np.testing.assert_allclose(scale, mine.scales.numpy()[:, 0], rtol=1e-6)
        checked += 1
    assert checked == 4


def test_convolutions_of_four_bits_are_dense_when_loaded(tmp_path):
    model, slots = cnn(False)
    found = quantize(model, 4, slots=slots, calibration=batches(pictures(32)))
    arrays = {t.name: t for t in found.model.graph.initializer}
    assert [arrays[f"c{i}.weight_quantized"].data_type for i in (1, 2)] == [TensorProto.INT4] * 2
    assert {o.domain: o.version for o in found.model.opset_import}[""] == 21
    assert found.model.ByteSize() < 0.25 * model.ByteSize()
    ran = optimized(found.model, tmp_path / "o.onnx")
    assert not {"Mul", "Reshape"} & {n.op_type for n in ran.graph.node if n.op_type in ("Mul", "Reshape")}
    held = {tuple(t.dims) for t in ran.graph.initializer}
    assert {(32, 16, 3, 3), (64, 32, 3, 3)} <= held
    x = pictures(16, seed=3)
    assert relative(run(model, x=x), run(found.model, x=x)) < 0.15


@pytest.mark.parametrize("kind", ["conv", "matmul", "gemm", "transposed"])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_only_stored_in_eight_bits_is_computed_as_it_was(kind, bits, tmp_path):
    """Nothing that is read or made is rounded, other weights are what they would be, and no node is left of it."""
    if kind == "conv":
        (model, slots), x, names = cnn(True), pictures(32), ["c1.weight", "c2.weight"]
    else:
        (model, slots), x, names = mlp(kind), rows(64), ["fc0.weight"]
    found = quantize(model, dict.fromkeys(names, bits), slots=slots, calibration=batches(x), stored=names)
    assert {r["bits"] for r in found.rows} == {8} and len(found.rows) == len(names)
    operators = {n.op_type for n in found.model.graph.node}
    assert not operators & {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "MatMulNBits",
    }
    assert {o.version for o in found.model.opset_import} == {o.version for o in model.opset_import}
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for name in names:
        rounded = found.coded[renamed(found.model, [name])[name].removesuffix("_quantized")].values().numpy()
        shape = stored(model)[name].shape
        put(whole.graph, [(name, rounded.T if shape == rounded.T.shape else rounded.reshape(shape))])
    feeds = adapter(model, slots, rank=3)
    put(whole.graph, [(n, v) for n, v in stored(found.model).items() if n.endswith("bias")])
    np.testing.assert_allclose(run(found.model, x=x, **feeds), run(whole, x=x, **feeds), rtol=1e-4, atol=1e-5)
    assert relative(run(model, x=x, **feeds), run(found.model, x=x, **feeds)) < 0.01
    assert found.model.ByteSize() < 0.6 * model.ByteSize()
    left = {n.op_type for n in optimized(found.model, tmp_path / "o.onnx").graph.node}
    assert not left & {"Cast", "Mul", "Reshape", "Transpose"}


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_tables_are_read_row_by_row(bits):
    g = Graph()
    table = (g.rng.standard_normal((500, 64)) * np.geomspace(1e-2, 10, 500)[:, None]).astype(np.float32)
    table[7] = 0
    x = g.node("Gather", [g.constant("emb.weight", table), "ids"], "rows", axis=0)
    model = g.model("ids", TensorProto.INT64, ["batch"], x, 64)
    found = quantize(model, bits, slots=[], calibration=None)
    ids = np.arange(500)
    got = run(found.model, ids=ids)
    if bits < 16:
        assert np.array_equal(got, found.coded["emb.weight"].values().numpy())
    else:
        assert np.array_equal(got, table.astype(np.float16).astype(np.float32))
    expected = {4: "GatherBlockQuantized", 8: "Gather", 16: "Gather"}[bits]
    assert expected in {n.op_type for n in found.model.graph.node}
    assert found.model.ByteSize() < {4: 0.16, 8: 0.29, 16: 0.52}[bits] * model.ByteSize()


def test_a_factorized_table_is_looked_up_and_multiplied_in_four_bits():
    g = Graph()
    decay = np.geomspace(5, 0.05, 32)
    u = (g.rng.standard_normal((400, 32)) * decay).astype(np.float32)
    v = np.linalg.qr(g.rng.standard_normal((96, 32)))[0].T.astype(np.float32)
    z = g.node("Gather", [g.constant("emb.U", u), "ids"], "z", axis=0)
    y = g.node("MatMul", [z, g.constant("emb.V", v)], "y")
    model = g.model("ids", TensorProto.INT64, ["batch"], y, 96)
    found = quantize(model, 4, slots=[], calibration=[{"ids": np.arange(400)}])
    ids = np.arange(400)
    plain = quantize(model, 4, slots=[], calibration=None, refits=False)
    errors = [relative(run(model, ids=ids), run(m.model, ids=ids)) for m in (plain, found)]
    assert errors[1] < 0.9 * errors[0]
    assert {n.op_type for n in found.model.graph.node} >= {"GatherBlockQuantized", "MatMulNBits"}


# slots ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 8, 4, {"c0.weight": 8, "c1.weight": 4, "c2.weight": 16, "fc.weight": 4}])
def test_slots_are_what_they_were(bits):
    model, slots = cnn()
    before = model.SerializeToString(deterministic=True)
    found = quantize(model, bits, slots=slots, calibration=batches(pictures(16)))
    assert model.SerializeToString(deterministic=True) == before
    kept = {i.name: i.type.SerializeToString() for i in found.model.graph.input}
    assert kept == {i.name: i.type.SerializeToString() for i in model.graph.input}
    session = ort.InferenceSession(found.model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_overridable_initializers()} == set(slots)
    defaults = stored(model)
    assert all(np.array_equal(stored(found.model)[s], defaults[s]) for s in slots)
    x, moved = pictures(16, seed=4), adapter(model, slots, rank=4)
    assert relative(run(model, x=x), run(found.model, x=x)) < 0.15
    assert relative(run(model, x=x, **moved), run(found.model, x=x, **moved)) < 0.15


def test_the_same_model_gives_the_same_bytes():
    model, slots = cnn()
    one, two = (quantize(model, 4, slots=slots, calibration=batches(pictures(8))).model for _ in range(2))
    assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)


def test_each_weight_gets_its_own_bits():
    model, slots = mlp("matmul", False)
    found = quantize(model, {"fc0.weight": 4}, slots=slots, calibration=None)
    assert [r["bits"] for r in found.rows] == [4] and stored(found.model)["fc1.weight"].dtype == np.float32
    ops = {n.op_type for n in found.model.graph.node}
    assert "MatMulNBits" in ops and "MatMulInteger" not in ops


# what cannot be held ------------------------------------------------------------------------------------------------------


def one_product(w: np.ndarray, name: str = "w") -> onnx.ModelProto:
    g = Graph()
    y = g.node("MatMul", ["x", g.constant(name, w)], "y")
    return g.model("x", TensorProto.FLOAT, ["batch", w.shape[0]], y, w.shape[1])


@pytest.mark.parametrize(("four", "turned"), [("a", 0), ("b", 0), ("a", 1), ("b", 1)])
def test_a_gemm_of_other_bits_keeps_its_name_beside_one_of_eight(four, turned):
    """The int8 tool rewrites every Gemm of a graph, and renames the weights of those that it is to leave alone."""
    rng = np.random.default_rng(0)
    weights = {"a": (64, 96), "b": (96, 32)}
    tensors = {n: rng.standard_normal(s[::-1] if turned else s).astype(np.float32) for n, s in weights.items()}
    tensors |= {"p": np.ones(96, np.float32), "q": np.zeros(32, np.float32)}
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("Gemm", ["x", "a", "p"], ["h"], transB=turned), node("Relu", ["h"], ["r"]),
            node("Gemm", ["r", "b", "q"], ["y"], transB=turned),
        ], "g", [value("x", TensorProto.FLOAT, ["n", 64])], [value("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(v, n) for n, v in tensors.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    found = quantize(model, {"a": 8, "b": 8, four: 4}, slots=(), calibration=batches(rows(32)), block=32)
    assert {r["name"]: r["bits"] for r in found.rows} == {"a": 8, "b": 8, four: 4}
    assert "MatMulNBits" in {n.op_type for n in found.model.graph.node}
    assert {o.domain for o in found.model.opset_import} <= {"", "com.microsoft"}
    assert relative(run(model, x=rows(8)), run(found.model, x=rows(8))) < 0.15


@pytest.mark.parametrize(
    ("value", "reason"),
    [(1e6, "an entry of 1e+06, beyond the range of 16 bits"), (1e-7, "entries too small for 16 bits")],
)
def test_sixteen_bits_refuse_what_they_lose(value, reason):
    w = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    w = w / np.abs(w).max() * np.float32(value)
    found = quantize(one_product(w), 16, slots=[], calibration=None)
    assert found.refused == [Refusal("w", reason)]
    assert found.rows[0]["bits"] == 32 and found.rows[0]["reason"] == reason
    assert np.array_equal(stored(found.model)["w"], w)


def test_a_table_that_is_also_a_weight_works_in_both_places():
    g = Graph()
    table = g.weight("emb.weight", 300, 32)
    x = g.node("Gather", [table, "ids"], "rows", axis=0)
    w = g.node("Transpose", [table], "emb.t", perm=[1, 0])
    model = g.model("ids", TensorProto.INT64, ["batch"], g.node("MatMul", [x, w], "scores"), 300)
    found = quantize(model, 4, slots=[], calibration=None)
    ids = np.arange(64)
    assert relative(run(model, ids=ids), run(found.model, ids=ids)) < 0.2


@pytest.mark.parametrize("bits", [{"other": 8}, {"emb.weight": 16, "other": 8}, 16], ids=["32", "16", "all 16"])
def test_a_table_that_is_also_a_weight_is_stored_once_where_it_is_not_rounded(bits):
    g = Graph()
    table = g.weight("emb.weight", 300, 32)
    x = g.node("MatMul", [g.node("Gather", [table, "ids"], "rows", axis=0), g.weight("other", 32, 32)], "h")
    w = g.node("Transpose", [table], "emb.t", perm=[1, 0])
    model = g.model("ids", TensorProto.INT64, ["batch"], g.node("MatMul", [x, w], "scores"), 300)
    small = quantize(model, bits, slots=[], calibration=None).model
    numbers = [int(np.prod(t.dims)) for t in small.graph.initializer]
    assert numbers.count(300 * 32) == 1
    width = 4 if bits == {"other": 8} else 2
    assert small.ByteSize() < width * 300 * 32 + 4500
    ids = np.arange(64)
    assert relative(run(model, ids=ids), run(small, ids=ids)) < 0.03


def test_what_no_operator_reads_in_fewer_bits_is_stored_in_sixteen():
    """A left operand, and a tensor that no product reads; one without elements stays what it is."""
    g = Graph()
    left = g.node("MatMul", [g.weight("left", 24, 64), "x"], "l")
    wide = g.node("Add", [left, g.constant("table", np.ones((24, 16), np.float32))], "w")
    y = g.node("Concat", [wide, g.constant("none", np.zeros((0, 16), np.float32))], "c", axis=0)
    model = g.model("x", TensorProto.FLOAT, [64, 16], y, 16)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    for d in (24, 16):
        model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = d
    for bits in (16, 8, 4):
        found = quantize(model, bits, slots=[], calibration=None)
        arrays = stored(found.model)
        assert {n: str(a.dtype) for n, a in arrays.items()} == {
            "left_quantized": "float16", "table_quantized": "float16", "none": "float32"
        }  # fmt: skip
        x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
        assert relative(run(model, x=x), run(found.model, x=x)) < 1e-3


def test_rows_of_an_odd_number_of_codes_take_eight_bits():
    g = Graph()
    x = g.node("Gather", [g.weight("emb.weight", 700, 33), "ids"], "rows", axis=0)
    found = quantize(g.model("ids", TensorProto.INT64, ["batch"], x, 33), 4, slots=[], calibration=None)
    assert [r["bits"] for r in found.rows] == [8] and stored(found.model)["emb.weight_quantized"].dtype == np.int8


# the verb -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits")
    torch.save(small().state_dict(), folder / "model.pt")
    arch = {"arch": "tests.support.nets:small", "inputs": SPEC}
    names = {"conv1": 8, "conv2": 4, "mix": 16, "fc1": 4, "fc2": 32}
    layers = [{"name": n, "form": "dense", "rank": 0, "bits": b} for n, b in names.items()]
    layers[1] |= {"form": "tucker", "rank": [12, 12]}
    layers[3] |= {"form": "svd", "rank": 16, "block": 128}
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"schema": 1, "made_by": "lrcompress plan", "layers": layers}))
    lrcompress.factorize(folder / "model.pt", plan=plan, output=folder / "compressed", **arch)
    lrcompress.factorize(folder / "model.pt", rank=4, output=folder / "plain", **arch)
    return folder


def test_a_plan_carries_its_bits_to_the_export(base, tmp_path):
    spec = json.loads((base / "compressed" / "lrcompress.json").read_text())
    assert spec["bits"] == {"conv1": 8, "conv2": 4, "mix": 16, "fc1": 4} and spec["blocks"] == {"fc1": 128}
    calib = Data.of_arrays({"x": X})
    found = lrcompress.export(base / "compressed", quantize="plan", calib=calib, output=tmp_path / "e").data
    bits = {w["name"]: w["bits"] for w in found["weights"]}
    assert bits["conv1.weight"] == 8 and bits["mix.weight"] == 16 and "fc2.weight" not in bits
    assert bits["fc1.U"] == bits["fc1.V"] == 4 and bits["conv2.core"] == 4
    fp32 = lrcompress.export(base / "compressed", calib=calib, output=tmp_path / "f").data
    assert found["slots_id"] == fp32["slots_id"] and found["base_id"] != fp32["base_id"]
    assert found["bytes"]["base"] < 0.5 * fp32["bytes"]["base"]
    manifest = Manifest.load(tmp_path / "e")
    widths = {
        a.i for n in onnx.load(tmp_path / "e" / "model.onnx").graph.node for a in n.attribute if a.name == "block_size"
    }
    assert widths == {16, 128}  # of U, which has 16 columns, and of V
    assert manifest.precision == "plan" and "conv2" in manifest.raw["dense_at_run_time"]
    one, two = (Session(tmp_path / n).run({"x": X})["output"] for n in "ef")
    assert relative(two, one) < 0.2
    assert lrcompress.validate(tmp_path / "e").passed


def test_a_plan_that_gives_no_layer_fewer_bits_is_a_plan_with_bits(base, tmp_path):
    plan = json.loads((base / "plan.json").read_text())
    for layer in plan["layers"]:
        layer["bits"] = 32
        layer.pop("block", None)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    lrcompress.factorize(
        base / "model.pt",
        arch="tests.support.nets:small",
        inputs=SPEC,
        plan=tmp_path / "plan.json",
        output=tmp_path / "c",
    )
    sizes = [
        lrcompress.export(tmp_path / "c", quantize=q, output=tmp_path / q).data["bytes"]["base"]
        for q in ("plan", "none")
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_precision_for_all_layers(base, tmp_path, precision):
    calib = Data.of_arrays({"x": X})
    found = lrcompress.export(base / "plain", quantize=precision, calib=calib, output=tmp_path / "e").data
    assert found["precision"] == precision and found["weights"]
    assert lrcompress.validate(tmp_path / "e").passed
    fp32 = lrcompress.export(base / "plain", calib=calib, output=tmp_path / "f").data
    share = {"fp16": 0.6, "int4": 0.45}[precision]
    assert found["bytes"]["base"] < share * fp32["bytes"]["base"] and found["slots_id"] == fp32["slots_id"]


def test_wider_blocks_are_fewer_bytes_and_only_known_ones_are_taken(base, tmp_path):
    sizes = [
        lrcompress.export(base / "plain", quantize="int4", slots=("none",), block=b, output=tmp_path / str(b)).data["bytes"]["base"]
        for b in (16, 128)
    ]  # fmt: skip
    assert sizes[1] < sizes[0]
    with pytest.raises(CommandError, match="16, 32, 64, 128, 256"):
        lrcompress.export(base / "plain", quantize="int4", block=48, output=tmp_path / "e")


def test_a_plan_without_bits_and_bits_that_are_none_are_refused(base, tmp_path):
    with pytest.raises(CommandError, match="factorized by a plan with bits") as e:
        lrcompress.export(base / "plain", quantize="plan", output=tmp_path / "e")
    assert e.value.exit_code == 2
    with pytest.raises(CommandError, match="factorized by a plan with bits"):
        lrcompress.export(open_model(small(), inputs=SPEC), quantize="plan", output=tmp_path / "e")
    import shutil

    shutil.copytree(base / "compressed", tmp_path / "compressed")
    path = tmp_path / "compressed" / "lrcompress.json"
    spec = json.loads(path.read_text())
    spec["bits"]["mix"] = 5
    spec["source"]["path"] = str(base / "model.pt")
    path.write_text(json.dumps(spec))
    with pytest.raises(ModelError, match="bits of mix: expected 32, 16, 8, 4, got 5"):
        lrcompress.export(tmp_path / "compressed", quantize="plan", output=tmp_path / "e")
    spec["bits"]["mix"], spec["blocks"]["fc1"] = 16, 48
    path.write_text(json.dumps(spec))
    with pytest.raises(ModelError, match="blocks of fc1: expected 16, 32, 64, 128, 256, got 48"):
        lrcompress.export(tmp_path / "compressed", quantize="plan", output=tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_device_whose_runtime_is_too_old_is_refused(base, tmp_path):
    text = Path("devices/raspberry-pi-4.yaml").read_text()
    old = tmp_path / "old.yaml"
    old.write_text(text.replace("ort: {min: 1.22.0}", "ort: {min: 1.17.0, max: 1.20.1}"))
    with pytest.raises(ProfileError, match=r"1\.22\.0 or later, .*got ort\.min 1\.17\.0, ort\.max 1\.20\.1") as e:
        lrcompress.export(base / "plain", device=old, output=tmp_path / "e")
    assert e.value.exit_code == 3 and not (tmp_path / "e").exists()
    assert "no version the profile allows" in str(e.value)


def test_what_a_graph_needs_of_the_runtime():
    g = Graph()
    model = g.model("x", TensorProto.FLOAT, ["batch", 8], g.node("MatMul", ["x", g.weight("w", 8, 8)], "y"), 8)
    assert needs(model).version == "1.22.0"
    model.opset_import[0].version = 27
    assert needs(model).why == "opset 27"
    with pytest.raises(ProfileError, match="opset 27"):
        check_device(needs(model), load_profile("raspberry-pi-4"))
    check_device(Need("1.22.0", "x"), load_profile("raspberry-pi-4"))

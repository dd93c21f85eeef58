"""Graph transformations, one by one: how often each fires, how many nodes are left, the same numbers, why it refuses."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrcompress.export.graph import strip
from lrcompress.export.rewrites import ORDER, apply, simplify
from tests.support.graphs import cnn, mlp, run

RNG = np.random.default_rng(0)


def graph(nodes, tensors, x=("n", 4, 8, 8), y=("a", "b", "c", "d"), opset=20, dtype=TensorProto.FLOAT, more=()):
    inputs = [helper.make_tensor_value_info("x", dtype, x), *more]
    g = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )  # fmt: skip
    return helper.make_model(g, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def answer(model, **feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def rewritten(name, model, keep=()):
    inside = ir.from_proto(model)
    found = apply(name, inside, keep)
    out = ir.to_proto(inside)
    onnx.checker.check_model(out)
    return out, found


N = helper.make_node
W = RNG.standard_normal((6, 4, 3, 3)).astype(np.float32)
X = RNG.standard_normal((2, 4, 8, 8)).astype(np.float32)
B = RNG.standard_normal(6).astype(np.float32)


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1)])
@pytest.mark.parametrize("order", [("c", "b"), ("b", "c")])
def test_biases_go_into_their_convolution(shape, order):
    model = graph([N("Conv", ["x", "w"], ["c"]), N("Add", list(order), ["y"])], {"w": W, "b": B.reshape(shape)})
    out, found = rewritten("biases", model)
    assert (found.fired, [n.op_type for n in out.graph.node]) == (1, ["Conv"])
    assert list(out.graph.node[0].input) == ["x", "w", "b"]
    np.testing.assert_allclose(answer(out, x=X), answer(model, x=X), rtol=1e-5, atol=1e-5)


def test_the_bias_of_a_sum_goes_to_the_convolution_in_it():
    nodes = [
        N("Conv", ["x", "w"], ["c"]), N("Conv", ["x", "v"], ["d"]), N("Add", ["c", "d"], ["s"]), N("Add", ["s", "b"], ["y"])
    ]  # fmt: skip
    model = graph(nodes, {"w": W, "v": 2 * W, "b": B.reshape(6, 1, 1)})
    out, found = rewritten("biases", model)
    assert (found.fired, sorted(n.op_type for n in out.graph.node)) == (1, ["Add", "Conv", "Conv"])
    np.testing.assert_allclose(answer(out, x=X), answer(model, x=X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("b", "extra", "reason"),
    [
        (B.reshape(6, 1, 1), [N("Identity", ["b"], ["z"])], "the bias has another reader"),
        (RNG.standard_normal((6, 6, 6)).astype(np.float32), [], "not one number per output channel"),
        (RNG.standard_normal((1, 1, 6)).astype(np.float32), [], "not one number per output channel"),
    ],
)
def test_biases_refuse(b, extra, reason):
    nodes = [N("Conv", ["x", "w"], ["c"]), N("Add", ["c", "b"], ["y"]), *extra]
    model = graph(nodes, {"w": W, "b": b})
    out, found = rewritten("biases", model)
    assert found.fired == 0 and [r.reason for r in found.refused] == [reason]
    assert sum(n.op_type == "Add" for n in out.graph.node) == 1


def test_biases_leave_alone_what_someone_else_reads_before_the_sum():
    nodes = [N("Conv", ["x", "w"], ["c"]), N("Add", ["c", "b"], ["s"]), N("Mul", ["s", "c"], ["y"])]
    model = graph(nodes, {"w": W, "b": B.reshape(6, 1, 1)})
    out, found = rewritten("biases", model)
    assert found.fired == 0 and len(out.graph.node) == 3


def test_biases_refuse_a_slot():
    slot = helper.make_tensor_value_info("w", TensorProto.FLOAT, ["r", 4, 3, 3])
    nodes = [N("Conv", ["x", "w"], ["c"]), N("Add", ["c", "b"], ["y"])]
    model = graph(nodes, {"w": W, "b": B.reshape(6, 1, 1)}, more=[slot])
    _, found = rewritten("biases", model, keep=("w",))
    assert found.fired == 0 and [r.reason for r in found.refused] == ["its weight is no constant"]


@pytest.mark.parametrize(("slots", "fired"), [((), 1), (("v",), 0)])
def test_biases_go_into_a_convolution_whose_weight_is_made_at_load(slots, fired):
    nodes = [N("Concat", ["w", "v"], ["both"], axis=0), N("Conv", ["x", "both"], ["c"]), N("Add", ["c", "b"], ["y"])]
    model = graph(nodes, {"w": W[:4], "v": W[4:], "b": B.reshape(6, 1, 1)})
    out, found = rewritten("biases", model, slots)
    assert found.fired == fired and ("b" in out.graph.node[1].input) == bool(fired)
    np.testing.assert_allclose(answer(out, x=X), answer(model, x=X), rtol=1e-5, atol=1e-5)


def test_biases_of_one_number_stay_where_the_channels_are_unknown():
    nodes = [N("Concat", ["w", "v"], ["both"], axis=0), N("Conv", ["x", "both"], ["c"]), N("Add", ["c", "b"], ["y"])]
    model = graph(nodes, {"w": W[:4], "v": W[4:], "b": np.ones((1, 1, 1), np.float32)})
    out, found = rewritten("biases", model)
    assert found.fired == 0 and len(out.graph.node) == 3


def test_folded_leaves_an_identity_to_the_runtime():
    """Two ranges instead of r² numbers."""
    nodes = [
        N("Equal", ["column", "row"], ["same"]), N("Cast", ["same"], ["one"], to=TensorProto.FLOAT), N("MatMul", ["x", "one"], ["y"])
    ]  # fmt: skip
    ids = np.arange(8, dtype=np.uint8)
    model = graph(nodes, {"column": ids[:, None], "row": ids}, x=("a", "b", "c", 8))
    out, _ = rewritten("folded", model)
    assert [n.op_type for n in out.graph.node] == ["Equal", "Cast", "MatMul"]
    np.testing.assert_array_equal(answer(out, x=X), X)


def test_as_read_turns_a_weight_that_is_only_read_turned():
    w = RNG.standard_normal((6, 8)).astype(np.float32)
    nodes = [N("Transpose", ["w"], ["t"], perm=[1, 0]), N("MatMul", ["x", "t"], ["y"])]
    model = graph(nodes, {"w": w})
    out, found = rewritten("as_read", model)
    assert (found.fired, len(out.graph.node)) == (1, 1)
    [t] = out.graph.initializer
    assert t.name == "w" and np.array_equal(numpy_helper.to_array(t), w.T)
    assert np.array_equal(answer(out, x=X), answer(model, x=X))


def test_as_read_follows_a_chain_and_many_equal_readers():
    w = RNG.standard_normal((8, 6)).astype(np.float32)
    shape = np.array([2, 4, 6], np.int64)
    nodes = [
        N("Reshape", ["w", "s"], ["a"]), N("Transpose", ["a"], ["b"], perm=[0, 2, 1]), N("Reshape", ["b", "u"], ["t"]),
        N("MatMul", ["x", "t"], ["p"]), N("Reshape", ["w", "s"], ["a2"]), N("Transpose", ["a2"], ["b2"], perm=[0, 2, 1]),
        N("Reshape", ["b2", "u"], ["t2"]), N("MatMul", ["x", "t2"], ["q"]), N("Add", ["p", "q"], ["y"]),
    ]  # fmt: skip
    model = graph(nodes, {"w": w, "s": shape, "u": np.array([8, 6], np.int64)})
    out, found = rewritten("as_read", model)
    assert found.fired == 6 and sorted(n.op_type for n in out.graph.node) == ["Add", "MatMul", "MatMul"]
    assert np.array_equal(answer(out, x=X), answer(model, x=X))


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([N("Transpose", ["w"], ["t"]), N("MatMul", ["x", "t"], ["p"]), N("MatMul", ["p", "w"], ["y"])], "read as it stands, too"),
        ([N("Transpose", ["w"], ["t"]), N("Reshape", ["w", "s"], ["u"]), N("MatMul", ["x", "t"], ["p"]), N("MatMul", ["p", "u"], ["y"])], "read in two ways"),
    ],
)  # fmt: skip
def test_as_read_refuses(nodes, reason):
    model = graph(nodes, {"w": RNG.standard_normal((8, 8)).astype(np.float32), "s": np.array([8, 8], np.int64)})
    out, found = rewritten("as_read", model)
    assert found.fired == 0 and [r.reason for r in found.refused] == [reason]
    assert np.array_equal(answer(out, x=X), answer(model, x=X))


def test_as_read_passes_indices_on_but_not_numbers():
    order = np.array([2, 0, 1], np.int32)
    nodes = [N("Cast", ["o"], ["l"], to=TensorProto.INT64), N("Gather", ["x", "l"], ["y"], axis=1)]
    model = graph(nodes, {"o": order})
    out, found = rewritten("as_read", model)
    assert (found.fired, len(out.graph.node)) == (1, 1) and np.array_equal(answer(out, x=X), X[:, order])
    nodes = [N("Cast", ["o"], ["f"], to=TensorProto.FLOAT), N("Add", ["x", "f"], ["y"])]
    _, found = rewritten("as_read", graph(nodes, {"o": np.array([1], np.int32)}))
    assert found.fired == 0


def test_folded_computes_shapes_and_shares_equal_ones():
    number = lambda name, v: N("Constant", [], [name], value=numpy_helper.from_array(np.array(v, np.int64)))  # noqa: E731
    nodes = [number("a", [2]), number("b", [-1]), N("Concat", ["a", "b"], ["s"], axis=0), N("Reshape", ["x", "s"], ["r"]),
             number("c", [2]), number("d", [-1]), N("Concat", ["c", "d"], ["t"], axis=0), N("Reshape", ["r", "t"], ["y"])]  # fmt: skip
    model = graph(nodes, {}, y=("a", "b"))
    out, found = rewritten("folded", model)
    assert found.fired == 6 and [n.op_type for n in out.graph.node] == ["Reshape", "Reshape"]
    assert len(out.graph.initializer) == 1 and np.array_equal(answer(out, x=X), answer(model, x=X))


def test_folded_never_multiplies_tensors_of_the_network():
    u, v = RNG.standard_normal((8, 2)).astype(np.float32), RNG.standard_normal((2, 8)).astype(np.float32)
    model = graph([N("MatMul", ["u", "v"], ["w"]), N("MatMul", ["x", "w"], ["y"])], {"u": u, "v": v})
    out, found = rewritten("folded", model)
    assert found.fired == 0 and {t.name for t in out.graph.initializer} == {"u", "v"}
    assert [r.reason for r in found.refused] == ["a tensor of the network stays apart"]


def test_no_ops_go():
    top = np.iinfo(np.int64).max
    i = lambda v: np.array([v], np.int64)  # noqa: E731
    nodes = [N("Slice", ["x", "zero", "top", "one", "one"], ["a"]), N("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
             N("CastLike", ["b", "x"], ["c"]), N("Identity", ["c"], ["d"]), N("Relu", ["d"], ["y"])]  # fmt: skip
    model = graph(nodes, {"zero": i(0), "one": i(1), "top": i(top)})
    model = onnx.shape_inference.infer_shapes(model)
    out, found = rewritten("no_ops", model)
    assert (found.fired, [n.op_type for n in out.graph.node]) == (4, ["Relu"])
    assert np.array_equal(answer(out, x=X), answer(model, x=X))


def test_no_ops_keep_what_does_something():
    i = lambda v: np.array([v], np.int64)  # noqa: E731
    nodes = [N("Slice", ["x", "one", "top", "one", "one"], ["a"]), N("Cast", ["a"], ["b"], to=TensorProto.INT32), N("Cast", ["b"], ["y"], to=TensorProto.FLOAT)]  # fmt: skip
    model = graph(nodes, {"one": i(1), "top": i(np.iinfo(np.int64).max)})
    out, found = rewritten("no_ops", model)
    assert found.fired == 0 and len(out.graph.node) == 3


def test_defaults_go_and_others_stay():
    said = {
        "dilations": [1, 1],
        "group": 1,
        "strides": [1, 1],
        "pads": [0, 0, 0, 0],
        "auto_pad": "NOTSET",
        "kernel_shape": [3, 3],
    }
    nodes = [N("Conv", ["x", "w"], ["c"], name="node_conv", **said), N("Conv", ["c", "v"], ["y"], strides=[2, 1], pads=[0, 1, 0, 1], kernel_shape=[3, 3])]  # fmt: skip
    model = graph(nodes, {"w": W, "v": RNG.standard_normal((2, 6, 3, 3)).astype(np.float32)})
    out, found = rewritten("defaults", model)
    assert found.fired == 7 and not out.graph.node[0].attribute
    assert sorted(a.name for a in out.graph.node[1].attribute) == ["pads", "strides"]
    assert out.ByteSize() < model.ByteSize() and np.array_equal(answer(out, x=X), answer(model, x=X))


def test_defaults_keep_the_kernel_of_a_weight_that_is_no_constant():
    slot = helper.make_tensor_value_info("w", TensorProto.FLOAT, ["r", 4, 3, 3])
    model = graph([N("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3])], {"w": W}, more=[slot])
    out, _ = rewritten("defaults", model, keep=("w",))
    assert [a.name for a in out.graph.node[0].attribute] == ["kernel_shape"]


@pytest.mark.parametrize("made", [lambda: cnn(True), lambda: mlp("transposed"), lambda: mlp("gemm")])
def test_a_whole_graph_keeps_its_slots_and_its_numbers(made):
    model, slots = made()
    before = model.SerializeToString(deterministic=True)
    out, done = simplify(model, slots)
    assert model.SerializeToString(deterministic=True) == before, "the source is not changed"
    assert set(done) == set(ORDER)
    assert [i.SerializeToString() for i in out.graph.input] == [i.SerializeToString() for i in model.graph.input]
    x = RNG.standard_normal((5, *(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]))).astype(
        "f"
    )
    feeds = {}
    for i in model.graph.input[1:]:
        shape = [3 if d.dim_param else d.dim_value for d in i.type.tensor_type.shape.dim]
        feeds[i.name] = (0.1 * RNG.standard_normal(shape)).astype(np.float32)
    for given in ({}, feeds):
        np.testing.assert_allclose(run(out, x=x, **given), run(model, x=x, **given), rtol=1e-5, atol=1e-5)
    strip(out)
    again, more = simplify(out, slots)
    strip(again)
    assert all(f.fired == 0 for f in more.values()), "nothing is left to do"
    assert again.SerializeToString(deterministic=True) == out.SerializeToString(deterministic=True)


def normalised(first="Conv", slot=False):
    v = {n: (0.5 + RNG.random(6)).astype(np.float32) for n in ("gamma", "beta", "mean", "var")}
    nodes = (
        [N("Conv", ["x", "w"], ["c"])] if first == "Conv" else [N("Conv", ["x", "w"], ["a"]), N(first, ["a"], ["c"])]
    )
    if slot:
        nodes = [N("Conv", ["x", "w"], ["a"]), N("Conv", ["x", "s"], ["d"]), N("Add", ["a", "d"], ["c"])]
    nodes.append(N("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y"], epsilon=1e-3))
    return nodes, {"w": W, **v, **({"s": 0 * W} if slot else {})}


def test_norms_go_into_their_convolution_and_keep_its_name():
    model = graph(*normalised())
    out, found = rewritten("norms", model)
    assert (found.fired, [n.op_type for n in out.graph.node]) == (1, ["Conv"])
    assert out.graph.node[0].input[1] == "w"
    np.testing.assert_allclose(answer(out, x=X), answer(model, x=X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "slot", "reason"),
    [("Relu", False, "Relu stands before it, no convolution"), ("Conv", True, "Add stands before it, no convolution")],
)
def test_norms_refuse(first, slot, reason):
    more = [helper.make_tensor_value_info("s", TensorProto.FLOAT, ["r", 4, 3, 3])] if slot else []
    model = graph(*normalised(first, slot), more=more)
    out, found = rewritten("norms", model, keep=("s",))
    assert found.fired == 0 and [r.reason for r in found.refused] == [reason]
    assert sum(n.op_type == "BatchNormalization" for n in out.graph.node) == 1


def test_names_are_short_and_the_outside_keeps_its_own():
    nodes = [N("Relu", ["x"], ["layer1.0.conv1.weight_QuantizeLinear"]), N("Neg", ["layer1.0.conv1.weight_QuantizeLinear"], ["v0"]), N("Abs", ["v0"], ["y"])]  # fmt: skip
    model = graph(nodes, {})
    out, found = rewritten("names", model)
    assert found.fired == 2 and [list(n.output) for n in out.graph.node] == [["v0"], ["v1"], ["y"]]
    assert np.array_equal(answer(out, x=X), answer(model, x=X))


def test_zero_points_that_are_zero_go():
    codes, scale = (
        RNG.integers(-127, 127, (6, 4, 3, 3)).astype(np.int8),
        (0.01 + RNG.random(6) / 100).astype(np.float32),
    )
    for zero, fired in ((np.zeros(6, np.int8), 1), (np.arange(6, dtype=np.int8), 0)):
        nodes = [N("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0), N("Conv", ["x", "w"], ["y"])]
        model = graph(nodes, {"q": codes, "s": scale, "z": zero})
        out, found = rewritten("zero_points", model)
        assert found.fired == fired and ("z" in {t.name for t in out.graph.initializer}) == (not fired)
        assert np.array_equal(answer(out, x=X), answer(model, x=X))
    nodes = [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("DequantizeLinear", ["q", "s", "z"], ["y"])]
    model = graph(nodes, {"s": np.float32(0.1), "z": np.uint8(0)})
    _, found = rewritten("zero_points", model)
    assert found.fired == 0, "an activation's zero is left for the runtime's fusions"

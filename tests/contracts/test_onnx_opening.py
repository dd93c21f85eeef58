"""What is wrong with an ONNX file is said when it is opened, with where and why; nothing else ever comes out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lrcompress.errors import LrcompressError, ModelError
from lrcompress.graphs import find_layers, is_onnx, open_graph
from lrcompress.graphs.opening import needed_runtime
from tests.support.onnx_files import conv_net, mlp, model, node, save, w


def external(path, tmp_path, location="w.data", data=None, offset="0", length=None):
    made = mlp()
    tensor = made.graph.initializer[0]
    raw = tensor.raw_data
    (tmp_path / "w.data").write_bytes(raw if data is None else data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length or str(len(raw)))):
        tensor.external_data.add(key=key, value=value)
    return save(made, path)


def test_external_data_are_read_from_beside_the_graph(tmp_path):
    graph = open_graph(external(tmp_path / "m.onnx", tmp_path))
    np.testing.assert_array_equal(graph.array("fc0.weight"), w(32, 48))
    assert graph.digest != open_graph(save(mlp(), tmp_path / "inline.onnx")).digest


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"location": "../w.data"}, "inside the graph's folder, got ../w.data"),
        ({"location": "/etc/passwd"}, "inside the graph's folder, got /etc/passwd"),
        ({"location": "link.data"}, "inside the graph's folder, got link.data"),
        ({"location": ""}, "inside the graph's folder"),
        ({"location": "nowhere.data"}, "no file nowhere.data; fetch both files"),
        ({"data": b"short"}, r"6144 bytes in w.data, got 6144 at 0 of a file of 5"),
        ({"offset": "4096"}, "got 6144 at 4096 of a file of 6144"),
        ({"offset": "-4"}, "got 6144 at -4"),
        ({"length": "12"}, "6144 bytes in w.data, got 12 at 0"),
        ({"offset": "x"}, "offset and length as numbers"),
    ],
)
def test_external_data_elsewhere_or_cut_are_refused(tmp_path, options, expected):
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "w.data").write_bytes(b"\0" * 6144)
    (folder / "link.data").symlink_to(tmp_path / "w.data")
    path = external(folder / "m.onnx", folder, **options)
    with pytest.raises(ModelError, match=expected) as e:
        open_graph(path)
    assert e.value.where == f"{path}: fc0.weight"


def _custom(made):
    made.graph.node.insert(0, helper.make_node("Swirl", ["x"], ["s"], domain="com.acme", name="swirl"))


def _twice_stored(made):
    made.graph.initializer.append(numpy_helper.from_array(w(2, 2), "fc0.weight"))


def _twice_made(made):
    made.graph.node.append(node("Relu", ["x"], ["h0"]))


def _empty_input(made):
    made.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 0


def _strings(made):
    made.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING


def _new_opset(made):
    made.opset_import[0].version = 99


def _old_opset(made):
    made.opset_import[0].version = 6


def _no_opset(made):
    del made.opset_import[:]


def _no_nodes(made):
    del made.graph.node[:]


def _negative(made):
    made.graph.initializer[0].dims[0] = -32


def _sparse(made):
    values, at = numpy_helper.from_array(w(2), "sp"), numpy_helper.from_array(np.array([0, 3]), "at")
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [8]))


BAD = {
    _custom: "node swirl: expected operators that ONNX Runtime brings, got the custom operator com.acme.Swirl",
    _twice_stored: "fc0.weight: expected names that stand once, got two tensors of that name",
    _twice_made: "h0: expected names that stand once, got two sources of that value",
    _empty_input: "input x: expected sizes of at least 1, got axis 1 of size 0",
    _strings: "input x: expected tensors of numbers",
    _new_opset: "expected operators of opset [0-9]+ or older, got opset 99",
    _old_opset: "expected operators of opset 7 or newer, got opset 6",
    _no_opset: "opset 7 or newer, got none",
    _no_nodes: "one without nodes",
    _negative: "fc0.weight: expected sizes of at least 0",
    _sparse: "sp: expected dense tensors",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__.strip("_"))
def test_a_graph_that_cannot_be_used_says_where_and_why(spoil, tmp_path):
    made = mlp()
    spoil(made)
    path = save(made, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=BAD[spoil]) as e:
        open_graph(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value) and e.value.remedy


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_an_error_of_the_model_or_a_graph(data, tmp_path):
    whole = bytearray(conv_net().SerializeToString())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for _ in range(data.draw(st.integers(0, 4)) if whole else 0):
        whole[data.draw(st.integers(0, min(len(whole) - 1, 2000)))] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.onnx"
    path.write_bytes(whole)
    try:
        find_layers(open_graph(path))
    except LrcompressError as e:
        assert "\n" not in str(e)


def test_files_are_told_by_content(tmp_path):
    assert is_onnx(save(mlp(), tmp_path / "weights.bin"))
    for content in (b"", b"\x08", b"PK\x03\x04", b'{"a": 1}', b"\x08\x00\x12\x00"):
        (tmp_path / "x.onnx").write_bytes(content)
        assert not is_onnx(tmp_path / "x.onnx")
    assert not is_onnx(tmp_path / "nowhere") and not is_onnx(tmp_path)


def test_the_oldest_runtime_that_takes_a_graph():
    """Measured: what 1.22.1, 1.23.2 and 1.24.1 load."""
    versions = {(22, 10): "1.22.0", (23, 10): "1.23.0", (20, 11): "1.23.0", (24, 10): "1.24.0", (25, 13): "1.24.0"}
    for (opset, ir), version in versions.items():
        assert needed_runtime(model([node("Relu", ["x"], ["y"])], {}, opset=opset, ir=ir)) == version


def layers_of(tmp_path, nodes, constants, **options):
    made = model(nodes, constants, **options)
    return {n.name: n for n in find_layers(open_graph(save(made, tmp_path / "m.onnx")))}


def test_what_must_stay_dense_says_why(tmp_path):
    loop_body = helper.make_graph(
        [node("MatMul", ["v", "loop.weight"], ["v2"]), node("Identity", ["keep"], ["again"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("keep", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("again", TensorProto.BOOL, []), helper.make_tensor_value_info("v2", TensorProto.FLOAT, None)],
    )  # fmt: skip
    nodes = [
        node("Gemm", ["x", "scaled.weight"], ["a"], alpha=0.5), node("MatMul", ["x", "read.weight"], ["b"]),
        node("ReduceSum", ["read.weight"], ["c"]), node("MatMul", ["x", "nan.weight"], ["d"]), node("MatMul", ["x", "empty.weight"], ["e"]),
        node("Gather", ["tied.weight", "ids"], ["f"]), node("MatMul", ["x", "tied.weight"], ["g"]),
        node("MatMul", ["left.weight", "x"], ["h"]), node("Loop", ["ten", "", "x"], ["l"], body=loop_body),
        node("DequantizeLinear", ["codes", "scale"], ["q"]), node("MatMul", ["x", "q"], ["r"]),
        node("LSTM", ["x3", "lstm.w", "lstm.r"], ["s"], hidden_size=16), node("Cast", ["x"], ["ids"], to=TensorProto.INT64),
        node("Reshape", ["x", "three"], ["x3"]), node("Conv", ["x4", "depth.weight"], ["t"], group=8),
        node("Conv", ["x4", "grouped.weight"], ["u"], group=2), node("Reshape", ["x", "four"], ["x4"]), node("Relu", ["x"], ["y"]),
    ]  # fmt: skip
    order = [0, 1, 2, 3, 4, 12, 5, 6, 7, 8, 9, 10, 13, 11, 16, 14, 15, 17]
    constants = {
        "scaled.weight": w(8, 8), "read.weight": w(8, 8), "nan.weight": w(8, 8) * np.float32(np.nan), "empty.weight": w(8, 0, scale=1.0),
        "tied.weight": w(8, 8), "left.weight": w(32, 32), "ten": np.array(10), "loop.weight": w(8, 8),
        "codes": np.ones((8, 64), np.int8), "scale": np.float32(0.1), "lstm.w": w(1, 64, 8), "lstm.r": w(1, 64, 16),
        "three": np.array([-1, 1, 8]), "four": np.array([-1, 8, 1, 1]), "depth.weight": w(8, 1, 1, 1), "grouped.weight": w(8, 4, 1, 1),
    }  # fmt: skip
    reasons = {name: layer.reason for name, layer in layers_of(tmp_path, [nodes[i] for i in order], constants).items()}
    expected = {
        "scaled": "scaled", "read": "also read directly", "nan": "not finite", "empty": "no elements", "tied": "tied: one tensor",
        "left": "no matrix on the right", "loop": "inside Loop", "codes": "quantized already", "lstm.w": "recurrent",
        "lstm.r": "recurrent", "depth": "depthwise", "grouped": "2 groups",
    }  # fmt: skip
    for name, part in expected.items():
        assert part in str(reasons[name]), (name, reasons.get(name))


def test_a_weight_that_may_be_fed_stays_but_not_in_old_files(tmp_path):
    for ir, reason in ((10, "may be fed"), (3, None)):
        made = model([node("MatMul", ["x", "fc.weight"], ["y"])], {"fc.weight": w(8, 8)}, ir=ir, opset=9)
        made.graph.input.append(helper.make_tensor_value_info("fc.weight", TensorProto.FLOAT, [8, 8]))
        graph = open_graph(save(made, tmp_path / "m.onnx"))
        (layer,) = find_layers(graph)
        assert [p.name for p in graph.inputs] == ["x"] and (reason is None) == (layer.reason is None)


def test_invented_names_give_way_to_those_of_nodes(tmp_path):
    nodes = [node("MatMul", ["x", "onnx::MatMul_403"], ["y"], name="/encoder/layer.0/query/MatMul")]
    assert list(layers_of(tmp_path, nodes, {"onnx::MatMul_403": w(8, 8)})) == ["encoder.layer.0.query"]
    nodes = [node("MatMul", ["x", "val_4"], ["p"], name="node_MatMul_5"), node("Add", ["p", "q.bias"], ["y"])]
    assert list(layers_of(tmp_path, nodes, {"val_4": w(8, 8), "q.bias": w(8)})) == ["q"], "or to that of the bias"


def test_layers_come_in_the_order_they_run(tmp_path):
    from tests.support.onnx_files import branching

    graph = open_graph(save(branching(), tmp_path / "m.onnx"))
    assert [n.name for n in find_layers(graph)] == ["up", "down", "last"] or [n.name for n in find_layers(graph)] == [
        "down",
        "up",
        "last",
    ]


def test_functions_are_inlined(tmp_path):
    body = helper.make_function(
        "local", "Linear", ["a", "b"], ["c"], [node("MatMul", ["a", "b"], ["c"])], [helper.make_opsetid("", 20)]
    )
    made = model([helper.make_node("Linear", ["x", "fc.weight"], ["y"], domain="local")], {"fc.weight": w(8, 8)})
    made.functions.append(body)
    made.opset_import.append(helper.make_opsetid("local", 1))
    assert [n.name for n in find_layers(open_graph(save(made, tmp_path / "m.onnx")))] == ["fc"]
